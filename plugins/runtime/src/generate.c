/* The whole way from a prompt to a stream of text. */
#include <stdlib.h>
#include <string.h>

#include "sample.h"
#include "sequence.h"

void jpq_generate_defaults(jpq_generate_options *options) {
  memset(options, 0, sizeof *options);
  options->size = sizeof *options, options->max_new_tokens = 128;
  jpq_sampling_defaults(&options->sampling);
}

/* What one generation holds. */
typedef struct run {
  const jpq_model *model;
  const int64_t *stop_ids;
  size_t stop_count;
  jpq_on_token on_token;
  void *user;
  bytes pending, text; /* bytes of an unfinished character; what is shown */
} run;

static int stops(const run *r, int64_t token) {
  for (size_t i = 0; i < r->stop_count; i++)
    if (r->stop_ids[i] == token) return 1;
  return 0;
}

/* Show a token (-1: what is left at the end) and the text it completes; *go_on is what the callback answered. */
static jpq_result show(run *r, int64_t token, int *go_on, jpq_error *error) {
  const int last = token < 0, decodes = r->model->tokenizer && r->model->tokenizer->decodes;
  size_t cut = 0;
  r->text.count = 0;
  if (decodes && !last) JPQ_TRY(token_bytes(r->model, token, &r->pending, error));
  JPQ_TRY(utf8_repair(r->pending.data, r->pending.count, &r->text, last ? NULL : &cut, error));
  if (cut) memmove(r->pending.data, r->pending.data + r->pending.count - cut, cut);
  r->pending.count = cut;
  JPQ_TRY(bytes_add(&r->text, "", 1, error));
  if (last && r->text.count == 1) return JPQ_SUCCESS;
  *go_on = r->on_token(r->user, token, r->text.data, r->text.count - 1) == 0;
  return JPQ_SUCCESS;
}

static jpq_result stream(run *r, jpq_sequence *sequence, jpq_sampler *sampler, const int64_t *prompt, size_t count,
                         int64_t most, jpq_error *error) {
  const float *logits;
  int64_t token;
  int go_on = 1;
  if (most > 0) JPQ_TRY(jpq_prefill(sequence, prompt, count, &logits, error));
  for (int64_t i = 0; i < most && go_on; i++) {
    if (i > 0) JPQ_TRY(jpq_decode(sequence, token, &logits, error));
    JPQ_TRY(jpq_sample(sampler, logits, &token, error));
    if (stops(r, token)) break;
    JPQ_TRY(show(r, token, &go_on, error));
  }
  return go_on ? show(r, -1, &go_on, error) : JPQ_SUCCESS;
}

static jpq_result check(const jpq_model *model, const int64_t *prompt, size_t count, const jpq_generate_options *options,
                        jpq_error *error) {
  if (options->size != sizeof *options)
    return jpq_fail(error, JPQ_BAD_ARGUMENT, "jpq_generate_options: size %zu, expected %zu; call jpq_generate_defaults first",
                    options->size, sizeof *options);
  if (options->max_new_tokens < 0)
    return jpq_fail(error, JPQ_BAD_ARGUMENT, "max_new_tokens: got %lld, expected 0 or more", (long long)options->max_new_tokens);
  if (!prompt || !count) return jpq_fail(error, JPQ_BAD_ARGUMENT, "the prompt has no tokens; give some text");
  const int64_t most = model->backend->spec.max_positions;
  if (count > (size_t)most || options->max_new_tokens > most - (int64_t)count)
    return jpq_fail(error, JPQ_BAD_ARGUMENT,
                    "a prompt of %zu tokens and %lld new ones need more than the %s's %lld positions; shorten the prompt or ask for fewer new tokens",
                    count, (long long)options->max_new_tokens, model->backend->limit, (long long)most);
  return sampling_check(&options->sampling, error);
}

jpq_result jpq_generate_ids(const jpq_model *model, const int64_t *prompt, size_t count, const jpq_generate_options *options,
                            jpq_on_token on_token, void *user, jpq_error *error) {
  jpq_generate_options asked;
  jpq_generate_defaults(&asked);
  if (!model || !on_token) return jpq_fail(error, JPQ_BAD_ARGUMENT, "jpq_generate: model and on_token must not be NULL");
  if (options) asked = *options;
  JPQ_TRY(check(model, prompt, count, &asked, error));
  const model_spec *spec = &model->backend->spec;
  run r = {.model = model, .on_token = on_token, .user = user};
  r.stop_ids = asked.stop_ids ? asked.stop_ids : spec->eos_ids, r.stop_count = asked.stop_ids ? asked.stop_count : spec->eos_count;
  jpq_sequence *sequence = NULL;
  jpq_sampler *sampler = NULL;
  jpq_result result = jpq_sequence_new(model, (int64_t)count + asked.max_new_tokens, &sequence, error);
  if (!result) result = jpq_sampler_new(&asked.sampling, spec->vocab, &sampler, error);
  if (!result) result = stream(&r, sequence, sampler, prompt, count, asked.max_new_tokens, error);
  jpq_sampler_free(sampler);
  jpq_sequence_free(sequence);
  free(r.pending.data), free(r.text.data);
  return result ? result : jpq_done(error);
}

jpq_result jpq_generate(const jpq_model *model, const char *prompt, const jpq_generate_options *options, jpq_on_token on_token,
                        void *user, jpq_error *error) {
  ids found = {0};
  if (!model || !prompt) return jpq_fail(error, JPQ_BAD_ARGUMENT, "jpq_generate: model and prompt must not be NULL");
  JPQ_TRY(text_needs_tokenizer(model, error));
  jpq_result result = tokenizer_encode(model->tokenizer, prompt, strlen(prompt), &found, error);
  if (!result) result = jpq_generate_ids(model, found.data, found.count, options, on_token, user, error);
  free(found.data);
  return result;
}
