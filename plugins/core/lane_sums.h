/* Sums over the lanes of 4 or 16 vectors of 16. Included between JPQ_TARGET and its end: compiled for what the includer
 * names. */
#ifndef JPQ_LANE_SUMS_H
#define JPQ_LANE_SUMS_H

/* Lane 4 l + i: a quarter of the sum of vector i. */
JPQ_INLINE __m512 jpq_quarters(const __m512 a[4]) {
  __m512d low = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1])));
  __m512d high = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3])));
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
}

JPQ_INLINE __m128 jpq_sum4(const __m512 a[4]) {
  const __m512 all = jpq_quarters(a);
  __m256 half = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
  half = _mm256_add_ps(half, _mm512_castps512_ps256(all));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

JPQ_INLINE __m512 jpq_sum16(float a[16][16]) {
  __m512 v[4], sum[4];
  for (int i = 0; i < 4; i++) {
    for (int j = 0; j < 4; j++) v[j] = _mm512_load_ps(a[4 * i + j]);
    sum[i] = jpq_quarters(v);
  }
  for (int i = 0; i < 4; i += 2)
    sum[i] = _mm512_add_ps(_mm512_shuffle_f32x4(sum[i], sum[i + 1], 0x44), _mm512_shuffle_f32x4(sum[i], sum[i + 1], 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(sum[0], sum[2], 0x88), _mm512_shuffle_f32x4(sum[0], sum[2], 0xdd));
}

#endif
