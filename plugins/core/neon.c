/* NEON (aarch64): 8 codes at a time, as two vectors of four. */
#include "internal.h"

#ifdef JPQ_NEON
#include <arm_neon.h>

#include "shuffles.h"

static int available(void) { return 1; }

typedef struct pair {
  float32x4_t low, high;
} pair;

typedef struct int_pair {
  int32x4_t low, high;
} int_pair;

#define W 8
#define VF pair
#define HAS_FIXED 1
#define CODES 8
#define VC int16x8_t
#define VI int_pair
#define c_load(p) vld1q_s16(p)
#define TILE_VECTORS 2
#define NAME "neon"
#define AVAILABLE available
#define IMPLEMENTATION jpq_neon

JPQ_INLINE VF v_set1(float a) { return (VF){vdupq_n_f32(a), vdupq_n_f32(a)}; }
JPQ_INLINE VF v_zero(void) { return v_set1(0); }
JPQ_INLINE VF v_load(const float *p) { return (VF){vld1q_f32(p), vld1q_f32(p + 4)}; }
JPQ_INLINE VF v_int8(const int8_t *p) {
  int16x8_t words = vmovl_s8(vld1_s8(p));
  return (VF){vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words))};
}
JPQ_INLINE void v_store(float *p, VF a) { vst1q_f32(p, a.low), vst1q_f32(p + 4, a.high); }
JPQ_INLINE VF v_fma(VF a, VF b, VF c) {
  return (VF){vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
JPQ_INLINE VF v_mul(VF a, VF b) { return (VF){vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
JPQ_INLINE VF v_sub(VF a, VF b) { return (VF){vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
JPQ_INLINE float v_sum(VF a) { return vaddvq_f32(vaddq_f32(a.low, a.high)); }
JPQ_INLINE void v_sums(float *out, const VF s[4]) { /* the sum of each of four */
  float32x4_t sum[4];
  for (int i = 0; i < 4; i++) sum[i] = vaddq_f32(s[i].low, s[i].high);
  vst1q_f32(out, vpaddq_f32(vpaddq_f32(sum[0], sum[1]), vpaddq_f32(sum[2], sum[3])));
}
JPQ_INLINE void v_transpose(VF r[W]) {
  float in[W][W], out[W][W];
  for (int i = 0; i < W; i++) v_store(in[i], r[i]);
  for (int i = 0; i < W; i++)
    for (int j = 0; j < W; j++) out[j][i] = in[i][j];
  for (int i = 0; i < W; i++) r[i] = v_load(out[i]);
}

/* 8 ternary codes in 16 bits each; they are in three bytes, or two. */
JPQ_INLINE uint16x8_t ternary_words(const uint8_t *row, int64_t j) {
  uint32_t bytes;
  memcpy(&bytes, jpq_at(row, JPQ_TERNARY, j), 4);
  uint8x16_t all = vreinterpretq_u8_u32(vdupq_n_u32(bytes));
  uint16x8_t q = vreinterpretq_u16_u8(vqtbl1q_u8(all, vld1q_u8(jpq_ternary_words[jpq_phase(j)])));
  q = vmulq_u16(q, vld1q_u16(jpq_ternary_word_factors[jpq_phase(j)])); /* 256 t: the code is the top of three times t */
  return vshrq_n_u16(vmulq_n_u16(vshrq_n_u16(q, 8), 3), 8);
}

/* Levels of codes that are alone in 16 or 32 bits. */
JPQ_INLINE uint8x16_t levels_of(uint8x16_t codes, int bits) {
  const uint8_t *levels = jpq_levels_of(bits);
  if (jpq_width(bits) <= 4) return vqtbl1q_u8(vld1q_u8(levels), codes);
  if (jpq_width(bits) == 5) return vqtbl2q_u8((uint8x16x2_t){{vld1q_u8(levels), vld1q_u8(levels + 16)}}, codes);
  return vqtbl4q_u8((uint8x16x4_t){{vld1q_u8(levels), vld1q_u8(levels + 16), vld1q_u8(levels + 32), vld1q_u8(levels + 48)}}, codes);
}

/* 8 codes as floats; reads 8 bytes, of which `bits` matter. */
JPQ_INLINE VF v_codes(const uint8_t *row, int64_t j, int bits) {
  if (bits == JPQ_TERNARY) {
    uint16x8_t c = ternary_words(row, j);
    return (VF){vcvtq_f32_u32(vmovl_u16(vget_low_u16(c))), vcvtq_f32_u32(vmovl_high_u16(c))};
  }
  uint64_t bytes;
  memcpy(&bytes, jpq_at(row, bits, j), 8);
  uint8x16_t all = vreinterpretq_u8_u64(vdupq_n_u64(bytes));
  const int width = jpq_width(bits);
  float32x4_t out[2];
  for (int i = 0; i < 2; i++) {
    uint32x4_t lanes = vreinterpretq_u32_u8(vqtbl1q_u8(all, vld1q_u8(jpq_lane_bytes[width - 1] + 16 * i)));
    lanes = vshlq_u32(lanes, vnegq_s32(vld1q_s32(jpq_lane_shifts[width - 1] + 4 * i)));
    lanes = vandq_u32(lanes, vdupq_n_u32((1u << width) - 1));
    if (jpq_is_normal(bits))
      lanes = vandq_u32(vreinterpretq_u32_u8(levels_of(vreinterpretq_u8_u32(lanes), bits)), vdupq_n_u32(255));
    out[i] = vcvtq_f32_u32(lanes);
  }
  return (VF){out[0], out[1]};
}

JPQ_INLINE VF v_half(const uint16_t *p) {
  float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(p));
  return (VF){vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)};
}

/* 8 codes in 16 bits each; reads as v_codes does. */
JPQ_INLINE VC c_codes(const uint8_t *row, int64_t j, int bits) {
  if (bits == JPQ_TERNARY) return vreinterpretq_s16_u16(ternary_words(row, j));
  uint64_t bytes;
  memcpy(&bytes, jpq_at(row, bits, j), 8);
  uint8x16_t all = vreinterpretq_u8_u64(vdupq_n_u64(bytes));
  const int width = jpq_width(bits);
  uint16x8_t words = vreinterpretq_u16_u8(vqtbl1q_u8(all, vld1q_u8(jpq_word_bytes[width - 1])));
  words = vmulq_u16(words, vld1q_u16(jpq_word_factors[width - 1]));
  words = vshlq_u16(words, vdupq_n_s16((int16_t)(width - 16)));
  if (jpq_is_normal(bits))
    words = vandq_u16(vreinterpretq_u16_u8(levels_of(vreinterpretq_u8_u16(words), bits)), vdupq_n_u16(255));
  return vreinterpretq_s16_u16(words);
}

JPQ_INLINE VI i_zero(void) { return (VI){vdupq_n_s32(0), vdupq_n_s32(0)}; }
JPQ_INLINE VI i_dot(VI sum, VC c, VC q) {
  return (VI){vmlal_s16(sum.low, vget_low_s16(c), vget_low_s16(q)), vmlal_high_s16(sum.high, c, q)};
}
JPQ_INLINE VF i_to_float(VI a) { return (VF){vcvtq_f32_s32(a.low), vcvtq_f32_s32(a.high)}; }

#include "wide.inc"
#endif
