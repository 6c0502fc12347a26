/* The public functions of rowwise.h: choose an implementation, hand over. */
#include "rowwise.h"

#include "internal.h"

jpq_status jpq_add_norm(const float *a, const float *b, const float *weight, float epsilon, int64_t rows, int64_t width,
                        float *sum, float *y, const char *implementation) {
  const jpq_implementation *chosen = jpq_choose_rowwise(implementation);
  if (!chosen) return JPQ_NOT_HERE;
  for (int64_t i = 0; i < rows * width; i += width) chosen->add_norm(a + i, b + i, weight, epsilon, width, sum + i, y + i);
  return JPQ_OK;
}

jpq_status jpq_gated(jpq_gate gate, const float *x, const float *factor, int64_t count, float *y, const char *implementation) {
  const jpq_implementation *chosen = jpq_choose_rowwise(implementation);
  if (!chosen) return JPQ_NOT_HERE;
  (gate == JPQ_SILU ? chosen->silu_times : chosen->gelu_times)(x, factor, count, y);
  return JPQ_OK;
}
