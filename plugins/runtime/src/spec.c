/* The model's facts from their JSON record, every number within limits. */
#include <stdlib.h>
#include <string.h>

#include "bundle.h"

/* Far beyond any model, and small enough that no product of three overflows 64 bits. */
enum { MOST_VOCAB = 1 << 24, MOST_POSITIONS = 1 << 24, MOST_HEADS = 1 << 12, MOST_LAYERS = 1 << 12, MOST_STOPS = 1 << 12 };

static jpq_result limited(const json *value, const char *name, int64_t least, int64_t most, int64_t otherwise,
                          const char *where, int64_t *out, jpq_error *error) {
  JPQ_TRY(json_integer(value, name, otherwise, where, out, error));
  if (*out >= least && *out <= most) return JPQ_SUCCESS;
  return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: %s is %lld, expected %lld to %lld; export the bundle again", where, name,
                  (long long)*out, (long long)least, (long long)most);
}

static jpq_result read_layers(const json *list, const char *where, model_spec *out, jpq_error *error) {
  if (!list || list->kind != JSON_ARRAY) return JPQ_SUCCESS; /* an encoder may have none: nothing is cached */
  if (list->count > MOST_LAYERS)
    return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: %zu layers; export the bundle again", where, list->count);
  out->kv_heads = calloc(list->count + 1, sizeof *out->kv_heads);
  if (!out->kv_heads) return jpq_no_memory(error);
  for (const json *layer = list->child; layer; layer = layer->next)
    JPQ_TRY(limited(layer, "kv_heads", 0, MOST_HEADS, 0, where, out->kv_heads + out->layers++, error));
  return JPQ_SUCCESS;
}

static jpq_result read_stops(const json *list, const char *where, model_spec *out, jpq_error *error) {
  if (!list || list->kind != JSON_ARRAY || !list->count) return JPQ_SUCCESS;
  if (list->count > MOST_STOPS)
    return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: %zu eos_ids; export the bundle again", where, list->count);
  out->eos_ids = calloc(list->count, sizeof *out->eos_ids);
  if (!out->eos_ids) return jpq_no_memory(error);
  for (const json *id = list->child; id; id = id->next) {
    if (id->kind != JSON_INTEGER)
      return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: eos_ids holds no integer; export the bundle again", where);
    out->eos_ids[out->eos_count++] = id->integer;
  }
  return JPQ_SUCCESS;
}

static jpq_result read_all(const json *value, const char *where, model_spec *out, jpq_error *error) {
  JPQ_TRY(limited(value, "vocab", 1, MOST_VOCAB, 0, where, &out->vocab, error));
  JPQ_TRY(limited(value, "max_positions", 1, MOST_POSITIONS, 2048, where, &out->max_positions, error));
  JPQ_TRY(limited(value, "head_dim", 0, MOST_HEADS, 0, where, &out->head_dim, error));
  JPQ_TRY(limited(value, "bos_id", -1, MOST_VOCAB, -1, where, &out->bos_id, error));
  out->add_bos = json_true(value, "add_bos");
  JPQ_TRY(read_layers(json_get(value, "layers"), where, out, error));
  return read_stops(json_get(value, "eos_ids"), where, out, error);
}

jpq_result spec_read(const json *value, const char *where, model_spec *out, jpq_error *error) {
  memset(out, 0, sizeof *out);
  const jpq_result result = read_all(value, where, out, error);
  if (result) spec_free(out);
  return result;
}

void spec_free(model_spec *spec) {
  free(spec->kv_heads);
  free(spec->eos_ids);
  memset(spec, 0, sizeof *spec);
}
