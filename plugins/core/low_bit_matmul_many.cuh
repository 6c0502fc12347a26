/* Y = X . dequant(W)^T for many rows of X (prefill): weights are unpacked into shared memory, tensor cores multiply.
 *
 * A block makes 64 x 64 of Y, 64 of K at a time. Shared memory holds code - zero, which fp16 holds exactly; the scale
 * is applied to fp32 sums at the end of each group. So the weight is never rounded. fp32 X is cut into two fp16 numbers
 * and multiplied twice.
 */
#ifndef JPQ_LOW_BIT_MATMUL_MANY_CUH
#define JPQ_LOW_BIT_MATMUL_MANY_CUH

#include "low_bit_levels.cuh"

namespace jpq {

constexpr int TILE = 64, MANY_THREADS = 128;
constexpr int MANY_BLOCKS = 3; /* on a multiprocessor: left to itself ptxas aims at more, and spills on sm_90 */
constexpr int STRIDE = TILE + 8; /* halves: 36 words, so that the 8 x 4 lanes of a fragment hit 32 banks */
constexpr int MANY_SHARED = 3 * TILE * STRIDE * 2 + TILE * 2 * 4;

struct Many {
  Weight w;
  const void *x, *bias;
  void *y;
  int64_t m;
  int x_type, bias_type, y_type;
};

__device__ __forceinline__ float low_half(uint32_t word) { return half_to_float((uint16_t)word); }
__device__ __forceinline__ float high_half(uint32_t word) { return half_to_float((uint16_t)(word >> 16)); }

/* X[64, 64] as fp16, and what fp16 loses of it (zero for fp16 X); beyond the edges zero. */
template <bool SPLIT>
__device__ __forceinline__ void stage_many_x(const Many &a, int64_t first, int k0, uint16_t *high, uint16_t *low) {
  for (int i = threadIdx.x; i < TILE * TILE / 4; i += MANY_THREADS) {
    const int m = i / (TILE / 4), at = i % (TILE / 4) * 4;
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    if (first + m < a.m && k0 + at < a.w.k) v = load_four(a.x, a.x_type, (first + m) * a.w.k + k0 + at);
    const uint2 rounded = make_uint2(pack_halves(v.x, v.y), pack_halves(v.z, v.w));
    *(uint2 *)(high + m * STRIDE + at) = rounded;
    if (!SPLIT) continue;
    const uint32_t first_two = pack_halves(v.x - low_half(rounded.x), v.y - high_half(rounded.x));
    *(uint2 *)(low + m * STRIDE + at) =
        make_uint2(first_two, pack_halves(v.z - low_half(rounded.y), v.w - high_half(rounded.y)));
  }
}

/* One unit of 32 codes a thread: row threadIdx / 2, half threadIdx % 2; codes - zero as fp16, exactly. */
template <int BITS>
__device__ __forceinline__ void stage_codes(const Many &a, int64_t first, int k0, uint16_t *out, float *scales) {
  const int n = threadIdx.x / 2, half = threadIdx.x % 2, k = k0 + half * UNIT;
  const int64_t row = first + n;
  uint16_t *to = out + n * STRIDE + half * UNIT;
  const bool here = row < a.w.n && k < a.w.k;
  uint32_t words[HELD<BITS>] = {};
  if constexpr (BITS == JPQ_TERNARY) {
    if (here) load_ternary(a.w, row, k / UNIT, words);
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH<BITS>; i++)
      if (here) words[i] = load_word(a.w.packed + row * a.w.row_bytes + (int64_t)(k / UNIT) * 4 * WIDTH<BITS> + 4 * i);
  }
  const int group = k / a.w.group_size;
  const float offset = offset_of(here ? zero_of<BITS>(a.w, row, group) : 0.f);
  scales[half * TILE + n] = here ? load_scale(a.w, row, group) : 0.f;
#pragma unroll
  for (int j = 0; j < UNIT; j += 8) { /* 16 bytes a store: eight lanes hit all banks once */
    uint32_t pair[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      pair[i] = pack_halves(number<BITS>(words, j + 2 * i, offset), number<BITS>(words, j + 2 * i + 1, offset));
    *(uint4 *)(to + j) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
  }
}

/* Fragment of X: rows `m` .. m+15, columns k .. k+15. */
__device__ __forceinline__ void load_a(const uint16_t *x, int m, int k, int lane, uint32_t (&a)[4]) {
  const uint16_t *p = x + (m + lane / 4) * STRIDE + k + lane % 4 * 2;
  a[0] = *(const uint32_t *)p;
  a[1] = *(const uint32_t *)(p + 8 * STRIDE);
  a[2] = *(const uint32_t *)(p + 8);
  a[3] = *(const uint32_t *)(p + 8 * STRIDE + 8);
}

/* 16 of K for the warp's 32 x 32. */
template <bool SPLIT>
__device__ __forceinline__ void step(const uint16_t *high, const uint16_t *low, const uint16_t *codes, int m0, int n0,
                                     int k, int lane, float (&part)[2][4][4]) {
  uint32_t b[4][2];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const uint16_t *p = codes + (n0 + 8 * j + lane / 4) * STRIDE + k + lane % 4 * 2;
    b[j][0] = *(const uint32_t *)p;
    b[j][1] = *(const uint32_t *)(p + 8);
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint32_t a[4];
    load_a(high, m0 + 16 * i, k, lane, a);
#pragma unroll
    for (int j = 0; j < 4; j++) mma(part[i][j], a, b[j]);
    if (!SPLIT) continue;
    load_a(low, m0 + 16 * i, k, lane, a);
#pragma unroll
    for (int j = 0; j < 4; j++) mma(part[i][j], a, b[j]);
  }
}

/* At the end of a group: total += scale * part, and the part starts again. */
__device__ __forceinline__ void close_group(const float *scales, int n0, int lane, float (&part)[2][4][4],
                                            float (&total)[2][4][4]) {
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const float scale = scales[n0 + 8 * j + lane % 4 * 2 + c % 2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        total[i][j][c] = fmaf(scale, part[i][j][c], total[i][j][c]);
        part[i][j][c] = 0.f;
      }
    }
}

__device__ __forceinline__ void store_many(const Many &a, int64_t first_m, int64_t first_n, int lane,
                                           const float (&total)[2][4][4]) {
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const int64_t m = first_m + 16 * i + lane / 4 + c / 2 * 8, n = first_n + 8 * j + lane % 4 * 2 + c % 2;
        if (m >= a.m || n >= a.w.n) continue;
        const float bias = a.bias ? load_float(a.bias, a.bias_type, n) : 0.f;
        store_float(a.y, a.y_type, m * a.w.n + n, total[i][j][c] + bias);
      }
}

template <int BITS, bool SPLIT>
__global__ void __launch_bounds__(MANY_THREADS, MANY_BLOCKS) many_rows(Many a) {
  JPQ_SHARED_BYTES(shared);
  uint16_t *high = (uint16_t *)shared, *low = high + TILE * STRIDE, *codes = low + TILE * STRIDE;
  float *scales = (float *)(codes + TILE * STRIDE); /* [2 units, 64 rows] */
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, m0 = warp / 2 * 32, n0 = warp % 2 * 32;
  const int64_t first_n = (int64_t)blockIdx.x * TILE, first_m = (int64_t)blockIdx.y * TILE;
  float part[2][4][4] = {}, total[2][4][4] = {};
  for (int k0 = 0; k0 < a.w.k; k0 += TILE) {
    stage_many_x<SPLIT>(a, first_m, k0, high, low);
    stage_codes<BITS>(a, first_n, k0, codes, scales);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < TILE; k += 16) {
      step<SPLIT>(high, low, codes, m0, n0, k, lane, part);
      const int done = k0 + k + 16; /* past the end of K all is zero, so closing there or not is the same */
      if (k % UNIT == 16 && done % a.w.group_size == 0) close_group(scales + k / UNIT * TILE, n0, lane, part, total);
    }
    __syncthreads();
  }
  store_many(a, first_m + m0, first_n + n0, lane, total);
}

}  // namespace jpq
#endif
