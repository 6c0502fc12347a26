/* Ternary codes (0, 1, 2) on a GPU: five share a byte, so units of 32 do not begin with one. They are taken apart once,
 * when loaded, into codes of two bits; all that follows is that of two-bit weights.
 *
 * A byte q is the number 0.c0 c1 c2 c3 c4 in base 3, in units of 1/256 (numerics/packing.py): three times it has the
 * next digit above bit 8, and the rest below.
 */
#ifndef JPQ_LOW_BIT_TERNARY_CUH
#define JPQ_LOW_BIT_TERNARY_CUH

#include "low_bit_device.cuh"

namespace jpq {

/* Bits of a code once its unit is in registers. */
template <int BITS>
constexpr int HELD = BITS == JPQ_TERNARY ? 2 : WIDTH<BITS>;

/* Code j of a packed row. */
__device__ __forceinline__ uint32_t ternary_at(const uint8_t *row, int j) {
  uint32_t rest = row[j / 5];
  for (int d = j % 5; d; d--) rest = rest * 3 & 255;
  return rest * 3 >> 8;
}

/* The zero of a group at a width known when compiling, so that others pay nothing for ternary codes. */
template <int BITS>
__device__ __forceinline__ float zero_of(const Weight &w, int64_t row, int group) {
  if constexpr (BITS == JPQ_TERNARY)
    return w.zeros ? (float)ternary_at(w.zeros + row * w.zero_bytes, group) : 1.f;
  else if constexpr (NORMAL<BITS>)
    return 0.f; /* `number` knows it */
  else
    return load_zero(w, row, group);
}

/* The word at `p`, a multiple of 4, as far as it lies in [begin, end); zeros elsewhere. */
__device__ __forceinline__ uint32_t word_within(const uint8_t *p, const uint8_t *begin, const uint8_t *end) {
  if (p >= begin && p + 4 <= end) return *(const uint32_t *)p;
  uint32_t v = 0;
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (p + i >= begin && p + i < end) v |= (uint32_t)p[i] << (8 * i);
  return v;
}

/* Ten codes of the bytes in bits 0-7 and 16-23, as 20 bits. */
__device__ __forceinline__ uint32_t ten_codes(uint32_t bytes) {
  uint32_t v = bytes, out = 0;
#pragma unroll
  for (int d = 0; d < 5; d++) {
    v *= 3; /* at most 765: the two do not meet */
    out |= (v >> 8 & 0x00030003u) << (2 * d);
    v &= 0x00ff00ffu;
  }
  return (out & 0x3ffu) | out >> 16 << 10;
}

/* The 32 codes from code `phase` (0-4) of the eight bytes in `low`, `high` on, as two words of two-bit codes. */
__device__ __forceinline__ void ternary_unit(uint32_t low, uint32_t high, int phase, uint32_t (&words)[2]) {
  const uint32_t a = ten_codes((low & 0xffu) | (low & 0xff00u) << 8);
  const uint32_t b = ten_codes((low >> 16 & 0xffu) | (low >> 24) << 16);
  const uint32_t c = ten_codes((high & 0xffu) | (high & 0xff00u) << 8);
  const uint32_t d = ten_codes((high >> 16 & 0xffu) | (high >> 24) << 16);
  const uint32_t first = a | b << 20, second = b >> 12 | c << 8 | d << 28, third = d >> 4; /* 80 bits in order */
  words[0] = (uint32_t)(((uint64_t)second << 32 | first) >> (2 * phase));
  words[1] = (uint32_t)(((uint64_t)third << 32 | second) >> (2 * phase));
}

/* Unit `unit` of a row: eight bytes from three straight words, none of them from outside the weight. */
__device__ __forceinline__ void load_ternary(const Weight &w, int64_t row, int unit, uint32_t (&words)[2]) {
  const int first = unit * UNIT, byte = first / 5;
  const uint8_t *p = w.packed + row * w.row_bytes + byte, *end = w.packed + w.n * w.row_bytes;
  const int shift = (int)((uintptr_t)p & 3) * 8;
  const uint8_t *straight = p - shift / 8;
  const uint32_t v0 = word_within(straight, w.packed, end), v1 = word_within(straight + 4, w.packed, end);
  const uint32_t v2 = word_within(straight + 8, w.packed, end);
  const uint32_t low = (uint32_t)(((uint64_t)v1 << 32 | v0) >> shift);
  const uint32_t high = (uint32_t)(((uint64_t)v2 << 32 | v1) >> shift);
  ternary_unit(low, high, first - 5 * byte, words);
}

}  // namespace jpq
#endif
