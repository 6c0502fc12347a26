// Where TensorRT finds the plugins: their creators, the fields these take, and the exported functions.
#include <cstring>
#include <new>

#include "low_bit_plugin.h"

using namespace nvinfer1;

namespace jpq_tensorrt {

const std::array<char const *, FIELDS> field_names = {"bits", "K", "N", "group_size", "symmetric"};

char const *name_of(Kind kind) { return kind == Kind::matmul ? "LowBitMatMul" : "LowBitGather"; }

namespace {

ILoggerFinder *logger_finder = nullptr;

void log_error(std::string const &text) noexcept {
  ILogger *logger = logger_finder ? logger_finder->findLogger() : nullptr;
  if (logger) logger->log(ILogger::Severity::kERROR, text.c_str());
}

// An integer of a field; the parser hands ONNX integers over with 32 bits or with 64.
bool read_int(PluginField const &field, int32_t *out) {
  if (!field.data || field.length < 1) return false;
  if (field.type == PluginFieldType::kINT32) {
    std::memcpy(out, field.data, sizeof *out);
    return true;
  }
  int64_t wide;
  if (field.type != PluginFieldType::kINT64) return false;
  std::memcpy(&wide, field.data, sizeof wide);
  *out = static_cast<int32_t>(wide);
  return *out == wide;
}

std::string check(Settings const &s) {
  static const uint8_t byte = 0;
  static const uint16_t half = 0;
  const jpq_weight w = {&byte, &half, nullptr, s.N, s.K, s.bits, s.group_size};
  if (s.symmetric != 0 && s.symmetric != 1) return "symmetric must be 0 or 1";
  switch (jpq_cuda_check(&w)) {
    case JPQ_CUDA_OK: return "";
    case JPQ_CUDA_BAD_GROUP: return "group_size " + std::to_string(s.group_size) + " is not a multiple of 32";
    default: return "bits must be 1 to 8 or 16 for ternary, K a multiple of group_size, N not negative";
  }
}

}  // namespace

std::string read_settings(PluginFieldCollection const *fields, Settings *out) {
  int32_t *const values[FIELDS] = {&out->bits, &out->K, &out->N, &out->group_size, &out->symmetric};
  bool seen[FIELDS] = {};
  for (int32_t i = 0; fields && i < fields->nbFields; i++) {
    PluginField const &field = fields->fields[i];
    for (int j = 0; field.name && j < FIELDS; j++) {  // others (plugin_version, plugin_namespace) are the parser's
      if (std::strcmp(field.name, field_names[j])) continue;
      if (!read_int(field, values[j])) return std::string(field.name) + " must be an integer";
      seen[j] = true;
    }
  }
  for (int j = 0; j < FIELDS; j++)
    if (!seen[j]) return std::string(field_names[j]) + " is missing";
  return check(*out);
}

class Creator final : public IPluginCreatorV3One {
 public:
  explicit Creator(Kind kind) : kind_(kind) {
    for (int i = 0; i < FIELDS; i++) fields_[i] = PluginField(field_names[i], nullptr, PluginFieldType::kINT32, 1);
    collection_ = {FIELDS, fields_.data()};
  }

  IPluginV3 *createPlugin(char const *name, PluginFieldCollection const *fields, TensorRTPhase) noexcept override {
    Settings settings;
    const std::string wrong = read_settings(fields, &settings);
    if (wrong.empty()) return new (std::nothrow) LowBit(kind_, settings);
    log_error(std::string("jpq::") + name_of(kind_) + " " + (name ? name : "") + ": " + wrong);
    return nullptr;
  }

  PluginFieldCollection const *getFieldNames() noexcept override { return &collection_; }
  char const *getPluginName() const noexcept override { return name_of(kind_); }
  char const *getPluginVersion() const noexcept override { return "1"; }
  char const *getPluginNamespace() const noexcept override { return "jpq"; }

 private:
  Kind kind_;
  std::array<PluginField, FIELDS> fields_;
  PluginFieldCollection collection_;
};

}  // namespace jpq_tensorrt

// TensorRT looks these two up by name when a plugin library is loaded (`setPluginsToSerialize`, `load_library`).
extern "C" JPQ_EXPORT IPluginCreatorInterface *const *getCreators(int32_t &count) {
  static jpq_tensorrt::Creator matmul(jpq_tensorrt::Kind::matmul), gather(jpq_tensorrt::Kind::gather);
  static IPluginCreatorInterface *const all[] = {&matmul, &gather};
  count = 2;
  return all;
}

extern "C" JPQ_EXPORT void setLoggerFinder(ILoggerFinder *finder) { jpq_tensorrt::logger_finder = finder; }
