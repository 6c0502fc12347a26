/* `jpq::LowBitMatMul` and `jpq::LowBitGather` for onnxruntime's CUDA provider, over plugins/core's CUDA kernels.
 *
 * Everything is queued on the provider's stream and nothing is waited for.
 *
 * onnxruntime takes a domain from one library only, and a session whose operators are all for a provider it lacks does
 * not load. So this library also registers the CPU's operators, from the library that the session option
 * "jpq.cpu_library" names, and where no GPU is to be seen none of its own.
 * The host shim's build of it (no nvcc) makes operators for the CPU out of the CUDA kernels, for tests.
 */
#include <dlfcn.h>

#include <mutex>
#include <new>
#include <vector>

#include "../core/low_bit_cuda.h"
#define JPQ_SPEAKER "jpq CUDA"
#include "ort_inputs.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define JPQ_PROVIDER "CUDAExecutionProvider"
#else
#include <stdlib.h>
#define JPQ_PROVIDER nullptr
#endif

#define CPU_LIBRARY_KEY "jpq.cpu_library"
namespace {

constexpr int CPU_FP32 = 0;
/* No product asks for more: K is split until 128 blocks of 8 rows of W are busy (16 rows of X), or of 16 (up to 4). */
constexpr size_t WORKSPACE_BYTES = 256 * 16 * 8 * sizeof(float) * 2;

struct Operator {
  OrtCustomOp base; /* first: onnxruntime hands back a pointer to it */
  const char *name;
  bool gather;
};

struct Kernel {
  const OrtApi *api;
  jpq_weight shape; /* pointers are filled in at each run */
  bool symmetric, gather;
};

/* ---- the workspace: one a stream, whose kernels run one after the other; kept until the process ends ---- */

struct Space {
  int device;
  void *stream, *memory;
};

void *allocate(size_t bytes) {
#ifdef __CUDACC__
  void *memory = nullptr;
  return cudaMalloc(&memory, bytes) == cudaSuccess ? memory : nullptr;
#else
  return malloc(bytes);
#endif
}

int current_device() {
  int device = 0;
#ifdef __CUDACC__
  if (cudaGetDevice(&device) != cudaSuccess) return -1;
#endif
  return device;
}

void *workspace_of(void *stream) {
  static std::mutex guard;
  static std::vector<Space> spaces;
  const int device = current_device();
  std::lock_guard<std::mutex> locked(guard);
  for (const Space &space : spaces)
    if (space.device == device && space.stream == stream) return space.memory;
  void *memory = allocate(WORKSPACE_BYTES);
  if (memory) spaces.push_back({device, stream, memory});
  return memory;
}

/* ---- description ---- */

const Operator &self(const OrtCustomOp *op) { return *reinterpret_cast<const Operator *>(op); }

const char *ORT_CALL name(const OrtCustomOp *op) { return self(op).name; }
const char *ORT_CALL provider(const OrtCustomOp *) { return JPQ_PROVIDER; }
/* X or indices, packed, scales, then zeros unless symmetric, then an optional bias. */
int ORT_CALL input_type(const OrtCustomOp *op, size_t i) {
  static const int types[] = {ORT_FLOAT, ORT_UINT8, ORT_FLOAT16, ORT_ANY, ORT_FLOAT};
  return i == 0 && self(op).gather ? ORT_INT64 : types[i];
}
size_t ORT_CALL input_count(const OrtCustomOp *op) { return self(op).gather ? 4 : 5; }
int ORT_CALL output_type(const OrtCustomOp *, size_t) { return ORT_FLOAT; }
size_t ORT_CALL output_count(const OrtCustomOp *) { return 1; }
int ORT_CALL input_kind(const OrtCustomOp *, size_t i) { return i < 3 ? ORT_REQUIRED : ORT_OPTIONAL; }
int ORT_CALL output_kind(const OrtCustomOp *, size_t) { return ORT_REQUIRED; }
int ORT_CALL memory_type(const OrtCustomOp *, size_t) { return 0; } /* where the provider computes */
int ORT_CALL one(const OrtCustomOp *) { return 1; }
int ORT_CALL last_version(const OrtCustomOp *) { return 0x7fffffff; }

/* ---- creation ---- */

const char *words(int status) {
  switch (status) {
    case JPQ_CUDA_BAD_GROUP: return "group_size must be a multiple of 32 on a GPU";
    case JPQ_CUDA_WORKSPACE: return "the workspace is too small";
    case JPQ_CUDA_LAUNCH: return "CUDA refused the launch; is the library compiled for this GPU?";
    default: return "bits, K, N and group_size do not fit";
  }
}

OrtStatus *ORT_CALL create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  static const char *const names[] = {"bits", "K", "N", "group_size", "symmetric"};
  static const uint8_t byte = 0;
  static const uint16_t half = 0;
  int64_t values[5];
  for (int i = 0; i < 5; i++) TRY(ORT(api, KernelInfoGetAttribute_int64)(info, names[i], values + i));
  const jpq_weight shape = {&byte, &half, nullptr, values[2], values[1], (int32_t)values[0], (int32_t)values[3]};
  if (const int status = jpq_cuda_check(&shape)) return fail(api, words(status), self(op).name);
  if (jpq_cuda_matmul_workspace(&shape, JPQ_CUDA_FEW_ROWS) > WORKSPACE_BYTES)
    return fail(api, words(JPQ_CUDA_WORKSPACE), self(op).name);
  Kernel *k = new (std::nothrow) Kernel{api, shape, values[4] != 0, self(op).gather};
  if (!k) return fail(api, "out of memory", self(op).name);
  *out = k;
  return nullptr;
}

void ORT_CALL destroy(void *k) { delete static_cast<Kernel *>(k); }

/* ---- a run ---- */

OrtStatus *multiply(const Kernel &k, const jpq_weight &w, const tensor &x, const void *bias, void *y, void *stream) {
  jpq_cuda_product product = {};
  product.weight = &w, product.x = x.data, product.bias = bias, product.y = y;
  product.x_type = product.bias_type = product.y_type = JPQ_F32;
  product.m = x.count / w.k, product.stream = stream;
  if (jpq_cuda_matmul_workspace(&w, product.m)) {
    product.workspace = workspace_of(stream), product.workspace_bytes = WORKSPACE_BYTES;
    if (!product.workspace) return fail(k.api, "no GPU memory for the workspace", "LowBitMatMul");
  }
  const int status = jpq_cuda_matmul(&product);
  return status ? fail(k.api, words(status), "LowBitMatMul") : nullptr;
}

OrtStatus *ORT_CALL compute(void *data, OrtKernelContext *context) {
  const Kernel &k = *static_cast<const Kernel *>(data);
  const OrtApi *api = k.api;
  tensor x;
  jpq_weight w = k.shape;
  const void *bias = nullptr;
  void *y, *stream = nullptr;
  size_t at = 1;
  TRY(input(api, context, 0, &x));
  TRY(read_weight(api, context, &at, k.symmetric, &w));
  if (!k.gather) TRY(read_bias(api, context, at, &w, &bias));
  TRY(make_output(api, context, 0, &w, k.gather, &x, &y));
  TRY(ORT(api, KernelContext_GetGPUComputeStream)(context, &stream));
  if (!k.gather) return multiply(k, w, x, bias, y, stream);
  const jpq_cuda_lookup look_up = {&w, x.data, y, stream, x.count, sizeof(int64_t), JPQ_F32};
  const int status = jpq_cuda_gather(&look_up);
  return status ? fail(api, words(status), "LowBitGather") : nullptr;
}

constexpr OrtCustomOp BASE = {
    JPQ_ORT_API, nullptr,    name,        provider,     input_type,  input_count, output_type, output_count, nullptr,
    destroy,     input_kind, output_kind, memory_type,  one,         one,         one,         one,          create,
    compute,     nullptr,    one,         last_version, nullptr,     nullptr,     nullptr,     nullptr};

const Operator operators[] = {{BASE, "LowBitMatMul", false}, {BASE, "LowBitGather", true}};

/* ---- registration ---- */

bool gpu_here() {
#if defined(__CUDACC__) && !defined(JPQ_ASSUME_GPU) /* the define: to try on a machine without one */
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
#else
  return true;
#endif
}

/* The operators of the CPU's library, which stays loaded; none when the session names no library. */
OrtStatus *add_cpu_operators(const OrtApi *api, const OrtSessionOptions *options, OrtCustomOpDomain *domain) {
  char path[4096] = "";
  size_t size = sizeof path;
  int given = 0;
  TRY(ORT(api, HasSessionConfigEntry)(options, CPU_LIBRARY_KEY, &given));
  if (!given) return nullptr;
  TRY(ORT(api, GetSessionConfigEntry)(options, CPU_LIBRARY_KEY, path, &size));
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return fail(api, "cannot be loaded", path);
  auto get = reinterpret_cast<const OrtCustomOp *(*)(int, int)>(dlsym(library, "jpq_cpu_operator"));
  if (!get) return fail(api, "has no jpq_cpu_operator", path);
  for (int i = 0; const OrtCustomOp *op = get(CPU_FP32, i); i++) TRY(ORT(api, CustomOpDomain_Add)(domain, op));
  return nullptr;
}

}  // namespace

extern "C" JPQ_EXPORT OrtStatus *ORT_CALL RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  const OrtApi *api = base->GetApi(JPQ_ORT_API);
  if (!api) { /* older than 1.18: a status can still be made, its slot is the first */
    const OrtApi *first = base->GetApi(1);
    return first ? fail(first, "onnxruntime 1.18 or later is needed", base->GetVersionString()) : nullptr;
  }
  OrtCustomOpDomain *domain;
  TRY(ORT(api, CreateCustomOpDomain)("jpq", &domain)); /* lives as long as the library, as onnxruntime asks */
  if (gpu_here())
    for (const Operator &op : operators) TRY(ORT(api, CustomOpDomain_Add)(domain, &op.base));
  TRY(add_cpu_operators(api, options, domain));
  return ORT(api, AddCustomOpDomain)(options, domain);
}
