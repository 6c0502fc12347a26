/* AVX-512 VNNI + VBMI: 64 codes at a time, unpacked to bytes and multiplied with X in fixed point.
 *
 * Each group of X becomes scale * q, q an integer of `parts` signed bytes in base 128:
 *
 *     1 part   8 bits    INT8    q = h
 *     2 parts  15 bits   INT16   q = 128 h + l
 *     3 parts  22 bits   FP32    q = 128 (128 h + m) + l: what rounding loses is below what an fp32 sum loses
 *
 * Up to `most_rows` rows of X; from there on fp32 tiles are faster, and exact.
 *
 * One vpdpbusd a part, a shift by 7 between parts; a 32-bit lane sums 4 products: at most 4 * 255 * 127 * 128^2 +
 * ... < 2^31. One conversion and one fused multiply-add per 64 codes bring it to fp32, times scale of W and of X.
 */
#include "internal.h"

#ifdef JPQ_X86
#include <immintrin.h>
#include <stdlib.h>

#include "shuffles.h"

enum {
  FEW = 4,
  TILE_BYTES = 16384,  /* of packed rows that stay in the first-level cache while all rows of X pass */
  AHEAD = 2048,        /* bytes to prefetch ahead: without, a core reads weights at half the speed of memory */
  OVERREAD = 64,       /* every load takes 64 bytes, of which 8 * bits matter */
};

static int available(void) { return jpq_cpu_features.avx512_vnni; }

static int takes(const jpq_weight *w) { return w->group_size % 8 == 0; }

static const jpq_implementation *other(const jpq_weight *w) { return jpq_avx512.takes(w) ? &jpq_avx512 : &jpq_avx2; }

/* X in fixed point, and where scales go when a block of 64 codes holds several groups. */
typedef struct prepared {
  int64_t real_groups;     /* of a row; a division, so done once */
  int64_t columns, groups; /* padded: k to 64, groups to 16 */
  const int8_t *q;         /* [m, parts, columns] */
  const float *scale;      /* [m, groups] */
  const float *sum;        /* [m, groups] scale * sum of q */
  const int32_t *lane;     /* [columns / 64, 16] group of 4 codes, from the block's first */
} prepared;

/* Shuffles for 64 codes: bytes b * j + t of qword j; bits b * t of byte t. */
#define SPREAD(B, J) (J) * (B), (J) * (B) + 1, (J) * (B) + 2, (J) * (B) + 3, (J) * (B) + 4, (J) * (B) + 5, (J) * (B) + 6, (J) * (B) + 7
#define SPREADS(B) \
  {SPREAD(B, 0), SPREAD(B, 1), SPREAD(B, 2), SPREAD(B, 3), SPREAD(B, 4), SPREAD(B, 5), SPREAD(B, 6), SPREAD(B, 7)},
#define STARTS(B) {0, (B), 2 * (B), 3 * (B), 4 * (B), 5 * (B), 6 * (B), 7 * (B)},
static const _Alignas(64) uint8_t spreads[8][64] = {JPQ_FOR_BINARY(SPREADS)};
static const uint8_t starts[8][8] = {JPQ_FOR_BINARY(STARTS)};

/* Ternary: the byte of each of 64 codes whose first is in a phase, and factors for even codes (whose result is brought
 * to the upper half of 16 bits) and odd ones (which are there). */
#define EVEN(P, J) JPQ_POWER(((P) + 2 * (J)) % 5) << 8,
#define ODD(P, J) JPQ_POWER(((P) + 2 * (J) + 1) % 5),
#define Q4(P, J) ((P) + 4 * (J)) / 5, ((P) + 4 * (J) + 1) / 5, ((P) + 4 * (J) + 2) / 5, ((P) + 4 * (J) + 3) / 5,
#define FACTORS(P, DO) {JPQ_FOR_16(DO, P) JPQ_FOR_16(DO, P + 32)} /* 32 more codes on: P + 32 of the same formula */
static const _Alignas(64) uint8_t ternary_spreads[5][64] = {JPQ_FOR_PHASES(Q4)};
static const _Alignas(64) uint16_t evens[5][32] = {FACTORS(0, EVEN), FACTORS(1, EVEN), FACTORS(2, EVEN), FACTORS(3, EVEN), FACTORS(4, EVEN)};
static const _Alignas(64) uint16_t odds[5][32] = {FACTORS(0, ODD), FACTORS(1, ODD), FACTORS(2, ODD), FACTORS(3, ODD), FACTORS(4, ODD)};

JPQ_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx2,fma,f16c")

JPQ_INLINE __mmask64 low_bits(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

/* ---- X ---- */

/* One group: its scale, and `parts` planes of digits `columns` apart; returns the sum of q. */
static float digits(const float *x, int32_t count, int parts, int8_t *q, int64_t columns, float *scale) {
  static const float largest[4] = {0, 127, 127 * 128, 127 * 128 * 128};
  __m512i top = _mm512_setzero_si512();
  for (int32_t j = 0; j < count; j += 16) {
    __m512i bits = _mm512_maskz_loadu_epi32((__mmask16)low_bits(count - j), x + j);
    top = _mm512_max_epu32(top, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  }
  uint32_t most = _mm512_reduce_max_epu32(top); /* floats without sign sort like integers, NaN above infinity */
  float size;
  memcpy(&size, &most, sizeof size);
  /* An infinity or NaN makes the row NaN; a group of nothing but numbers below 1e-30 is nothing. */
  *scale = most >= 0x7f800000u ? size - size : size < 1e-30f ? 0 : size / largest[parts];
  __m512 inverse = _mm512_set1_ps(*scale > 0 ? largest[parts] / size : 0);
  __m512i total = _mm512_setzero_si512();
  const __m512i half = _mm512_set1_epi32(64), mask = _mm512_set1_epi32(127);
  for (int32_t j = 0; j < count; j += 16) {
    __mmask16 here = (__mmask16)low_bits(count - j);
    __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(here, x + j), inverse));
    total = _mm512_add_epi32(total, v);
    for (int part = parts - 1; part > 0; part--) {
      __m512i digit = _mm512_sub_epi32(_mm512_and_si512(_mm512_add_epi32(v, half), mask), half);
      _mm_mask_storeu_epi8(q + part * columns + j, here, _mm512_cvtepi32_epi8(digit));
      v = _mm512_srai_epi32(_mm512_sub_epi32(v, digit), 7);
    }
    _mm_mask_storeu_epi8(q + j, here, _mm512_cvtepi32_epi8(v));
  }
  return _mm512_reduce_add_ps(_mm512_cvtepi32_ps(total)) * *scale;
}

static jpq_status prepare(jpq_product *p) {
  const jpq_weight *w = p->weight;
  static const int parts_of[] = {[JPQ_FP32] = 3, [JPQ_INT8] = 1, [JPQ_INT16] = 2};
  static const int64_t most_rows[] = {[JPQ_FP32] = 12, [JPQ_INT8] = 32, [JPQ_INT16] = 16}; /* measured */
  p->parts = parts_of[p->activations];
  if (p->m > most_rows[p->activations]) {
    p->chosen = other(w);
    return p->chosen->prepare(p);
  }
  int64_t columns = (w->k + 63) & ~(int64_t)63, groups = (jpq_groups(w) + 15) & ~(int64_t)15;
  size_t head = 64 + (size_t)columns, q = (size_t)(p->m * p->parts * columns), floats = 4 * (size_t)(p->m * groups);
  char *memory = calloc(1, sizeof(prepared) + head + q + 2 * floats + 64);
  if (!memory) return JPQ_NO_MEMORY;
  prepared *out = (prepared *)memory;
  char *at = (char *)(((uintptr_t)(memory + sizeof *out) + 63) & ~(uintptr_t)63);
  int32_t *lane = (int32_t *)at;
  int8_t *planes = (int8_t *)(at + columns);
  float *scale = (float *)(at + columns + q), *sum = scale + p->m * groups;
  for (int64_t i = 0; i < columns / 4; i++) lane[i] = (int32_t)(4 * i / w->group_size - 64 * (i / 16) / w->group_size);
  for (int64_t m = 0; m < p->m; m++)
    for (int64_t g = 0; g < jpq_groups(w); g++)
      sum[m * groups + g] =
          digits(p->x + m * w->k + g * w->group_size, w->group_size, p->parts,
                 planes + m * p->parts * columns + g * w->group_size, columns, scale + m * groups + g);
  *out = (prepared){jpq_groups(w), columns, groups, planes, scale, sum, lane};
  p->prepared = memory;
  return JPQ_OK;
}

/* ---- the product ---- */

/* Only as many bytes as 64 codes are in are loaded: wider loads cross more cache lines. */
JPQ_INLINE __m512i load(const uint8_t *p, int bits) {
  if (bits == JPQ_TERNARY || bits <= 2) return _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
  if (bits <= 4) return _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)p));
  return _mm512_loadu_si512(p);
}

/* In 16 bits, 256 t = q * 3^d * 256: the code is the upper half of three times that. */
JPQ_INLINE __m512i unpack_ternary(const uint8_t *p, unsigned phase) {
  __m512i q = _mm512_permutexvar_epi8(*(const __m512i *)ternary_spreads[phase], load(p, JPQ_TERNARY));
  __m512i even = _mm512_mullo_epi16(q, *(const __m512i *)evens[phase]);
  __m512i odd = _mm512_mullo_epi16(_mm512_andnot_si512(_mm512_set1_epi16(255), q), *(const __m512i *)odds[phase]);
  even = _mm512_mulhi_epu16(even, _mm512_set1_epi16(3));
  odd = _mm512_mulhi_epu16(odd, _mm512_set1_epi16(3 * 256)); /* the code in its upper byte, a rest in the lower */
  return _mm512_ternarylogic_epi32(_mm512_set1_epi16(255), even, odd, 0xca); /* lower bytes of even, upper of odd */
}

/* Codes j .. j + 63 of a row as bytes, j a multiple of 64. */
JPQ_INLINE __m512i unpack(const uint8_t *row, int64_t j, int bits) {
  if (bits == JPQ_TERNARY) return unpack_ternary(jpq_at(row, bits, j), jpq_phase(j));
  const uint8_t *p = row + j / 8 * bits;
  if (bits == 8) return load(p, bits);
  if (bits == 1) {
    uint64_t mask;
    memcpy(&mask, p, 8);
    return _mm512_maskz_set1_epi8(mask, 1);
  }
  uint64_t control;
  memcpy(&control, starts[bits - 1], 8);
  __m512i spread = _mm512_permutexvar_epi8(*(const __m512i *)spreads[bits - 1], load(p, bits));
  __m512i codes = _mm512_multishift_epi64_epi8(_mm512_set1_epi64((int64_t)control), spread);
  return _mm512_and_si512(codes, _mm512_set1_epi8((char)((1 << bits) - 1)));
}

/* Zeros of groups g .. g + 15 of a row, of which `bytes` in all; g a multiple of 16. */
JPQ_INLINE __m512 load_zeros(const uint8_t *zeros, int64_t bytes, int64_t g, int bits) {
  const uint8_t *p = jpq_at(zeros, bits, g);
  int64_t left = zeros + bytes - p;
  __m512i lanes = _mm512_broadcast_i32x4(_mm_maskz_loadu_epi8((__mmask16)low_bits(left < 16 ? left : 16), p));
  if (bits == JPQ_TERNARY) {
    lanes = _mm512_shuffle_epi8(lanes, *(const __m512i *)jpq_ternary_lanes[jpq_phase(g)]);
    lanes = _mm512_mullo_epi16(lanes, *(const __m512i *)jpq_ternary_lane_factors[jpq_phase(g)]);
    return _mm512_cvtepi32_ps(_mm512_mulhi_epu16(lanes, _mm512_set1_epi32(3)));
  }
  lanes = _mm512_shuffle_epi8(lanes, *(const __m512i *)jpq_lane_bytes[bits - 1]);
  lanes = _mm512_srlv_epi32(lanes, *(const __m512i *)jpq_lane_shifts[bits - 1]);
  return _mm512_cvtepi32_ps(_mm512_and_si512(lanes, _mm512_set1_epi32((1 << bits) - 1)));
}

/* Scales of a row of W times those of X into scale[r * groups ..]; total[r] starts as -scale * zero * sum of X. */
JPQ_INLINE void start_row(const jpq_product *p, const prepared *x, int64_t n, int64_t m0, int rows, int bits,
                          float *scale, __m512 *total) {
  const jpq_weight *w = p->weight;
  int64_t groups = x->real_groups, zero_bytes = jpq_bytes(groups, bits);
  for (int r = 0; r < rows; r++) total[r] = _mm512_setzero_ps();
  _mm_prefetch((const char *)(w->scales + n * groups) + AHEAD / 4, _MM_HINT_T0);
  for (int64_t g = 0; g < groups; g += 16) {
    __m512 s = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)low_bits(groups - g), w->scales + n * groups + g));
    __m512 z = w->zeros ? load_zeros(w->zeros + n * zero_bytes, zero_bytes, g, bits) : _mm512_set1_ps(jpq_centre(bits));
    z = _mm512_mul_ps(z, s);
    for (int r = 0; r < rows; r++) {
      int64_t at = (m0 + r) * x->groups + g;
      total[r] = _mm512_fnmadd_ps(z, _mm512_loadu_ps(x->sum + at), total[r]);
      _mm512_storeu_ps(scale + r * x->groups + g, _mm512_mul_ps(s, _mm512_loadu_ps(x->scale + at)));
    }
  }
}

JPQ_INLINE void block(__m512i codes, const int8_t *q, int64_t columns, int rows, int parts, const __m512 *scale,
                      __m512 *total) {
  for (int r = 0; r < rows; r++) {
    __m512i d = _mm512_setzero_si512();
    for (int part = 0; part < parts; part++) {
      if (part) d = _mm512_slli_epi32(d, 7);
      d = _mm512_dpbusd_epi32(d, codes, _mm512_loadu_si512(q + (r * parts + part) * columns));
    }
    total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(d), scale[r], total[r]);
  }
}

/* Products of a row of W, whose packed bytes are `codes` and may be overread, with `rows` rows of X. */
JPQ_INLINE void one_row(const jpq_product *p, const prepared *x, int64_t n, const uint8_t *codes, int64_t m0, int rows,
                        int parts, int bits, int whole, float *scale, __m512 *total) {
  const jpq_weight *w = p->weight;
  const int8_t *q = x->q + m0 * parts * x->columns;
  __m512 here[FEW];
  start_row(p, x, n, m0, rows, bits, scale, total);
  if (whole) { /* groups are whole blocks */
    for (int64_t g = 0, j = 0; g < x->real_groups; g++) {
      for (int r = 0; r < rows; r++) here[r] = _mm512_set1_ps(scale[r * x->groups + g]);
      for (int64_t end = j + w->group_size; j < end; j += 64) {
        _mm_prefetch((const char *)jpq_at(codes, bits, j) + AHEAD, _MM_HINT_T0);
        block(unpack(codes, j, bits), q + j, x->columns, rows, parts, here, total);
      }
    }
  } else { /* X is zero where the last block is more than the row */
    for (int64_t j = 0; j < w->k; j += 64) {
      __m512i lane = _mm512_load_si512(x->lane + j / 4);
      for (int r = 0; r < rows; r++)
        here[r] = _mm512_permutexvar_ps(lane, _mm512_loadu_ps(scale + r * x->groups + j / w->group_size));
      _mm_prefetch((const char *)jpq_at(codes, bits, j) + AHEAD, _MM_HINT_T0);
      block(unpack(codes, j, bits), q + j, x->columns, rows, parts, here, total);
    }
  }
}

JPQ_INLINE __m256 halves(__m512 a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}

JPQ_INLINE __m128 sum4(const __m512 a[4]) {
  __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(halves(a[0]), halves(a[1])), _mm256_hadd_ps(halves(a[2]), halves(a[3])));
  return _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
}

/* Rows [first, last) of W, at most 4, so that their lanes are summed together. `copy`: room for a row and OVERREAD. */
JPQ_INLINE void four_rows(const jpq_product *p, int64_t m0, int64_t first, int64_t last, int rows, int parts, int bits,
                          int whole, float *scale, uint8_t *copy) {
  const jpq_weight *w = p->weight;
  int64_t bytes = jpq_bytes(w->k, bits);
  const uint8_t *codes = w->packed + first * bytes, *safe = w->packed + w->n * bytes - bytes - OVERREAD;
  __m512 total[FEW][4]; /* [row of X, row of W] */
  for (int i = 0; i < 4; i++) {
    __m512 t[FEW];
    if (first + i >= last) {
      for (int r = 0; r < rows; r++) total[r][i] = _mm512_setzero_ps();
      continue;
    }
    const uint8_t *row = codes + i * bytes;
    if (row > safe) row = memcpy(copy, row, (size_t)bytes);
    one_row(p, p->prepared, first + i, row, m0, rows, parts, bits, whole, scale, t);
    for (int r = 0; r < rows; r++) total[r][i] = t[r];
  }
  __mmask8 real = (__mmask8)low_bits(last - first < 4 ? last - first : 4);
  __m128 bias = p->bias ? _mm_maskz_loadu_ps(real, p->bias + first) : _mm_setzero_ps();
  for (int r = 0; r < rows; r++)
    _mm_mask_storeu_ps(p->y + (m0 + r) * w->n + first, real, _mm_add_ps(sum4(total[r]), bias));
}

#define ROWS(B, P, R, WHOLE)                                                                              \
  static void rows_##B##_##P##_##R##_##WHOLE(const jpq_product *p, int64_t m0, int64_t first,             \
                                             int64_t last, float *scale, uint8_t *copy) {                 \
    for (int64_t n = first; n < last; n += 4) four_rows(p, m0, n, last, R, P, B, WHOLE, scale, copy);     \
  }
#define ENTRY(B, P, R, WHOLE) rows_##B##_##P##_##R##_##WHOLE
#define ROWS_P(B, P) \
  ROWS(B, P, 1, 0) ROWS(B, P, 1, 1) ROWS(B, P, 2, 0) ROWS(B, P, 2, 1) ROWS(B, P, 4, 0) ROWS(B, P, 4, 1)
#define ROWS_B(B) ROWS_P(B, 1) ROWS_P(B, 2) ROWS_P(B, 3)
JPQ_FOR_BITS(ROWS_B)

JPQ_TARGET_END

typedef void (*rows_function)(const jpq_product *p, int64_t m0, int64_t first, int64_t last, float *scale,
                              uint8_t *copy);
#define ENTRIES_P(B, P)                                                                                        \
  {{ENTRY(B, P, 1, 0), ENTRY(B, P, 1, 1)}, {ENTRY(B, P, 2, 0), ENTRY(B, P, 2, 1)},                             \
   {ENTRY(B, P, 4, 0), ENTRY(B, P, 4, 1)}}
#define ENTRIES(B) {ENTRIES_P(B, 1), ENTRIES_P(B, 2), ENTRIES_P(B, 3)},
static const rows_function functions[JPQ_WIDTHS][3][3][2] = {JPQ_FOR_BITS(ENTRIES)}; /* bits, parts, rows 1 2 4, whole */

static jpq_status matmul_rows(const jpq_product *p, int64_t first, int64_t last) {
  const jpq_weight *w = p->weight;
  const prepared *x = p->prepared;
  int64_t bytes = jpq_bytes(w->k, w->bits), floats = FEW * x->groups + 16;
  float *scale = malloc(sizeof(float) * (size_t)floats + (size_t)bytes + OVERREAD);
  if (!scale) return JPQ_NO_MEMORY;
  uint8_t *copy = (uint8_t *)(scale + floats);
  memset(copy, 0, (size_t)bytes + OVERREAD);
  int64_t step = p->m <= FEW ? last - first : 4 + TILE_BYTES / bytes / 4 * 4;
  int whole = w->group_size % 64 == 0;
  for (int64_t n = first; n < last; n += step) {
    int64_t stop = n + step < last ? n + step : last;
    for (int64_t m = 0; m < p->m;) {
      int log = p->m - m >= 4 ? 2 : p->m - m >= 2 ? 1 : 0;
      functions[jpq_index(w->bits)][p->parts - 1][log][whole](p, m, n, stop, scale, copy);
      m += 1 << log;
    }
  }
  free(scale);
  return JPQ_OK;
}

static void dequantize(const jpq_weight *w, int64_t row, int64_t begin, int64_t end, float *out) {
  other(w)->dequantize(w, row, begin, end, out);
}

const jpq_implementation jpq_vnni = {"avx512-vnni", available, takes, prepare, matmul_rows, dequantize};
#endif
