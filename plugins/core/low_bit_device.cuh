/* What the CUDA kernels share: numbers in and out, units of 32 codes, tensor-core steps.
 *
 * 32 codes of b bits fill b words of 32 bits exactly, and a group is a whole number of such units. So a lane always
 * works on whole words, and rows (K * b / 8 bytes) start on a multiple of 4 bytes whatever the width; ternary codes
 * are brought into that form when they are loaded (low_bit_ternary.cuh).
 */
#ifndef JPQ_LOW_BIT_DEVICE_CUH
#define JPQ_LOW_BIT_DEVICE_CUH

#include <stdint.h>

#include "low_bit_cuda.h"

#ifndef __CUDACC__
#include "host_shim.h" /* numerics on the CPU, for tests: see tests/plugins/cuda_shim */
#else
#define JPQ_SHARED_BYTES(NAME) extern __shared__ __align__(16) unsigned char NAME[]
#define JPQ_LAUNCH(KERNEL, GRID, THREADS, SHARED, STREAM, ...) \
  KERNEL<<<GRID, THREADS, SHARED, (cudaStream_t)(STREAM)>>>(__VA_ARGS__)
#endif

namespace jpq {

constexpr int UNIT = 32; /* codes */

/* Whether codes stand for normal levels, and bits of a code in a row (of ternary ones JPQ_TERNARY). */
template <int BITS>
constexpr bool NORMAL = (BITS > JPQ_NORMAL);
template <int BITS>
constexpr int WIDTH = NORMAL<BITS> ? BITS - JPQ_NORMAL : BITS;

/* A weight as kernels take it. */
struct Weight {
  const uint8_t *packed, *zeros;
  const uint16_t *scales;
  int64_t n, row_bytes, zero_bytes;
  int k, group_size, groups, bits;
};

__device__ __forceinline__ float half_to_float(uint16_t h) {
#ifdef __CUDACC__
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
#else
  return shim::half_to_float(h);
#endif
}

__device__ __forceinline__ uint16_t float_to_half(float f) {
#ifdef __CUDACC__
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
#else
  return shim::float_to_half(f);
#endif
}

/* Two halves in a word, `low` first in memory. */
__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
#ifdef __CUDACC__
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  return float_to_half(low) | (uint32_t)float_to_half(high) << 16;
#endif
}

__device__ __forceinline__ float load_float(const void *p, int type, int64_t i) {
  return type == JPQ_F16 ? half_to_float(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

__device__ __forceinline__ void store_float(void *p, int type, int64_t i, float value) {
  if (type == JPQ_F16)
    ((uint16_t *)p)[i] = float_to_half(value);
  else
    ((float *)p)[i] = value;
}

__device__ __forceinline__ bool aligned(const void *p, int bytes) { return ((uintptr_t)p & (bytes - 1)) == 0; }

/* Four numbers from i on; X of a caller need not lie on a multiple of 16 bytes. */
__device__ __forceinline__ float4 load_four(const void *p, int type, int64_t i) {
  if (type == JPQ_F32 && aligned(p, 16)) return *(const float4 *)((const float *)p + i);
  if (type == JPQ_F16 && aligned(p, 8)) {
    uint2 v = *(const uint2 *)((const uint16_t *)p + i);
    return make_float4(half_to_float((uint16_t)v.x), half_to_float((uint16_t)(v.x >> 16)),
                       half_to_float((uint16_t)v.y), half_to_float((uint16_t)(v.y >> 16)));
  }
  return make_float4(load_float(p, type, i), load_float(p, type, i + 1), load_float(p, type, i + 2),
                     load_float(p, type, i + 3));
}

__device__ __forceinline__ uint32_t load_word(const uint8_t *p) {
  if (aligned(p, 4)) return *(const uint32_t *)p;
  return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* The zero of a group, in codes: packed at `bits` bits each, or the half-integer centre. Not for ternary codes. */
__device__ __forceinline__ float load_zero(const Weight &w, int64_t row, int group) {
  const int top = (1 << w.bits) - 1;
  if (!w.zeros) return 0.5f * (float)top;
  const int bit = group * w.bits, shift = bit & 7;
  const uint8_t *p = w.zeros + row * w.zero_bytes + (bit >> 3);
  unsigned v = p[0];
  if (shift + w.bits > 8) v |= (unsigned)p[1] << 8; /* only when the code goes on there: no byte past the row */
  return (float)((v >> shift) & top);
}

__device__ __forceinline__ float load_scale(const Weight &w, int64_t row, int group) {
  return half_to_float(w.scales[row * w.groups + group]);
}

/* Code J of the 32 in `words`; J is a constant after unrolling, so this is one shift, or one funnel shift. */
template <int BITS>
__device__ __forceinline__ uint32_t code(const uint32_t (&words)[BITS], int j) {
  const int bit = j * BITS, at = bit >> 5, shift = bit & 31;
  uint32_t v = words[at] >> shift;
  if (shift + BITS > 32) v |= words[at + 1] << (32 - shift);
  return v & ((1u << BITS) - 1);
}

constexpr uint32_t TWO_22 = 0x4a800000u; /* 2^22 as fp32; a step of its last bit is 1/2 */

/* code - zero, exactly: `offset` is 2^22 + zero, and half-integer zeros fit its last bit. No slow int-to-float. */
__device__ __forceinline__ float centred(uint32_t code, float offset) {
  return __uint_as_float(TWO_22 | code << 1) - offset;
}
__device__ __forceinline__ float offset_of(float zero) { return 4194304.0f + zero; }

/* One tensor-core step of a warp: D[16, 8] += A[16, 16] . B[16, 8], fp16 in, fp32 sums. Lane l, g = l / 4, t = l % 4,
 * holds A[g | g+8, 2t..2t+1 | +8], B[2t..2t+1 | +8, g] and D[g | g+8, 2t..2t+1], as PTX lays out m16n8k16. */
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDA_ARCH__)
#error "jpq: the many-row kernel needs compute capability 8.0 or later"
#elif !defined(__CUDACC__)
  shim::mma(d, a, b);
#endif
}

}  // namespace jpq
#endif
