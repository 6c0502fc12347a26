// What the plugins tell TensorRT when an engine is built, and what they queue when it runs.
#include "low_bit_plugin.h"

#include <new>

using namespace nvinfer1;

namespace jpq_tensorrt {

namespace {

bool is_float(DataType type) { return type == DataType::kFLOAT || type == DataType::kHALF; }
// Packed bytes may be declared either way: ONNX says uint8, and int8 is what TensorRT handles in more places.
bool is_bytes(DataType type) { return type == DataType::kUINT8 || type == DataType::kINT8; }
bool is_index(DataType type) { return type == DataType::kINT64 || type == DataType::kINT32; }
int32_t float_code(DataType type) { return type == DataType::kHALF ? JPQ_F16 : JPQ_F32; }

// Numbers before the last `skip` dimensions; -1 when one is not known.
int64_t count(Dims const &dims, int32_t skip) {
  int64_t out = 1;
  for (int32_t i = 0; i < dims.nbDims - skip; i++) {
    if (dims.d[i] < 0) return -1;
    out *= dims.d[i];
  }
  return out;
}

bool is_matrix(Dims const &dims, int64_t rows, int64_t columns) {
  return dims.nbDims == 2 && dims.d[0] == rows && dims.d[1] == columns;
}

}  // namespace

LowBit::LowBit(Kind kind, Settings const &settings) : kind_(kind), settings_(settings) {
  Settings const &s = settings_;
  timing_key_ = std::string(name_of(kind)) + "_1_b" + std::to_string(s.bits) + "_k" + std::to_string(s.K) + "_n" +
                std::to_string(s.N) + "_g" + std::to_string(s.group_size) + "_s" + std::to_string(s.symmetric);
}

IPluginCapability *LowBit::getCapabilityInterface(PluginCapabilityType type) noexcept {
  switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore *>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild *>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime *>(this);
  }
  return nullptr;
}

IPluginV3 *LowBit::clone() noexcept {
  LowBit *copy = new (std::nothrow) LowBit(kind_, settings_);
  if (copy) copy->inputs_ = inputs_;
  return copy;
}

IPluginV3 *LowBit::attachToContext(IPluginResourceContext *) noexcept { return clone(); }  // no resources are shared

char const *LowBit::getPluginName() const noexcept { return name_of(kind_); }
char const *LowBit::getPluginVersion() const noexcept { return "1"; }
char const *LowBit::getPluginNamespace() const noexcept { return "jpq"; }

bool LowBit::counts_fit(int32_t inputs, int32_t outputs) const {
  const int32_t least = first_bias(), most = kind_ == Kind::matmul ? least + 1 : least;
  return outputs == 1 && inputs >= least && inputs <= most;
}

// Whether all inputs have the shapes the settings promise; dimensions that vary are -1.
bool LowBit::shapes_fit(Dims const *const *dims, int32_t inputs) const {
  const int64_t groups = settings_.K / settings_.group_size;
  const int32_t bits = settings_.bits;
  if (kind_ == Kind::matmul) {
    Dims const &x = *dims[0];
    if (x.nbDims < 1 || (x.d[x.nbDims - 1] != settings_.K && x.d[x.nbDims - 1] != -1)) return false;
  }
  if (!is_matrix(*dims[1], settings_.N, jpq_bytes(settings_.K, bits))) return false;
  if (!is_matrix(*dims[2], settings_.N, groups)) return false;
  if (!settings_.symmetric && !is_matrix(*dims[3], settings_.N, jpq_bytes(groups, bits))) return false;
  return inputs <= first_bias() || (dims[first_bias()]->nbDims == 1 && dims[first_bias()]->d[0] == settings_.N);
}

int32_t LowBit::configurePlugin(DynamicPluginTensorDesc const *in, int32_t inputs, DynamicPluginTensorDesc const *,
                                int32_t outputs) noexcept {
  if (!counts_fit(inputs, outputs)) return -1;
  std::array<Dims const *, 5> dims{};
  for (int32_t i = 0; i < inputs; i++) dims[i] = &in[i].desc.dims;
  inputs_ = inputs;
  return shapes_fit(dims.data(), inputs) ? 0 : -1;
}

int32_t LowBit::getOutputDataTypes(DataType *types, int32_t outputs, DataType const *input_types,
                                   int32_t inputs) const noexcept {
  if (!counts_fit(inputs, outputs)) return -1;
  types[0] = kind_ == Kind::matmul ? input_types[0] : DataType::kFLOAT;
  return 0;
}

int32_t LowBit::getOutputShapes(DimsExprs const *in, int32_t inputs, DimsExprs const *, int32_t, DimsExprs *out,
                                int32_t outputs, IExprBuilder &builder) noexcept {
  if (!counts_fit(inputs, outputs)) return -1;
  out[0] = in[0];
  if (kind_ == Kind::matmul) {  // [..., K] -> [..., N]
    if (out[0].nbDims < 1) return -1;
    out[0].d[out[0].nbDims - 1] = builder.constant(settings_.N);
  } else {  // [...] -> [..., K]
    if (out[0].nbDims >= Dims::MAX_DIMS) return -1;
    out[0].d[out[0].nbDims++] = builder.constant(settings_.K);
  }
  return out[0].d[out[0].nbDims - 1] ? 0 : -1;
}

// Judged by the tensors up to `at` only, as TensorRT asks.
bool LowBit::supportsFormatCombination(int32_t at, DynamicPluginTensorDesc const *tensors, int32_t inputs,
                                       int32_t outputs) noexcept {
  if (!counts_fit(inputs, outputs) || at < 0 || at > inputs) return false;
  if (tensors[at].desc.format != TensorFormat::kLINEAR) return false;
  const DataType type = tensors[at].desc.type;
  if (at == inputs) return kind_ == Kind::matmul ? type == tensors[0].desc.type : type == DataType::kFLOAT;
  if (at == 0) return kind_ == Kind::matmul ? is_float(type) : is_index(type);
  if (at == 2) return type == DataType::kHALF;
  return at == first_bias() ? is_float(type) : is_bytes(type);
}

size_t LowBit::getWorkspaceSize(DynamicPluginTensorDesc const *in, int32_t inputs, DynamicPluginTensorDesc const *,
                                int32_t outputs) const noexcept {
  if (kind_ != Kind::matmul || !counts_fit(inputs, outputs)) return 0;
  const jpq_weight w = weight();
  const int64_t rows = count(in[0].max, 1);
  return jpq_cuda_matmul_workspace(&w, rows < 0 ? int64_t{JPQ_CUDA_FEW_ROWS} : rows);
}

int32_t LowBit::onShapeChange(PluginTensorDesc const *in, int32_t inputs, PluginTensorDesc const *,
                              int32_t outputs) noexcept {
  if (!counts_fit(inputs, outputs)) return -1;
  std::array<Dims const *, 5> dims{};
  for (int32_t i = 0; i < inputs; i++) dims[i] = &in[i].dims;
  inputs_ = inputs;
  return shapes_fit(dims.data(), inputs) ? 0 : -1;
}

jpq_weight LowBit::weight() const {
  return {nullptr, nullptr, nullptr, settings_.N, settings_.K, settings_.bits, settings_.group_size};
}

int32_t LowBit::enqueue(PluginTensorDesc const *in, PluginTensorDesc const *out, void const *const *inputs,
                        void *const *outputs, void *workspace, cudaStream_t stream) noexcept {
  if (!inputs_) return -1;  // onShapeChange comes first
  jpq_weight w = weight();
  w.packed = static_cast<uint8_t const *>(inputs[1]);
  w.scales = static_cast<uint16_t const *>(inputs[2]);
  w.zeros = settings_.symmetric ? nullptr : static_cast<uint8_t const *>(inputs[3]);
  if (kind_ == Kind::gather) {
    const int32_t bytes = in[0].type == DataType::kINT64 ? 8 : 4;
    const int64_t indices = count(in[0].dims, 0);
    const jpq_cuda_lookup look_up = {&w, inputs[0], outputs[0], stream, indices, bytes, float_code(out[0].type)};
    return jpq_cuda_gather(&look_up);
  }
  const bool biased = inputs_ > first_bias();
  const int64_t rows = count(in[0].dims, 1);
  jpq_cuda_product product = {};
  product.weight = &w, product.x = inputs[0], product.y = outputs[0], product.m = rows;
  product.x_type = float_code(in[0].type), product.y_type = float_code(out[0].type);
  if (biased) product.bias = inputs[first_bias()], product.bias_type = float_code(in[first_bias()].type);
  product.workspace = workspace, product.workspace_bytes = jpq_cuda_matmul_workspace(&w, rows);
  product.stream = stream;
  return jpq_cuda_matmul(&product);
}

PluginFieldCollection const *LowBit::getFieldsToSerialize() noexcept {
  int32_t const *const values[FIELDS] = {&settings_.bits, &settings_.K, &settings_.N, &settings_.group_size,
                                         &settings_.symmetric};
  for (int i = 0; i < FIELDS; i++) fields_[i] = PluginField(field_names[i], values[i], PluginFieldType::kINT32, 1);
  collection_ = {FIELDS, fields_.data()};
  return &collection_;
}

}  // namespace jpq_tensorrt
