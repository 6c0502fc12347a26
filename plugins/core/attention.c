/* Attention: the cache, the division into tasks, and the sum of their parts. The arithmetic is in attention.inc. */
#include "attention.h"

#include <stdlib.h>

#include "attention_task.h"

/* `heads` heads of position `at` of [batch, seq], turned where there is something to turn them with. */
static void place(const jpq_attention *a, float *out, const float *x, int64_t at, int64_t heads, int turned) {
  if (!turned || !a->cos) {
    memcpy(out, x, sizeof(float) * (size_t)(heads * a->dim));
    return;
  }
  for (int64_t h = 0; h < heads; h++)
    jpq_turn(out + h * a->dim, x + h * a->dim, a->cos + at * (a->dim / 2), a->sin + at * (a->dim / 2), a->dim);
}

/* The new codes of position `from` of [batch, seq] at row `to` of the cache. */
static void place_codes(const jpq_attention *a, int64_t to, int64_t from) {
  const int64_t heads = a->kv_heads, row = heads * a->dim;
  memcpy(a->codes.keys + to * row, a->fresh.keys + from * row, (size_t)row);
  memcpy(a->codes.values + to * row, a->fresh.values + from * row, (size_t)row);
  memcpy(a->codes.key_scales + to * heads, a->fresh.key_scales + from * heads, sizeof(float) * (size_t)heads);
  memcpy(a->codes.value_scales + to * heads, a->fresh.value_scales + from * heads, sizeof(float) * (size_t)heads);
}

static void append(jpq_attention *a) {
  const int64_t row = a->kv_heads * a->dim, past = a->total - a->seq, wide = a->heads * a->dim;
  for (int64_t b = 0; b < a->batch; b++)
    for (int64_t s = 0; s < a->seq; s++) {
      const int64_t from = b * a->seq + s, to = (past + s) * a->batch + b;
      if (a->codes.keys) {
        place_codes(a, to, from);
      } else {
        place(a, a->keys + to * row, a->k + from * row, from, a->kv_heads, 1);
        place(a, a->values + to * row, a->v + from * row, from, a->kv_heads, 0);
      }
      if (a->turned) place(a, a->turned + from * wide, a->q + from * wide, from, a->heads, 1);
    }
}

static int64_t keys_of_task(const jpq_attention *a) {
  const int64_t bytes = a->heads_of_task * a->dim * (a->codes.keys ? 1 : 4), keys = JPQ_BYTES / bytes;
  return keys > JPQ_CHUNK ? JPQ_CHUNK : keys < JPQ_LEAST ? JPQ_LEAST : keys;
}

jpq_status jpq_attention_begin(jpq_attention *a) {
  a->partial = a->turned = NULL;
  a->tasks = 0;
  a->chosen = NULL;
  if (a->kv_heads < 1 || a->heads % a->kv_heads || a->dim < 1 || a->seq < 0 || a->total < a->seq) return JPQ_BAD_WEIGHT;
  a->chosen = jpq_choose_attention(a->dim, a->implementation);
  if (!a->chosen) return JPQ_NOT_HERE;
  if (a->batch < 1 || a->seq < 1) return JPQ_OK;
  if (a->cos) {
    if (a->dim % 2) return JPQ_BAD_WEIGHT;
    a->turned = malloc(sizeof(float) * (size_t)(a->batch * a->seq * a->heads * a->dim));
    if (!a->turned) return JPQ_NO_MEMORY;
  }
  append(a);
  a->rows = a->seq * (a->heads / a->kv_heads);
  a->tiles = (a->rows + JPQ_TILE - 1) / JPQ_TILE;
  a->heads_of_task = a->rows <= JPQ_FEW ? a->kv_heads : 1;
  /* Few tiles would leave threads without work: then keys are divided too. */
  const int64_t keys = keys_of_task(a);
  a->chunks = a->tiles > 1 ? 1 : (a->total + keys - 1) / keys;
  a->tasks = a->batch * (a->kv_heads / a->heads_of_task) * a->tiles * a->chunks;
  if (a->chunks == 1) return JPQ_OK;
  a->partial = malloc(sizeof(float) * (size_t)(a->batch * a->kv_heads * a->chunks * JPQ_TILE * (a->dim + 2)));
  return a->partial ? JPQ_OK : JPQ_NO_MEMORY;
}

jpq_status jpq_attention_task(const jpq_attention *a, int64_t i) {
  attention_task task = {.heads = a->heads_of_task, .tile = i / a->chunks % a->tiles, .chunk = i % a->chunks};
  const int64_t head = i / a->chunks / a->tiles * task.heads, length = (a->total + a->chunks - 1) / a->chunks;
  task.head = head % a->kv_heads, task.batch = head / a->kv_heads;
  int64_t left = a->rows - task.tile * JPQ_TILE;
  task.rows = left < JPQ_TILE ? left : JPQ_TILE;
  task.first = task.chunk * length;
  task.last = task.first + length < a->total ? task.first + length : a->total;
  return a->chosen->attend(a, &task);
}

/* The chunks of one tile, weighted by how far their maxima lie below the largest. */
static void join(const jpq_attention *a, int64_t head, int64_t row) {
  const int64_t width = a->dim + 2;
  const float *part = a->partial + (head * a->chunks * JPQ_TILE + row) * width;
  float *y = jpq_attention_row(a, a->y, head / a->kv_heads, head % a->kv_heads, row);
  float most = -INFINITY, weight = 0;
  for (int64_t c = 0; c < a->chunks; c++) {
    float here = part[c * JPQ_TILE * width + a->dim];
    most = here > most ? here : most;
  }
  for (int64_t j = 0; j < a->dim; j++) y[j] = 0;
  for (int64_t c = 0; c < a->chunks; c++) {
    const float *sums = part + c * JPQ_TILE * width;
    float factor = sums[a->dim + 1] == 0 ? 0 : jpq_exp(sums[a->dim] - most); /* nothing was to be looked at there */
    weight += factor * sums[a->dim + 1];
    for (int64_t j = 0; j < a->dim; j++) y[j] += factor * sums[j];
  }
  for (int64_t j = 0; j < a->dim; j++) y[j] = weight == 0 ? 0 : y[j] / weight;
}

void jpq_attention_finish(jpq_attention *a) {
  for (int64_t head = 0; a->partial && head < a->batch * a->kv_heads; head++)
    for (int64_t row = 0; row < a->rows; row++) join(a, head, row);
}

void jpq_attention_end(jpq_attention *a) {
  free(a->partial), free(a->turned);
  a->partial = a->turned = NULL;
}
