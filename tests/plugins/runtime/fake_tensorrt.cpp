// libnvinfer.so for tests: an "engine" is a text that lists its tensors and profiles, and computes a rule over the tokens
// it finds in its KV cache. The classes Stub... are generated from NVIDIA's headers: each of their methods ends the test.
//
//     in|out NAME TYPE RANK size...             range PROFILE NAME RANK smallest... largest...
#include <NvInferRuntime.h>

#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "fake_gpu.h"
#include "fake_stubs.h"

using namespace nvinfer1;

struct Tensor {
  std::string name;
  bool input;
  DataType type;
  Dims dims;
};

static ILogger *logger;  // of the model opened last
static bool refuse(char const *what) {
  logger->log(ILogger::Severity::kVERBOSE, "chatter");
  logger->log(ILogger::Severity::kERROR, (std::string("refused:\n") + what).c_str());
  return false;
}

static Dims read_dims(std::istream &from, int rank) {
  Dims out{};
  out.nbDims = rank;
  for (int i = 0; i < rank; i++) from >> out.d[i];
  return out;
}

struct Engine final : ICudaEngine, StubCudaEngine {
  std::vector<Tensor> tensors;
  std::map<std::pair<int, std::string>, std::pair<Dims, Dims>> ranges;
  int profiles = 0;
  explicit Engine(std::string const &text);
  ~Engine() noexcept override { record("~engine"); }
  Tensor const &find(char const *name) const {
    for (Tensor const &t : tensors)
      if (t.name == name) return t;
    never("no tensor %s", name);
  }
  IExecutionContext *createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept override;
  int32_t getNbOptimizationProfiles() const noexcept override { return profiles; }
  int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(tensors.size()); }
  char const *getIOTensorName(int32_t i) const noexcept override { return tensors.at(i).name.c_str(); }
  TensorIOMode getTensorIOMode(char const *name) const noexcept override {
    return find(name).input ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
  }
  DataType getTensorDataType(char const *name) const noexcept override { return find(name).type; }
  Dims getTensorShape(char const *name) const noexcept override { return find(name).dims; }
  Dims getProfileShape(char const *name, int32_t profile, OptProfileSelector select) const noexcept override {
    auto found = ranges.find({profile, name});
    if (found == ranges.end() || select == OptProfileSelector::kOPT) never("profile %d of %s", profile, name);
    return select == OptProfileSelector::kMIN ? found->second.first : found->second.second;
  }
};

Engine::Engine(std::string const &text) {
  mImpl = this;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream in(line);
    std::string kind, name;
    int number, rank;
    in >> kind;
    if (kind == "range") {
      in >> number >> name >> rank;
      const Dims low = read_dims(in, rank);
      ranges[{number, name}] = {low, read_dims(in, rank)};
      profiles = number + 1 > profiles ? number + 1 : profiles;
    } else {
      in >> name >> number >> rank;
      tensors.push_back({name, kind == "in", static_cast<DataType>(number), read_dims(in, rank)});
    }
    if (!in) never("engine: %s", line.c_str());
  }
}

struct Context final : IExecutionContext, StubExecutionContext {
  Engine *engine;
  int profile = 0;
  std::map<std::string, Dims> shapes;
  std::map<std::string, char *> at;
  explicit Context(Engine *of) : engine(of) { mImpl = this; }
  ~Context() noexcept override {
    need_context();
    record("~context");
  }
  bool setOptimizationProfileAsync(int32_t index, cudaStream_t) noexcept override {
    need_context();
    record("profile %d", index);
    if (broken("profile")) return refuse("profile");
    profile = index;
    shapes.clear();  // they must all be set again
    return true;
  }
  bool setInputShape(char const *name, Dims const &dims) noexcept override;
  bool setTensorAddress(char const *name, void *data) noexcept override {
    engine->find(name);
    if (reinterpret_cast<uintptr_t>(data) % 256) never("%s: not aligned", name);
    if (broken("address")) return refuse("address");
    at[name] = static_cast<char *>(data);
    return data != nullptr;
  }
  bool enqueueV3(cudaStream_t stream) noexcept override;
};

IExecutionContext *Engine::createExecutionContext(ExecutionContextAllocationStrategy) noexcept {
  need_context();
  record("createExecutionContext");
  if (broken("context")) return refuse("context"), nullptr;
  return new Context(this);
}

bool Context::setInputShape(char const *name, Dims const &dims) noexcept {
  auto range = engine->ranges.at({profile, name});
  bool fits = dims.nbDims == range.first.nbDims && !broken("shape");
  for (int i = 0; fits && i < dims.nbDims; i++) fits = dims.d[i] >= range.first.d[i] && dims.d[i] <= range.second.d[i];
  if (!fits) return refuse(name);
  std::string sizes;
  for (int i = 0; i < dims.nbDims; i++) sizes += " " + std::to_string(dims.d[i]);
  record("shape %s%s", name, sizes.c_str());
  shapes[name] = dims;
  return true;
}

// Cache tensor j holds token * 64 + j everywhere: past is checked and copied behind, so that no two can be mixed up.
static void grow(float const *past, float *present, Dims const &dims, std::vector<int64_t> &tokens, int64_t const *ids, int j) {
  const int64_t before = dims.d[2], count = static_cast<int64_t>(tokens.size()) - before, width = dims.d[3];
  for (int64_t head = 0; head < dims.d[1]; head++)
    for (int64_t t = 0; t < before + count; t++)
      for (int64_t i = 0; i < width; i++) {
        const float value = t < before ? past[(head * before + t) * width + i] : static_cast<float>(ids[t - before] * 64 + j);
        if (!(value >= 0) || static_cast<int64_t>(value) % 64 != j) never("cache tensor %d: %g at position %ld", j, value, (long)t);
        tokens[t] = static_cast<int64_t>(value) / 64;
        present[(head * (before + count) + t) * width + i] = value;
      }
}

static void compute(Engine *engine, std::map<std::string, Dims> shapes, std::map<std::string, char *> at, int64_t vocab) {
  auto const *ids = reinterpret_cast<int64_t *>(at["input_ids"]), *mask = reinterpret_cast<int64_t *>(at["attention_mask"]);
  auto const *positions = reinterpret_cast<int64_t *>(at["position_ids"]);
  const int64_t count = shapes["input_ids"].d[1], total = shapes["attention_mask"].d[1];
  std::vector<int64_t> tokens(total, -1);
  for (int64_t i = 0; i < total; i++)
    if (mask[i] != 1) never("mask %ld", (long)mask[i]);
  for (int64_t i = 0; i < count; i++)
    if (positions[i] != total - count + i) never("position %ld", (long)positions[i]);
  int j = 0;
  for (Tensor const &t : engine->tensors) {
    if (t.name.rfind("past.", 0)) continue;
    auto *present = reinterpret_cast<float *>(at["present." + t.name.substr(5)]);
    if (shapes[t.name].d[2] != total - count) never("%s: another past", t.name.c_str());
    grow(reinterpret_cast<float *>(at[t.name]), present, shapes[t.name], tokens, ids, j++);
  }
  auto *logits = reinterpret_cast<float *>(at["logits"]);
  int64_t state = 7;
  std::vector<int64_t> states;  // of the new tokens
  for (int64_t t = 0; t < total; t++) {
    state = (state * 31 + tokens[t] * 17 + 5) % 1009;
    if (t >= total - count) states.push_back(state);
  }
  if (at.count("logits_at")) {
    auto const *wanted = reinterpret_cast<int64_t *>(at["logits_at"]);
    std::vector<int64_t> chosen;
    for (int64_t i = 0; i < shapes["logits_at"].d[0]; i++) chosen.push_back(states.at(wanted[i]));
    states = chosen;
  }
  for (size_t t = 0; t < states.size(); t++)
    for (int64_t v = 0; v < vocab; v++) logits[t * vocab + v] = static_cast<float>(states[t] * (v + 1) * 13 % 101) / 8;
}

bool Context::enqueueV3(cudaStream_t stream) noexcept {
  for (Tensor const &t : engine->tensors) {
    if (!at[t.name]) return refuse((t.name + ": no address").c_str());
    if (t.input && !shapes.count(t.name)) return refuse((t.name + ": no shape").c_str());
  }
  record("enqueue profile %d", profile);
  if (broken("enqueue")) return refuse("enqueue");
  Engine *of = engine;
  auto with = shapes;
  auto where = at;
  const int64_t vocab = engine->find("logits").dims.d[2];
  queue(stream, [=] { compute(of, with, where, vocab); });
  return true;
}

struct Registry final : StubPluginRegistry {
  PluginLibraryHandle loadLibrary(AsciiChar const *path) noexcept override {
    record("loadLibrary %s", path);
    return broken("plugin") ? (refuse("plugin"), nullptr) : this;
  }
};

struct Runtime final : IRuntime, StubRuntime {
  Registry registry;
  Runtime() { mImpl = this; }
  ~Runtime() noexcept override { record("~runtime"); }
  IPluginRegistry &getPluginRegistry() noexcept override { return registry; }
  ICudaEngine *deserializeCudaEngine(void const *blob, std::size_t size) noexcept override {
    record("deserializeCudaEngine %zu", size);
    if (broken("deserialize")) return refuse("deserialize"), nullptr;
    return new Engine(std::string(static_cast<char const *>(blob), size));
  }
};

extern "C" int32_t getInferLibVersion() noexcept {
  return std::getenv("FAKE_VERSION") ? std::atoi(std::getenv("FAKE_VERSION")) : NV_TENSORRT_MAJOR * 10000 + 300;
}

extern "C" void *createInferRuntime_INTERNAL(void *with, int32_t version) noexcept {
  need_context();
  record("createInferRuntime %d", version / 10000);
  logger = static_cast<ILogger *>(with);
  if (broken("runtime")) return nullptr;
  return static_cast<IRuntime *>(new Runtime);
}
