/* Attention over a cache that grows in place, on the CPU: the C interface, free of dependencies.
 *
 *     Y[b, s, h] = softmax_t(scale * Q[b, s, h] · K[t, b, h / G] where mask[b, s, t]) · V[t, b, h / G],  G = heads / kv_heads
 *
 * Time comes first in the cache, so that new rows lie behind the old ones whatever the batch. It holds floats, or int8
 * codes and a scale for each (position, head): what is multiplied is code * scale. Any number of threads may share a
 * pass: `jpq_attention_begin`, `jpq_attention_task` for 0 <= i < tasks, `jpq_attention_finish` and `jpq_attention_end`.
 */
#ifndef JPQ_ATTENTION_H
#define JPQ_ATTENTION_H

#include "low_bit.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Keys and values as int8, a head's scale max |x| / 127 and its codes round(x / scale), ties to even. */
typedef struct jpq_int8_cache {
  int8_t *keys, *values;             /* codes [..., kv_heads, dim] */
  float *key_scales, *value_scales;  /* [..., kv_heads] */
} jpq_int8_cache;

typedef struct jpq_attention {
  const float *q;             /* [batch, seq, heads, dim] */
  const float *k, *v;         /* [batch, seq, kv_heads, dim] */
  const float *cos, *sin;     /* [batch, seq, dim / 2], to turn halves of q and k with first, or NULL */
  const uint8_t *mask;        /* [batch, seq, total], 0 = not to be looked at */
  float *keys, *values;       /* [total or more, batch, kv_heads, dim]: the first total - seq rows hold what came before */
  float *y;                   /* [batch, seq, heads, dim] */
  jpq_int8_cache fresh, codes; /* instead of k, v (turned already), keys, values, which are NULL then: of the same places */
  int64_t batch, seq, total, heads, kv_heads, dim;
  float scale;
  const char *implementation; /* name, or NULL for the best one here */
  /* Set by jpq_attention_begin. */
  const struct jpq_implementation *chosen;
  int64_t rows;               /* seq * heads / kv_heads: queries that share a key head, [seq, G] */
  int64_t tiles, chunks;      /* of rows and of keys */
  int64_t heads_of_task;      /* key heads */
  int64_t tasks;              /* batch * kv_heads / heads_of_task * tiles * chunks */
  float *turned;              /* q after that, NULL where it is as it was */
  float *partial;             /* [batch, kv_heads, chunks, JPQ_TILE, dim + 2] sums, maximum, weight; NULL for one chunk */
} jpq_attention;

/* Codes and scales of new keys, turned first where there is `cos`, and values: k, v [positions, kv_heads, dim] and cos,
 * sin [positions, dim / 2] -> `out` [positions, ...]. */
JPQ_EXPORT jpq_status jpq_to_int8(const float *k, const float *v, const float *cos, const float *sin, int64_t positions,
                                  int64_t kv_heads, int64_t dim, const jpq_int8_cache *out);

/* Write the new keys and values behind the old ones and cut the work into tasks. After all of them, finish joins their
 * parts; end releases what is held, whatever the status. */
JPQ_EXPORT jpq_status jpq_attention_begin(jpq_attention *a);
JPQ_EXPORT jpq_status jpq_attention_task(const jpq_attention *a, int64_t i);
JPQ_EXPORT void jpq_attention_finish(jpq_attention *a);
JPQ_EXPORT void jpq_attention_end(jpq_attention *a);

#ifdef __cplusplus
}
#endif
#endif
