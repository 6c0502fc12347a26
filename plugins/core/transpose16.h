/* 16 rows of 16 words of 32 bits into 16 columns of them. Included between JPQ_TARGET and JPQ_TARGET_END. */
JPQ_INLINE void jpq_transpose16(__m512 r[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int c = 0; c < 2; c++) {
      __m512d low = _mm512_castps_pd(t[i + c]), high = _mm512_castps_pd(t[i + c + 2]);
      r[i + 2 * c] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      r[i + 2 * c + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int c = 0; c < 4; c++) { /* 128-bit lane l of r[4 i + c]: column 4 l + c of rows 4 i .. 4 i + 3 */
    __m512 low = _mm512_shuffle_f32x4(r[c], r[c + 4], 0x44), high = _mm512_shuffle_f32x4(r[c], r[c + 4], 0xee);
    __m512 low2 = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0x44), high2 = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0xee);
    t[c] = _mm512_shuffle_f32x4(low, low2, 0x88), t[c + 4] = _mm512_shuffle_f32x4(low, low2, 0xdd);
    t[c + 8] = _mm512_shuffle_f32x4(high, high2, 0x88), t[c + 12] = _mm512_shuffle_f32x4(high, high2, 0xdd);
  }
  memcpy(r, t, sizeof t);
}
