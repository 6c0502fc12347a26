/* One part of an attention: what implementations are given to compute. */
#ifndef JPQ_ATTENTION_TASK_H
#define JPQ_ATTENTION_TASK_H

#include <math.h>

#include "attention.h"
#include "internal.h"

enum {
  JPQ_TILE = 24, /* rows of Q a task has at most: a multiple of what a product keeps in registers */
  JPQ_FEW = 8,   /* up to as many rows a key head a task looks at all heads: a key's lie together, and memory likes that */
  /* Where there is one tile only, keys are divided: a task looks at as many as fit JPQ_BYTES, between these. */
  JPQ_LEAST = 16,
  JPQ_CHUNK = 128,
  JPQ_BYTES = 1 << 17,
};

typedef struct attention_task {
  int64_t batch, head, heads; /* of the keys: the first and how many */
  int64_t tile, chunk;
  int64_t rows;        /* of the tile */
  int64_t first, last; /* keys */
} attention_task;

/* Row `row` of the queries that share key head `head`, in Q or Y. */
JPQ_INLINE float *jpq_attention_row(const jpq_attention *a, const float *base, int64_t batch, int64_t head, int64_t row) {
  int64_t group = a->heads / a->kv_heads;
  int64_t at = ((batch * a->seq + row / group) * a->heads + head * group + row % group) * a->dim;
  return (float *)(uintptr_t)(base + at);
}

JPQ_INLINE const uint8_t *jpq_attention_mask(const jpq_attention *a, const attention_task *task, int64_t row) {
  int64_t s = (task->tile * JPQ_TILE + row) / (a->heads / a->kv_heads);
  return a->mask + (task->batch * a->seq + s) * a->total;
}

/* Where the part of one row goes that a task has of it: dim sums, their maximum, their weight. NULL: it is the whole. */
JPQ_INLINE float *jpq_attention_part(const jpq_attention *a, const attention_task *task, int64_t head, int64_t row) {
  const int64_t at = (task->batch * a->kv_heads + head) * a->chunks + task->chunk;
  return a->partial ? a->partial + (at * JPQ_TILE + row) * (a->dim + 2) : NULL;
}

/* Rotary embedding of one head (RoFormer, Su et al. 2021; halves as in GPT-NeoX). */
JPQ_INLINE void jpq_turn(float *out, const float *x, const float *cos, const float *sin, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t j = 0; j < half; j++) {
    float low = x[j], high = x[j + half];
    out[j] = low * cos[j] - high * sin[j];
    out[j + half] = high * cos[j] + low * sin[j];
  }
}

/* e^x for x <= 0, within 2 units of the last place (Cephes' polynomial); no call, so that loops over it become vectors. */
JPQ_INLINE float jpq_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  float shifted = x * 1.44269504f + 0x1.8p23f, n = shifted - 0x1.8p23f; /* the nearest integer, in the low bits too */
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4b400000u + 127) << 23;
  float power;
  memcpy(&power, &bits, 4);
  return y * power;
}

#endif
