/* AVX-512 VNNI + VBMI: 64 to 256 codes at a time, unpacked to bytes and multiplied with X in fixed point.
 *
 * Each group of X becomes scale * q, q an integer of `parts` signed bytes in base B = 128, or 256 in long groups:
 *
 *     1 part   8 bits           INT8    q = h
 *     2 parts  15 or 16 bits    INT16   q = B h + l
 *     3 parts  22 or 24 bits    FP32    q = B (B h + m) + l: what rounding loses is below what an fp32 sum loses
 *
 * Of codes that come multiplied (vnni_triples.h) X is divided first. Few rows of X; where there are more (has_many), they
 * are vnni_many.c's.
 *
 * One vpdpbusd a part and 64 codes; in short groups a shift by 7 between parts: a 32-bit lane sums 4 products of 8 bits, at most
 * 4 * 255 * 127 * 128^2 + ... < 2^31, or up to 16 of 4 bits. One conversion and one fused multiply-add for all of them
 * bring it to fp32, times scale of W and of X. Of long groups, those of whole blocks or rows, each part is summed to the
 * end of the group; the first two parts meet as integers (is_long), the third in fp32.
 */
#include "vnni.h"
#include "vnni_triples.h"

#ifdef JPQ_X86
#include <stdlib.h>

enum {
  LARGEST_GROUP = 16384, /* the sum of a whole group (vnni_many.c) is below 2^31 */
  TILE_BYTES = 16384,  /* of packed rows that stay in the first-level cache while all rows of X pass */
  STACK_BYTES = 16384, /* that a call finds room for without asking */
};

static int available(void) { return jpq_cpu_features.avx512_vnni; }

static int takes(const jpq_weight *w) { return w->group_size % 8 == 0 && w->group_size <= LARGEST_GROUP && w->bits != 7; }

static const jpq_implementation *other(const jpq_weight *w) { return jpq_avx512.takes(w) ? &jpq_avx512 : &jpq_avx2; }

JPQ_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,gfni,avx2,fma,f16c")

/* ---- X ---- */

/* 16 numbers from column j on, of `count`; divided where codes come multiplied. */
JPQ_INLINE __m512 load_x(const float *x, int32_t j, int32_t count, int divided) {
  const __m512 v = _mm512_maskz_loadu_ps((__mmask16)low_bits(count - j), x + j);
  return divided ? _mm512_mul_ps(v, _mm512_load_ps(triple_inverses)) : v;
}

/* As jpq_vnni_digits; compiled for no triples too. */
JPQ_INLINE float digits(const float *x, int32_t count, int32_t triples, int parts, int log, int8_t *q, int64_t columns,
                        float *scale) {
  const float largest = 127 << log * (parts - 1);
  __m512i top = _mm512_setzero_si512();
  for (int32_t j = 0; j < count; j += 16) {
    __m512i bits = _mm512_castps_si512(load_x(x, j, count, j < triples));
    top = _mm512_max_epu32(top, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  }
  uint32_t most = _mm512_reduce_max_epu32(top); /* floats without sign sort like integers, NaN above infinity */
  float size;
  memcpy(&size, &most, sizeof size);
  /* An infinity or NaN makes the row NaN; a group of nothing but numbers below 1e-30 (divided) is nothing. */
  *scale = most >= 0x7f800000u ? size - size : size < 1e-30f ? 0 : size / largest;
  const __m512 inverse = _mm512_set1_ps(*scale > 0 ? largest / size : 0);
  const __m512i half = _mm512_set1_epi32(1 << log >> 1), mask = _mm512_set1_epi32((1 << log) - 1);
  const __m128i bits = _mm_cvtsi32_si128(log);
  __m512i total = _mm512_setzero_si512(); /* of 64 bits */
  for (int32_t j = 0; j < count; j += 16) {
    __mmask16 here = (__mmask16)low_bits(count - j);
    __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(load_x(x, j, count, j < triples), inverse));
    const __m512i times = j < triples ? _mm512_sllv_epi32(v, _mm512_load_si512(triple_powers)) : v; /* below 2^25 */
    total = _mm512_add_epi64(total, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(times)));
    total = _mm512_add_epi64(total, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(times, 1)));
    for (int part = parts - 1; part > 0; part--) {
      __m512i digit = _mm512_sub_epi32(_mm512_and_si512(_mm512_add_epi32(v, half), mask), half);
      _mm_mask_storeu_epi8(q + part * columns + j, here, _mm512_cvtepi32_epi8(digit));
      v = _mm512_sra_epi32(_mm512_sub_epi32(v, digit), bits);
    }
    _mm_mask_storeu_epi8(q + j, here, _mm512_cvtepi32_epi8(v));
  }
  return (float)_mm512_reduce_add_epi64(total) * *scale;
}

float jpq_vnni_digits(const float *x, int32_t count, int32_t triples, int parts, int log, int8_t *q, int64_t columns,
                      float *scale) {
  if (triples) return digits(x, count, triples, parts, log, q, columns, scale);
  return digits(x, count, 0, parts, log, q, columns, scale);
}

/* Columns [j, blocked) of a plane from their own order into that of the codes. */
static void reorder(int8_t *q, int64_t j, int64_t blocked, int form) {
  const int count = (int)(block_of(form) / 64);
  for (; j < blocked; j += 64 * count) {
    __m512i v[4];
    for (int i = 0; i < 4; i++) v[i] = _mm512_loadu_si512(q + j + 64 * (i % count));
    for (int i = 0; i < count; i++) {
      __m512i order = *(const __m512i *)orders[form][i], first = _mm512_permutex2var_epi8(v[0], order, v[1]);
      __m512i second = _mm512_permutex2var_epi8(v[2], order, v[3]); /* where the top bit is set */
      _mm512_storeu_si512(q + j + 64 * i, _mm512_mask_mov_epi8(first, _mm512_movepi8_mask(order), second));
    }
  }
}

/* Where in a block the codes of a lane begin. */
static uint32_t lane_start(uint32_t lane, uint32_t block, int form) {
  if (form == SPLIT_QUADS && block == 256) return 32 * (lane / 4) + 16 * (lane % 2) + 128 * (lane % 4 / 2);
  return block / 16 * lane;
}

/* Which group of 16 the codes of a lane are in: a sixteenth of a block. A group is whole lanes, so 16 groups are whole
 * blocks: none is of two sixteens. */
static void find_lanes(int32_t *lane, int64_t columns, int64_t blocked, int64_t block, int32_t group_size, int form) {
  const uint32_t size = (uint32_t)group_size;
  for (int64_t j = 0; j < columns; j += block) {
    if (j >= blocked) block = 64;
    const uint32_t before = (uint32_t)(j % (16 * (int64_t)size));
    for (uint32_t i = 0; i < 16; i++) lane[j / 4 + i] = (int32_t)((before + lane_start(i, (uint32_t)block, form)) / size % 16);
  }
}

/* No block of 256 codes is of two groups. */
static int whole_blocks(const jpq_weight *w) { return w->group_size % 256 == 0 || w->group_size == w->k; }

/* Whether a lane has room for the products of a group with the largest byte, see is_long. */
static int has_room(const jpq_weight *w) {
  const int64_t largest = jpq_is_normal(w->bits) ? 255 : (1 << w->bits) - 1;
  return (w->group_size + 63) / 64 * 4 * largest < 1 << 16;
}

static int codes_form(const jpq_weight *w) {
  return form_of(w->bits, w->group_size, whole_blocks(w) && (!jpq_is_normal(w->bits) || has_room(w)));
}

/* Whose sums stay integers to the end of a group (four_long): a lane's, of up to four times 3-bit codes too, 2^8 times as
 * large where two parts meet, below 2^31. */
static int is_long(const jpq_weight *w) {
  if (!whole_blocks(w) || w->bits == JPQ_TERNARY) return 0;
  return w->bits <= 4 ? codes_form(w) >= QUADS : has_room(w);
}

/* Columns that come in blocks: one of which more than half is there is filled up. */
static int64_t blocked_columns(int64_t k, int64_t block) {
  return block == 64 ? 0 : k / block * block + (k % block > block / 2 ? block : 0);
}

/* Whether there are so many rows that vnni_many.c is faster. */
static int has_many(const jpq_product *p) {
  static const int64_t most_rows[2][3] = {/* measured; of long groups the sums of several rows do not fit the registers */
                                          {[JPQ_FP32] = 12, [JPQ_INT8] = 18, [JPQ_INT16] = 16},
                                          {[JPQ_FP32] = 3, [JPQ_INT8] = 18, [JPQ_INT16] = 4}};
  return p->m > most_rows[is_long(p->weight)][p->activations];
}

/* The first columns of each group whose codes come as triples. */
static int32_t in_triples(const jpq_product *p) {
  const jpq_weight *w = p->weight;
  return w->bits == 3 && p->activations == JPQ_FP32 && is_long(w) ? w->group_size / TRIPLES * TRIPLES : 0;
}

static int form(const jpq_product *p) {
  if (has_many(p)) return -1;
  return 2 * (in_triples(p) ? OF_TRIPLES : codes_form(p->weight)) + is_long(p->weight); /* long ones have other digits */
}

/* All columns of a plane that are not one vector at a time. */
static void reorder_plane(int8_t *q, const jpq_product *p, int64_t blocked) {
  const jpq_weight *w = p->weight;
  const int64_t triples = in_triples(p);
  if (!triples) {
    reorder(q, 0, blocked, codes_form(w));
    return;
  }
  for (int64_t g = 0; g < w->k; g += w->group_size) {
    const int64_t end = g + w->group_size;
    for (int64_t j = g; j < g + triples; j += TRIPLES) triple_order(q + j);
    reorder(q, g + triples, end < blocked ? end : blocked, codes_form(w));
  }
}

static jpq_status prepare(jpq_product *p) {
  const jpq_weight *w = p->weight;
  p->parts = jpq_vnni_parts(p->activations);
  if (has_many(p)) {
    p->chosen = &jpq_vnni_many;
    return p->chosen->prepare(p);
  }
  const int64_t block = block_of(codes_form(w)), blocked = blocked_columns(w->k, block);
  int64_t columns = (w->k + 127) & ~(int64_t)127, groups = (jpq_groups(w) + 15) & ~(int64_t)15;
  if (columns < blocked) columns = blocked;
  size_t head = 64 + (size_t)columns, q = (size_t)(p->m * p->parts * columns), floats = 4 * (size_t)(p->m * groups);
  char *memory = calloc(1, sizeof(prepared) + head + q + 2 * floats + 64);
  if (!memory) return JPQ_NO_MEMORY;
  prepared *out = (prepared *)memory;
  char *at = (char *)(((uintptr_t)(memory + sizeof *out) + 63) & ~(uintptr_t)63);
  int32_t *lane = (int32_t *)at;
  int8_t *planes = (int8_t *)(at + columns);
  float *scale = (float *)(planes + q), *sum = scale + p->m * groups;
  find_lanes(lane, columns, blocked, block, w->group_size, codes_form(w));
  const int log = is_long(w) ? LONG_DIGIT_BITS : DIGIT_BITS;
  for (int64_t m = 0; m < p->m; m++)
    for (int64_t g = 0; g < jpq_groups(w); g++) {
      const int64_t j = g * w->group_size;
      sum[m * groups + g] = jpq_vnni_digits(p->x + m * w->k + j, w->group_size, in_triples(p), p->parts, log,
                                            planes + m * p->parts * columns + j, columns, scale + m * groups + g);
    }
  for (int64_t i = 0; blocked && i < p->m * p->parts; i++) reorder_plane(planes + i * columns, p, blocked);
  *out = (prepared){jpq_groups(w), columns, groups, block, blocked, planes, scale, sum, lane};
  p->prepared = memory;
  return JPQ_OK;
}

JPQ_TARGET_END

/* ---- the product ---- */

/* How the groups of a weight lie; where codes come one vector at a time, two of the three say the same. */
static int layout_of(const jpq_weight *w) {
  if (is_long(w)) return LONG;
  if (w->bits == 8 || w->bits == JPQ_TERNARY || jpq_is_normal(w->bits)) return w->group_size % 64 ? ANY : WHOLE;
  if (w->group_size == 64) return HALVES;
  if (w->bits <= 4) return ANY;
  return w->group_size % 128 ? ANY : WHOLE;
}

static jpq_status matmul_rows(const jpq_product *p, int64_t first, int64_t last) {
  const jpq_weight *w = p->weight;
  const prepared *x = p->prepared;
  const int64_t bytes = jpq_bytes(w->k, w->bits);
  const size_t room = room_for(w, x->real_groups);
  _Alignas(2) uint8_t here[STACK_BYTES]; /* a token has thousands of these calls */
  uint8_t *copy = room <= sizeof here ? here : malloc(room);
  if (!copy) return JPQ_NO_MEMORY;
  int64_t step = p->m <= FEW ? last - first : 4 + TILE_BYTES / bytes / 4 * 4;
  const vnni_table *table = jpq_width(w->bits) < 4 || w->bits == JPQ_TERNARY ? &jpq_vnni_narrow : &jpq_vnni_wide;
  const rows_function(*chosen)[3] = (*table)[jpq_index(w->bits)][layout_of(w)];
  for (int64_t n = first; n < last; n += step) {
    int64_t stop = n + step < last ? n + step : last;
    for (int64_t m = 0; m < p->m;) {
      int log = p->m - m >= 4 ? 2 : p->m - m >= 2 ? 1 : 0;
      chosen[p->parts - 1][log](p, m, n, stop, copy);
      m += 1 << log;
    }
  }
  if (copy != here) free(copy);
  return JPQ_OK;
}

static void dequantize(const jpq_weight *w, int64_t row, int64_t begin, int64_t end, float *out) {
  other(w)->dequantize(w, row, begin, end, out);
}

const jpq_implementation jpq_vnni = {"avx512-vnni", available, takes, prepare, form, matmul_rows, dequantize, NULL, 0, NULL, NULL, NULL};
#endif
