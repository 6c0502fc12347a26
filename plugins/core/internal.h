/* What the implementations share: the table each fills, the unpacking of 8 codes, fp16, sums over groups. */
#ifndef JPQ_INTERNAL_H
#define JPQ_INTERNAL_H

#include <string.h>

#include "levels.h"
#include "low_bit.h"

#if defined(__x86_64__) || defined(_M_X64)
#define JPQ_X86 1
#endif
#if defined(__aarch64__)
#define JPQ_NEON 1
#endif

#define JPQ_INLINE static inline __attribute__((always_inline, unused))

/* Compile what follows for more than the base processor; run it only where `available` said so. */
#if defined(__clang__)
#define JPQ_PRAGMA(text) _Pragma(#text)
#define JPQ_TARGET(features) \
  JPQ_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define JPQ_TARGET_END _Pragma("clang attribute pop")
#else
#define JPQ_PRAGMA(text) _Pragma(#text)
#define JPQ_TARGET(features) JPQ_PRAGMA(GCC push_options) JPQ_PRAGMA(GCC target(features))
#define JPQ_TARGET_END JPQ_PRAGMA(GCC pop_options)
#endif

/* One line per width. Every width goes through the same text. Tables have an
 * entry each, in this order: that of a width is at jpq_index. */
#define JPQ_FOR_BINARY(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8)
#define JPQ_FOR_NORMAL(DO) DO(35) DO(36) DO(37) DO(38)
#define JPQ_FOR_BITS(DO) JPQ_FOR_BINARY(DO) DO(16) JPQ_FOR_NORMAL(DO)
#define JPQ_INDEX(BITS) ((BITS) == JPQ_TERNARY ? 8 : (BITS) > JPQ_NORMAL ? (BITS)-JPQ_NORMAL - JPQ_LEAST_NORMAL + 9 : (BITS)-1)
enum { JPQ_WIDTHS = 13 };

struct jpq_attention;
struct attention_task;

typedef struct jpq_implementation {
  const char *name;
  int (*available)(void);
  int (*takes)(const jpq_weight *weight); /* group sizes and row lengths it can do */
  /* Bring X into shape; may leave product->prepared NULL. */
  jpq_status (*prepare)(jpq_product *product);
  /* Products of one X, K and group size whose forms are equal want X alike; NULL says that all do. */
  int (*form)(const jpq_product *product);
  jpq_status (*matmul_rows)(const jpq_product *product, int64_t first, int64_t last);
  /* Codes [begin, end) of a row as scale * (code - zero); multiples of 8 unless `takes` allows any. */
  void (*dequantize)(const jpq_weight *weight, int64_t row, int64_t begin, int64_t end, float *out);
  /* A task of an attention (attention_task.h) whose heads are a multiple of `lanes` wide; NULL leaves it to others. */
  jpq_status (*attend)(const struct jpq_attention *attention, const struct attention_task *task);
  int lanes;
  /* One row of jpq_add_norm, and jpq_gated (rowwise.h); NULL leaves them to others. */
  void (*add_norm)(const float *a, const float *b, const float *weight, float epsilon, int64_t width, float *sum, float *y);
  void (*silu_times)(const float *x, const float *factor, int64_t count, float *y);
  void (*gelu_times)(const float *x, const float *factor, int64_t count, float *y);
} jpq_implementation;

/* The best implementation of attention with heads of width `dim`, or the one called `name`; NULL when there is none. */
const jpq_implementation *jpq_choose_attention(int64_t dim, const char *name);

/* Likewise of what stands in rowwise.h. */
const jpq_implementation *jpq_choose_rowwise(const char *name);

#ifdef JPQ_X86
/* What processor and operating system both allow; asked of them, as compilers differ in the names they know. */
typedef struct jpq_cpu {
  int avx2;        /* with FMA and F16C */
  int avx512;      /* F, DQ, BW, VL */
  int avx512_vnni; /* with VBMI and GFNI */
  int amd;         /* whose prefetching differs from Intel's */
} jpq_cpu;
extern jpq_cpu jpq_cpu_features; /* set when the library is loaded: asking takes 30 us in a virtual machine */
#endif

extern const jpq_implementation jpq_scalar, jpq_avx2, jpq_avx512, jpq_vnni, jpq_neon;

JPQ_INLINE int jpq_index(int bits) { return JPQ_INDEX(bits); }

JPQ_INLINE int jpq_is_normal(int bits) { return bits > JPQ_NORMAL; }

/* The levels of a width, or of any where it has none. */
JPQ_INLINE const uint8_t *jpq_levels_of(int bits) { return jpq_levels[jpq_is_normal(bits) ? jpq_width(bits) - JPQ_LEAST_NORMAL : 0]; }

JPQ_INLINE int64_t jpq_groups(const jpq_weight *w) { return w->k / w->group_size; }

/* The zero of symmetric codes. */
JPQ_INLINE float jpq_centre(int bits) {
  return bits == JPQ_TERNARY ? 1 : jpq_is_normal(bits) ? 128 : 0.5f * (float)((1 << bits) - 1);
}

/* What 8 codes of `bits` bits stand for, from as many bytes. */
JPQ_INLINE void jpq_unpack8(const uint8_t *p, int bits, uint8_t out[8]) {
  const int width = jpq_width(bits);
  uint64_t v = 0;
  for (int i = 0; i < width; i++) v |= (uint64_t)p[i] << (8 * i);
  for (int j = 0; j < 8; j++) {
    const uint8_t code = (uint8_t)((v >> (j * width)) & ((1u << width) - 1));
    out[j] = jpq_is_normal(bits) ? jpq_levels_of(bits)[code] : code;
  }
}

/* Where a code's bytes begin, for a multiple of 8 codes, or any of ternary ones, of which it may be in the middle. */
JPQ_INLINE const uint8_t *jpq_at(const uint8_t *row, int bits, int64_t j) {
  return row + (bits == JPQ_TERNARY ? (int64_t)((uint64_t)j / 5) : j / 8 * jpq_width(bits));
}

/* Which of its byte's five ternary code j is. */
JPQ_INLINE unsigned jpq_phase(int64_t j) { return (unsigned)((uint64_t)j % 5); }

/* What code j of a row stands for; reads no byte past the one its last bit is in. */
JPQ_INLINE uint8_t jpq_code(const uint8_t *row, int bits, int64_t j) {
  static const unsigned powers[5] = {1, 3, 9, 27, 81};
  if (bits == JPQ_TERNARY) return (uint8_t)((row[j / 5] * powers[j % 5] & 255) * 3 >> 8);
  const int width = jpq_width(bits);
  int64_t bit = j * width;
  int shift = (int)(bit & 7);
  unsigned v = row[bit >> 3];
  if (shift + width > 8) v |= (unsigned)row[(bit >> 3) + 1] << 8;
  const uint8_t code = (uint8_t)((v >> shift) & ((1u << width) - 1));
  return jpq_is_normal(bits) ? jpq_levels_of(bits)[code] : code;
}

JPQ_INLINE float jpq_half(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023u, bits;
  float f;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    f = (float)mantissa * 0x1p-24f; /* subnormal: exact */
    return sign ? -f : f;
  }
  memcpy(&f, &bits, sizeof f);
  return f;
}

/* Scales of a row and scale * zero, as floats: `scale`[groups], `shift`[groups]. */
JPQ_INLINE void jpq_row_scales(const jpq_weight *w, int64_t row, float *scale, float *shift) {
  int64_t groups = jpq_groups(w);
  const uint16_t *s = w->scales + row * groups;
  const uint8_t *z = w->zeros ? w->zeros + row * jpq_bytes(groups, w->bits) : NULL;
  float centre = jpq_centre(w->bits);
  for (int64_t g = 0; g < groups; g++) {
    scale[g] = jpq_half(s[g]);
    shift[g] = scale[g] * (z ? (float)jpq_code(z, w->bits, g) : centre);
  }
}

/* Sums of X over groups: [m, groups]. */
JPQ_INLINE void jpq_group_sums(const float *x, int64_t m, int64_t k, int32_t group, float *sums) {
  for (int64_t i = 0; i < m * (k / group); i++) {
    float total = 0;
    for (int32_t j = 0; j < group; j++) total += x[i * group + j];
    sums[i] = total;
  }
}

#endif
