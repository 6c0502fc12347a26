/* Answers products, look-ups and attentions over a pipe, for a processor that only an emulator has here: requests on stdin, as
 * conftest.py writes them, a status and the output on stdout, until stdin ends.
 *
 * A request: 10 int64 (see `request`), a name of 16 bytes, then packed, scales, zeros, X or indices, bias, ranges; of an attention
 * (gather is 2, with an int8 cache 3) in the same fields seq, dim, heads, kv_heads, batch, total, rotary, room, then what `attend` takes. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "attention.h"

enum { GUARD = 64 };

typedef struct request {
  int64_t gather, n, k, bits, group_size, rows, activations, zeros, bias, ranges;
  char name[16];
} request;

static void *take(size_t bytes) {
  void *memory = malloc(bytes ? bytes : 1);
  if (!memory || fread(memory, 1, bytes, stdin) != bytes) exit(2);
  return memory;
}

static int64_t multiply(const request *r, jpq_product *p, const int64_t *ranges) {
  if (!r->ranges) return jpq_matmul(p);
  jpq_status status = jpq_prepare(p);
  for (int64_t i = 0; i < r->ranges && !status; i++) status = jpq_matmul_rows(p, ranges[2 * i], ranges[2 * i + 1]);
  jpq_release(p);
  return status;
}

static jpq_int8_cache take_codes(size_t heads, size_t dim) {
  jpq_int8_cache out;
  out.keys = take(heads * dim), out.values = take(heads * dim);
  out.key_scales = take(4 * heads), out.value_scales = take(4 * heads);
  return out;
}

static void give_codes(const jpq_int8_cache *c, size_t heads, size_t dim, FILE *to) {
  if (to) {
    fwrite(c->keys, 1, heads * dim, to), fwrite(c->values, 1, heads * dim, to);
    fwrite(c->key_scales, 4, heads, to), fwrite(c->value_scales, 4, heads, to);
  }
  free(c->keys), free(c->values), free(c->key_scales), free(c->value_scales);
}

static void attend(const request *r) {
  jpq_attention a = {.seq = r->n, .dim = r->k, .heads = r->bits, .kv_heads = r->group_size, .batch = r->rows,
                     .total = r->activations, .implementation = r->name};
  const int coded = r->gather == 3;
  size_t q = (size_t)(a.batch * a.seq * a.heads * a.dim), k = (size_t)(a.batch * a.seq * a.kv_heads * a.dim);
  size_t table = (size_t)(a.batch * a.seq * a.dim / 2), cache = (size_t)(r->bias * a.batch * a.kv_heads * a.dim);
  size_t dim = (size_t)a.dim;
  float *scale = take(sizeof *scale), *y = malloc(sizeof *y * (q + GUARD));
  a.scale = *scale, a.y = y;
  a.q = take(4 * q);
  if (!coded) a.k = take(4 * k), a.v = take(4 * k);
  a.cos = r->zeros ? take(4 * table) : NULL, a.sin = r->zeros ? take(4 * table) : NULL;
  a.mask = take((size_t)(a.batch * a.seq * a.total));
  if (coded)
    a.fresh = take_codes(k / dim, dim), a.codes = take_codes(cache / dim, dim);
  else
    a.keys = take(4 * cache), a.values = take(4 * cache);
  for (size_t i = 0; i < q + GUARD; i++) y[i] = NAN;
  int64_t status = jpq_attention_begin(&a);
  for (int64_t i = 0; i < a.tasks && !status; i++) status = jpq_attention_task(&a, i);
  if (!status) jpq_attention_finish(&a);
  jpq_attention_end(&a);
  fwrite(&status, sizeof status, 1, stdout);
  fwrite(y, sizeof *y, q + GUARD, stdout);
  if (coded)
    give_codes(&a.fresh, 0, 0, NULL), give_codes(&a.codes, cache / dim, dim, stdout);
  else
    fwrite(a.keys, 4, cache, stdout), fwrite(a.values, 4, cache, stdout);
  fflush(stdout);
  free(scale), free(y), free((void *)a.q), free((void *)a.k), free((void *)a.v), free((void *)a.cos), free((void *)a.sin);
  free((void *)a.mask), free(a.keys), free(a.values);
}

int main(void) {
  request r;
  while (fread(&r, sizeof r, 1, stdin) == 1) {
    if (r.gather >= 2) {
      attend(&r);
      continue;
    }
    int64_t groups = r.k / r.group_size, count = r.rows * (r.gather ? r.k : r.n) + GUARD;
    jpq_weight w = {.n = r.n, .k = r.k, .bits = (int32_t)r.bits, .group_size = (int32_t)r.group_size};
    w.packed = take((size_t)(r.n * jpq_bytes(r.k, w.bits)));
    w.scales = take((size_t)(r.n * groups * 2));
    w.zeros = r.zeros ? take((size_t)(r.n * jpq_bytes(groups, w.bits))) : NULL;
    void *x = take((size_t)(r.gather ? 8 * r.rows : 4 * r.rows * r.k));
    float *bias = r.bias ? take((size_t)(4 * r.n)) : NULL, *y = malloc(sizeof *y * (size_t)count);
    int64_t *ranges = take((size_t)(16 * r.ranges)), status;
    for (int64_t i = 0; i < count; i++) y[i] = NAN;
    if (r.gather) {
      status = jpq_gather(&w, x, r.rows, y, r.name);
    } else {
      jpq_product p = {.weight = &w, .x = x, .bias = bias, .y = y, .m = r.rows, .implementation = r.name};
      p.activations = (jpq_activations)r.activations;
      status = multiply(&r, &p, ranges);
    }
    fwrite(&status, sizeof status, 1, stdout);
    fwrite(y, sizeof *y, (size_t)count, stdout);
    fflush(stdout);
    free((void *)w.packed), free((void *)w.scales), free((void *)w.zeros);
    free(x), free(bias), free(y), free(ranges);
  }
  return 0;
}
