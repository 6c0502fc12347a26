// Every kernel on buffers of exactly the bytes it may touch, to be run under AddressSanitizer; an argument names a
// buffer that is made one element short, which must be seen.
#include <string>

#include "low_bit_cuda.cu"

static std::string short_buffer;

static char *buffer(const char *name, size_t count, size_t size) {
  if (short_buffer == name) count--;
  char *p = (char *)malloc(count * size);  // exact, so that the next byte is poisoned
  memset(p, 0, count * size);
  return p;
}

struct Made {
  jpq_weight weight;
  char *parts[3];
  ~Made() {
    for (char *p : parts) free(p);
  }
};

static Made make(int64_t n, int64_t k, int bits, int group_size, bool symmetric) {
  const size_t groups = k / group_size;
  Made out;
  out.parts[0] = buffer("packed", n * jpq_bytes(k, bits), 1);
  out.parts[1] = buffer("scales", n * groups, 2);
  out.parts[2] = symmetric ? nullptr : buffer("zeros", n * jpq_bytes(groups, bits), 1);
  out.weight = {(uint8_t *)out.parts[0], (uint16_t *)out.parts[1], (uint8_t *)out.parts[2], n, k, bits, group_size};
  return out;
}

static int product(const jpq_weight &w, int64_t m, int type) {
  const size_t size = type == JPQ_F16 ? 2 : 4, bytes = jpq_cuda_matmul_workspace(&w, m);
  char *x = buffer("x", m * w.k, size), *y = buffer("y", m * w.n, size), *bias = buffer("bias", w.n, size);
  char *workspace = buffer("workspace", bytes, 1);
  const jpq_cuda_product p = {&w, x, bias, y, workspace, bytes, nullptr, m, type, type, type, JPQ_CUDA_AUTO};
  const int status = jpq_cuda_matmul(&p);
  free(x), free(y), free(bias), free(workspace);
  return status;
}

static int look_up(const jpq_weight &w, int bytes) {
  char *indices = buffer("indices", 3, bytes), *out = buffer("out", 3 * w.k, 4);
  const int last = (int)w.n - 1;
  memcpy(indices + bytes, &last, 4);  // little-endian: the low half
  const jpq_cuda_lookup p = {&w, indices, out, nullptr, 3, bytes, JPQ_F32};
  const int status = jpq_cuda_gather(&p);
  free(indices), free(out);
  return status;
}

int main(int argc, char **argv) {
  if (argc > 1) short_buffer = argv[1];
  const int64_t rows[] = {1, 4, 16};
  int products = 0, look_ups = 0;
  for (const int bits : {1, 2, 3, 4, 5, 6, 7, 8, JPQ_TERNARY}) {
    for (const int64_t k : {96, 1120}) {
      const Made made = make(5, k, bits, 32, k == 1120);
      for (const int64_t m : rows)
        for (const int type : {JPQ_F32, JPQ_F16}) {
          if (product(made.weight, m == 16 && k == 96 ? 17 : m, type)) return 2;
          products++;
        }
      for (const int bytes : {4, 8}) {
        if (look_up(made.weight, bytes)) return 2;
        look_ups++;
      }
    }
  }
  printf("ran %d products and %d look-ups\n", products, look_ups);
  return 0;
}
