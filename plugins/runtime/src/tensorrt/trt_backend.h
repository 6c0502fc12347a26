/* The TensorRT backend's own state, shared by opening (trt_open.c) and running (trt_run.c). Not run on a GPU yet: its
 * calls are recorded and answered by a stand-in in tests/plugins/runtime/test_tensorrt.py. */
#ifndef JPQ_RUNTIME_TRT_BACKEND_H
#define JPQ_RUNTIME_TRT_BACKEND_H

#include "../backend.h"
#include "cuda_driver.h"
#include "trt_engine.h"

enum { TRT_NAME_MOST = 64 };

/* One cache tensor, [1, kv_heads, past, head_dim], fp32. */
typedef struct trt_cached {
  char past[TRT_NAME_MOST], present[TRT_NAME_MOST];
  int64_t kv_heads;
} trt_cached;

typedef struct trt_backend {
  backend base; /* first: the functions get a pointer to it */
  cuda_driver cuda;
  trt_engine *engine;
  int takes_mask, takes_positions, takes_wanted;
  size_t cached_count;
  trt_cached *cached;
} trt_backend;

jpq_result trt_cache_new(const backend *self, int64_t capacity, backend_cache **out, jpq_error *error);
void trt_cache_free(backend_cache *cache);
jpq_result trt_step(const backend *self, backend_cache *cache, int64_t past, const int64_t *ids, int64_t count, float *logits,
                    jpq_error *error);

#endif
