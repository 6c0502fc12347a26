/* What computes: onnxruntime, or TensorRT. One structure of functions each, chosen when a model is loaded. */
#ifndef JPQ_RUNTIME_BACKEND_H
#define JPQ_RUNTIME_BACKEND_H

#include "bundle.h"

typedef struct backend backend;
typedef struct backend_cache backend_cache; /* of one sequence */

struct backend {
  void (*free)(backend *self);
  /* A cache of `capacity` positions. */
  jpq_result (*cache_new)(const backend *self, int64_t capacity, backend_cache **out, jpq_error *error);
  void (*cache_free)(backend_cache *cache);
  /* Run `count` tokens after `past` cached ones; logits [vocab] of the last. `past` decides what of the cache is valid,
   * so that a failed step leaves the sequence as it was. */
  jpq_result (*step)(const backend *self, backend_cache *cache, int64_t past, const int64_t *ids, int64_t count,
                     float *logits, jpq_error *error);
  /* ids and mask [batch, seq] -> out [batch, embedding]; NULL for a decoder. */
  jpq_result (*embed)(const backend *self, const int64_t *ids, const int64_t *mask, int64_t batch, int64_t seq, float *out,
                      jpq_error *error);
  model_spec spec;
  int64_t embedding; /* 0: a decoder */
  int64_t most_new;  /* tokens one step may take */
  int64_t most_past; /* after how many; behind them a step takes one */
  const char *limit; /* whose spec.max_positions is: "model" or "engine" */
  char path[512];    /* what computes, for people */
};

jpq_result ort_backend_open(const char *folder, const manifest *m, const jpq_load_options *options, backend **out,
                            jpq_error *error);
jpq_result trt_backend_open(const char *folder, const manifest *m, const jpq_load_options *options, backend **out,
                            jpq_error *error);
/* Whether the bundle's engine (`engine`: another) is one for this machine's GPU; otherwise why not, for people. */
jpq_result trt_backend_fits(const char *folder, const char *engine, jpq_error *why);
/* The one that the options, JPQ_BACKEND or the bundle choose. */
jpq_result backend_open(const char *folder, const manifest *m, const jpq_load_options *options, backend **out, jpq_error *error);

#endif
