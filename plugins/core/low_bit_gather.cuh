/* Rows of dequant(W) at indices, for embeddings: one warp-sized share of 32-code units at a time, any width. */
#ifndef JPQ_LOW_BIT_GATHER_CUH
#define JPQ_LOW_BIT_GATHER_CUH

#include "low_bit_levels.cuh"

namespace jpq {

constexpr int GATHER_THREADS = 128;

struct Gather {
  Weight w;
  const void *indices;
  void *out;
  int index_bytes, out_type;
};

/* Code j of a row; reads no byte past the one its last bit is in. */
__device__ __forceinline__ uint32_t code_at(const uint8_t *row, int bits, int j) {
  if (bits == JPQ_TERNARY) return ternary_at(row, j);
  const int width = bits & (JPQ_NORMAL - 1), shift = (int)((int64_t)j * width & 7);
  const uint8_t *p = row + ((int64_t)j * width >> 3);
  uint32_t v = p[0];
  if (shift + width > 8) v |= (uint32_t)p[1] << 8;
  return (v >> shift) & ((1u << width) - 1);
}

/* Block (i, part): neighbouring threads write neighbouring numbers, and their bytes of W are neighbours too. */
__global__ void __launch_bounds__(GATHER_THREADS) gather_rows(Gather a) {
  const int64_t i = blockIdx.x;
  int64_t row = a.index_bytes == 8 ? ((const int64_t *)a.indices)[i] : ((const int32_t *)a.indices)[i];
  if (row < 0) row += a.w.n;
  const bool here = row >= 0 && row < a.w.n;
  for (int k = blockIdx.y * GATHER_THREADS + threadIdx.x; k < a.w.k; k += gridDim.y * GATHER_THREADS) {
    float value = __uint_as_float(0x7fc00000u); /* NaN: an index out of range must be seen */
    if (here) {
      const int group = k / a.w.group_size, bits = a.w.bits;
      const uint32_t code = code_at(a.w.packed + row * a.w.row_bytes, bits, k);
      if (bits > JPQ_NORMAL)
        value = level_number(code, bits);
      else
        value = centred(code, offset_of(bits == JPQ_TERNARY ? zero_of<JPQ_TERNARY>(a.w, row, group)
                                                            : load_zero(a.w, row, group)));
      value *= load_scale(a.w, row, group);
    }
    store_float(a.out, a.out_type, i * a.w.k + k, value);
  }
}

}  // namespace jpq
#endif
