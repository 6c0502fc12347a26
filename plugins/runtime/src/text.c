/* The text functions of the interface: tokenise, detokenise, embed. */
#include <stdlib.h>
#include <string.h>

#include "sequence.h"

jpq_result text_needs_tokenizer(const jpq_model *model, jpq_error *error) {
  if (model->tokenizer) return JPQ_SUCCESS;
  if (error) *error = model->no_tokenizer;
  return model->no_tokenizer.code;
}

jpq_result jpq_tokenize(const jpq_model *model, const char *text, size_t count, int64_t *out, size_t capacity, size_t *needed,
                        jpq_error *error) {
  ids found = {0};
  if (!model || (!text && count) || (!out && capacity) || !needed)
    return jpq_fail(error, JPQ_BAD_ARGUMENT, "jpq_tokenize: model, text, ids and count must not be NULL");
  JPQ_TRY(text_needs_tokenizer(model, error));
  jpq_result result = tokenizer_encode(model->tokenizer, text, count, &found, error);
  if (!result) {
    *needed = found.count;
    if (found.count > capacity)
      result = jpq_fail(error, JPQ_TOO_SMALL, "jpq_tokenize: room for %zu ids, %zu needed", capacity, found.count);
    else if (found.count)
      memcpy(out, found.data, found.count * sizeof *out);
  }
  free(found.data);
  return result ? result : jpq_done(error);
}

jpq_result token_bytes(const jpq_model *model, int64_t id, bytes *out, jpq_error *error) {
  const tokenizer *t = model->tokenizer;
  if (!t->decodes)
    return jpq_fail(error, JPQ_UNSUPPORTED, "tokenizer.json: only the ByteLevel decoder is interpreted; decode with Python's `tokenizers`");
  const vocabulary *v = &t->vocabulary;
  if (id < 0 || (size_t)id >= v->size || !v->known[id] || t->special[id]) return JPQ_SUCCESS;
  return bytes_add(out, v->pool.data + v->starts[id], v->lengths[id], error);
}

jpq_result jpq_detokenize(const jpq_model *model, const int64_t *list, size_t count, char *text, size_t capacity, size_t *needed,
                          jpq_error *error) {
  bytes raw = {0}, valid = {0};
  if (!model || (!list && count) || (!text && capacity) || !needed)
    return jpq_fail(error, JPQ_BAD_ARGUMENT, "jpq_detokenize: model, ids, text and bytes must not be NULL");
  JPQ_TRY(text_needs_tokenizer(model, error));
  jpq_result result = JPQ_SUCCESS;
  for (size_t i = 0; i < count && !result; i++) result = token_bytes(model, list[i], &raw, error);
  if (!result) result = utf8_repair(raw.data, raw.count, &valid, NULL, error);
  if (!result) {
    *needed = valid.count;
    if (valid.count >= capacity) {
      result = jpq_fail(error, JPQ_TOO_SMALL, "jpq_detokenize: room for %zu bytes, %zu needed", capacity, valid.count + 1);
    } else {
      if (valid.count) memcpy(text, valid.data, valid.count);
      text[valid.count] = 0;
    }
  }
  free(raw.data), free(valid.data);
  return result ? result : jpq_done(error);
}
