/* `jpq::LowBitMatMul`, `jpq::LowBitMatMuls` (several of one X) and `jpq::LowBitGather` for onnxruntime's CUDA provider,
 * over plugins/core's CUDA kernels; the bodies of the others are of operators the provider has.
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

enum Kind { MATMUL, MATMULS, GATHER };

struct Operator {
  OrtCustomOp base; /* first: onnxruntime hands back a pointer to it */
  const char *name;
  Kind kind;
};

struct Kernel {
  const OrtApi *api;
  Kind kind;
  int count;
  part parts[MOST_PARTS];
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
/* X or indices, packed, scales, then zeros unless symmetric, then an optional bias; of several, all that for each. */
int ORT_CALL input_type(const OrtCustomOp *op, size_t i) {
  static const int types[] = {ORT_FLOAT, ORT_UINT8, ORT_FLOAT16, ORT_ANY, ORT_FLOAT};
  if (i == 0) return self(op).kind == GATHER ? ORT_INT64 : ORT_FLOAT;
  return self(op).kind == MATMULS ? ORT_ANY : types[i];
}
size_t ORT_CALL input_count(const OrtCustomOp *op) {
  static const size_t counts[] = {5, 2, 4}; /* in the order of Kind */
  return counts[self(op).kind];
}
int ORT_CALL output_type(const OrtCustomOp *, size_t) { return ORT_FLOAT; }
size_t ORT_CALL output_count(const OrtCustomOp *) { return 1; }
int ORT_CALL input_kind(const OrtCustomOp *op, size_t i) {
  if (self(op).kind == MATMULS) return i ? ORT_VARIADIC : ORT_REQUIRED;
  return i < 3 ? ORT_REQUIRED : ORT_OPTIONAL;
}
int ORT_CALL output_kind(const OrtCustomOp *op, size_t) {
  return self(op).kind == MATMULS ? ORT_VARIADIC : ORT_REQUIRED;
}
int ORT_CALL none(const OrtCustomOp *) { return 0; }
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

/* Whether the kernels take a weight that is as these attributes say. */
OrtStatus *check(const OrtApi *api, const char *op, const jpq_weight &described) {
  static const uint8_t byte = 0;
  static const uint16_t half = 0;
  jpq_weight shape = described;
  shape.packed = &byte, shape.scales = &half;
  if (const int status = jpq_cuda_check(&shape)) return fail(api, words(status), op);
  if (jpq_cuda_matmul_workspace(&shape, JPQ_CUDA_FEW_ROWS) > WORKSPACE_BYTES)
    return fail(api, words(JPQ_CUDA_WORKSPACE), op);
  return nullptr;
}

OrtStatus *ORT_CALL create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  const bool single = self(op).kind != MATMULS;
  Kernel made = {api, self(op).kind, 0, {}};
  int64_t count;
  TRY(read_count(api, info, single, &count));
  for (; made.count < count; made.count++) {
    TRY(read_part(api, info, single ? SINGLE : OF_ONE_X, made.count, made.parts + made.count));
    TRY(check(api, self(op).name, made.parts[made.count].shape));
  }
  Kernel *k = new (std::nothrow) Kernel(made);
  if (!k) return fail(api, "out of memory", self(op).name);
  *out = k;
  return nullptr;
}

void ORT_CALL destroy(void *k) { delete static_cast<Kernel *>(k); }

/* ---- a run ---- */

OrtStatus *multiply(const OrtApi *api, const jpq_weight &w, const tensor &x, const void *bias, void *y, void *stream) {
  jpq_cuda_product product = {};
  product.weight = &w, product.x = x.data, product.bias = bias, product.y = y;
  product.x_type = product.bias_type = product.y_type = JPQ_F32;
  product.m = x.count / w.k, product.stream = stream;
  if (jpq_cuda_matmul_workspace(&w, product.m)) {
    product.workspace = workspace_of(stream), product.workspace_bytes = WORKSPACE_BYTES;
    if (!product.workspace) return fail(api, "no GPU memory for the workspace", "LowBitMatMul");
  }
  const int status = jpq_cuda_matmul(&product);
  return status ? fail(api, words(status), "LowBitMatMul") : nullptr;
}

OrtStatus *look_up(const OrtApi *api, const jpq_weight &w, const tensor &indices, void *y, void *stream) {
  const jpq_cuda_lookup lookup = {&w, indices.data, y, stream, indices.count, sizeof(int64_t), JPQ_F32};
  const int status = jpq_cuda_gather(&lookup);
  return status ? fail(api, words(status), "LowBitGather") : nullptr;
}

OrtStatus *ORT_CALL compute(void *data, OrtKernelContext *context) {
  const Kernel &k = *static_cast<const Kernel *>(data);
  const OrtApi *api = k.api;
  const bool gather = k.kind == GATHER;
  const source run = {api, context, nullptr};
  tensor x;
  void *y, *stream = nullptr;
  size_t at = 1;
  TRY(input(api, context, 0, &x));
  TRY(ORT(api, KernelContext_GetGPUComputeStream)(context, &stream));
  for (int i = 0; i < k.count; i++) {
    jpq_weight w = k.parts[i].shape;
    const void *bias = nullptr;
    TRY(read_weight(&run, &at, k.parts[i].symmetric, &w));
    if (!gather && k.parts[i].biased) TRY(read_bias(api, context, at++, &w, &bias));
    TRY(make_output(api, context, (size_t)i, &w, gather, &x, &y));
    TRY(gather ? look_up(api, w, x, y, stream) : multiply(api, w, x, bias, y, stream));
  }
  return nullptr;
}

constexpr OrtCustomOp BASE = {
    JPQ_ORT_API, nullptr,    name,        provider,     input_type,  input_count, output_type, output_count, nullptr,
    destroy,     input_kind, output_kind, memory_type,  one,         none,        one,         one,          create,
    compute,     nullptr,    one,         last_version, nullptr,     nullptr,     nullptr,     nullptr};

const Operator operators[] = {
    {BASE, "LowBitMatMul", MATMUL}, {BASE, "LowBitMatMuls", MATMULS}, {BASE, "LowBitGather", GATHER}};

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
