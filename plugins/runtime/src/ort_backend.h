/* The onnxruntime backend's own state, shared by opening (ort_open.c) and running (ort_run.c). */
#ifndef JPQ_RUNTIME_ORT_BACKEND_H
#define JPQ_RUNTIME_ORT_BACKEND_H

#include "backend.h"
#include "ort_session_api.h"

enum { FIXED_INPUTS = 4, FIXED_OUTPUTS = 1, NAME_MOST = 64 };

/* One cache tensor: floats or int8 codes, head_dim wide, or the codes' scales, one wide. `grows`: it is
 * [room, 1, kv_heads, width] and new rows are written behind the old ones; otherwise [1, kv_heads, past, width]. */
typedef struct ort_cached {
  char past[NAME_MOST], present[NAME_MOST];
  int64_t kv_heads, width;
  int grows;
  int type;
  size_t item; /* bytes */
} ort_cached;

typedef struct ort_backend {
  backend base; /* first: the functions get a pointer to it */
  void *library, *kernels;
  const OrtApi *api;
  OrtEnv *env;
  OrtSession *session;
  OrtMemoryInfo *cpu;
  int takes_mask, takes_positions;
  int takes_from; /* which new token is the first whose logits are wanted */
  size_t cached_count;
  ort_cached *cached;
} ort_backend;

/* Turn onnxruntime's status into ours and release it; `what` and `where` make the line. */
jpq_result ort_check(const OrtApi *api, OrtStatus *status, const char *what, jpq_error *error);
#define ORT_TRY(self, call, what) JPQ_TRY(ort_check((self)->api, (call), (what), error))

jpq_result ort_cache_new(const backend *self, int64_t capacity, backend_cache **out, jpq_error *error);
void ort_cache_free(backend_cache *cache);
jpq_result ort_step(const backend *self, backend_cache *cache, int64_t past, const int64_t *ids, int64_t count, float *logits,
                    jpq_error *error);
jpq_result ort_embed(const backend *self, const int64_t *ids, const int64_t *mask, int64_t batch, int64_t seq, float *out,
                     jpq_error *error);

#endif
