/* AVX-512 VBMI: 512 codes of 3 bits as eight vectors, for X in three parts and groups that have them whole.
 *
 * Three bytes hold eight codes. Six lie within a byte and are taken where they are, so multiplied by 1, 2 or 4; X is
 * divided by that before it is rounded. Only the third and the sixth, which two bytes share, are shuffled. Other forms find
 * the bits of a code with vpmultishiftqb, which on Zen 4 takes the place of a product (a cycle each; shuffles, shifts and
 * masks take none beside products, vpternlogd 0.4); there is none here. X keeps 22 of its 24 bits where it is divided by 4.
 */
#ifndef JPQ_VNNI_TRIPLES_H
#define JPQ_VNNI_TRIPLES_H

#include "vnni.h"

#ifdef JPQ_X86
#include "shuffles.h"

enum { TRIPLES = 512, TRIPLE_VECTORS = 8 };

/* Byte n of vectors 2 i and 2 i + 1 comes of byte 64 i + n: bits 0 to 2 of the first of three, 1 to 3 of the second, 2 to
 * 4 of the third, and the three bits behind them. Vectors 6 and 7 have of 256 codes those that two bytes share, of the
 * first 128 in even and of the others in odd bytes. */
#define IN_ONE_BYTE(V, N) (8 * ((64 * ((V) / 2) + (N)) / 3) + 3 * ((64 * ((V) / 2) + (N)) % 3) + (V) % 2)
#define IN_TWO_BYTES(V, N) (256 * ((V) - 6) + 8 * ((N) / 4) + 2 + 3 * ((N) / 2 % 2) + 128 * ((N) % 2))
#define CODE(V, N) ((V) < 6 ? IN_ONE_BYTE(V, N) : IN_TWO_BYTES(V, N))
#define CODE_LOW(P, J) (CODE((P) / 64, (P) % 64 + (J)) & 127),
#define CODE_HIGH(P, J) (CODE((P) / 64, (P) % 64 + (J)) >> 7),
#define FOR_64(DO, V) {JPQ_FOR_16(DO, 64 * (V)) JPQ_FOR_16(DO, 64 * (V) + 16) JPQ_FOR_16(DO, 64 * (V) + 32) JPQ_FOR_16(DO, 64 * (V) + 48)}
#define FOR_VECTORS(DO) \
  {FOR_64(DO, 0), FOR_64(DO, 1), FOR_64(DO, 2), FOR_64(DO, 3), FOR_64(DO, 4), FOR_64(DO, 5), FOR_64(DO, 6), FOR_64(DO, 7)}
static const _Alignas(64) uint8_t triple_places[TRIPLE_VECTORS][64] = FOR_VECTORS(CODE_LOW); /* among 128 codes */
static const _Alignas(64) uint8_t triple_quarters[TRIPLE_VECTORS][64] = FOR_VECTORS(CODE_HIGH);

#define IN_PLACE(P, J) (7 << ((P) + (J)) % 3),
static const _Alignas(64) uint8_t triple_masks[3][64] = {FOR_64(IN_PLACE, 0), FOR_64(IN_PLACE, 1), FOR_64(IN_PLACE, 2)};
#define SHARED(P, J) 3 * (J) + (P), 3 * (J) + (P) + 1, 3 * (J) + (P) + 1, 3 * (J) + (P) + 2,
static const _Alignas(64) uint8_t triple_shared[2][64] = {{JPQ_FOR_16(SHARED, 0)}, {JPQ_FOR_16(SHARED, 16)}};

/* By what codes 8 n + j come multiplied: a power of two. */
static const _Alignas(64) int32_t triple_powers[16] = {0, 0, 0, 1, 1, 1, 2, 2, 0, 0, 0, 1, 1, 1, 2, 2};
static const _Alignas(64) float triple_inverses[16] = {1, 1, 1, .5f, .5f, .5f, .25f, .25f, 1, 1, 1, .5f, .5f, .5f, .25f, .25f};

JPQ_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,gfni,avx2,fma,f16c")

/* TRIPLES digits from their own order into that of the codes. */
JPQ_INLINE void triple_order(int8_t *q) {
  __m512i v[TRIPLE_VECTORS];
  for (int i = 0; i < TRIPLE_VECTORS; i++) v[i] = _mm512_loadu_si512(q + 64 * i);
  for (int i = 0; i < TRIPLE_VECTORS; i++) {
    const __m512i place = *(const __m512i *)triple_places[i], quarter = *(const __m512i *)triple_quarters[i];
    __m512i out = _mm512_permutex2var_epi8(v[0], place, v[1]);
    for (int from = 1; from < 4; from++) {
      const __mmask64 here = _mm512_cmpeq_epi8_mask(quarter, _mm512_set1_epi8((char)from));
      out = _mm512_mask_mov_epi8(out, here, _mm512_permutex2var_epi8(v[2 * from], place, v[2 * from + 1]));
    }
    _mm512_storeu_si512(q + 64 * i, out);
  }
}

/* Vector 2 i (`second`: 2 i + 1) of the codes whose 64 bytes are `v`. */
JPQ_INLINE __m512i triple_in_bytes(__m512i v, int i, int second) {
  return _mm512_and_si512(second ? _mm512_srli_epi16(v, 3) : v, *(const __m512i *)triple_masks[i]);
}

/* Vector 6 of those and of the 64 bytes that begin 48 behind theirs, or 7 of those and of what begins 32 before. */
JPQ_INLINE __m512i triple_in_two(__m512i v, __m512i other, int last) {
  const __m512i near = _mm512_permutexvar_epi8(*(const __m512i *)triple_shared[last], v);
  const __m512i far = _mm512_permutexvar_epi8(*(const __m512i *)triple_shared[0], other);
  const __m512i even = _mm512_srli_epi16(last ? far : near, 6), odd = _mm512_slli_epi16(last ? near : far, 2);
  const __m512i both = _mm512_mask_mov_epi8(even, 0xaaaaaaaaaaaaaaaa, odd); /* vpternlogd would keep products waiting */
  return _mm512_and_si512(both, _mm512_set1_epi32(0x0e0e0707));
}

JPQ_TARGET_END

#endif
#endif
