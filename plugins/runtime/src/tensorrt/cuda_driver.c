/* The CUDA driver, loaded by name. */
#include "cuda_driver.h"

#include <string.h>

#include "../libraries.h"

#define DRIVER "libcuda.so.1"
enum { NO_MEMORY = 2, MAJOR = 75, MINOR = 76 /* CUdevice_attribute: compute capability */ };

jpq_result cuda_check(int code, const char *name, jpq_error *error) {
  if (!code) return JPQ_SUCCESS;
  if (code == NO_MEMORY)
    return jpq_fail(error, JPQ_OUT_OF_MEMORY, "GPU: out of memory in %s; use a smaller capacity or close other programs", name);
  return jpq_fail(error, JPQ_BACKEND, "GPU: %s failed with CUDA error %d; try nvidia-smi or tegrastats", name, code);
}

static jpq_result find_functions(void *library, cuda_driver *out, jpq_error *error) {
#define CUDA_FIND(name, parameters)            \
  library_symbol(library, #name, &out->name); \
  if (!out->name) return jpq_fail(error, JPQ_BACKEND, DRIVER ": no function " #name "; update the NVIDIA driver");
  CUDA_FUNCTIONS(CUDA_FIND)
#undef CUDA_FIND
  return JPQ_SUCCESS;
}

jpq_result cuda_open(cuda_driver *out, jpq_error *error) {
  void *library; /* stays loaded: the driver has threads of its own */
  int major, minor;
  memset(out, 0, sizeof *out);
  if (!library_find(DRIVER, &library))
    return jpq_fail(error, JPQ_BACKEND, DRIVER
                    " not found; it comes with JetPack (elsewhere with the NVIDIA driver), in a container with --runtime nvidia");
  JPQ_TRY(find_functions(library, out, error));
  CUDA_TRY(out, cuInit, (0));
  CUDA_TRY(out, cuDeviceGet, (&out->device, 0));
  CUDA_TRY(out, cuDeviceGetAttribute, (&major, MAJOR, out->device));
  CUDA_TRY(out, cuDeviceGetAttribute, (&minor, MINOR, out->device));
  return out->sm = 10 * major + minor, JPQ_SUCCESS;
}

jpq_result cuda_retain(cuda_driver *cuda, jpq_error *error) {
  CUDA_TRY(cuda, cuDevicePrimaryCtxRetain, (&cuda->context, cuda->device));
  return JPQ_SUCCESS;
}

void cuda_release(cuda_driver *cuda) {
  if (cuda->context) cuda->cuDevicePrimaryCtxRelease_v2(cuda->device);
  cuda->context = NULL;
}

jpq_result cuda_enter(const cuda_driver *cuda, jpq_error *error) {
  CUDA_TRY(cuda, cuCtxPushCurrent_v2, (cuda->context));
  return JPQ_SUCCESS;
}

void cuda_leave(const cuda_driver *cuda) {
  void *context;
  cuda->cuCtxPopCurrent_v2(&context);
}
