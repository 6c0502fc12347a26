/* AVX-512 VBMI: the codes of a row as vectors of bytes, 256 codes as four, 128 as a pair or 64 as one, and zeros of 16
 * groups.
 *
 * A pair holds codes 8 l .. 8 l + 7 in 32-bit lane l, those of even place in the first vector (1 to 4 bits); or its lanes
 * 0 to 7 the first 64 codes, 8 to 15 the others (5 to 7 bits). Either way groups of 64 codes lie side by side: they
 * share one sum, one conversion and one multiplication by scales. X is brought into the same order, once.
 * Four vectors (1 to 4 bits) hold 16 codes that follow each other in lane l: one sum for four of them. Up to 2 bits these are
 * codes 16 l .. 16 l + 15; of 3 and 4 bits lanes 4 k and 4 k + 1 have codes 32 k .. 32 k + 31 of the first 128 and lanes
 * 4 k + 2 and 4 k + 3 those of the others, as that shuffle comes which hinders products least. Where all 256 are of one
 * group no lane needs to be of neighbours: the four are two pairs, without a shuffle.
 */
#ifndef JPQ_VNNI_CODES_H
#define JPQ_VNNI_CODES_H

#include <immintrin.h>

#include "internal.h"
#include "shuffles.h"

enum { OVERREAD = 64 }; /* loads end at most so many bytes behind the codes they are for */

/* Bytes b * j + t of qword j, and bits b * t of byte t: 64 codes of b bits in their order. */
#define SPREAD(B, J) (J) * (B), (J) * (B) + 1, (J) * (B) + 2, (J) * (B) + 3, (J) * (B) + 4, (J) * (B) + 5, (J) * (B) + 6, (J) * (B) + 7
#define SPREAD4(B, D) SPREAD(1, D), SPREAD(1, D + B), SPREAD(1, D + 2 * (B)), SPREAD(1, D + 3 * (B))
#define SPREADS(B) {SPREAD4(B, 0), SPREAD4(B, 4 * (B))},
#define STARTS(B) {0, (B), 2 * (B), 3 * (B), 4 * (B), 5 * (B), 6 * (B), 7 * (B)},
static const _Alignas(64) uint8_t spreads[8][64] = {JPQ_FOR_BINARY(SPREADS)};
static const uint8_t starts[8][8] = {JPQ_FOR_BINARY(STARTS)};

/* Pairs. Up to 4 bits a qword holds 16 codes, of which either vector takes every second. Then a vector takes 32 codes
 * from the first 64 and 32 from the others; of 5 bits both lie within 64 bytes, of 6 and 7 they are loaded apart. */
#define EVERY_SECOND(B) {SPREAD4(2 * (B), 0), SPREAD4(2 * (B), 8 * (B))}
#define TWO_PARTS(B, D) {SPREAD4(B, 0), SPREAD4(B, D)}
static const _Alignas(64) uint8_t pair_spreads[7][64] = {
    EVERY_SECOND(1), EVERY_SECOND(2), EVERY_SECOND(3), {0}, TWO_PARTS(5, 40), TWO_PARTS(6, 32), TWO_PARTS(7, 32)};
#define SECONDS(B) {0, 2 * (B), 4 * (B), 6 * (B), 8 * (B), 10 * (B), 12 * (B), 14 * (B)}
static const uint8_t seconds[3][8] = {SECONDS(1), SECONDS(2), SECONDS(3)};

/* Of 3 bits: 128 codes as 16 lanes of 8 codes in 3 bytes each, and where every second code of two lanes begins. */
#define THREE(AT) AT, (AT) + 1, (AT) + 2, 0
#define FOUR_THREES(AT) THREE(AT), THREE((AT) + 3), THREE((AT) + 6), THREE((AT) + 9)
static const _Alignas(64) uint8_t threes[64] = {FOUR_THREES(0), FOUR_THREES(12), FOUR_THREES(24), FOUR_THREES(36)};
static const uint8_t sixths[8] = {0, 6, 12, 18, 32, 38, 44, 50};

/* Four vectors of 1 bit: of each byte of a vector whose bytes begin with codes 0, 4, 8, ... of 32. */
static const uint8_t fourths[8] = {0, 4, 8, 12, 16, 20, 24, 28};

/* Where the codes of each vector are among the 128 or 256 of a form. */
#define ORDER16(STEP, AT) \
  AT, AT + STEP, AT + 2 * STEP, AT + 3 * STEP, AT + 4 * STEP, AT + 5 * STEP, AT + 6 * STEP, AT + 7 * STEP, AT + 8 * STEP, \
      AT + 9 * STEP, AT + 10 * STEP, AT + 11 * STEP, AT + 12 * STEP, AT + 13 * STEP, AT + 14 * STEP, AT + 15 * STEP
#define EVERY_FOURTH(I) {ORDER16(4, I), ORDER16(4, 64 + I), ORDER16(4, 128 + I), ORDER16(4, 192 + I)}
#define ORDER4(AT) AT, AT + 2, AT + 4, AT + 6
#define FOUR_LANES(AT) ORDER4(AT), ORDER4(AT + 16), ORDER4(AT + 128), ORDER4(AT + 144)
#define OF_EIGHT(I) {FOUR_LANES(I), FOUR_LANES(32 + I), FOUR_LANES(64 + I), FOUR_LANES(96 + I)}
#define EVERY_OTHER(I) {ORDER16(2, I), ORDER16(2, 32 + I), ORDER16(2, 64 + I), ORDER16(2, 96 + I)}
enum { PLAIN, PAIRS, WIDE_PAIRS, QUADS, SPLIT_QUADS, TWO_PAIRS, OF_TRIPLES /* vnni_triples.h */ };
static const _Alignas(64) uint8_t orders[6][4][64] = {
    [PAIRS] = {EVERY_OTHER(0), EVERY_OTHER(1)},
    [WIDE_PAIRS] = {{ORDER16(1, 0), ORDER16(1, 16), ORDER16(1, 64), ORDER16(1, 80)},
                    {ORDER16(1, 32), ORDER16(1, 48), ORDER16(1, 96), ORDER16(1, 112)}},
    [QUADS] = {EVERY_FOURTH(0), EVERY_FOURTH(1), EVERY_FOURTH(2), EVERY_FOURTH(3)},
    [SPLIT_QUADS] = {OF_EIGHT(0), OF_EIGHT(1), OF_EIGHT(8), OF_EIGHT(9)},
    [TWO_PAIRS] = {EVERY_OTHER(0), EVERY_OTHER(1), EVERY_OTHER(128), EVERY_OTHER(129)}};

/* Ternary: the byte of each of 64 codes whose first is in a phase, and factors for even codes (whose result is brought
 * to the upper half of 16 bits) and odd ones (which are there). */
#define EVEN(P, J) JPQ_POWER(((P) + 2 * (J)) % 5) << 8,
#define ODD(P, J) JPQ_POWER(((P) + 2 * (J) + 1) % 5),
#define Q4(P, J) ((P) + 4 * (J)) / 5, ((P) + 4 * (J) + 1) / 5, ((P) + 4 * (J) + 2) / 5, ((P) + 4 * (J) + 3) / 5,
#define FACTORS(P, DO) {JPQ_FOR_16(DO, P) JPQ_FOR_16(DO, P + 32)} /* 32 more codes on: P + 32 of the same formula */
static const _Alignas(64) uint8_t ternary_spreads[5][64] = {JPQ_FOR_PHASES(Q4)};
static const _Alignas(64) uint16_t evens[5][32] = {FACTORS(0, EVEN), FACTORS(1, EVEN), FACTORS(2, EVEN), FACTORS(3, EVEN), FACTORS(4, EVEN)};
static const _Alignas(64) uint16_t odds[5][32] = {FACTORS(0, ODD), FACTORS(1, ODD), FACTORS(2, ODD), FACTORS(3, ODD), FACTORS(4, ODD)};

JPQ_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,gfni,avx2,fma,f16c")

JPQ_INLINE __mmask64 low_bits(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

/* How codes come: 8 bits and ternary ones, and where a lane would be of several groups, 64 at a time. `whole`: a block of
 * 256, or what there is of it, is never of two groups. */
JPQ_INLINE int form_of(int bits, int32_t group_size, int whole) {
  if (jpq_is_normal(bits) && !whole) return PLAIN; /* levels are bytes: a lane has room for four products */
  if (jpq_is_normal(bits) && group_size % 16) return PLAIN;
  bits = jpq_width(bits);
  if (bits <= 4 && group_size % 16 == 0) return bits <= 2 ? QUADS : whole ? TWO_PAIRS : SPLIT_QUADS;
  return bits <= 4 ? PAIRS : bits <= 7 && group_size % 64 == 0 ? WIDE_PAIRS : PLAIN;
}

/* Codes that come together. */
JPQ_INLINE int64_t block_of(int form) { return form >= QUADS ? 256 : form == PLAIN ? 64 : 128; }

/* Only as many bytes as the codes are in are loaded: wider loads cross more cache lines. */
JPQ_INLINE __m512i load(const uint8_t *p, int bytes) {
  if (bytes <= 16) return _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
  if (bytes <= 32) return _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)p));
  return _mm512_loadu_si512(p);
}

/* In 16 bits, 256 t = q * 3^d * 256: the code is the upper half of three times that. */
JPQ_INLINE __m512i unpack_ternary(const uint8_t *p, unsigned phase) {
  __m512i q = _mm512_permutexvar_epi8(*(const __m512i *)ternary_spreads[phase], load(p, 14));
  __m512i even = _mm512_mullo_epi16(q, *(const __m512i *)evens[phase]);
  __m512i odd = _mm512_mullo_epi16(_mm512_andnot_si512(_mm512_set1_epi16(255), q), *(const __m512i *)odds[phase]);
  even = _mm512_mulhi_epu16(even, _mm512_set1_epi16(3));
  odd = _mm512_mulhi_epu16(odd, _mm512_set1_epi16(3 * 256)); /* the code in its upper byte, a rest in the lower */
  return _mm512_ternarylogic_epi32(_mm512_set1_epi16(255), even, odd, 0xca); /* lower bytes of even, upper of odd */
}

/* Bits start[t] .. start[t] + 7 of each qword as its byte t. */
JPQ_INLINE __m512i windows(__m512i qwords, const uint8_t *start) {
  uint64_t control;
  memcpy(&control, start, 8);
  return _mm512_multishift_epi64_epi8(_mm512_set1_epi64((int64_t)control), qwords);
}

/* The same, `bits` bits of them. */
JPQ_INLINE __m512i pick(__m512i qwords, const uint8_t *start, int bits) {
  return _mm512_and_si512(windows(qwords, start), _mm512_set1_epi8((char)((1 << bits) - 1)));
}

/* Levels of the codes in bits start on of each byte, whatever is above them; of 16 bits that are shifted together. */
JPQ_INLINE __m512i levels_at(__m512i bytes, int start, int bits) {
  if (start) bytes = _mm512_srli_epi16(bytes, (unsigned)start);
  return _mm512_permutexvar_epi8(bytes, *(const __m512i *)jpq_levels_of(bits));
}

/* Codes j .. j + 63 of a row in their order, j a multiple of 64. */
JPQ_INLINE __m512i unpack(const uint8_t *row, int64_t j, int bits) {
  if (bits == JPQ_TERNARY) return unpack_ternary(jpq_at(row, bits, j), jpq_phase(j));
  const int width = jpq_width(bits);
  const uint8_t *p = row + j / 8 * width;
  if (bits == 8) return load(p, 64);
  const __m512i spread = _mm512_permutexvar_epi8(*(const __m512i *)spreads[width - 1], load(p, 8 * width));
  return jpq_is_normal(bits) ? levels_at(windows(spread, starts[width - 1]), 0, bits) : pick(spread, starts[width - 1], bits);
}

/* Bits start .. start + bits - 1 of each byte. */
JPQ_INLINE __m512i field(__m512i bytes, int start, int bits) {
  if (jpq_is_normal(bits)) return levels_at(bytes, start, bits);
  uint64_t matrix = 0; /* byte 7 - i says of which bits bit i is the sum */
  if (!start) return _mm512_and_si512(bytes, _mm512_set1_epi8((char)((1 << bits) - 1)));
  for (int i = 0; i < bits; i++) matrix |= 1ull << (8 * (7 - i) + start + i);
  return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64((int64_t)matrix), 0);
}

/* The 128 codes from `p` on as a pair. */
JPQ_INLINE void unpack_pair(const uint8_t *p, int bits, __m512i out[2]) {
  const int width = jpq_width(bits);
  if (width == 4) {
    __m512i v = load(p, 64);
    for (int i = 0; i < 2; i++) out[i] = field(v, 4 * i, bits);
    return;
  }
  __m512i spread = *(const __m512i *)pair_spreads[width - 1];
  if (width < 4) {
    __m512i v = windows(_mm512_permutexvar_epi8(spread, load(p, 16 * width)), seconds[width - 1]);
    for (int i = 0; i < 2; i++) out[i] = field(v, i * width, bits);
    return;
  }
  for (int i = 0; i < 2; i++, p += 4 * width) {
    __m512i v = width == 5 ? load(p, 64)
                           : _mm512_inserti64x4(load(p, 32), _mm256_loadu_si256((const __m256i *)(p + 8 * width)), 1);
    v = windows(_mm512_permutexvar_epi8(spread, v), starts[width - 1]);
    out[i] = field(v, 0, bits);
  }
}

/* Of the 256 codes from `p` on: bytes that begin with the codes of vectors 0 and 2, and hold those of the vectors behind
 * them; up to 2 bits all are in the first. `whole` as in form_of. */
JPQ_INLINE void quad_bytes(const uint8_t *p, int bits, int whole, __m512i out[2]) {
  if (bits <= 2) {
    out[0] = bits == 2 ? load(p, 64) : _mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i *)p));
    if (bits == 1) out[0] = windows(out[0], fourths); /* four codes and four of the next byte */
    return;
  }
  __m512i first = load(p, 64), last = load(p + 16 * jpq_width(bits), 64);
  if (whole) {
    const __m512i spread = *(const __m512i *)pair_spreads[2];
    out[0] = jpq_width(bits) == 4 ? first : windows(_mm512_permutexvar_epi8(spread, first), seconds[2]);
    out[1] = jpq_width(bits) == 4 ? last : windows(_mm512_permutexvar_epi8(spread, last), seconds[2]);
    return;
  }
  if (bits == 3) {
    first = _mm512_permutexvar_epi8(*(const __m512i *)threes, first);
    last = _mm512_permutexvar_epi8(*(const __m512i *)threes, last);
  }
  const __m512 a = _mm512_castsi512_ps(first), b = _mm512_castsi512_ps(last);
  out[0] = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)); /* even lanes of both */
  out[1] = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd)); /* odd ones */
  for (int half = 0; half < 2 && bits == 3; half++) out[half] = windows(out[half], sixths);
}

/* Vector v of the four. */
JPQ_INLINE __m512i quad_vector(const __m512i bytes[2], int v, int bits, int shifts) {
  const int start = jpq_width(bits) * (bits <= 2 ? v : v % 2);
  const __m512i b = bytes[bits <= 2 ? 0 : v / 2];
  if (!shifts || !start || jpq_is_normal(bits)) return field(b, start, bits);
  return field(_mm512_srli_epi16(b, (unsigned)start), 0, bits);
}

/* The 256 codes from `p` on as four vectors. */
JPQ_INLINE void unpack_quad(const uint8_t *p, int bits, int whole, __m512i out[4]) {
  __m512i bytes[2];
  quad_bytes(p, bits, whole, bytes);
  for (int v = 0; v < 4; v++) out[v] = quad_vector(bytes, v, bits, 0);
}

/* Zeros of groups g .. g + 15 of a row, g a multiple of 16, `there`: which bytes from theirs on may be read. */
JPQ_INLINE __m512 load_zeros(const uint8_t *zeros, int64_t g, int bits, __mmask16 there) {
  __m512i lanes = _mm512_castsi128_si512(_mm_maskz_loadu_epi8(there, jpq_at(zeros, bits, g)));
  if (bits == JPQ_TERNARY) {
    lanes = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm512_castsi512_si128(lanes)), *(const __m512i *)jpq_ternary_lanes[jpq_phase(g)]);
    lanes = _mm512_mullo_epi16(lanes, *(const __m512i *)jpq_ternary_lane_factors[jpq_phase(g)]);
    return _mm512_cvtepi32_ps(_mm512_mulhi_epu16(lanes, _mm512_set1_epi32(3)));
  }
  const int width = jpq_width(bits); /* of levels too, though none has zeros */
  lanes = _mm512_permutexvar_epi8(*(const __m512i *)jpq_lane_bytes[width - 1], lanes); /* what is to be 0 is masked away */
  lanes = _mm512_srlv_epi32(lanes, *(const __m512i *)jpq_lane_shifts[width - 1]);
  return _mm512_cvtepi32_ps(_mm512_and_si512(lanes, _mm512_set1_epi32((1 << width) - 1)));
}

JPQ_TARGET_END

#endif
