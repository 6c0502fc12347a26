/* The public functions: check a weight, choose an implementation, hand over. */
#include <stdlib.h>

#include "internal.h"

#ifdef JPQ_X86
#include <cpuid.h>

jpq_cpu jpq_cpu_features;

__attribute__((constructor)) static void ask(void) {
  unsigned a, b, c, d, low, high;
  const unsigned basic = 1u << 12 | 1u << 27 | 1u << 29; /* FMA, OSXSAVE, F16C in ecx of leaf 1 */
  jpq_cpu_features.amd = __get_cpuid(0, &a, &b, &c, &d) && b == 0x68747541; /* "Auth" of AuthenticAMD */
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & basic) != basic) return;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0)); /* registers the operating system saves */
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
  const unsigned wide = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL in ebx of leaf 7 */
  jpq_cpu_features.avx2 = (low & 0x06) == 0x06 && (b & 1u << 5);
  jpq_cpu_features.avx512 = jpq_cpu_features.avx2 && (low & 0xe6) == 0xe6 && (b & wide) == wide;
  const unsigned bytes = 1u << 1 | 1u << 8 | 1u << 11; /* VBMI, GFNI, VNNI in ecx */
  jpq_cpu_features.avx512_vnni = jpq_cpu_features.avx512 && (c & bytes) == bytes;
}
#endif

/* Best first; the last takes everything. */
static const jpq_implementation *const all[] = {
#ifdef JPQ_X86
    &jpq_vnni, &jpq_avx512, &jpq_avx2,
#endif
#ifdef JPQ_NEON
    &jpq_neon,
#endif
    &jpq_scalar,
};
enum { COUNT = sizeof all / sizeof *all };

const char *jpq_implementation_name(int i) {
  for (int j = 0; j < COUNT; j++)
    if (all[j]->available() && i-- == 0) return all[j]->name;
  return NULL;
}

jpq_status jpq_check(const jpq_weight *w) {
  if (!w || !w->packed || !w->scales || w->n < 0 || w->k < 1) return JPQ_BAD_WEIGHT;
  if (!jpq_is_width(w->bits) || (jpq_is_normal(w->bits) && w->zeros)) return JPQ_BAD_WEIGHT;
  if (w->group_size < 1 || w->k % w->group_size) return JPQ_BAD_WEIGHT;
  return JPQ_OK;
}

static const jpq_implementation *choose(const jpq_weight *w, const char *name, jpq_status *status) {
  *status = JPQ_OK;
  for (int j = 0; j < COUNT; j++) {
    if (name && strcmp(name, all[j]->name)) continue;
    if (all[j]->available() && all[j]->takes(w)) return all[j];
  }
  *status = JPQ_NOT_HERE;
  return NULL;
}

const jpq_implementation *jpq_choose_attention(int64_t dim, const char *name) {
  for (int j = 0; j < COUNT; j++)
    if ((!name || !strcmp(name, all[j]->name)) && all[j]->available() && all[j]->attend && dim % all[j]->lanes == 0) return all[j];
  return NULL;
}

const jpq_implementation *jpq_choose_rowwise(const char *name) {
  for (int j = 0; j < COUNT; j++)
    if ((!name || !strcmp(name, all[j]->name)) && all[j]->available() && all[j]->add_norm) return all[j];
  return NULL;
}

jpq_status jpq_prepare(jpq_product *p) {
  p->chosen = NULL;
  p->prepared = NULL;
  p->parts = p->borrowed = 0;
  jpq_status status = jpq_check(p->weight);
  if (status) return status;
  p->chosen = choose(p->weight, p->implementation, &status);
  if (status || p->m < 1) return status;
  return p->chosen->prepare(p);
}

jpq_status jpq_prepare_like(jpq_product *p, const jpq_product *other) {
  const jpq_weight *w = p->weight, *o = other->weight;
  jpq_status status = jpq_check(w);
  const jpq_implementation *mine = status ? NULL : choose(w, p->implementation, &status);
  const int alike = !status && other->prepared && w->k == o->k && w->group_size == o->group_size && p->x == other->x &&
                    p->m == other->m && p->activations == other->activations && mine == choose(o, other->implementation, &status) &&
                    (!mine->form || mine->form(p) == mine->form(other));
  if (!alike) return jpq_prepare(p);
  p->chosen = other->chosen, p->parts = other->parts, p->prepared = other->prepared, p->borrowed = 1;
  return JPQ_OK;
}

jpq_status jpq_matmul_rows(const jpq_product *p, int64_t first, int64_t last) {
  if (!p->chosen) return JPQ_NOT_HERE;
  if (p->m < 1 || first >= last) return JPQ_OK;
  return p->chosen->matmul_rows(p, first, last);
}

void jpq_release(jpq_product *p) {
  if (!p->borrowed) free(p->prepared);
  p->prepared = NULL;
}

jpq_status jpq_matmul(jpq_product *p) {
  jpq_status status = jpq_prepare(p);
  if (!status) status = jpq_matmul_rows(p, 0, p->weight->n);
  jpq_release(p);
  return status;
}

jpq_status jpq_gather(const jpq_weight *w, const int64_t *indices, int64_t count, float *out, const char *name) {
  jpq_status status = jpq_check(w);
  if (status) return status;
  const jpq_implementation *chosen = choose(w, name, &status);
  if (status) return status;
  for (int64_t i = 0; i < count; i++) {
    int64_t row = indices[i] < 0 ? indices[i] + w->n : indices[i];
    if (row < 0 || row >= w->n) return JPQ_BAD_INDEX;
    chosen->dequantize(w, row, 0, w->k, out + i * w->k);
  }
  return JPQ_OK;
}
