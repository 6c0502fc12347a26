/* Every CUDA kernel once, on buffers of exactly the bytes it may touch, for compute-sanitizer.
 *
 *     edges            all is right
 *     edges BUFFER     twin: that buffer is one element short (packed, scales, zeros, x, y, indices)
 *     edges race       twin: a kernel with a race in shared memory
 *
 * Compiled by nvcc for a GPU, or by g++ with the host shim and AddressSanitizer (which sees no races).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>

#include "low_bit_cuda.cu"

static std::string fault;

static void *take(size_t bytes) {
#ifdef __CUDACC__
  void *p = nullptr;
  if (bytes && (cudaMalloc(&p, bytes) != cudaSuccess || cudaMemset(p, 0, bytes) != cudaSuccess)) {
    fprintf(stderr, "edges: no %zu bytes on the GPU\n", bytes);
    exit(3);
  }
  return p;
#else
  return calloc(bytes, 1);
#endif
}

static void give(void *p) {
#ifdef __CUDACC__
  cudaFree(p);
#else
  free(p);
#endif
}

static void put(void *to, const void *from, size_t bytes) {
#ifdef __CUDACC__
  cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice);
#else
  memcpy(to, from, bytes);
#endif
}

static bool finished() {
#ifdef __CUDACC__
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) fprintf(stderr, "edges: %s\n", cudaGetErrorString(error));
  return error == cudaSuccess;
#else
  return true;
#endif
}

static char *buffer(const char *name, size_t count, size_t size) {
  return (char *)take((fault == name ? count - 1 : count) * size);
}

struct Made {
  jpq_weight weight;
  char *parts[3];
  ~Made() {
    for (char *p : parts) give(p);
  }
};

static Made make(int64_t n, int64_t k, int bits, int group_size, bool symmetric) {
  const int64_t groups = k / group_size;
  Made out;
  out.parts[0] = buffer("packed", (size_t)(n * jpq_bytes(k, bits)), 1);
  out.parts[1] = buffer("scales", n * groups, 2);
  out.parts[2] = symmetric ? nullptr : buffer("zeros", (size_t)(n * jpq_bytes(groups, bits)), 1);
  out.weight = {(uint8_t *)out.parts[0], (uint16_t *)out.parts[1], (uint8_t *)out.parts[2], n, k, bits, group_size};
  return out;
}

static int product(const jpq_weight &w, int64_t m, int type) {
  const size_t size = type == JPQ_F16 ? 2 : 4, bytes = jpq_cuda_matmul_workspace(&w, m);
  char *x = buffer("x", m * w.k, size), *y = buffer("y", m * w.n, size), *bias = buffer("bias", w.n, size);
  char *workspace = (char *)take(bytes);
  const jpq_cuda_product p = {&w, x, bias, y, workspace, bytes, nullptr, m, type, type, type, JPQ_CUDA_AUTO};
  const int status = jpq_cuda_matmul(&p);
  const bool good = finished();
  give(x), give(y), give(bias), give(workspace);
  return status || !good;
}

static int look_up(const jpq_weight &w, int bytes) {
  char *indices = buffer("indices", 3, bytes), *out = (char *)take(3 * w.k * 4);
  const int last = (int)w.n - 1;
  put(indices + bytes, &last, 4); /* little-endian: the low half */
  const jpq_cuda_lookup p = {&w, indices, out, nullptr, 3, bytes, JPQ_F32};
  const int status = jpq_cuda_gather(&p);
  const bool good = finished();
  give(indices), give(out);
  return status || !good;
}

#ifdef __CUDACC__
__global__ void racing(int *out) {
  __shared__ int slot[64];
  slot[threadIdx.x] = (int)threadIdx.x; /* no barrier before a neighbour's is read */
  out[threadIdx.x] = slot[(threadIdx.x + 33) % 64];
}

static int race() {
  int *out = (int *)take(64 * sizeof(int));
  racing<<<1, 64>>>(out);
  const bool good = finished();
  give(out);
  return !good;
}
#else
static int race() { return 4; } /* fibers cannot race */
#endif

int main(int argc, char **argv) {
  if (argc > 1) fault = argv[1];
  if (fault == "race") return race();
  int products = 0, look_ups = 0;
  for (const int bits : {1, 2, 3, 4, 5, 6, 7, 8, JPQ_TERNARY, 35, 36, 37, 38})
    for (const int64_t k : {96, 1120}) {
      const Made made = make(5, k, bits, 32, k == 1120 || bits > JPQ_NORMAL);
      for (const int64_t m : {1, 4, 16, 67})
        for (const int type : {JPQ_F32, JPQ_F16}) {
          if (m == 67 && k == 1120) continue;
          if (product(made.weight, m, type)) return 2;
          products++;
        }
      for (const int bytes : {4, 8}) {
        if (look_up(made.weight, bytes)) return 2;
        look_ups++;
      }
    }
  printf("ran %d products and %d look-ups\n", products, look_ups);
  return 0;
}
