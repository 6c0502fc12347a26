// Vectors of texts and how alike they are: embed BUNDLE "text" "text" ...
//
// JPQ_ONNXRUNTIME: libonnxruntime.so or its folder, when it is neither beside libjpq_runtime nor installed. With
// JPQ_VECTORS set, the vectors are printed instead.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <jpq_runtime.hpp>

static double cosine(std::vector<float> const &a, std::vector<float> const &b) {
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); i++) ab += a[i] * b[i], aa += a[i] * a[i], bb += b[i] * b[i];
  return ab / std::sqrt(aa * bb);
}

int main(int count, char **arguments) {
  if (count < 3) {
    std::fprintf(stderr, "usage: %s BUNDLE \"text\" \"text\" ...\n", arguments[0]);
    return 2;
  }
  try {
    jpq::LoadOptions options;
    options.library = std::getenv("JPQ_ONNXRUNTIME");
    const jpq::Model model(arguments[1], options);
    const std::vector<std::string> texts(arguments + 2, arguments + count);
    const auto vectors = model.embed(texts);
    for (size_t i = 0; i < vectors.size(); i++) {
      if (std::getenv("JPQ_VECTORS"))
        for (float value : vectors[i]) std::printf("%.9g ", value);
      else
        for (auto const &other : vectors) std::printf("%7.4f ", cosine(vectors[i], other));
      std::printf(" %s\n", texts[i].c_str());
    }
  } catch (jpq::Error const &error) {
    std::fprintf(stderr, "%s: %s\n", arguments[0], error.what());
    return 1;
  }
}
