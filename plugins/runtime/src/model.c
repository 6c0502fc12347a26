/* Loading a bundle, and the sequences that run through it. */
#include <stdlib.h>
#include <string.h>

#include "sequence.h"

struct jpq_sequence {
  const jpq_model *model;
  backend_cache *cache;
  int64_t length, capacity;
  float *logits; /* [vocab] */
};

void jpq_load_defaults(jpq_load_options *options) {
  memset(options, 0, sizeof *options);
  options->size = sizeof *options, options->backend = JPQ_AUTO;
}

static jpq_result load(const char *folder, const jpq_load_options *options, const manifest *m, jpq_model *model,
                       jpq_error *error) {
  if (options->check) JPQ_TRY(manifest_check_all(folder, m, error));
  JPQ_TRY(backend_open(folder, m, options, &model->backend, error));
  const jpq_result result = tokenizer_load(folder, &model->backend->spec, &model->tokenizer, &model->no_tokenizer);
  if (result == JPQ_SUCCESS || result == JPQ_UNSUPPORTED) return JPQ_SUCCESS;
  if (error) *error = model->no_tokenizer;
  return result;
}

jpq_result jpq_model_load(const char *folder, const jpq_load_options *options, jpq_model **out, jpq_error *error) {
  jpq_load_options asked;
  manifest m;
  jpq_load_defaults(&asked);
  if (!folder || !out) return jpq_fail(error, JPQ_BAD_ARGUMENT, "jpq_model_load: folder and out must not be NULL");
  *out = NULL;
  if (options) {
    if (options->size != sizeof asked)
      return jpq_fail(error, JPQ_BAD_ARGUMENT, "jpq_load_options: size %zu, expected %zu; call jpq_load_defaults first",
                      options->size, sizeof asked);
    asked = *options;
  }
  JPQ_TRY(manifest_read(folder, &m, error));
  jpq_model *model = calloc(1, sizeof *model);
  const jpq_result result = model ? load(folder, &asked, &m, model, error) : jpq_no_memory(error);
  manifest_free(&m);
  if (result) return jpq_model_free(model), result;
  return *out = model, jpq_done(error);
}

void jpq_model_free(jpq_model *model) {
  if (!model) return;
  tokenizer_free(model->tokenizer);
  if (model->backend) model->backend->free(model->backend);
  free(model);
}

jpq_result jpq_model_describe(const jpq_model *model, jpq_model_info *info, jpq_error *error) {
  if (!model || !info || info->size != sizeof *info)
    return jpq_fail(error, JPQ_BAD_ARGUMENT, "jpq_model_describe: set info.size = sizeof(jpq_model_info) first");
  const model_spec *spec = &model->backend->spec;
  *info = (jpq_model_info){sizeof *info, spec->vocab, spec->max_positions, model->backend->embedding, model->backend->path};
  return jpq_done(error);
}

jpq_result jpq_sequence_new(const jpq_model *model, int64_t capacity, jpq_sequence **out, jpq_error *error) {
  if (!model || !out) return jpq_fail(error, JPQ_BAD_ARGUMENT, "jpq_sequence_new: model and out must not be NULL");
  *out = NULL;
  const model_spec *spec = &model->backend->spec;
  if (model->backend->embedding) return jpq_fail(error, JPQ_BAD_ARGUMENT, "the bundle is an encoder; use jpq_embed");
  if (capacity < 0 || capacity > spec->max_positions)
    return jpq_fail(error, JPQ_BAD_ARGUMENT, "capacity: got %lld, expected 0 to the %s's %lld positions",
                    (long long)capacity, model->backend->limit, (long long)spec->max_positions);
  jpq_sequence *made = calloc(1, sizeof *made);
  if (!made) return jpq_no_memory(error);
  made->model = model, made->capacity = capacity ? capacity : spec->max_positions;
  made->logits = malloc((size_t)spec->vocab * sizeof *made->logits);
  const jpq_result result =
      made->logits ? model->backend->cache_new(model->backend, made->capacity, &made->cache, error) : jpq_no_memory(error);
  if (result) return jpq_sequence_free(made), result;
  return *out = made, jpq_done(error);
}

void jpq_sequence_free(jpq_sequence *sequence) {
  if (!sequence) return;
  if (sequence->cache) sequence->model->backend->cache_free(sequence->cache);
  free(sequence->logits);
  free(sequence);
}

void jpq_sequence_reset(jpq_sequence *sequence) { sequence->length = 0; }

int64_t jpq_sequence_length(const jpq_sequence *sequence) { return sequence->length; }

static jpq_result check_tokens(const jpq_sequence *s, const int64_t *ids, size_t count, jpq_error *error) {
  const int64_t vocab = s->model->backend->spec.vocab;
  if (!ids || !count) return jpq_fail(error, JPQ_BAD_ARGUMENT, "the prompt has no tokens; give some text");
  if (count > (size_t)(s->capacity - s->length))
    return jpq_fail(error, JPQ_BAD_ARGUMENT,
                    "%zu tokens after %lld need more than the sequence's %lld positions; shorten the prompt or ask for fewer new tokens",
                    count, (long long)s->length, (long long)s->capacity);
  for (size_t i = 0; i < count; i++)
    if (ids[i] < 0 || ids[i] >= vocab)
      return jpq_fail(error, JPQ_BAD_ARGUMENT, "token %lld is not in the model's vocabulary of %lld; use its own tokenizer",
                      (long long)ids[i], (long long)vocab);
  return JPQ_SUCCESS;
}

jpq_result jpq_prefill(jpq_sequence *s, const int64_t *ids, size_t count, const float **logits, jpq_error *error) {
  if (!s) return jpq_fail(error, JPQ_BAD_ARGUMENT, "jpq_prefill: sequence must not be NULL");
  JPQ_TRY(check_tokens(s, ids, count, error));
  const backend *b = s->model->backend;
  for (size_t at = 0; at < count;) { /* in parts: older graphs give logits for every position, and those are large */
    const int64_t left = (int64_t)(count - at), most = s->length > b->most_past ? 1 : b->most_new;
    const int64_t part = left < most ? left : most;
    JPQ_TRY(b->step(b, s->cache, s->length, ids + at, part, s->logits, error));
    s->length += part, at += (size_t)part;
  }
  if (logits) *logits = s->logits;
  return jpq_done(error);
}

jpq_result jpq_decode(jpq_sequence *sequence, int64_t id, const float **logits, jpq_error *error) {
  return jpq_prefill(sequence, &id, 1, logits, error);
}
