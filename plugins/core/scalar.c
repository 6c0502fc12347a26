/* The plain implementation: every width, every group size, every processor. */
#include <stdlib.h>

#include "attention_task.h"
#include "rowwise.inc"

static int available(void) { return 1; }

static int takes(const jpq_weight *w) {
  (void)w;
  return 1;
}

#define UNPACK(B)                                                                              \
  static void unpack_##B(const uint8_t *row, int64_t begin, int64_t end, float *out) {         \
    int64_t j = begin;                                                                         \
    for (; j < end && j % 8; j++) *out++ = jpq_code(row, B, j);                                \
    for (; j + 8 <= end; j += 8, out += 8) {                                                   \
      uint8_t codes[8];                                                                        \
      jpq_unpack8(jpq_at(row, B, j), B, codes);                                                  \
      for (int i = 0; i < 8; i++) out[i] = codes[i];                                           \
    }                                                                                          \
    for (; j < end; j++) *out++ = jpq_code(row, B, j);                                         \
  }
JPQ_FOR_BINARY(UNPACK)
JPQ_FOR_NORMAL(UNPACK)

/* Five codes a byte: times three, what leaves the byte is the next code. */
static void unpack_16(const uint8_t *row, int64_t begin, int64_t end, float *out) {
  for (int64_t j = begin; j < end;) {
    unsigned rest = row[j / 5];
    int64_t next = (j / 5 + 1) * 5;
    for (int64_t i = j / 5 * 5; i < j; i++) rest = rest * 3 & 255;
    for (; j < end && j < next; j++, rest &= 255) *out++ = (float)((rest *= 3) >> 8);
  }
}

static void unpack(const jpq_weight *w, int64_t row, int64_t begin, int64_t end, float *out) {
  const uint8_t *p = w->packed + row * jpq_bytes(w->k, w->bits);
  switch (w->bits) {
#define CASE(B) \
  case B: unpack_##B(p, begin, end, out); return;
    JPQ_FOR_BITS(CASE)
  }
}

static void dequantize(const jpq_weight *w, int64_t row, int64_t begin, int64_t end, float *out) {
  int64_t groups = jpq_groups(w);
  const uint16_t *scales = w->scales + row * groups;
  const uint8_t *zeros = w->zeros ? w->zeros + row * jpq_bytes(groups, w->bits) : NULL;
  unpack(w, row, begin, end, out);
  for (int64_t j = begin; j < end;) {
    int64_t group = j / w->group_size, stop = (group + 1) * w->group_size;
    float scale = jpq_half(scales[group]), zero = zeros ? (float)jpq_code(zeros, w->bits, group) : jpq_centre(w->bits);
    for (; j < end && j < stop; j++) out[j - begin] = (out[j - begin] - zero) * scale;
  }
}

static jpq_status prepare(jpq_product *p) {
  const jpq_weight *w = p->weight;
  p->prepared = malloc(sizeof(float) * (size_t)(p->m * jpq_groups(w)));
  if (!p->prepared) return JPQ_NO_MEMORY;
  jpq_group_sums(p->x, p->m, w->k, w->group_size, p->prepared);
  return JPQ_OK;
}

static jpq_status matmul_rows(const jpq_product *p, int64_t first, int64_t last) {
  const jpq_weight *w = p->weight;
  int64_t k = w->k, groups = jpq_groups(w);
  const float *sums = p->prepared;
  float *codes = malloc(sizeof(float) * (size_t)(k + 2 * groups)), *scale = codes + k, *shift = scale + groups;
  if (!codes) return JPQ_NO_MEMORY;
  for (int64_t n = first; n < last; n++) {
    unpack(w, n, 0, k, codes);
    jpq_row_scales(w, n, scale, shift);
    for (int64_t m = 0; m < p->m; m++) {
      float total = p->bias ? p->bias[n] : 0;
      for (int64_t g = 0; g < groups; g++) {
        const float *x = p->x + m * k + g * w->group_size, *c = codes + g * w->group_size;
        float part = 0;
        for (int32_t j = 0; j < w->group_size; j++) part += x[j] * c[j];
        total += scale[g] * part - shift[g] * sums[m * groups + g];
      }
      p->y[m * w->n + n] = total;
    }
  }
  free(codes);
  return JPQ_OK;
}

/* Number j of a head of the cache that begins at `at`. */
JPQ_INLINE float cached(const float *floats, const int8_t *codes, const float *scales, int64_t dim, int64_t at, int64_t j) {
  return codes ? (float)codes[at + j] * scales[at / dim] : floats[at + j];
}

/* The definition of attention: one row of Q, `row` of those that share key head `head`. `scores`: room for the keys. */
static void attend_row(const jpq_attention *a, const attention_task *task, int64_t head, int64_t r, float *scores, float *sums) {
  const int64_t stride = a->batch * a->kv_heads * a->dim, at = (task->batch * a->kv_heads + head) * a->dim;
  const int64_t row = task->tile * JPQ_TILE + r, count = task->last - task->first;
  const float *q = jpq_attention_row(a, a->turned ? a->turned : a->q, task->batch, head, row);
  const uint8_t *mask = jpq_attention_mask(a, task, r) + task->first;
  float most = -INFINITY, weight = 0;
  for (int64_t t = 0; t < count; t++) {
    const int64_t key = (task->first + t) * stride + at;
    scores[t] = mask[t] ? 0 : -INFINITY;
    for (int64_t j = 0; mask[t] && j < a->dim; j++)
      scores[t] += q[j] * a->scale * cached(a->keys, a->codes.keys, a->codes.key_scales, a->dim, key, j);
    most = scores[t] > most ? scores[t] : most;
  }
  for (int64_t j = 0; j < a->dim; j++) sums[j] = 0;
  for (int64_t t = 0; t < count; t++) {
    const int64_t value = (task->first + t) * stride + at;
    float p = mask[t] ? jpq_exp(scores[t] - most) : 0;
    weight += p;
    for (int64_t j = 0; mask[t] && j < a->dim; j++)
      sums[j] += p * cached(a->values, a->codes.values, a->codes.value_scales, a->dim, value, j);
  }
  float *part = jpq_attention_part(a, task, head, r);
  float *y = part ? part : jpq_attention_row(a, a->y, task->batch, head, row), factor = part ? 1 : 1 / weight;
  for (int64_t j = 0; j < a->dim; j++) y[j] = weight == 0 ? 0 : sums[j] * factor;
  if (part) part[a->dim] = most, part[a->dim + 1] = weight;
}

static jpq_status attend(const jpq_attention *a, const attention_task *task) {
  const int64_t count = task->last - task->first;
  float *scores = malloc(sizeof(float) * (size_t)(count + a->dim));
  if (!scores) return JPQ_NO_MEMORY;
  for (int64_t h = 0; h < task->heads; h++)
    for (int64_t r = 0; r < task->rows; r++) attend_row(a, task, task->head + h, r, scores, scores + count);
  free(scores);
  return JPQ_OK;
}

const jpq_implementation jpq_scalar = {"scalar", available, takes, prepare, NULL, matmul_rows, dequantize, attend, 1, add_norm, silu_times, gelu_times};
