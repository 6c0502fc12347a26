/* Choosing a token from logits: as jpq_export/runtime/sampling.py, with the same random numbers and, where not all tokens
 * are kept, through them in the same order: the likeliest first, of equals the lower id. top_k is applied before top_p. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "random.h"
#include "sample.h"

struct jpq_sampler {
  jpq_sampling options;
  int64_t vocab;
  random_state random;
  uint32_t *heap;  /* [vocab]: tokens not yet taken, the likeliest first */
  uint32_t *order; /* [vocab]: tokens taken, falling */
  double *weights; /* [vocab]: theirs */
};

void jpq_sampling_defaults(jpq_sampling *sampling) {
  memset(sampling, 0, sizeof *sampling);
  sampling->size = sizeof *sampling, sampling->top_p = 1;
}

jpq_result sampling_check(const jpq_sampling *s, jpq_error *error) {
  if (s->size != sizeof *s)
    return jpq_fail(error, JPQ_BAD_ARGUMENT, "jpq_sampling: size %zu, expected %zu; call jpq_sampling_defaults first", s->size, sizeof *s);
  if (!(s->temperature >= 0) || isinf(s->temperature))
    return jpq_fail(error, JPQ_BAD_ARGUMENT, "temperature: got %g, expected 0 or more", s->temperature);
  if (s->top_k < 0)
    return jpq_fail(error, JPQ_BAD_ARGUMENT, "top_k: got %lld, expected 1 or more, or 0 for all", (long long)s->top_k);
  if (!(s->top_p > 0 && s->top_p <= 1))
    return jpq_fail(error, JPQ_BAD_ARGUMENT, "top_p: got %g, expected above 0 and at most 1", s->top_p);
  return JPQ_SUCCESS;
}

jpq_result jpq_sampler_new(const jpq_sampling *sampling, int64_t vocab, jpq_sampler **out, jpq_error *error) {
  jpq_sampling asked;
  jpq_sampling_defaults(&asked);
  if (!out || vocab < 1 || vocab > INT32_MAX)
    return jpq_fail(error, JPQ_BAD_ARGUMENT, "jpq_sampler_new: out must not be NULL, vocab must be 1 or more");
  *out = NULL;
  if (sampling) asked = *sampling;
  JPQ_TRY(sampling_check(&asked, error));
  jpq_sampler *made = calloc(1, sizeof *made);
  if (!made) return jpq_no_memory(error);
  made->options = asked, made->vocab = vocab;
  random_seed(&made->random, asked.seed);
  made->heap = malloc((size_t)vocab * sizeof *made->heap);
  made->order = malloc((size_t)vocab * sizeof *made->order);
  made->weights = malloc((size_t)vocab * sizeof *made->weights);
  if (!made->heap || !made->order || !made->weights) return jpq_sampler_free(made), jpq_no_memory(error);
  return *out = made, jpq_done(error);
}

void jpq_sampler_free(jpq_sampler *sampler) {
  if (!sampler) return;
  free(sampler->heap), free(sampler->order), free(sampler->weights);
  free(sampler);
}

static int before(const float *logits, uint32_t a, uint32_t b) {
  return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
}

static void sink(const float *logits, uint32_t *heap, int64_t at, int64_t count) {
  const uint32_t moved = heap[at];
  for (int64_t child; (child = 2 * at + 1) < count; at = child) {
    if (child + 1 < count && before(logits, heap[child + 1], heap[child])) child++;
    if (!before(logits, heap[child], moved)) break;
    heap[at] = heap[child];
  }
  heap[at] = moved;
}

/* Take the likeliest token left: its weight, relative to the likeliest of all, goes behind those taken before. */
static double take(jpq_sampler *s, const float *logits, float most, int64_t taken) {
  const int64_t left = s->vocab - taken;
  const uint32_t first = s->heap[0];
  s->heap[0] = s->heap[left - 1];
  sink(logits, s->heap, 0, left - 1);
  s->order[taken] = first;
  return s->weights[taken] = exp(((double)logits[first] - most) / s->options.temperature);
}

/* All tokens, in the order of their ids. */
static int64_t draw_of_all(jpq_sampler *s, const float *logits, int64_t best) {
  double total = 0, sum = 0;
  for (int64_t i = 0; i < s->vocab; i++)
    total += s->weights[i] = exp(((double)logits[i] - logits[best]) / s->options.temperature);
  const double target = random_uniform(&s->random) * total;
  for (int64_t i = 0; i < s->vocab; i++)
    if ((sum += s->weights[i]) > target) return i;
  return best; /* the product was rounded up to the total */
}

/* Tokens are taken only until the drawn one is reached: sorting all would cost as much as the model. */
static int64_t draw(jpq_sampler *s, const float *logits, float most) {
  const int64_t limit = s->options.top_k && s->options.top_k < s->vocab ? s->options.top_k : s->vocab;
  int64_t taken = 0, kept = limit, at = 0;
  double total = 0, sum = 0;
  for (int64_t i = 0; i < s->vocab; i++) s->heap[i] = (uint32_t)i;
  for (int64_t i = s->vocab / 2; i-- > 0;) sink(logits, s->heap, i, s->vocab);
  if (limit < s->vocab)
    while (taken < limit) total += take(s, logits, most, taken), taken++;
  else
    for (int64_t i = 0; i < s->vocab; i++) total += exp(((double)logits[i] - most) / s->options.temperature);
  if (s->options.top_p < 1) { /* Holtzman et al., 2020: the fewest that reach it */
    for (kept = 0; kept < limit && (kept == 0 || sum < s->options.top_p * total); kept++) {
      if (kept == taken) take(s, logits, most, taken), taken++;
      sum += s->weights[kept];
    }
    total = sum, sum = 0;
  }
  const double target = random_uniform(&s->random) * total;
  for (;; at++) {
    if (at == taken) take(s, logits, most, taken), taken++;
    sum += s->weights[at];
    if (sum > target || at + 1 == kept) return s->order[at];
  }
}

jpq_result jpq_sample(jpq_sampler *s, const float *logits, int64_t *token, jpq_error *error) {
  if (!s || !logits || !token)
    return jpq_fail(error, JPQ_BAD_ARGUMENT, "jpq_sample: sampler, logits and token must not be NULL");
  int64_t best = 0;
  int bad = 0;
  for (int64_t i = 0; i < s->vocab; i++) {
    bad |= logits[i] != logits[i];
    if (logits[i] > logits[best]) best = i;
  }
  if (bad || isinf(logits[best]))
    return jpq_fail(error, JPQ_BACKEND, "logits: NaN or infinite; check the bundle with `jpq-export verify`");
  const int whole = s->options.top_p == 1 && (!s->options.top_k || s->options.top_k >= s->vocab);
  *token = s->options.temperature == 0 ? best : whole ? draw_of_all(s, logits, best) : draw(s, logits, logits[best]);
  return jpq_done(error);
}
