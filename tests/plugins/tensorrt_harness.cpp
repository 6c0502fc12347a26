// Calls the plugins as TensorRT does, in its order, on host memory: the kernels come from the host shim. For ctypes.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

// Dimensions as expressions, as a builder would make them; the two classes below stand in for libnvinfer's.
struct Number final : IDimensionExpr, apiv::VDimensionExpr {
  int64_t value;
  explicit Number(int64_t v) : value(v) { mImpl = this; }
  bool isConstant() const override { return value >= 0; }
  int64_t getConstantValue() const override { return value; }
  bool isSizeTensor() const override { return false; }
};

struct Numbers final : IExprBuilder, apiv::VExprBuilder {
  std::vector<std::unique_ptr<Number>> made;
  Numbers() { mImpl = this; }
  IDimensionExpr const *constant(int64_t value) override {
    made.push_back(std::make_unique<Number>(value));
    return made.back().get();
  }
  IDimensionExpr const *operation(DimensionOperation, IDimensionExpr const &, IDimensionExpr const &) override {
    return nullptr;
  }
  IDimensionExpr const *declareSizeTensor(int32_t, IDimensionExpr const &, IDimensionExpr const &) override {
    return nullptr;
  }
};

std::string last_log;
struct Logger final : ILogger {
  void log(Severity, char const *text) noexcept override { last_log = text; }
};
struct Finder final : ILoggerFinder {
  ILogger *findLogger() override {
    static Logger logger;
    return &logger;
  }
};

constexpr int MOST = 6;

}  // namespace

extern "C" {

// A tensor as Python describes it.
struct Tensor {
  void *data;
  int64_t dims[8];
  int32_t rank, type;
};

struct Call {
  char const *library, *op;
  int32_t bits, K, N, group_size, symmetric;
  int32_t wide_fields;  // attributes as int64, as newer parsers hand them over
  Tensor tensors[MOST];  // inputs, then the output
  int32_t inputs, workspace_missing;
  int64_t out_dims[8];  // filled in
  int32_t out_rank;
  int64_t workspace_bytes;
};

char const *harness_log() { return last_log.c_str(); }

static IPluginCreatorV3One *find(Call const *call) {
  void *library = dlopen(call->library, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    last_log = dlerror();
    return nullptr;
  }
  auto get = reinterpret_cast<IPluginCreatorInterface *const *(*)(int32_t &)>(dlsym(library, "getCreators"));
  auto set = reinterpret_cast<void (*)(ILoggerFinder *)>(dlsym(library, "setLoggerFinder"));
  static Finder finder;
  int32_t count = 0;
  set(&finder);
  auto *creators = get(count);
  for (int32_t i = 0; i < count; i++) {
    auto *creator = static_cast<IPluginCreatorV3One *>(creators[i]);
    if (strcmp(creator->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE")) continue;
    if (!strcmp(creator->getPluginName(), call->op) && !strcmp(creator->getPluginNamespace(), "jpq") &&
        !strcmp(creator->getPluginVersion(), "1"))
      return creator;
  }
  return nullptr;
}

static IPluginV3 *create(Call const *call, IPluginCreatorV3One *creator) {
  char const *names[] = {"bits", "K", "N", "group_size", "symmetric"};
  const int32_t narrow[] = {call->bits, call->K, call->N, call->group_size, call->symmetric};
  int64_t wide[5];
  std::vector<PluginField> fields;
  fields.emplace_back("plugin_version", "1", PluginFieldType::kCHAR, 1);
  for (int i = 0; i < 5; i++) {
    wide[i] = narrow[i];
    if (call->wide_fields)
      fields.emplace_back(names[i], wide + i, PluginFieldType::kINT64, 1);
    else
      fields.emplace_back(names[i], narrow + i, PluginFieldType::kINT32, 1);
  }
  PluginFieldCollection all = {(int32_t)fields.size(), fields.data()};
  return creator->createPlugin("node", &all, TensorRTPhase::kBUILD);
}

static DynamicPluginTensorDesc describe(Tensor const &tensor, bool first) {
  DynamicPluginTensorDesc out = {};
  out.desc.type = (DataType)tensor.type;
  out.desc.format = TensorFormat::kLINEAR;
  out.desc.dims.nbDims = tensor.rank;
  memcpy(out.desc.dims.d, tensor.dims, sizeof tensor.dims);
  out.min = out.max = out.opt = out.desc.dims;
  if (first) out.desc.dims.d[0] = -1;  // dynamic while the engine is built
  return out;
}

// 0, or the number of the step that failed. Runs a serialised and restored copy, as an engine does.
int harness_run(Call *call) {
  last_log.clear();
  IPluginCreatorV3One *creator = find(call);
  if (!creator) return 1;
  std::unique_ptr<IPluginV3> built(create(call, creator));
  if (!built) return 2;
  auto *core = static_cast<IPluginV3OneCore *>(built->getCapabilityInterface(PluginCapabilityType::kCORE));
  auto *build = static_cast<IPluginV3OneBuild *>(built->getCapabilityInterface(PluginCapabilityType::kBUILD));
  if (strcmp(core->getPluginName(), call->op) || strcmp(core->getPluginNamespace(), "jpq")) return 3;
  const int n = call->inputs;
  std::vector<DynamicPluginTensorDesc> all;
  for (int i = 0; i <= n; i++) all.push_back(describe(call->tensors[i], i == 0 || i == n));
  for (int i = 0; i <= n; i++)
    if (!build->supportsFormatCombination(i, all.data(), n, 1)) return 100 + i;
  DataType types[MOST], out_type;
  for (int i = 0; i < n; i++) types[i] = all[i].desc.type;
  if (build->getOutputDataTypes(&out_type, 1, types, n) || out_type != all[n].desc.type) return 4;
  Numbers numbers;
  DimsExprs dims[MOST] = {}, out_dims = {};
  for (int i = 0; i < n; i++) {
    dims[i].nbDims = call->tensors[i].rank;
    for (int d = 0; d < dims[i].nbDims; d++) dims[i].d[d] = numbers.constant(call->tensors[i].dims[d]);
  }
  if (build->getOutputShapes(dims, n, nullptr, 0, &out_dims, 1, numbers)) return 5;
  call->out_rank = out_dims.nbDims;
  for (int d = 0; d < out_dims.nbDims; d++) call->out_dims[d] = out_dims.d[d]->getConstantValue();
  if (build->configurePlugin(all.data(), n, all.data() + n, 1)) return 6;
  call->workspace_bytes = (int64_t)build->getWorkspaceSize(all.data(), n, all.data() + n, 1);

  std::unique_ptr<IPluginV3> copy(built->clone());
  built.swap(copy);
  copy.reset();  // a clone outlives what it was cloned from
  auto *before = static_cast<IPluginV3OneRuntime *>(built->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  auto const *saved = before->getFieldsToSerialize();
  std::unique_ptr<IPluginV3> restored(creator->createPlugin("node", saved, TensorRTPhase::kRUNTIME));
  if (!restored) return 7;
  built.reset();
  auto *runtime = static_cast<IPluginV3OneRuntime *>(restored->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  std::unique_ptr<IPluginV3> attached(runtime->attachToContext(nullptr));
  runtime = static_cast<IPluginV3OneRuntime *>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  std::vector<PluginTensorDesc> in;
  void const *inputs[MOST];
  void *output = call->tensors[n].data;
  for (int i = 0; i < n; i++) {
    in.push_back(all[i].desc);
    in[i].dims = all[i].max;
    inputs[i] = call->tensors[i].data;
  }
  PluginTensorDesc out = all[n].desc;
  out.dims = all[n].max;
  if (runtime->enqueue(in.data(), &out, inputs, &output, nullptr, nullptr) == 0) return 8;  // before onShapeChange
  if (runtime->onShapeChange(in.data(), n, &out, 1)) return 9;
  std::vector<float> workspace(call->workspace_bytes / 4 + 1, 0.0f / 0.0f);
  void *scratch = call->workspace_missing ? nullptr : workspace.data();
  return runtime->enqueue(in.data(), &out, inputs, &output, scratch, nullptr) ? 10 : 0;
}
}
