/* TensorRT's C++ classes as C functions: the only file that needs its headers is trt_engine.cpp. Not run on a GPU yet. */
#ifndef JPQ_RUNTIME_TRT_ENGINE_H
#define JPQ_RUNTIME_TRT_ENGINE_H

#include <stdint.h>

#include "../error.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { TRT_DECODE = 0, TRT_PREFILL = 1, TRT_PROFILES = 2 }; /* as jpq_export/engine/builder.py adds them */
enum { TRT_FLOAT = 0, TRT_INT64 = 8 };                      /* nvinfer1::DataType */
enum { TRT_RANK = 8 };

typedef struct trt_engine trt_engine;   /* runtime, plugin and engine */
typedef struct trt_context trt_context; /* of one sequence */

typedef struct trt_dims {
  int32_t rank; /* -1: none */
  int64_t sizes[TRT_RANK];
} trt_dims;

typedef struct trt_tensor {
  const char *name; /* lives as long as the engine */
  int input;
  int32_t type;
  trt_dims dims; /* -1: varies */
} trt_tensor;

/* Name of the library to look for, and the oldest thing it must be: what these headers were. */
const char *trt_library_name(void);
/* Compare the library's version with the headers' major and with `expected` ("10.3.0.30"), the engine's. */
jpq_result trt_check_version(void *library, const char *expected, jpq_error *error);
/* `plugin`: library to register first, "" for none. `where`: for errors. The GPU's context must be current: without a GPU
 * TensorRT ends the process. */
jpq_result trt_engine_open(void *library, const char *plugin, const void *data, size_t bytes, const char *where,
                           trt_engine **out, jpq_error *error);
void trt_engine_free(trt_engine *engine);
int32_t trt_engine_profiles(const trt_engine *engine);
int32_t trt_engine_tensors(const trt_engine *engine);
void trt_engine_tensor(const trt_engine *engine, int32_t index, trt_tensor *out);
/* Largest shape of an input in a profile. */
trt_dims trt_engine_largest(const trt_engine *engine, const char *name, int32_t profile);

/* With the memory for activations. Contexts of one engine may be made and used by several threads, each by one at a time. */
jpq_result trt_context_new(trt_engine *engine, trt_context **out, jpq_error *error);
void trt_context_free(trt_engine *engine, trt_context *context);
jpq_result trt_context_profile(trt_engine *engine, trt_context *context, int32_t profile, void *stream, jpq_error *error);
jpq_result trt_context_bind(trt_engine *engine, trt_context *context, const char *name, const trt_dims *shape,
                            uint64_t address, jpq_error *error); /* `shape`: NULL for an output */
jpq_result trt_context_run(trt_engine *engine, trt_context *context, void *stream, jpq_error *error);

#ifdef __cplusplus
}
#endif
#endif
