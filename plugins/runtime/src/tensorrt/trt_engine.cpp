// TensorRT's C++ classes as C functions. Nothing of libnvinfer is linked: its two entry points are looked up in the loaded
// library, everything else is virtual. Written for TensorRT 10.3 to 11, compiled with the headers of 10.14.
#include "trt_engine.h"

#include <NvInferRuntime.h>
#include <pthread.h>

#include <cstdio>
#include <cstring>
#include <new>

#include "../libraries.h"

#if NV_TENSORRT_MAJOR < 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR < 3)
#error "jpq: TensorRT 10.3 or later is needed"
#endif

using namespace nvinfer1;

namespace {

class Lock {
 public:
  explicit Lock(pthread_mutex_t &mutex) : mutex_(mutex) { pthread_mutex_lock(&mutex_); }
  ~Lock() { pthread_mutex_unlock(&mutex_); }

 private:
  pthread_mutex_t &mutex_;
};

// TensorRT's reason for a refusal is its last error message; nothing is printed.
class LastError final : public ILogger {
 public:
  void log(Severity severity, char const *text) noexcept override {
    if (severity > Severity::kERROR) return;
    Lock lock(mutex_);
    std::snprintf(said_, sizeof said_, "%s", text ? text : "");
  }
  jpq_result fail(jpq_result code, char const *what, jpq_error *error) noexcept {
    Lock lock(mutex_);
    jpq_fail(error, code, "%.400s: TensorRT says: %s", what, *said_ ? said_ : "nothing");
    *said_ = 0;
    return code;
  }

 private:
  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  char said_[500] = "";
};

Dims to_dims(trt_dims const &given) {
  Dims out{};
  out.nbDims = given.rank;
  std::memcpy(out.d, given.sizes, sizeof given.sizes);
  return out;
}

trt_dims from_dims(Dims const &given) {
  trt_dims out{given.nbDims, {}};
  static_assert(Dims::MAX_DIMS == TRT_RANK && sizeof given.d == sizeof out.sizes, "jpq: another TensorRT's dimensions");
  std::memcpy(out.sizes, given.d, sizeof given.d);
  return out;
}

}  // namespace

struct trt_engine {
  LastError logger;
  pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;  // of contexts: only using them is said to be safe from threads
  IRuntime *runtime = nullptr;
  ICudaEngine *engine = nullptr;
};

static IExecutionContext *inside(trt_context *context) { return reinterpret_cast<IExecutionContext *>(context); }

#define JPQ_TEXT(x) #x
#define JPQ_NUMBER(x) JPQ_TEXT(x)
char const *trt_library_name(void) { return "libnvinfer.so." JPQ_NUMBER(NV_TENSORRT_MAJOR); }

jpq_result trt_check_version(void *library, char const *expected, jpq_error *error) {
  int32_t (*get)(void) = nullptr;
  char found[40];
  library_symbol(library, "getInferLibVersion", &get);
  if (!get) return jpq_fail(error, JPQ_BACKEND, "library: not TensorRT (no getInferLibVersion); give %s", trt_library_name());
  const int version = get(), major = version / 10000;
  std::snprintf(found, sizeof found, "%d.%d.%d", major, version / 100 % 100, version % 100);
  if (major != NV_TENSORRT_MAJOR)
    return jpq_fail(error, JPQ_BACKEND, "TensorRT %s: this libjpq_runtime was compiled for TensorRT %d; compile it again here",
                    found, NV_TENSORRT_MAJOR);
  const size_t n = std::strlen(found);
  if (!std::strncmp(found, expected, n) && (!expected[n] || expected[n] == '.')) return JPQ_SUCCESS;
  return jpq_fail(error, JPQ_BACKEND, "TensorRT %s: the engine was built with %.40s and runs in no other; build it again: jpq-export build",
                  found, expected);
}

static jpq_result open_all(trt_engine *self, void *library, char const *plugin, void const *data, size_t bytes,
                           char const *where, jpq_error *error) {
  void *(*create)(void *, int32_t) = nullptr;
  library_symbol(library, "createInferRuntime_INTERNAL", &create);
  if (!create) return jpq_fail(error, JPQ_BACKEND, "library: not TensorRT (no createInferRuntime_INTERNAL); give %s", trt_library_name());
  ILogger *logger = &self->logger;
  self->runtime = static_cast<IRuntime *>(create(logger, NV_TENSORRT_VERSION));
  if (!self->runtime) return self->logger.fail(JPQ_BACKEND, "no TensorRT runtime", error);
  // The runtime's own registry: two models may bring two builds of the plugin, and both go with their runtime.
  if (*plugin && !self->runtime->getPluginRegistry().loadLibrary(plugin)) return self->logger.fail(JPQ_BACKEND, plugin, error);
  self->engine = self->runtime->deserializeCudaEngine(data, bytes);
  return self->engine ? JPQ_SUCCESS : self->logger.fail(JPQ_BACKEND, where, error);
}

jpq_result trt_engine_open(void *library, char const *plugin, void const *data, size_t bytes, char const *where,
                           trt_engine **out, jpq_error *error) {
  trt_engine *self = new (std::nothrow) trt_engine;
  if (!self) return jpq_no_memory(error);
  const jpq_result result = open_all(self, library, plugin, data, bytes, where, error);
  if (result) return trt_engine_free(self), result;
  return *out = self, JPQ_SUCCESS;
}

void trt_engine_free(trt_engine *self) {
  if (!self) return;
  delete self->engine;
  delete self->runtime;
  delete self;
}

int32_t trt_engine_profiles(trt_engine const *self) { return self->engine->getNbOptimizationProfiles(); }

int32_t trt_engine_tensors(trt_engine const *self) { return self->engine->getNbIOTensors(); }

void trt_engine_tensor(trt_engine const *self, int32_t index, trt_tensor *out) {
  out->name = self->engine->getIOTensorName(index);
  out->input = self->engine->getTensorIOMode(out->name) == TensorIOMode::kINPUT;
  out->type = static_cast<int32_t>(self->engine->getTensorDataType(out->name));
  out->dims = from_dims(self->engine->getTensorShape(out->name));
}

trt_dims trt_engine_largest(trt_engine const *self, char const *name, int32_t profile) {
  return from_dims(self->engine->getProfileShape(name, profile, OptProfileSelector::kMAX));
}

jpq_result trt_context_new(trt_engine *self, trt_context **out, jpq_error *error) {
  Lock lock(self->making);
  IExecutionContext *made = self->engine->createExecutionContext();
  if (!made) return self->logger.fail(JPQ_BACKEND, "no execution context (memory may be short)", error);
  return *out = reinterpret_cast<trt_context *>(made), JPQ_SUCCESS;
}

void trt_context_free(trt_engine *self, trt_context *context) {
  Lock lock(self->making);
  delete inside(context);
}

jpq_result trt_context_profile(trt_engine *self, trt_context *context, int32_t profile, void *stream, jpq_error *error) {
  if (inside(context)->setOptimizationProfileAsync(profile, static_cast<cudaStream_t>(stream))) return JPQ_SUCCESS;
  return self->logger.fail(JPQ_BACKEND, profile == TRT_DECODE ? "decode profile" : "prefill profile", error);
}

jpq_result trt_context_bind(trt_engine *self, trt_context *context, char const *name, trt_dims const *shape,
                            uint64_t address, jpq_error *error) {
  char what[200];
  if (shape && !inside(context)->setInputShape(name, to_dims(*shape))) {
    const bool four = shape->rank == 4;
    std::snprintf(what, sizeof what, "%.100s: %lld positions are beyond the engine's profile; build it with more --max-tokens",
                  name, static_cast<long long>(shape->sizes[four ? 2 : shape->rank > 1]));
    return self->logger.fail(JPQ_BACKEND, what, error);
  }
  if (inside(context)->setTensorAddress(name, reinterpret_cast<void *>(address))) return JPQ_SUCCESS;
  return self->logger.fail(JPQ_BACKEND, name, error);
}

jpq_result trt_context_run(trt_engine *self, trt_context *context, void *stream, jpq_error *error) {
  if (inside(context)->enqueueV3(static_cast<cudaStream_t>(stream))) return JPQ_SUCCESS;
  return self->logger.fail(JPQ_BACKEND, "the engine did not run", error);
}
