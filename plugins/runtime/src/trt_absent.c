/* In place of the TensorRT backend where the library was built without TensorRT's headers. */
#include "backend.h"

jpq_result trt_backend_open(const char *folder, const manifest *m, const jpq_load_options *options, backend **out,
                            jpq_error *error) {
  (void)m, (void)options, (void)out;
  return jpq_fail(error, JPQ_UNSUPPORTED,
                  "%s: this libjpq_runtime was built without TensorRT; build it with -DJPQ_TENSORRT_INCLUDE=<folder of NvInferRuntime.h>",
                  folder);
}
