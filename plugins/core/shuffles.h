/* Where the bits of code j lie, as tables for byte shuffles: lane j of 32 bits gets the two bytes its code is in.
 *
 * Code j of b bits starts at bit j * b: byte j * b / 8, shift j * b % 8, and ends in that byte or the next.
 */
#ifndef JPQ_SHUFFLES_H
#define JPQ_SHUFFLES_H

#include "internal.h"

#define JPQ_LANE(B, J) (((J) * (B)) >> 3) & 15, ((((J) * (B)) >> 3) + 1) & 15, 0x80, 0x80
#define JPQ_LANES4(B, J) JPQ_LANE(B, J), JPQ_LANE(B, J + 1), JPQ_LANE(B, J + 2), JPQ_LANE(B, J + 3)
#define JPQ_BYTES_OF(B) {JPQ_LANES4(B, 0), JPQ_LANES4(B, 4), JPQ_LANES4(B, 8), JPQ_LANES4(B, 12)},
#define JPQ_SHIFT(B, J) ((J) * (B)) & 7
#define JPQ_SHIFTS4(B, J) JPQ_SHIFT(B, J), JPQ_SHIFT(B, J + 1), JPQ_SHIFT(B, J + 2), JPQ_SHIFT(B, J + 3)
#define JPQ_SHIFTS_OF(B) {JPQ_SHIFTS4(B, 0), JPQ_SHIFTS4(B, 4), JPQ_SHIFTS4(B, 8), JPQ_SHIFTS4(B, 12)},

/* Of the 16 bytes from where 16 codes begin; [bits - 1][4 * lane ..]. The second byte may belong to the next code: it
 * is masked away. */
static const _Alignas(64) uint8_t jpq_lane_bytes[8][64] = {JPQ_FOR_BINARY(JPQ_BYTES_OF)};
static const _Alignas(64) int32_t jpq_lane_shifts[8][16] = {JPQ_FOR_BINARY(JPQ_SHIFTS_OF)};

/* The same for lanes of 16 bits: two bytes each, and the factor that moves a code to the top of its lane. */
#define JPQ_WORD(B, J) (((J) * (B)) >> 3) & 15, ((((J) * (B)) >> 3) + 1) & 15
#define JPQ_WORDS4(B, J) JPQ_WORD(B, J), JPQ_WORD(B, J + 1), JPQ_WORD(B, J + 2), JPQ_WORD(B, J + 3)
#define JPQ_WORDS_OF(B) {JPQ_WORDS4(B, 0), JPQ_WORDS4(B, 4), JPQ_WORDS4(B, 8), JPQ_WORDS4(B, 12)},
#define JPQ_FACTOR(B, J) 1 << (16 - (B) - (((J) * (B)) & 7))
#define JPQ_FACTORS4(B, J) JPQ_FACTOR(B, J), JPQ_FACTOR(B, J + 1), JPQ_FACTOR(B, J + 2), JPQ_FACTOR(B, J + 3)
#define JPQ_FACTORS_OF(B) {JPQ_FACTORS4(B, 0), JPQ_FACTORS4(B, 4), JPQ_FACTORS4(B, 8), JPQ_FACTORS4(B, 12)},
static const _Alignas(32) uint8_t jpq_word_bytes[8][32] = {JPQ_FOR_BINARY(JPQ_WORDS_OF)};
static const _Alignas(32) uint16_t jpq_word_factors[8][16] = {JPQ_FOR_BINARY(JPQ_FACTORS_OF)};

/* Ternary codes: a byte q holds five, code d of it the part of q * 3^d * 3 / 256 above the point of q * 3^d / 256. The
 * first of a run may be any of the five: [phase][lane]. A 16-bit lane with q in its low byte, times 256 * 3^d, keeps
 * 256 times that fraction's numerator; the upper half of three times it is the code. */
#define JPQ_POWER(D) ((D) == 0 ? 1 : (D) == 1 ? 3 : (D) == 2 ? 9 : (D) == 3 ? 27 : 81)
#define JPQ_FOR_16(DO, P)                                                                                           \
  DO(P, 0) DO(P, 1) DO(P, 2) DO(P, 3) DO(P, 4) DO(P, 5) DO(P, 6) DO(P, 7) DO(P, 8) DO(P, 9) DO(P, 10) DO(P, 11)     \
      DO(P, 12) DO(P, 13) DO(P, 14) DO(P, 15)
#define JPQ_FOR_PHASES(DO) {JPQ_FOR_16(DO, 0)}, {JPQ_FOR_16(DO, 1)}, {JPQ_FOR_16(DO, 2)}, {JPQ_FOR_16(DO, 3)}, {JPQ_FOR_16(DO, 4)}
#define JPQ_Q_LANE(P, J) ((P) + (J)) / 5, 0x80, 0x80, 0x80,
#define JPQ_Q_WORD(P, J) ((P) + (J)) / 5, 0x80,
#define JPQ_Q_FACTOR(P, J) JPQ_POWER(((P) + (J)) % 5) << 8,
static const _Alignas(64) uint8_t jpq_ternary_lanes[5][64] = {JPQ_FOR_PHASES(JPQ_Q_LANE)};
static const _Alignas(64) int32_t jpq_ternary_lane_factors[5][16] = {JPQ_FOR_PHASES(JPQ_Q_FACTOR)};
static const _Alignas(32) uint8_t jpq_ternary_words[5][32] = {JPQ_FOR_PHASES(JPQ_Q_WORD)};
static const _Alignas(32) uint16_t jpq_ternary_word_factors[5][16] = {JPQ_FOR_PHASES(JPQ_Q_FACTOR)};

#endif
