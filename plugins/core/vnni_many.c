/* AVX-512 VNNI: many rows of X in fixed point, as vnni.c brings them there, against panels of 32 rows of W.
 *
 * Of a panel, four codes of 16 rows are a vector; of X, four digits are a word that goes to every lane. So a vpdpbusd
 * adds 64 products, and 24 sums stay in registers until a group ends: those of two vectors with 12 digits of X, which
 * are 12, 6 or 4 rows of 1, 2 or 3 parts. Digits have 8 bits whatever the group: parts meet in fp32.
 */
#include "vnni.h"

#ifdef JPQ_X86
#include <stdlib.h>

enum {
  VECTORS = 2,
  PANEL_ROWS = 16 * VECTORS,
  DIGITS = 12, /* of X that a tile holds of every column: rows times parts */
};

typedef struct many {
  int64_t groups;
  const int8_t *q;     /* [tiles, k / 4, DIGITS, 4] */
  const float *scale;  /* [tiles * rows of a tile, groups] */
  const float *sum;    /* likewise, scale * sum of q */
} many;

JPQ_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,gfni,avx2,fma,f16c")

#include "transpose16.h"

/* The digits of a tile, from planes [DIGITS, columns] to [quads, DIGITS, 4]; writes 16 bytes behind that. */
static void interleave(const int8_t *planes, int64_t columns, int64_t quads, int8_t *to) {
  for (int64_t j = 0; j < quads; j += 16) {
    __m512 words[16];
    for (int d = 0; d < 16; d++) words[d] = d < DIGITS ? _mm512_loadu_ps(planes + d * columns + 4 * j) : _mm512_setzero_ps();
    jpq_transpose16(words);
    for (int i = 0; i < 16 && j + i < quads; i++, to += 4 * DIGITS) _mm512_storeu_ps(to, words[i]);
  }
}

static jpq_status prepare(jpq_product *p) {
  const jpq_weight *w = p->weight;
  const int parts = p->parts, rows = DIGITS / parts;
  const int64_t groups = jpq_groups(w), tiles = (p->m + rows - 1) / rows, quads = w->k / 4, columns = (w->k + 63) & ~(int64_t)63;
  const size_t q = (size_t)(tiles * quads) * DIGITS * 4 + 16, floats = (size_t)(tiles * rows * groups);
  char *memory = malloc(sizeof(many) + q + 2 * sizeof(float) * floats + (size_t)(DIGITS * columns));
  if (!memory) return JPQ_NO_MEMORY;
  float *scale = (float *)(memory + sizeof(many)), *sum = scale + floats;
  int8_t *to = (int8_t *)(sum + floats), *planes = to + q;
  *(many *)memory = (many){groups, to, scale, sum};
  for (int64_t m = 0; m < tiles * rows; m++) {
    int8_t *row = planes + m % rows * parts * columns;
    for (int64_t g = 0; g < groups; g++) {
      const int64_t j = g * w->group_size, at = m * groups + g;
      if (m < p->m)
        sum[at] = jpq_vnni_digits(p->x + m * w->k + j, w->group_size, 0, parts, LONG_DIGIT_BITS, row + j, columns, scale + at);
      else
        scale[at] = sum[at] = 0; /* whatever its digits are */
    }
    if (m % rows == rows - 1) interleave(planes, columns, quads, to + m / rows * quads * DIGITS * 4);
  }
  p->prepared = memory;
  return JPQ_OK;
}

/* Rows [n, n + rows) of W: panel[k / 4, PANEL_ROWS] of four codes, of anything behind the last column or row. */
JPQ_INLINE void fill_panel(const jpq_weight *w, int64_t n, int rows, uint8_t *panel, uint8_t *copy, int bits) {
  const int64_t bytes = jpq_bytes(w->k, bits);
  for (int v = 0; v < VECTORS && 16 * v < rows; v++) {
    const uint8_t *codes[16];
    for (int i = 0; i < 16; i++) {
      const int64_t row = n + 16 * v + (16 * v + i < rows ? i : 0);
      codes[i] = w->packed + row * bytes;
      if ((w->n - row - 1) * bytes < OVERREAD) codes[i] = memcpy(copy + i * (bytes + OVERREAD), codes[i], (size_t)bytes);
    }
    for (int64_t j = 0; j < w->k; j += 64) {
      __m512 block[16];
      for (int i = 0; i < 16; i++) block[i] = _mm512_castsi512_ps(unpack(codes[i], j, bits));
      jpq_transpose16(block);
      for (int i = 0; i < 16; i++) _mm512_store_ps(panel + 4 * ((j / 4 + i) * PANEL_ROWS + 16 * v), block[i]);
    }
  }
}

#define FILL(B)                                                                                                 \
  static void fill_##B(const jpq_weight *w, int64_t n, int rows, uint8_t *panel, uint8_t *copy) {              \
    fill_panel(w, n, rows, panel, copy, B);                                                                     \
  }
JPQ_FOR_BITS(FILL)
#define FILL_ENTRY(B) fill_##B,
static void (*const fill_functions[])(const jpq_weight *, int64_t, int, uint8_t *, uint8_t *) = {JPQ_FOR_BITS(FILL_ENTRY)};

/* A tile of X, [PANEL_ROWS] outputs of each row into `out`. */
JPQ_INLINE void tile(const many *x, int64_t t, const uint8_t *panel, const float *scale, const float *shift, int64_t k,
                     int64_t group_size, int parts, float *out) {
  const int rows = DIGITS / parts;
  const int8_t *q = x->q + t * k * DIGITS;
  const float *x_scale = x->scale + t * rows * x->groups, *x_sum = x->sum + t * rows * x->groups;
  for (int64_t g = 0; g < x->groups; g++) {
    __m512i sum[DIGITS][VECTORS];
    for (int d = 0; d < DIGITS; d++)
      for (int v = 0; v < VECTORS; v++) sum[d][v] = _mm512_setzero_si512();
    for (int64_t j = 0; j < group_size; j += 4, q += 4 * DIGITS, panel += 4 * PANEL_ROWS) {
      __m512i codes[VECTORS];
      for (int v = 0; v < VECTORS; v++) codes[v] = _mm512_load_si512(panel + 64 * v);
      for (int d = 0; d < DIGITS; d++) {
        int32_t word;
        memcpy(&word, q + 4 * d, 4);
        for (int v = 0; v < VECTORS; v++) sum[d][v] = jpq_plus_products(sum[d][v], codes[v], _mm512_set1_epi32(word));
      }
    }
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < VECTORS; v++) {
        __m512 total = _mm512_cvtepi32_ps(sum[r * parts][v]);
        for (int i = 1; i < parts; i++)
          total = _mm512_fmadd_ps(total, _mm512_set1_ps(1 << LONG_DIGIT_BITS), _mm512_cvtepi32_ps(sum[r * parts + i][v]));
        const __m512 s = _mm512_mul_ps(_mm512_load_ps(scale + g * PANEL_ROWS + 16 * v), _mm512_set1_ps(x_scale[r * x->groups + g]));
        float *at = out + r * PANEL_ROWS + 16 * v;
        total = _mm512_fmadd_ps(total, s, g ? _mm512_load_ps(at) : _mm512_setzero_ps());
        const __m512 z = _mm512_load_ps(shift + g * PANEL_ROWS + 16 * v);
        _mm512_store_ps(at, _mm512_fnmadd_ps(z, _mm512_set1_ps(x_sum[r * x->groups + g]), total));
      }
  }
}

#define TILE(P)                                                                                                     \
  static void tile_##P(const many *x, int64_t t, const uint8_t *panel, const float *scale, const float *shift, int64_t k, \
                       int64_t group_size, float *out) {                                                            \
    tile(x, t, panel, scale, shift, k, group_size, P, out);                                                         \
  }
TILE(1) TILE(2) TILE(3)
static void (*const tile_functions[])(const many *, int64_t, const uint8_t *, const float *, const float *, int64_t, int64_t,
                                      float *) = {NULL, tile_1, tile_2, tile_3};

/* Scales of rows [n, n + rows), and scale * zero, as [groups, PANEL_ROWS]; `room`: for those of a row. */
static void panel_scales(const jpq_weight *w, int64_t n, int rows, int64_t groups, float *scale, float *shift, float *room) {
  for (int i = 0; i < rows; i++) {
    jpq_row_scales(w, n + i, room, room + groups);
    for (int64_t g = 0; g < groups; g++) scale[g * PANEL_ROWS + i] = room[g], shift[g * PANEL_ROWS + i] = room[groups + g];
  }
}

static jpq_status matmul_rows(const jpq_product *p, int64_t first, int64_t last) {
  const jpq_weight *w = p->weight;
  const many *x = p->prepared;
  const int64_t groups = x->groups, columns = (w->k + 63) & ~(int64_t)63;
  const int rows = DIGITS / p->parts;
  const size_t floats = (size_t)(2 * groups * PANEL_ROWS + 2 * groups), panel_bytes = (size_t)(columns * PANEL_ROWS);
  char *memory = malloc(64 + panel_bytes + 4 * floats + 16 * (size_t)(jpq_bytes(w->k, w->bits) + OVERREAD));
  if (!memory) return JPQ_NO_MEMORY;
  uint8_t *panel = (uint8_t *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
  float *scale = (float *)(panel + panel_bytes), *shift = scale + groups * PANEL_ROWS, *room = shift + groups * PANEL_ROWS;
  uint8_t *copy = (uint8_t *)(room + 2 * groups);
  _Alignas(64) float out[DIGITS * PANEL_ROWS];
  for (int64_t n = first; n < last; n += PANEL_ROWS) {
    const int here = last - n < PANEL_ROWS ? (int)(last - n) : PANEL_ROWS;
    fill_functions[jpq_index(w->bits)](w, n, here, panel, copy);
    panel_scales(w, n, here, groups, scale, shift, room);
    for (int64_t t = 0; t * rows < p->m; t++) {
      tile_functions[p->parts](x, t, panel, scale, shift, w->k, w->group_size, out);
      for (int r = 0; r < rows && t * rows + r < p->m; r++)
        for (int v = 0; v < VECTORS; v++) {
          const __mmask16 real = (__mmask16)low_bits(here - 16 * v < 0 ? 0 : here - 16 * v);
          const __m512 bias = p->bias ? _mm512_maskz_loadu_ps(real, p->bias + n + 16 * v) : _mm512_setzero_ps();
          float *y = p->y + (t * rows + r) * w->n + n + 16 * v;
          _mm512_mask_storeu_ps(y, real, _mm512_add_ps(_mm512_load_ps(out + r * PANEL_ROWS + 16 * v), bias));
        }
    }
  }
  free(memory);
  return JPQ_OK;
}

JPQ_TARGET_END

/* Not one to choose: jpq_vnni hands over to it. */
const jpq_implementation jpq_vnni_many = {"avx512-vnni", NULL, NULL, prepare, NULL, matmul_rows, NULL, NULL, 0, NULL, NULL, NULL};
#endif
