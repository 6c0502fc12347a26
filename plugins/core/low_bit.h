/* Low-bit matrix products and row look-ups on the CPU: the C interface, free of dependencies.
 *
 * A weight is stored as numerics/packing.py lays it out: each row one little-endian bit stream of codes, padded to a
 * byte, or five ternary codes a byte; fp16 scales per group along K; integer zeros packed like the codes, or none (then
 * the zero is half of the largest code: (2^bits - 1) / 2, or 1).
 *
 *     Y[m, n] = sum_k X[m, k] * scale[n, k / g] * (code[n, k] - zero[n, k / g])  (+ bias[n])
 *
 * Any number of threads may share a product: `jpq_prepare` once, then `jpq_matmul_rows` for disjoint ranges of n.
 */
#ifndef JPQ_LOW_BIT_H
#define JPQ_LOW_BIT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define JPQ_EXPORT __declspec(dllexport)
#else
#define JPQ_EXPORT __attribute__((visibility("default")))
#endif

#define JPQ_TERNARY 16 /* `bits` of codes 0, 1, 2, five a byte: 1.6 bits, in tenths */
#define JPQ_NORMAL 32  /* added to `bits` of 3 to 6 where codes stand for levels (levels.h), whose zero is 128 */

typedef struct jpq_weight {
  const uint8_t *packed;  /* [n, jpq_bytes(k, bits)] */
  const uint16_t *scales; /* fp16 [n, k / group_size] */
  const uint8_t *zeros;   /* [n, jpq_bytes(k / group_size, bits)], or NULL when symmetric */
  int64_t n, k;
  int32_t bits; /* 1 .. 8, JPQ_TERNARY, or JPQ_NORMAL + 3 .. 6 with zeros NULL */
  int32_t group_size;
} jpq_weight;

/* Bits that a code takes in a row; JPQ_TERNARY as it is. */
static inline int jpq_width(int bits) { return bits & (JPQ_NORMAL - 1); }

/* Bytes of `codes` packed codes in a row. */
static inline int64_t jpq_bytes(int64_t codes, int bits) {
  return bits == JPQ_TERNARY ? (codes + 4) / 5 : (codes * jpq_width(bits) + 7) / 8;
}

/* Whether there are codes of so many bits. */
static inline int jpq_is_width(int bits) {
  return (bits >= 1 && bits <= 8) || bits == JPQ_TERNARY || (bits >= JPQ_NORMAL + 3 && bits <= JPQ_NORMAL + 6);
}

/* What may happen to X. INT8 and INT16: an implementation *may* round it, per row and group of K, to 8 or 15 bits
 * relative to the largest value there. FP32: no loss beyond that of an fp32 sum. */
typedef enum jpq_activations { JPQ_FP32 = 0, JPQ_INT8 = 1, JPQ_INT16 = 2 } jpq_activations;

typedef enum jpq_status { JPQ_OK = 0, JPQ_BAD_WEIGHT = 1, JPQ_NO_MEMORY = 2, JPQ_BAD_INDEX = 3, JPQ_NOT_HERE = 4 } jpq_status;

/* A product on its way. `prepared` is what `jpq_prepare` made of X, or NULL. */
typedef struct jpq_product {
  const jpq_weight *weight;
  const float *x; /* [m, k] */
  const float *bias; /* [n] or NULL */
  float *y; /* [m, n] */
  int64_t m;
  jpq_activations activations;
  const char *implementation; /* name, or NULL for the best one here */
  const struct jpq_implementation *chosen; /* set by jpq_prepare, as is what follows */
  int parts;
  void *prepared;
  int borrowed; /* `prepared` is another product's */
} jpq_product;

/* JPQ_OK, or what is wrong with the shape of a weight. */
JPQ_EXPORT jpq_status jpq_check(const jpq_weight *weight);

/* Choose an implementation and bring X into its form. Release with jpq_release whatever the status. */
JPQ_EXPORT jpq_status jpq_prepare(jpq_product *product);
/* The same, but what `other` made of the same X serves where both weights want it in one form. Release `other` last. */
JPQ_EXPORT jpq_status jpq_prepare_like(jpq_product *product, const jpq_product *other);
JPQ_EXPORT jpq_status jpq_matmul_rows(const jpq_product *product, int64_t first, int64_t last);
JPQ_EXPORT void jpq_release(jpq_product *product);

/* The three in one, on this thread. */
JPQ_EXPORT jpq_status jpq_matmul(jpq_product *product);

/* out[i] = row indices[i] of the weight as floats [count, k]; indices count from the end when negative. */
JPQ_EXPORT jpq_status jpq_gather(const jpq_weight *weight, const int64_t *indices, int64_t count, float *out,
                                 const char *implementation);

/* Sum of the 64-bit words in `memory`: for measuring how fast this core reads. */
JPQ_EXPORT uint64_t jpq_read(const void *memory, int64_t bytes);

/* Name of the i-th implementation this processor runs, best first; NULL past the last. */
JPQ_EXPORT const char *jpq_implementation_name(int i);

#ifdef __cplusplus
}
#endif
#endif
