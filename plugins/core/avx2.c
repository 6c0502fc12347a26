/* AVX2 + FMA + F16C: 8 codes at a time, 16 in fixed point. */
#include "internal.h"

#ifdef JPQ_X86
#include <immintrin.h>

#include "shuffles.h"

static int available(void) { return jpq_cpu_features.avx2; }

JPQ_TARGET("avx2,fma,f16c")

#define W 8
#define VF __m256
#define v_zero() _mm256_setzero_ps()
#define v_set1(a) _mm256_set1_ps(a)
#define v_load(p) _mm256_loadu_ps(p)
#define v_store(p, a) _mm256_storeu_ps(p, a)
#define v_fma(a, b, c) _mm256_fmadd_ps(a, b, c)
#define v_mul(a, b) _mm256_mul_ps(a, b)
#define v_sub(a, b) _mm256_sub_ps(a, b)
#define v_int8(p) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#define v_half(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define HAS_FIXED 1
#define CODES 16
#define VC __m256i
#define VI __m256i
#define c_load(p) _mm256_loadu_si256((const __m256i *)(p))
#define i_zero() _mm256_setzero_si256()
#define i_dot(sum, c, q) _mm256_add_epi32(sum, _mm256_madd_epi16(c, q))
#define i_to_float(a) _mm256_cvtepi32_ps(a)
#define TILE_VECTORS 2
#define NAME "avx2"
#define AVAILABLE available
#define IMPLEMENTATION jpq_avx2

JPQ_INLINE float v_sum(VF a) {
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

/* The sum of each of four. */
JPQ_INLINE void v_sums(float *out, const VF s[4]) {
  __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

JPQ_INLINE void v_transpose(VF r[W]) {
  VF t[W];
  for (int i = 0; i < W; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < W; i += 4)
    for (int c = 0; c < 2; c++) {
      __m256d low = _mm256_castps_pd(t[i + c]), high = _mm256_castps_pd(t[i + c + 2]);
      r[i + 2 * c] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      r[i + 2 * c + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  for (int c = 0; c < 4; c++) {
    t[c] = _mm256_permute2f128_ps(r[c], r[c + 4], 0x20);
    t[c + 4] = _mm256_permute2f128_ps(r[c], r[c + 4], 0x31);
  }
  memcpy(r, t, sizeof t);
}

/* The same bytes in every 32 bits: 8 or 16 ternary codes are in four at most. */
JPQ_INLINE __m256i ternary_bytes(const uint8_t *row, int64_t j) {
  int32_t bytes;
  memcpy(&bytes, jpq_at(row, JPQ_TERNARY, j), 4);
  return _mm256_set1_epi32(bytes);
}

/* Levels of codes that are alone in 16 or 32 bits. */
JPQ_INLINE __m256i levels_of(__m256i codes, int bits) {
  const __m128i *levels = (const __m128i *)jpq_levels_of(bits);
#define SIXTEEN(I) _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(levels + (I))), codes)
  __m256i out = SIXTEEN(0);
  if (jpq_width(bits) > 4) out = _mm256_blendv_epi8(out, SIXTEEN(1), _mm256_slli_epi16(codes, 3)); /* bit 4 decides */
  if (jpq_width(bits) > 5)
    out = _mm256_blendv_epi8(out, _mm256_blendv_epi8(SIXTEEN(2), SIXTEEN(3), _mm256_slli_epi16(codes, 3)), _mm256_slli_epi16(codes, 2));
#undef SIXTEEN
  return out;
}

/* 8 codes as floats; reads 8 bytes, of which `bits` matter. */
JPQ_INLINE VF v_codes(const uint8_t *row, int64_t j, int bits) {
  if (bits == JPQ_TERNARY) {
    __m256i q = _mm256_shuffle_epi8(ternary_bytes(row, j), *(const __m256i *)jpq_ternary_lanes[jpq_phase(j)]);
    q = _mm256_mullo_epi16(q, *(const __m256i *)jpq_ternary_lane_factors[jpq_phase(j)]);
    return _mm256_cvtepi32_ps(_mm256_mulhi_epu16(q, _mm256_set1_epi32(3)));
  }
  int64_t bytes;
  memcpy(&bytes, jpq_at(row, bits, j), 8);
  const int width = jpq_width(bits);
  __m256i lanes = _mm256_shuffle_epi8(_mm256_set1_epi64x(bytes), *(const __m256i *)jpq_lane_bytes[width - 1]);
  lanes = _mm256_srlv_epi32(lanes, *(const __m256i *)jpq_lane_shifts[width - 1]);
  lanes = _mm256_and_si256(lanes, _mm256_set1_epi32((1 << width) - 1));
  if (jpq_is_normal(bits)) lanes = _mm256_and_si256(levels_of(lanes, bits), _mm256_set1_epi32(255));
  return _mm256_cvtepi32_ps(lanes);
}

/* 16 codes in 16 bits each; reads 16 bytes, of which 2 * bits matter. */
JPQ_INLINE VC c_codes(const uint8_t *row, int64_t j, int bits) {
  if (bits == JPQ_TERNARY) {
    __m256i q = _mm256_shuffle_epi8(ternary_bytes(row, j), *(const __m256i *)jpq_ternary_words[jpq_phase(j)]);
    q = _mm256_mullo_epi16(q, *(const __m256i *)jpq_ternary_word_factors[jpq_phase(j)]);
    return _mm256_mulhi_epu16(q, _mm256_set1_epi16(3));
  }
  __m128i bytes = _mm_loadu_si128((const __m128i *)jpq_at(row, bits, j));
  const int width = jpq_width(bits);
  __m256i words =
      _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), *(const __m256i *)jpq_word_bytes[width - 1]);
  words = _mm256_mullo_epi16(words, *(const __m256i *)jpq_word_factors[width - 1]);
  words = _mm256_srli_epi16(words, 16 - width);
  return jpq_is_normal(bits) ? _mm256_and_si256(levels_of(words, bits), _mm256_set1_epi16(255)) : words;
}

#include "wide.inc"

JPQ_TARGET_END
#endif
