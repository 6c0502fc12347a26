/* The few CUDA calls the TensorRT backend needs, of the driver itself: its C ABI is stable and it is wherever a GPU is,
 * while libcudart has another name with every major version. Loaded at run time; no CUDA header is used. */
#ifndef JPQ_RUNTIME_CUDA_DRIVER_H
#define JPQ_RUNTIME_CUDA_DRIVER_H

#include "../bundle.h"

typedef uint64_t cuda_address;
typedef void *cuda_stream;

#define CUDA_FUNCTIONS(X)                                                             \
  X(cuInit, (unsigned))                                                               \
  X(cuDeviceGet, (int *, int))                                                        \
  X(cuDeviceGetAttribute, (int *, int, int))                                          \
  X(cuDevicePrimaryCtxRetain, (void **, int))                                         \
  X(cuDevicePrimaryCtxRelease_v2, (int))                                              \
  X(cuCtxPushCurrent_v2, (void *))                                                    \
  X(cuCtxPopCurrent_v2, (void **))                                                    \
  X(cuStreamCreate, (cuda_stream *, unsigned))                                        \
  X(cuStreamDestroy_v2, (cuda_stream))                                                \
  X(cuStreamSynchronize, (cuda_stream))                                               \
  X(cuMemAlloc_v2, (cuda_address *, size_t))                                          \
  X(cuMemFree_v2, (cuda_address))                                                     \
  X(cuMemcpyHtoDAsync_v2, (cuda_address, const void *, size_t, cuda_stream))          \
  X(cuMemcpyDtoHAsync_v2, (void *, cuda_address, size_t, cuda_stream))

typedef struct cuda_driver {
  int device, sm; /* sm: 87 for Orin */
  void *context;  /* the GPU's primary one, which TensorRT uses too */
#define CUDA_POINTER(name, parameters) int(*name) parameters;
  CUDA_FUNCTIONS(CUDA_POINTER)
#undef CUDA_POINTER
} cuda_driver;

/* Load the driver and look at the first GPU; JPQ_BACKEND when there is none. Nothing to close. */
jpq_result cuda_open(cuda_driver *out, jpq_error *error);
/* Bring the GPU's context up; cuda_release gives it back. */
jpq_result cuda_retain(cuda_driver *cuda, jpq_error *error);
void cuda_release(cuda_driver *cuda);
/* Around every use: the caller's thread may have a context of its own. */
jpq_result cuda_enter(const cuda_driver *cuda, jpq_error *error);
void cuda_leave(const cuda_driver *cuda);
/* Turn the driver's code into ours; `name`: the function. */
jpq_result cuda_check(int code, const char *name, jpq_error *error);
#define CUDA_TRY(cuda, name, arguments) JPQ_TRY(cuda_check((cuda)->name arguments, #name, error))

#endif
