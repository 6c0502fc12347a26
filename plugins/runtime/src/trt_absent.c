/* TensorRT is not supported yet: asking for it says so. */
#include "backend.h"

jpq_result trt_backend_open(const char *folder, const manifest *m, const jpq_load_options *options, backend **out,
                            jpq_error *error) {
  (void)m, (void)options, (void)out;
  return jpq_fail(error, JPQ_UNSUPPORTED,
                  "%s: this libjpq_runtime has no TensorRT backend yet; load the bundle with JPQ_ONNXRUNTIME",
                  folder);
}
