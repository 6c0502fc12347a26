/* What stands between the products of a decoder, on the CPU: the C interface, free of dependencies.
 *
 * Each reads and writes its numbers once; as operators of their own, two of onnxruntime's each, they take longer to be
 * called than to be computed when there is one token. `implementation` is a name, or NULL for the best one here;
 * JPQ_NOT_HERE when this processor has none of that name.
 */
#ifndef JPQ_ROWWISE_H
#define JPQ_ROWWISE_H

#include "low_bit.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum jpq_gate { JPQ_SILU, JPQ_GELU_TANH } jpq_gate;

/* a, b [rows, width], weight [width] -> sum = a + b, y = sum / sqrt(mean(sum^2) + epsilon) * weight (RMSNorm, Zhang and
 * Sennrich 2019), [rows, width] both. */
JPQ_EXPORT jpq_status jpq_add_norm(const float *a, const float *b, const float *weight, float epsilon, int64_t rows,
                                   int64_t width, float *sum, float *y, const char *implementation);

/* y = gate(x) * factor, of `count` numbers (GLU variants, Shazeer 2020). GELU is its tanh form. */
JPQ_EXPORT jpq_status jpq_gated(jpq_gate gate, const float *x, const float *factor, int64_t count, float *y,
                                const char *implementation);

#ifdef __cplusplus
}
#endif
#endif
