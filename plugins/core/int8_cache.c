/* Keys and values as int8 codes with a scale for each head: how they come into a cache. */
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "attention_task.h"

/* The nearest integer, ties to even, of |x| < 2^22; no call, so that loops over it become vectors. */
JPQ_INLINE int8_t nearest(float x) {
  float shifted = x + 0x1.8p23f;
  int32_t bits;
  memcpy(&bits, &shifted, 4);
  return (int8_t)(bits & 255);
}

/* A real division as in the definition: a product with the reciprocal rounds otherwise. */
static float to_codes(int8_t *codes, const float *x, int64_t dim) {
  int32_t most = 0, bits;
  for (int64_t j = 0; j < dim; j++) { /* sizes are ordered as their bits are, what is no number above all */
    memcpy(&bits, x + j, 4);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  float peak;
  memcpy(&peak, &most, 4);
  const float scale = peak / 127, divisor = scale < 0x1p-126f ? 0x1p-126f : scale; /* of zeros, codes and scale are 0 */
  for (int64_t j = 0; j < dim; j++) codes[j] = nearest(x[j] / divisor);
  return scale;
}

jpq_status jpq_to_int8(const float *k, const float *v, const float *cos, const float *sin, int64_t positions,
                       int64_t kv_heads, int64_t dim, const jpq_int8_cache *out) {
  if (kv_heads < 1 || dim < 1 || positions < 0 || (cos && dim % 2)) return JPQ_BAD_WEIGHT;
  float *turned = malloc(sizeof(float) * (size_t)dim);
  if (!turned) return JPQ_NO_MEMORY;
  for (int64_t i = 0; i < positions * kv_heads; i++) {
    const int64_t tables = i / kv_heads * (dim / 2);
    if (cos) jpq_turn(turned, k + i * dim, cos + tables, sin + tables, dim);
    out->key_scales[i] = to_codes(out->keys + i * dim, cos ? turned : k + i * dim, dim);
    out->value_scales[i] = to_codes(out->values + i * dim, v + i * dim, dim);
  }
  free(turned);
  return JPQ_OK;
}
