/* What vnni.c brings X into, and the products of it that vnni_rows.inc makes. */
#ifndef JPQ_VNNI_H
#define JPQ_VNNI_H

#include "internal.h"

#ifdef JPQ_X86
#include <immintrin.h>

#include "vnni_codes.h"

enum {
  FEW = 4,
  DIGIT_BITS = 7,      /* of X: parts meet in 32 bits */
  LONG_DIGIT_BITS = 8, /* where they meet in fp32, all that a byte holds */
};

/* X in fixed point, in the order of the codes, and which scale a lane needs. */
typedef struct prepared {
  int64_t real_groups;     /* of a row; a division, so done once */
  int64_t columns, groups; /* padded: k to 128, groups to 16 */
  int64_t block, blocked;  /* columns that come in blocks, by how many; at most 128 are left */
  const int8_t *q;         /* [m, parts, columns] */
  const float *scale;      /* [m, groups] */
  const float *sum;        /* [m, groups] of what q stands for: scale * q, or times a power of two (vnni_triples.h) */
  const int32_t *lane;     /* [columns / 64, 16] group of the codes in a lane, from a multiple of 16 groups on */
} prepared;

JPQ_TARGET("avx512f,avx512vnni")

/* As _mm512_dpbusd_epi32, for which GCC 12 copies or stores every sum. */
JPQ_INLINE __m512i jpq_plus_products(__m512i sum, __m512i codes, __m512i digits) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(digits));
  return sum;
}

JPQ_TARGET_END

/* Signed bytes that X becomes a number of: 1 of INT8, 2 of INT16, 3 of FP32. */
JPQ_INLINE int jpq_vnni_parts(jpq_activations activations) {
  return activations == JPQ_FP32 ? 3 : activations == JPQ_INT16 ? 2 : 1;
}

/* How groups lie to 128 codes: any way, two halves, one group of several times 128; or a group of several times 256 codes
 * or all of a row, whose sums stay integers to its end (vnni_long.inc). */
enum { ANY, HALVES, WHOLE, LONG, LAYOUTS };

/* Rows [first, last) of W with some rows of X from m0 on; `copy`: room for four rows. */
typedef void (*rows_function)(const jpq_product *p, int64_t m0, int64_t first, int64_t last, uint8_t *copy);

/* Bytes of that room: scales, codes and OVERREAD, zeros, as copy_rows (vnni_rows.inc) lays them out. */
JPQ_INLINE size_t room_for(const jpq_weight *w, int64_t groups) {
  return 8 * (size_t)groups + 4 * (size_t)jpq_bytes(w->k, w->bits) + OVERREAD + 4 * (size_t)jpq_bytes(groups, w->bits);
}

/* A group of X, `count` of them, as integers times `*scale`: `parts` planes of signed digits of `log` bits, `columns`
 * apart, the highest first; the first `triples` of them for codes that come multiplied (vnni_triples.h). Returns the sum of
 * what they stand for. */
float jpq_vnni_digits(const float *x, int32_t count, int32_t triples, int parts, int log, int8_t *q, int64_t columns,
                      float *scale);

/* Many rows of X, in parts that are set already, of weights that jpq_vnni takes. */
extern const jpq_implementation jpq_vnni_many;

/* By bits, layout, parts, and 1, 2 or 4 rows of X; NULL for what is compiled elsewhere. */
typedef rows_function vnni_table[JPQ_WIDTHS][LAYOUTS][3][3];
extern const vnni_table jpq_vnni_narrow, jpq_vnni_wide;
#endif
#endif
