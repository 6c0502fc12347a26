/* AVX-512: 16 codes at a time. */
#include "internal.h"

#ifdef JPQ_X86
#include <immintrin.h>

#include "shuffles.h"

static int available(void) { return jpq_cpu_features.avx512; }

JPQ_TARGET("avx512f,avx512bw,avx512vl,avx2,fma")

#include "lane_sums.h"
#include "transpose16.h"

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
#define v_int8(p) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define v_half(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define HAS_FIXED 0
#define TILE_VECTORS 4
#define NAME "avx512"
#define AVAILABLE available
#define IMPLEMENTATION jpq_avx512

JPQ_INLINE void v_sums(float *out, const VF s[4]) { _mm_storeu_ps(out, jpq_sum4(s)); }

#define v_transpose(rows) jpq_transpose16(rows)

/* 16 ternary codes in 32 bits each. */
JPQ_INLINE __m512i ternary_lanes(const uint8_t *row, int64_t j) {
  int32_t bytes;
  memcpy(&bytes, jpq_at(row, JPQ_TERNARY, j), 4);
  __m512i lanes = _mm512_shuffle_epi8(_mm512_set1_epi32(bytes), *(const __m512i *)jpq_ternary_lanes[jpq_phase(j)]);
  lanes = _mm512_mullo_epi16(lanes, *(const __m512i *)jpq_ternary_lane_factors[jpq_phase(j)]);
  return _mm512_mulhi_epu16(lanes, _mm512_set1_epi32(3));
}

/* Levels of codes that are alone in 32 bits. */
JPQ_INLINE __m512i levels_of(__m512i codes, int bits) {
  const __m128i *levels = (const __m128i *)jpq_levels_of(bits);
#define SIXTEEN(I) _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128(levels + (I))), codes)
  __m512i out = SIXTEEN(0);
  for (int i = 1; i < 1 << (jpq_width(bits) > 4 ? jpq_width(bits) - 4 : 0); i++) {
    const __mmask16 here = _mm512_cmpeq_epi32_mask(_mm512_srli_epi32(codes, 4), _mm512_set1_epi32(i));
    out = _mm512_mask_mov_epi32(out, here, SIXTEEN(i));
  }
#undef SIXTEEN
  return out;
}

/* 16 codes as floats; reads 16 bytes, of which 2 * bits matter. */
JPQ_INLINE VF v_codes(const uint8_t *row, int64_t j, int bits) {
  if (bits == JPQ_TERNARY) return _mm512_cvtepi32_ps(ternary_lanes(row, j));
  const uint8_t *p = jpq_at(row, bits, j);
  __m512i lanes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p));
  const int width = jpq_width(bits);
  lanes = _mm512_shuffle_epi8(lanes, *(const __m512i *)jpq_lane_bytes[width - 1]);
  lanes = _mm512_srlv_epi32(lanes, *(const __m512i *)jpq_lane_shifts[width - 1]);
  lanes = _mm512_and_si512(lanes, _mm512_set1_epi32((1 << width) - 1));
  if (jpq_is_normal(bits)) lanes = _mm512_and_si512(levels_of(lanes, bits), _mm512_set1_epi32(255));
  return _mm512_cvtepi32_ps(lanes);
}

#include "wide.inc"

JPQ_TARGET_END
#endif
