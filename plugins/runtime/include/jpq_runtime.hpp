// jpq_runtime.h in C++17: objects that free themselves, exceptions instead of result codes. Header only.
//
//     jpq::Model model("bundle");
//     model.generate("Once upon a time", [](std::string_view text, int64_t) { std::cout << text; return true; });
//
// Threads: as in jpq_runtime.h. A Model may be shared; a Sequence and a Sampler belong to one thread at a time.
#ifndef JPQ_RUNTIME_HPP
#define JPQ_RUNTIME_HPP

#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "jpq_runtime.h"

namespace jpq {

// what(): one line with the remedy; code(): which kind.
class Error : public std::runtime_error {
 public:
  explicit Error(jpq_error const &error) : std::runtime_error(error.text), code_(error.code) {}
  jpq_result code() const noexcept { return code_; }

 private:
  jpq_result code_;
};

struct LoadOptions : jpq_load_options {
  LoadOptions() { jpq_load_defaults(this); }
};
struct Sampling : jpq_sampling {
  Sampling() { jpq_sampling_defaults(this); }
};
struct GenerateOptions : jpq_generate_options {
  GenerateOptions() { jpq_generate_defaults(this); }
};

namespace detail {
template <auto function>
struct Free {
  template <class T>
  void operator()(T *object) const noexcept {
    function(object);
  }
};
inline void check(jpq_result result, jpq_error const &error) {
  if (result != JPQ_SUCCESS) throw Error(error);
}
}  // namespace detail

class Model {
 public:
  explicit Model(std::string const &folder, LoadOptions const &options = {}) {
    jpq_error error;
    jpq_model *made = nullptr;
    detail::check(jpq_model_load(folder.c_str(), &options, &made, &error), error);
    model_.reset(made);
  }

  jpq_model const *get() const noexcept { return model_.get(); }

  jpq_model_info info() const {
    jpq_error error;
    jpq_model_info out = {};
    out.size = sizeof out;
    detail::check(jpq_model_describe(get(), &out, &error), error);
    return out;
  }

  std::vector<int64_t> tokenize(std::string_view text) const {
    jpq_error error;
    std::vector<int64_t> ids(text.size() + 16);  // seldom more tokens than bytes
    size_t count = 0;
    jpq_result result = jpq_tokenize(get(), text.data(), text.size(), ids.data(), ids.size(), &count, &error);
    if (result == JPQ_TOO_SMALL) {
      ids.resize(count);
      result = jpq_tokenize(get(), text.data(), text.size(), ids.data(), ids.size(), &count, &error);
    }
    detail::check(result, error);
    ids.resize(count);
    return ids;
  }

  std::string detokenize(std::vector<int64_t> const &ids) const {
    jpq_error error;
    std::string text(8 * ids.size() + 1, '\0');
    size_t bytes = 0;
    jpq_result result = jpq_detokenize(get(), ids.data(), ids.size(), text.data(), text.size(), &bytes, &error);
    if (result == JPQ_TOO_SMALL) {
      text.resize(bytes + 1);
      result = jpq_detokenize(get(), ids.data(), ids.size(), text.data(), text.size(), &bytes, &error);
    }
    detail::check(result, error);
    text.resize(bytes);
    return text;
  }

  // on_text(text, token) for every token; it returns whether to go on. What it throws comes out of generate.
  template <class OnText>
  void generate(std::string const &prompt, OnText on_text, GenerateOptions const &options = {}) const {
    stream(on_text, [&](jpq_on_token on_token, void *user, jpq_error *error) {
      return jpq_generate(get(), prompt.c_str(), &options, on_token, user, error);
    });
  }

  template <class OnText>
  void generate(std::vector<int64_t> const &ids, OnText on_text, GenerateOptions const &options = {}) const {
    stream(on_text, [&](jpq_on_token on_token, void *user, jpq_error *error) {
      return jpq_generate_ids(get(), ids.data(), ids.size(), &options, on_token, user, error);
    });
  }

  // One vector a text.
  std::vector<std::vector<float>> embed(std::vector<std::string> const &texts) const {
    jpq_error error;
    const size_t dim = static_cast<size_t>(info().embedding);
    std::vector<char const *> pointers;
    for (auto const &text : texts) pointers.push_back(text.c_str());
    std::vector<float> flat(texts.size() * dim + 1);
    detail::check(jpq_embed(get(), pointers.data(), texts.size(), flat.data(), &error), error);
    std::vector<std::vector<float>> out;
    for (size_t i = 0; i < texts.size(); i++) out.emplace_back(flat.begin() + i * dim, flat.begin() + (i + 1) * dim);
    return out;
  }

 private:
  // An exception must not pass through C: it waits here until C has returned.
  template <class OnText>
  struct Call {
    OnText &on_text;
    std::exception_ptr thrown;
    static int on_token(void *user, int64_t token, char const *text, size_t bytes) noexcept {
      auto *call = static_cast<Call *>(user);
      try {
        return call->on_text(std::string_view(text, bytes), token) ? 0 : 1;
      } catch (...) {
        call->thrown = std::current_exception();
        return 1;
      }
    }
  };

  template <class OnText, class Run>
  static void stream(OnText &on_text, Run run) {
    jpq_error error;
    Call<OnText> call{on_text, nullptr};
    const jpq_result result = run(Call<OnText>::on_token, &call, &error);
    if (call.thrown) std::rethrow_exception(call.thrown);
    detail::check(result, error);
  }

  std::unique_ptr<jpq_model, detail::Free<jpq_model_free>> model_;
};

// One growing text. The model must outlive it.
class Sequence {
 public:
  explicit Sequence(Model const &model, int64_t capacity = 0) {
    jpq_error error;
    jpq_sequence *made = nullptr;
    detail::check(jpq_sequence_new(model.get(), capacity, &made, &error), error);
    sequence_.reset(made);
  }

  // Logits [vocab] of the last token, valid until the sequence is used again.
  float const *prefill(std::vector<int64_t> const &ids) {
    jpq_error error;
    float const *logits = nullptr;
    detail::check(jpq_prefill(sequence_.get(), ids.data(), ids.size(), &logits, &error), error);
    return logits;
  }
  float const *decode(int64_t id) {
    jpq_error error;
    float const *logits = nullptr;
    detail::check(jpq_decode(sequence_.get(), id, &logits, &error), error);
    return logits;
  }
  int64_t length() const noexcept { return jpq_sequence_length(sequence_.get()); }
  void reset() noexcept { jpq_sequence_reset(sequence_.get()); }

 private:
  std::unique_ptr<jpq_sequence, detail::Free<jpq_sequence_free>> sequence_;
};

class Sampler {
 public:
  Sampler(int64_t vocab, Sampling const &sampling = {}) {
    jpq_error error;
    jpq_sampler *made = nullptr;
    detail::check(jpq_sampler_new(&sampling, vocab, &made, &error), error);
    sampler_.reset(made);
  }

  int64_t operator()(float const *logits) {
    jpq_error error;
    int64_t token = 0;
    detail::check(jpq_sample(sampler_.get(), logits, &token, &error), error);
    return token;
  }

 private:
  std::unique_ptr<jpq_sampler, detail::Free<jpq_sampler_free>> sampler_;
};

}  // namespace jpq
#endif
