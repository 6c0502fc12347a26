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

#include "vnni_codes.h"

enum {
  FEW = 4,
  TILE_BYTES = 16384,  /* of packed rows that stay in the first-level cache while all rows of X pass */
  AHEAD = 2048,        /* bytes to prefetch ahead: without, a core reads weights at half the speed of memory */
  STACK_FLOATS = 4096, /* that a call finds room for without asking */
  AHEAD_AMD = 8192,    /* on Zen 4, into the second-level cache: 4 bits, activations in 8 or 15 bits, 1.2 times as fast */
};

static int available(void) { return jpq_cpu_features.avx512_vnni; }

static int takes(const jpq_weight *w) { return w->group_size % 8 == 0 && w->bits != 7; }

static const jpq_implementation *other(const jpq_weight *w) { return jpq_avx512.takes(w) ? &jpq_avx512 : &jpq_avx2; }

/* X in fixed point, in the order of the codes, and which scale a lane needs. */
typedef struct prepared {
  int64_t real_groups;     /* of a row; a division, so done once */
  int64_t columns, groups; /* padded: k to 128, groups to 16 */
  int64_t block, blocked;  /* columns that come in blocks, by how many; at most 128 are left */
  const int8_t *q;         /* [m, parts, columns] */
  const float *scale;      /* [m, groups] */
  const float *sum;        /* [m, groups] scale * sum of q */
  const int32_t *lane;     /* [columns / 64, 16] group of the codes in a lane, from that of the first of a block */
} prepared;

JPQ_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,gfni,avx2,fma,f16c")

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

/* Columns [0, blocked) of a plane from their own order into that of the codes. */
static void reorder(int8_t *q, int64_t blocked, int form) {
  const int count = (int)(block_of(form) / 64);
  for (int64_t j = 0; j < blocked; j += 64 * count) {
    __m512i v[4];
    for (int i = 0; i < 4; i++) v[i] = _mm512_loadu_si512(q + j + 64 * (i % count));
    for (int i = 0; i < count; i++) {
      __m512i order = *(const __m512i *)orders[form][i], first = _mm512_permutex2var_epi8(v[0], order, v[1]);
      __m512i second = _mm512_permutex2var_epi8(v[2], order, v[3]); /* where the top bit is set */
      _mm512_storeu_si512(q + j + 64 * i, _mm512_mask_mov_epi8(first, _mm512_movepi8_mask(order), second));
    }
  }
}

/* Which group, from that of the first of a block, the codes of a lane are in: a sixteenth of it. */
static void find_lanes(int32_t *lane, int64_t columns, int64_t blocked, int64_t block, int32_t group_size) {
  for (int64_t first = 0; first < columns; first += block) {
    if (first >= blocked) block = 64;
    int32_t group = 0, left = group_size - (int32_t)(first % group_size);
    for (int i = 0; i < 16; i++) {
      lane[first / 4 + i] = group;
      for (left -= (int32_t)block / 16; left <= 0; left += group_size) group++;
    }
  }
}

static int form(const jpq_weight *w) { return form_of(w->bits, w->group_size); }

/* Columns that come in blocks: one of which more than half is there is filled up. */
static int64_t blocked_columns(int64_t k, int64_t block) {
  return block == 64 ? 0 : k / block * block + (k % block > block / 2 ? block : 0);
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
  const int64_t block = block_of(form(w)), blocked = blocked_columns(w->k, block);
  int64_t columns = (w->k + 127) & ~(int64_t)127, groups = (jpq_groups(w) + 15) & ~(int64_t)15;
  if (columns < blocked) columns = blocked;
  size_t head = 64 + (size_t)columns, q = (size_t)(p->m * p->parts * columns), floats = 4 * (size_t)(p->m * groups);
  char *memory = calloc(1, sizeof(prepared) + head + q + 2 * floats + 64);
  if (!memory) return JPQ_NO_MEMORY;
  prepared *out = (prepared *)memory;
  char *at = (char *)(((uintptr_t)(memory + sizeof *out) + 63) & ~(uintptr_t)63);
  int32_t *lane = (int32_t *)at;
  int8_t *planes = (int8_t *)(at + columns);
  float *scale = (float *)(at + columns + q), *sum = scale + p->m * groups;
  find_lanes(lane, columns, blocked, block, w->group_size);
  for (int64_t m = 0; m < p->m; m++)
    for (int64_t g = 0; g < jpq_groups(w); g++)
      sum[m * groups + g] =
          digits(p->x + m * w->k + g * w->group_size, w->group_size, p->parts,
                 planes + m * p->parts * columns + g * w->group_size, columns, scale + m * groups + g);
  for (int64_t i = 0; blocked && i < p->m * p->parts; i++) reorder(planes + i * columns, blocked, form(w));
  *out = (prepared){jpq_groups(w), columns, groups, block, blocked, planes, scale, sum, lane};
  p->prepared = memory;
  return JPQ_OK;
}

/* ---- the product ---- */

/* What four rows of W need beside their codes: scales of W times those of X into scale[(i * FEW + r) * groups ..], and
 * what the zeros take away, -scale * zero * sum of X, which total[r][i] starts with. Rows past `count` are the first. */
JPQ_INLINE void start_rows(const jpq_product *p, const prepared *x, int64_t n, int64_t count, int64_t m0, int rows,
                           int bits, int symmetric, float *scale, __m512 total[][4]) {
  const jpq_weight *w = p->weight;
  const int64_t groups = x->real_groups, stride = x->groups, zero_bytes = symmetric ? 0 : jpq_bytes(groups, bits);
  const uint16_t *scales = w->scales + n * groups;
  const uint8_t *zeros = w->zeros + n * zero_bytes;
  const float *x_scale = x->scale + m0 * stride, *x_sum = x->sum + m0 * stride;
  for (int i = 0; i < 4; i++)
    for (int r = 0; r < rows; r++) total[r][i] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g += 16) {
    __mmask16 here = (__mmask16)low_bits(groups - g);
    _mm_prefetch((const char *)(scales + g * 4) + AHEAD / 4, _MM_HINT_T0);
    for (int i = 0; i < 4; i++) {
      int64_t row = i < count ? i : 0;
      __m512 s = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(here, scales + row * groups + g));
      __m512 z = symmetric ? _mm512_set1_ps(jpq_centre(bits)) : load_zeros(zeros + row * zero_bytes, zero_bytes, g, bits);
      z = _mm512_mul_ps(z, s);
      for (int r = 0; r < rows; r++) {
        total[r][i] = _mm512_fnmadd_ps(z, _mm512_loadu_ps(x_sum + r * stride + g), total[r][i]);
        _mm512_storeu_ps(scale + (i * FEW + r) * stride + g, _mm512_mul_ps(s, _mm512_loadu_ps(x_scale + r * stride + g)));
      }
    }
  }
}

/* Sums of the products of four rows' codes, `count` vectors each, with a row of X. With `apart` each part is summed by
 * itself: the processor waits for every addition of one long chain, but a few vectors (1 bit, ternary) are not worth it. */
JPQ_INLINE void products(__m512i codes[4][4], int count, const int8_t *q, int64_t columns, int parts, int apart,
                         __m512i d[4]) {
  __m512i sums[3][4];
  for (int part = 0; part < parts; part++) {
    for (int i = 0; i < 4; i++)
      sums[part][i] = apart || !part ? _mm512_setzero_si512() : _mm512_slli_epi32(sums[part - 1][i], 7);
    for (int v = 0; v < count; v++) {
      __m512i x = _mm512_loadu_si512(q + part * columns + 64 * v);
      for (int i = 0; i < 4; i++) sums[part][i] = _mm512_dpbusd_epi32(sums[part][i], codes[i][v], x);
    }
  }
  for (int i = 0; i < 4; i++) {
    d[i] = sums[apart ? 0 : parts - 1][i];
    for (int part = 1; apart && part < parts; part++)
      d[i] = _mm512_add_epi32(_mm512_slli_epi32(d[i], 7), sums[part][i]);
  }
}

/* How groups lie to 128 codes: any way, two halves, or one group of several times 128. */
enum { ANY, HALVES, WHOLE };

/* Scales of the `block` codes from column j on, the first of which are of group `g`. */
JPQ_INLINE __m512 scales_at(const float *scale, const prepared *x, int64_t j, int64_t g, int layout, int block) {
  if (layout == ANY || block == 256)
    return _mm512_permutexvar_ps(_mm512_load_si512(x->lane + j / 4), _mm512_loadu_ps(scale + g));
  if (layout == WHOLE || block == 64) return _mm512_set1_ps(scale[g]);
  return _mm512_mask_mov_ps(_mm512_set1_ps(scale[g]), 0xff00, _mm512_set1_ps(scale[g + 1]));
}

JPQ_INLINE void unpack_block(const uint8_t *row, int64_t j, int bits, int block, __m512i out[4]) {
  if (block == 64)
    out[0] = unpack(row, j, bits);
  else if (block == 128)
    unpack_pair(row + j / 8 * bits, bits, out);
  else
    unpack_quad(row + j / 8 * bits, bits, out);
}

/* Four rows of W from `codes` on, `bytes` apart and overread, columns [j, stop) in blocks of `block`, with `rows` rows of
 * X into total[row of X][row of W]. Four at once hide each other's latency and share what is loaded of X. */
JPQ_INLINE void blocks(const jpq_product *p, const prepared *x, const uint8_t *codes, int64_t bytes, int64_t m0, int rows,
                       int parts, int bits, int layout, int block, int64_t j, int64_t stop, const float *scale,
                       __m512 total[][4]) {
  const int64_t columns = x->columns, stride = x->groups, size = layout == HALVES ? 64 : p->weight->group_size;
  const int lines = bits == JPQ_TERNARY ? 1 : (block / 64 * bits + 1) / 2;
  const int8_t *q = x->q + m0 * parts * columns;
  const int amd = jpq_cpu_features.amd;
  const uint8_t *ahead = codes + 4 * (j / 8 * bits) + (amd ? AHEAD_AMD : AHEAD);
  int64_t g = j ? j / size : 0, next = (g + 1) * size;
  for (; j < stop; j += block) {
    for (int line = 0; line < lines; line++, ahead += 64)
      if (amd)
        _mm_prefetch((const char *)ahead, _MM_HINT_T1);
      else
        _mm_prefetch((const char *)ahead, _MM_HINT_T0);
    if (layout != HALVES)
      for (; next <= j; next += size) g++;
    __m512i c[4][4];
    for (int i = 0; i < 4; i++) unpack_block(codes + i * bytes, j, bits, block, c[i]);
    for (int r = 0; r < rows; r++) {
      __m512i d[4];
      products(c, block / 64, q + r * parts * columns + j, columns, parts, block > 64 && bits > 1, d);
      for (int i = 0; i < 4; i++) {
        __m512 s = scales_at(scale + (i * FEW + r) * stride, x, j, g, layout, block);
        total[r][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(d[i]), s, total[r][i]);
      }
    }
    if (layout == HALVES) g += block / 64;
  }
}

JPQ_INLINE void four_products(const jpq_product *p, const prepared *x, const uint8_t *codes, int64_t bytes, int64_t m0,
                              int rows, int parts, int bits, int layout, const float *scale, __m512 total[][4]) {
#define BLOCKS(BLOCK, FROM, TO) blocks(p, x, codes, bytes, m0, rows, parts, bits, layout, BLOCK, FROM, TO, scale, total)
  if (bits <= 4 && x->block == 256)
    BLOCKS(256, 0, x->blocked);
  else if (bits < 8)
    BLOCKS(128, 0, x->blocked);
  BLOCKS(64, x->blocked, p->weight->k);
#undef BLOCKS
}

JPQ_INLINE __m256 halves(__m512 a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}

JPQ_INLINE __m128 sum4(const __m512 a[4]) {
  __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(halves(a[0]), halves(a[1])), _mm256_hadd_ps(halves(a[2]), halves(a[3])));
  return _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
}

/* Rows [first, last) of W, at most 4, so that their lanes are summed together. `copy`: room for 4 rows and OVERREAD. */
JPQ_INLINE void four_rows(const jpq_product *p, int64_t m0, int64_t first, int64_t last, int rows, int parts, int bits,
                          int layout, float *scale, uint8_t *copy) {
  const jpq_weight *w = p->weight;
  const prepared *x = p->prepared;
  int64_t bytes = jpq_bytes(w->k, bits), count = last - first < 4 ? last - first : 4;
  const uint8_t *codes = w->packed + first * bytes;
  __m512 total[FEW][4]; /* [row of X, row of W] */
  if (w->zeros)
    start_rows(p, x, first, count, m0, rows, bits, 0, scale, total);
  else
    start_rows(p, x, first, count, m0, rows, bits, 1, scale, total);
  if ((w->n - first - 4) * bytes < OVERREAD) {
    memset(copy, 0, 4 * (size_t)bytes + OVERREAD);
    codes = memcpy(copy, codes, (size_t)(count * bytes));
  }
  four_products(p, x, codes, bytes, m0, rows, parts, bits, layout, scale, total);
  __mmask8 real = (__mmask8)low_bits(count);
  __m128 bias = p->bias ? _mm_maskz_loadu_ps(real, p->bias + first) : _mm_setzero_ps();
  for (int r = 0; r < rows; r++)
    _mm_mask_storeu_ps(p->y + (m0 + r) * w->n + first, real, _mm_add_ps(sum4(total[r]), bias));
}

/* Compiled for the layouts a width comes in, as each takes a fifth of a second; 7 bits are left to others. */
#define ROWS(B, P, R, L)                                                                                  \
  static void rows_##B##_##P##_##R##_##L(const jpq_product *p, int64_t m0, int64_t first, int64_t last,   \
                                         float *scale, uint8_t *copy) {                                   \
    for (int64_t n = first; n < last; n += 4) four_rows(p, m0, n, last, R, P, B, L, scale, copy);         \
  }
#define ROWS_R(B, L, P) ROWS(B, P, 1, L) ROWS(B, P, 2, L) ROWS(B, P, 4, L)
#define ROWS_P(B, L) ROWS_R(B, L, 1) ROWS_R(B, L, 2) ROWS_R(B, L, 3)
#define EACH(DO) \
  DO(1, 0) DO(1, 1) DO(2, 0) DO(2, 1) DO(3, 0) DO(3, 1) DO(4, 0) DO(4, 1) \
  DO(5, 0) DO(5, 1) DO(5, 2) DO(6, 0) DO(6, 1) DO(6, 2) DO(8, 0) DO(8, 2) DO(16, 0) DO(16, 2)
EACH(ROWS_P)

JPQ_TARGET_END

typedef void (*rows_function)(const jpq_product *p, int64_t m0, int64_t first, int64_t last, float *scale,
                              uint8_t *copy);
#define ENTRY(B, P, R, L) rows_##B##_##P##_##R##_##L
#define ENTRIES_R(B, P, L) {ENTRY(B, P, 1, L), ENTRY(B, P, 2, L), ENTRY(B, P, 4, L)}
#define ENTRIES(B, L) [(B) == 16 ? 8 : (B) - 1][L] = {ENTRIES_R(B, 1, L), ENTRIES_R(B, 2, L), ENTRIES_R(B, 3, L)},
static const rows_function functions[JPQ_WIDTHS][3][3][3] = {EACH(ENTRIES)}; /* bits, layout, parts, rows 1 2 4 */

/* How the groups of a weight lie; where codes come as four vectors, or one, two of the three say the same. */
static int layout_of(const jpq_weight *w) {
  if (w->bits == 8 || w->bits == JPQ_TERNARY) return w->group_size % 64 ? ANY : WHOLE;
  if (w->group_size == 64) return HALVES;
  return w->bits <= 4 || w->group_size % 128 ? ANY : WHOLE;
}

static jpq_status matmul_rows(const jpq_product *p, int64_t first, int64_t last) {
  const jpq_weight *w = p->weight;
  const prepared *x = p->prepared;
  int64_t bytes = jpq_bytes(w->k, w->bits), floats = 4 * FEW * x->groups + 16;
  const size_t room = sizeof(float) * (size_t)floats + 4 * (size_t)bytes + OVERREAD;
  float here[STACK_FLOATS], *scale = room <= sizeof here ? here : malloc(room); /* a token has thousands of these calls */
  if (!scale) return JPQ_NO_MEMORY;
  uint8_t *copy = (uint8_t *)(scale + floats);
  int64_t step = p->m <= FEW ? last - first : 4 + TILE_BYTES / bytes / 4 * 4;
  const rows_function(*chosen)[3] = functions[jpq_index(w->bits)][layout_of(w)];
  for (int64_t n = first; n < last; n += step) {
    int64_t stop = n + step < last ? n + step : last;
    for (int64_t m = 0; m < p->m;) {
      int log = p->m - m >= 4 ? 2 : p->m - m >= 2 ? 1 : 0;
      chosen[p->parts - 1][log](p, m, n, stop, scale, copy);
      m += 1 << log;
    }
  }
  if (scale != here) free(scale);
  return JPQ_OK;
}

static void dequantize(const jpq_weight *w, int64_t row, int64_t begin, int64_t end, float *out) {
  other(w)->dequantize(w, row, begin, end, out);
}

const jpq_implementation jpq_vnni = {"avx512-vnni", available, takes, prepare, form, matmul_rows, dequantize, NULL, 0, NULL, NULL, NULL};
#endif
