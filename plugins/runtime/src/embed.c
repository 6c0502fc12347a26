/* Texts to vectors: one padded batch through an encoder. */
#include <stdlib.h>
#include <string.h>

#include "sequence.h"

/* Ids of every text, one behind the other; ends[i] is where text i ends. */
static jpq_result tokenise(const jpq_model *model, const char *const *texts, size_t count, ids *all, size_t *ends,
                           jpq_error *error) {
  for (size_t i = 0; i < count; i++) {
    if (!texts[i]) return jpq_fail(error, JPQ_BAD_ARGUMENT, "jpq_embed: text %zu is NULL", i);
    JPQ_TRY(tokenizer_encode(model->tokenizer, texts[i], strlen(texts[i]), all, error));
    ends[i] = all->count;
    const size_t tokens = ends[i] - (i ? ends[i - 1] : 0);
    const int64_t most = model->backend->spec.max_positions;
    if (!tokens) return jpq_fail(error, JPQ_BAD_ARGUMENT, "text %zu has no tokens; give some text", i);
    if (tokens > (size_t)most)
      return jpq_fail(error, JPQ_BAD_ARGUMENT, "text %zu has %zu tokens, expected at most %lld; shorten or split it", i,
                      tokens, (long long)most);
  }
  return JPQ_SUCCESS;
}

static jpq_result run_batch(const jpq_model *model, const ids *all, const size_t *ends, size_t count, float *out, jpq_error *error) {
  size_t seq = 0;
  for (size_t i = 0; i < count; i++) {
    const size_t n = ends[i] - (i ? ends[i - 1] : 0);
    if (n > seq) seq = n;
  }
  if (count > SIZE_MAX / 4 / sizeof(int64_t) / seq) return jpq_no_memory(error);
  int64_t *input = calloc(2 * count * seq, sizeof *input), *mask = input + count * seq;
  if (!input) return jpq_no_memory(error);
  for (size_t i = 0, from = 0; i < count; from = ends[i++])
    for (size_t at = 0; at < ends[i] - from; at++)
      input[i * seq + at] = all->data[from + at], mask[i * seq + at] = 1; /* padding: id 0, masked */
  const backend *b = model->backend;
  const jpq_result result = b->embed(b, input, mask, (int64_t)count, (int64_t)seq, out, error);
  free(input);
  return result;
}

jpq_result jpq_embed(const jpq_model *model, const char *const *texts, size_t count, float *out, jpq_error *error) {
  if (!model || !texts || !out || !count)
    return jpq_fail(error, JPQ_BAD_ARGUMENT, "jpq_embed: model, texts and out must not be NULL, count must be 1 or more");
  if (!model->backend->embedding) return jpq_fail(error, JPQ_BAD_ARGUMENT, "the bundle is a decoder; use jpq_generate");
  JPQ_TRY(text_needs_tokenizer(model, error));
  ids all = {0};
  size_t *ends = calloc(count, sizeof *ends);
  jpq_result result = ends ? tokenise(model, texts, count, &all, ends, error) : jpq_no_memory(error);
  if (!result) result = run_batch(model, &all, ends, count, out, error);
  free(all.data), free(ends);
  return result ? result : jpq_done(error);
}
