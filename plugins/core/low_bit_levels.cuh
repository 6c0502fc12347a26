/* Normal levels (levels.h) on a GPU: codes of 3 to 6 bits stand for bytes around 128.
 *
 * PRMT takes one byte of eight by a code of three bits, from registers. A width more is twice as many of them and a
 * choice: 1, 3, 7 and 15 instructions for 3, 4, 5 and 6 bits. So an Orin has none to spare for more than 4 bits, and
 * plans for a GPU give wider codes even levels (format/target.py); they are read here all the same.
 */
#ifndef JPQ_LOW_BIT_LEVELS_CUH
#define JPQ_LOW_BIT_LEVELS_CUH

#include "levels.h"
#include "low_bit_ternary.cuh"

namespace jpq {

constexpr uint32_t TWO_23 = 0x4b000000u; /* 2^23 as fp32; a step of its last bit is 1 */
constexpr float TWO_23_ZERO = 8388608.f + 128.f;

/* Four levels in a word. */
template <int WIDE, int I>
struct Levels {
  static constexpr int table = WIDE - JPQ_LEAST_NORMAL;
  static constexpr uint32_t word = jpq_levels[table][4 * I] | (uint32_t)jpq_levels[table][4 * I + 1] << 8 |
                                   (uint32_t)jpq_levels[table][4 * I + 2] << 16 |
                                   (uint32_t)jpq_levels[table][4 * I + 3] << 24;
};

/* In the lowest byte: the level of the lowest BITS bits of `code`, in the table of WIDE bits from word FIRST on. */
template <int WIDE, int BITS = WIDE, int FIRST = 0>
__device__ __forceinline__ uint32_t level(uint32_t code) {
  if constexpr (BITS == 3) {
    return __byte_perm(Levels<WIDE, FIRST>::word, Levels<WIDE, FIRST + 1>::word, code & 7);
  } else {
    const uint32_t low = level<WIDE, BITS - 1, FIRST>(code);
    const uint32_t high = level<WIDE, BITS - 1, FIRST + (1 << (BITS - 3))>(code);
    return code >> (BITS - 1) & 1 ? high : low;
  }
}

/* The level in a word's lowest byte less 128, exactly. */
__device__ __forceinline__ float centred_level(uint32_t byte) {
  return __uint_as_float(__byte_perm(byte, TWO_23, 0x7440)) - TWO_23_ZERO;
}

/* What the scale multiplies, exactly, of code J of the 32 in `words`; `offset`: see `centred`. */
template <int BITS>
__device__ __forceinline__ float number(const uint32_t (&words)[HELD<BITS>], int j, float offset) {
  if constexpr (NORMAL<BITS>)
    return centred_level(level<WIDTH<BITS>>(code<HELD<BITS>>(words, j)));
  else
    return centred(code<HELD<BITS>>(words, j), offset);
}

/* The same at a width known when running. */
__device__ __forceinline__ float level_number(uint32_t code, int bits) {
  switch (bits - JPQ_NORMAL) {
    case 3: return centred_level(level<3>(code));
    case 4: return centred_level(level<4>(code));
    case 5: return centred_level(level<5>(code));
    default: return centred_level(level<6>(code));
  }
}

}  // namespace jpq
#endif
