/* A library built without TensorRT's headers: asking for TensorRT says so. */
#include "backend.h"

#ifndef JPQ_HAVE_TENSORRT
#define REASON "this libjpq_runtime was built without TensorRT's headers (cmake says how)"

jpq_result trt_backend_open(const char *folder, const manifest *m, const jpq_load_options *options, backend **out,
                            jpq_error *error) {
  (void)m, (void)options, (void)out;
  return jpq_fail(error, JPQ_UNSUPPORTED, "%s: " REASON "; build it with them, or load the bundle with JPQ_ONNXRUNTIME", folder);
}

jpq_result trt_backend_fits(const char *folder, const char *engine, jpq_error *why) {
  (void)folder, (void)engine;
  return jpq_fail(why, JPQ_UNSUPPORTED, REASON);
}
#endif
