/* Y = X . dequant(W)^T for few rows of X (decode): memory-bound, each packed byte is read once.
 *
 * A warp owns ROWS rows of W and walks along K in chunks of 1024 codes, 32 a lane. Widths 1, 2, 4 and 8 are loaded by
 * the lane that needs them, in vectors, and so are ternary codes, word by word; the others by 16-byte loads that are coalesced over the warp and exchanged
 * through shared memory (a lane's words lie an odd number of words, or of pairs, apart: no bank conflicts).
 * X lies in shared memory as fp32. Long rows are split over blocks when N alone does not fill a GPU; the parts are
 * added in a fixed order by a second kernel.
 */
#ifndef JPQ_LOW_BIT_MATMUL_CUH
#define JPQ_LOW_BIT_MATMUL_CUH

#include "low_bit_levels.cuh"

namespace jpq {

constexpr int FEW_WARPS = 4, FEW_THREADS = FEW_WARPS * 32, CHUNK = 32 * UNIT;
constexpr int FEW_BLOCKS = 3; /* on a multiprocessor: left to itself ptxas aims at more, and spills on sm_120 */

struct Few {
  Weight w;
  const void *x, *bias;
  void *y;
  float *parts; /* [splits, m, n] or NULL when there is one part */
  int64_t m, n;
  int first_row, chunks_per_split;
  int x_type, bias_type, y_type;
};

template <int BITS>
constexpr bool DIRECT = (BITS & (BITS - 1)) == 0; /* 1, 2, 4, 8 and ternary, which is 16 here */

/* Bytes of shared memory: X, then a chunk of a row for each warp. */
template <int BITS, int M>
constexpr int few_shared() {
  return M * CHUNK * 4 + (DIRECT<BITS> ? 0 : FEW_WARPS * 32 * BITS * 4);
}

/* Place of four numbers of X: unit `lane`, numbers 4q ... The exclusive or spares writer and reader bank conflicts. */
__device__ __forceinline__ int x_slot(int m, int q, int lane) { return (m * 8 + q) * 32 + (lane ^ q); }

template <int M>
__device__ void stage_x(const Few &a, float4 *xs, int chunk) {
  for (int i = threadIdx.x; i < M * CHUNK / 4; i += FEW_THREADS) {
    const int m = i / (CHUNK / 4), at = i % (CHUNK / 4), k = chunk * CHUNK + 4 * at;
    const int64_t row = a.first_row + m;
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    if (row < a.m && k < a.w.k) v = load_four(a.x, a.x_type, row * a.w.k + k);
    xs[x_slot(m, at % 8, at / 8)] = v;
  }
}

/* The lane's own unit, as wide as its address allows. */
template <int BITS>
__device__ __forceinline__ void load_direct(const uint8_t *p, uint32_t (&words)[BITS]) {
  if constexpr (BITS >= 4) {
    if (aligned(p, 16)) {
#pragma unroll
      for (int i = 0; i < BITS / 4; i++) {
        const uint4 v = ((const uint4 *)p)[i];
        words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
      }
      return;
    }
  }
  if constexpr (BITS == 2) {
    if (aligned(p, 8)) {
      const uint2 v = *(const uint2 *)p;
      words[0] = v.x, words[1] = v.y;
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < BITS; i++) words[i] = load_word(p + 4 * i);
}

/* A chunk of a row on its way from memory: vectors `lane`, `lane + 32` of 16 bytes, or words a stride of 32 apart. */
template <int BITS>
struct Passing {
  static constexpr int VECTORS = (BITS * 8 + 31) / 32;
  uint4 v[VECTORS];

  __device__ __forceinline__ void load(const uint8_t *p, int words, int lane) {
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
      const int at = (lane + 32 * i) * 4; /* first word of the vector */
      v[i] = make_uint4(0, 0, 0, 0);
      if (aligned(p, 16) && at + 4 <= words) {
        v[i] = *(const uint4 *)(p + 4 * (int64_t)at);
      } else { /* rows off a multiple of 16 bytes, and the last words of a row */
        if (at < words) v[i].x = load_word(p + 4 * (int64_t)at);
        if (at + 1 < words) v[i].y = load_word(p + 4 * (int64_t)at + 4);
        if (at + 2 < words) v[i].z = load_word(p + 4 * (int64_t)at + 8);
        if (at + 3 < words) v[i].w = load_word(p + 4 * (int64_t)at + 12);
      }
    }
  }

  /* Through shared memory to the lanes: each gets the words of its unit. */
  __device__ __forceinline__ void hand_over(uint32_t *stage, int lane, uint32_t (&words)[BITS]) const {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
      if (lane + 32 * i < BITS * 8) ((uint4 *)stage)[lane + 32 * i] = v[i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < BITS; i++) words[i] = stage[lane * BITS + i];
  }
};

/* The words of the lane's unit for each row of the warp; rows past the last repeat it and are not stored. */
template <int BITS, int ROWS>
__device__ __forceinline__ void load_rows(const Weight &w, int64_t first, int chunk, uint32_t *stage, int lane,
                                          uint32_t (&words)[ROWS][HELD<BITS>]) {
  const int units = w.k / UNIT - chunk * 32; /* from here to the end of the row */
  if constexpr (DIRECT<BITS>) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int64_t row = first + r < w.n ? first + r : w.n - 1;
#pragma unroll
      for (int i = 0; i < HELD<BITS>; i++) words[r][i] = 0;
      if constexpr (BITS == JPQ_TERNARY) {
        if (lane < units) load_ternary(w, row, chunk * 32 + lane, words[r]);
      } else {
        const uint8_t *unit = w.packed + row * w.row_bytes + ((int64_t)chunk * 32 + lane) * 4 * BITS;
        if (lane < units) load_direct<BITS>(unit, words[r]);
      }
    }
  } else {
    Passing<BITS> passing[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) { /* all on their way before the first is used */
      const int64_t row = first + r < w.n ? first + r : w.n - 1;
      const uint8_t *piece = w.packed + row * w.row_bytes + (int64_t)chunk * 128 * BITS;
      passing[r].load(piece, (units < 32 ? units : 32) * BITS, lane);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) passing[r].hand_over(stage, lane, words[r]);
  }
}

/* Add the lane's 32 codes of each row times X. */
template <int BITS, int M, int ROWS>
__device__ __forceinline__ void multiply(const float4 *xs, const uint32_t (&words)[ROWS][HELD<BITS>],
                                         const float (&scale)[ROWS], const float (&offset)[ROWS], int lane,
                                         float (&sum)[ROWS][M]) {
#pragma unroll
  for (int q = 0; q < 8; q++) {
    float wide[ROWS][4];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int j = 0; j < 4; j++) wide[r][j] = number<BITS>(words[r], 4 * q + j, offset[r]) * scale[r];
#pragma unroll
    for (int m = 0; m < M; m++) {
      const float4 x = xs[x_slot(m, q, lane)];
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        sum[r][m] = fmaf(x.x, wide[r][0], sum[r][m]);
        sum[r][m] = fmaf(x.y, wide[r][1], sum[r][m]);
        sum[r][m] = fmaf(x.z, wide[r][2], sum[r][m]);
        sum[r][m] = fmaf(x.w, wide[r][3], sum[r][m]);
      }
    }
  }
}

__device__ __forceinline__ void store_few(const Few &a, int64_t m, int64_t row, float total) {
  if (a.parts) {
    a.parts[((int64_t)blockIdx.y * a.m + m) * a.n + row] = total;
    return;
  }
  if (a.bias) total += load_float(a.bias, a.bias_type, row);
  store_float(a.y, a.y_type, m * a.n + row, total);
}

template <int BITS, int M, int ROWS>
__global__ void __launch_bounds__(FEW_THREADS, FEW_BLOCKS) few_rows(Few a) {
  JPQ_SHARED_BYTES(shared);
  float4 *xs = (float4 *)shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t *stage = (uint32_t *)(shared + M * CHUNK * 4) + warp * 32 * WIDTH<BITS>; /* not touched by direct widths */
  const int64_t first = ((int64_t)blockIdx.x * FEW_WARPS + warp) * ROWS;
  const int chunks = (a.w.k + CHUNK - 1) / CHUNK, begin = blockIdx.y * a.chunks_per_split;
  const int end = begin + a.chunks_per_split < chunks ? begin + a.chunks_per_split : chunks;
  float sum[ROWS][M] = {};
  for (int chunk = begin; chunk < end; chunk++) {
    uint32_t words[ROWS][HELD<BITS>];
    float scale[ROWS], offset[ROWS];
    load_rows<WIDTH<BITS>, ROWS>(a.w, first, chunk, stage, lane, words);
    const int k = chunk * CHUNK + lane * UNIT, group = k / a.w.group_size;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int64_t row = first + r < a.w.n ? first + r : a.w.n - 1;
      scale[r] = k < a.w.k ? load_scale(a.w, row, group) : 0.f;
      offset[r] = offset_of(k < a.w.k ? zero_of<BITS>(a.w, row, group) : 0.f);
    }
    __syncthreads(); /* everybody is done with the chunk before */
    stage_x<M>(a, xs, chunk);
    __syncthreads();
    multiply<BITS, M, ROWS>(xs, words, scale, offset, lane, sum);
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int m = 0; m < M; m++) {
      float total = sum[r][m];
#pragma unroll
      for (int step = 16; step; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
      if (lane == 0 && first + r < a.n && a.first_row + m < a.m) store_few(a, a.first_row + m, first + r, total);
    }
}

/* Add the parts of split rows, always in the same order. */
__global__ void __launch_bounds__(256) add_parts(Few a, int splits) {
  const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x, count = a.m * a.n;
  if (i >= count) return;
  float total = 0.f;
  for (int s = 0; s < splits; s++) total += a.parts[s * count + i];
  if (a.bias) total += load_float(a.bias, a.bias_type, i % a.n);
  store_float(a.y, a.y_type, i, total);
}

}  // namespace jpq
#endif
