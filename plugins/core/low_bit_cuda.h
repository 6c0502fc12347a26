/* Low-bit matrix products and row look-ups on CUDA: the C interface. No framework, no CUDA header needed to include it.
 *
 * Weights mean and lie as in low_bit.h, but every pointer is one the GPU can read. Calls only queue work on `stream`
 * (a cudaStream_t); nothing is allocated and nothing is waited for. Sums do not depend on the GPU's size, and no atomics
 * are used: the same inputs give the same bytes on every run.
 */
#ifndef JPQ_LOW_BIT_CUDA_H
#define JPQ_LOW_BIT_CUDA_H

#include "low_bit.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum jpq_float { JPQ_F32 = 0, JPQ_F16 = 1 } jpq_float;

typedef enum jpq_cuda_status {
  JPQ_CUDA_OK = 0,
  JPQ_CUDA_BAD_WEIGHT = 1,
  JPQ_CUDA_BAD_GROUP = 2,  /* group_size must be a multiple of 32 here */
  JPQ_CUDA_BAD_PRODUCT = 3,
  JPQ_CUDA_WORKSPACE = 4,  /* smaller than jpq_cuda_matmul_workspace asks for */
  JPQ_CUDA_LAUNCH = 5,     /* CUDA refused; cudaGetLastError has been read */
} jpq_cuda_status;

/* Which kernel: few rows stream the weight once, many rows go through tensor cores. */
typedef enum jpq_cuda_path { JPQ_CUDA_AUTO = 0, JPQ_CUDA_FEW = 1, JPQ_CUDA_MANY = 2 } jpq_cuda_path;

enum { JPQ_CUDA_FEW_ROWS = 16 };

/* Y = X . dequant(W)^T (+ bias). Sums are fp32. The many-row kernel multiplies fp16 by exact codes: fp16 X loses nothing;
 * fp32 X is cut into two fp16 numbers (22 bits, |x| <= 65504; larger gives inf or NaN, never a wrong finite number). */
typedef struct jpq_cuda_product {
  const jpq_weight *weight; /* the struct lies on the host, its pointers on the device */
  const void *x;            /* [m, k] */
  const void *bias;         /* [n] or NULL */
  void *y;                  /* [m, n] */
  void *workspace;          /* NULL when no bytes are asked for */
  size_t workspace_bytes;
  void *stream;
  int64_t m;
  int32_t x_type, bias_type, y_type; /* jpq_float */
  int32_t path;                      /* jpq_cuda_path */
} jpq_cuda_product;

/* Rows out[i] = weight row indices[i]; negative indices count from the end; one out of range gives a row of NaN. */
typedef struct jpq_cuda_lookup {
  const jpq_weight *weight;
  const void *indices; /* [count] */
  void *out;           /* [count, k] */
  void *stream;
  int64_t count;
  int32_t index_bytes; /* 4 or 8 */
  int32_t out_type;    /* jpq_float */
} jpq_cuda_lookup;

JPQ_EXPORT int jpq_cuda_check(const jpq_weight *weight);
/* Bytes of workspace for up to `m` rows; enough for every smaller m too. */
JPQ_EXPORT size_t jpq_cuda_matmul_workspace(const jpq_weight *weight, int64_t m);
JPQ_EXPORT int jpq_cuda_matmul(const jpq_cuda_product *product);
JPQ_EXPORT int jpq_cuda_gather(const jpq_cuda_lookup *lookup);

#ifdef __cplusplus
}
#endif
#endif
