// `jpq::LowBitMatMul` and `jpq::LowBitGather` as TensorRT plugins (IPluginV3), over plugins/core's CUDA kernels.
//
// One source for TensorRT 10.3 to 11: only what all of them have is used, and nothing of libnvinfer is linked.
#ifndef JPQ_LOW_BIT_PLUGIN_H
#define JPQ_LOW_BIT_PLUGIN_H

#include <NvInferRuntime.h>

#include <array>
#include <string>

#include "../core/low_bit_cuda.h"

#if NV_TENSORRT_MAJOR < 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR < 3)
#error "jpq: TensorRT 10.3 or later is needed"
#endif

namespace jpq_tensorrt {

// What a node's attributes say; exactly these are serialised, as int32 fields of the same names.
struct Settings {
  int32_t bits = 0, K = 0, N = 0, group_size = 0, symmetric = -1;
};
constexpr int FIELDS = 5;
extern const std::array<char const *, FIELDS> field_names;

enum class Kind { matmul, gather };
char const *name_of(Kind kind);

// Sentence that says what is wrong with settings or with a field collection; empty when nothing is.
std::string read_settings(nvinfer1::PluginFieldCollection const *fields, Settings *out);

class LowBit final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  LowBit(Kind kind, Settings const &settings);

  // IPluginV3
  nvinfer1::IPluginCapability *getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3 *clone() noexcept override;

  // IPluginV3OneCore
  char const *getPluginName() const noexcept override;
  char const *getPluginVersion() const noexcept override;
  char const *getPluginNamespace() const noexcept override;

  // IPluginV3OneBuild
  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const *in, int32_t inputs,
                          nvinfer1::DynamicPluginTensorDesc const *out, int32_t outputs) noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType *types, int32_t outputs, nvinfer1::DataType const *input_types,
                             int32_t inputs) const noexcept override;
  int32_t getOutputShapes(nvinfer1::DimsExprs const *in, int32_t inputs, nvinfer1::DimsExprs const *shapes,
                          int32_t shape_inputs, nvinfer1::DimsExprs *out, int32_t outputs,
                          nvinfer1::IExprBuilder &builder) noexcept override;
  bool supportsFormatCombination(int32_t at, nvinfer1::DynamicPluginTensorDesc const *tensors, int32_t inputs,
                                 int32_t outputs) noexcept override;
  int32_t getNbOutputs() const noexcept override { return 1; }
  size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const *in, int32_t inputs,
                          nvinfer1::DynamicPluginTensorDesc const *out, int32_t outputs) const noexcept override;
  char const *getTimingCacheID() noexcept override { return timing_key_.c_str(); }

  // IPluginV3OneRuntime
  int32_t onShapeChange(nvinfer1::PluginTensorDesc const *in, int32_t inputs, nvinfer1::PluginTensorDesc const *out,
                        int32_t outputs) noexcept override;
  int32_t enqueue(nvinfer1::PluginTensorDesc const *in, nvinfer1::PluginTensorDesc const *out,
                  void const *const *inputs, void *const *outputs, void *workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3 *attachToContext(nvinfer1::IPluginResourceContext *context) noexcept override;
  nvinfer1::PluginFieldCollection const *getFieldsToSerialize() noexcept override;

 private:
  int first_bias() const { return settings_.symmetric ? 3 : 4; }  // index of the bias among the inputs, if it is there
  bool counts_fit(int32_t inputs, int32_t outputs) const;
  bool shapes_fit(nvinfer1::Dims const *const *dims, int32_t inputs) const;
  jpq_weight weight() const;

  Kind kind_;
  Settings settings_;
  int32_t inputs_ = 0;  // as last configured: whether there is a bias
  std::string timing_key_;
  std::array<nvinfer1::PluginField, FIELDS> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace jpq_tensorrt
#endif
