/* AVX-512: 16 codes at a time. */
#include "internal.h"

#ifdef JPQ_X86
#include <immintrin.h>

#include "shuffles.h"

static int available(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

JPQ_TARGET("avx512f,avx512bw,avx512vl,avx2,fma")

#define W 16
#define VF __m512
#define v_zero() _mm512_setzero_ps()
#define v_set1(a) _mm512_set1_ps(a)
#define v_load(p) _mm512_loadu_ps(p)
#define v_store(p, a) _mm512_storeu_ps(p, a)
#define v_fma(a, b, c) _mm512_fmadd_ps(a, b, c)
#define v_mul(a, b) _mm512_mul_ps(a, b)
#define v_sub(a, b) _mm512_sub_ps(a, b)
#define v_sum(a) _mm512_reduce_add_ps(a)
#define TILE_ROWS 6
#define NAME "avx512"
#define AVAILABLE available
#define IMPLEMENTATION jpq_avx512

JPQ_INLINE __m256 halves(VF a) {
  __m512i bits = _mm512_castps_si512(a);
  return _mm256_add_ps(_mm512_castps512_ps256(a), _mm256_castsi256_ps(_mm512_extracti64x4_epi64(bits, 1)));
}

JPQ_INLINE void v_sum4(const VF a[4], float out[4]) {
  __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(halves(a[0]), halves(a[1])), _mm256_hadd_ps(halves(a[2]), halves(a[3])));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1)));
}

/* 16 codes as floats; reads exactly the 2 * bits bytes they are in. */
JPQ_INLINE VF v_codes(const uint8_t *p, const uint8_t *stop, int bits) {
  (void)stop;
  __m512i lanes = _mm512_broadcast_i32x4(_mm_maskz_loadu_epi8((__mmask16)((1u << (2 * bits)) - 1), p));
  lanes = _mm512_shuffle_epi8(lanes, *(const __m512i *)jpq_lane_bytes[bits - 1]);
  lanes = _mm512_srlv_epi32(lanes, *(const __m512i *)jpq_lane_shifts[bits - 1]);
  return _mm512_cvtepi32_ps(_mm512_and_si512(lanes, _mm512_set1_epi32((1 << bits) - 1)));
}

#include "wide.inc"

JPQ_TARGET_END
#endif
