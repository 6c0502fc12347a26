/* The sums of four vectors of 16 lanes. Included between JPQ_TARGET and its end: compiled for what the includer names. */
#ifndef JPQ_SUM4_H
#define JPQ_SUM4_H

JPQ_INLINE __m128 jpq_sum4(const __m512 a[4]) {
  __m512d low = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1])));
  __m512d high = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3])));
  __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  __m256 half = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
  half = _mm256_add_ps(half, _mm512_castps512_ps256(all));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

#endif
