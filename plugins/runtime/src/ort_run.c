/* Running the graph. The cache lies in a block of the sequence's own. Tensors that grow are bound to an input and an
 * output at once; of others there are two, onnxruntime reads one and writes the other. Nothing is allocated from token
 * to token. */
#include <stdlib.h>
#include <string.h>

#include "ort_backend.h"

enum { ALIGNMENT = 64 };

struct backend_cache {
  const ort_backend *owner;
  int64_t capacity;
  size_t *offsets; /* [cached_count], in bytes */
  unsigned char *sides[2];
  int current; /* the side that holds what is valid */
  int64_t *positions, *mask; /* [capacity] each */
  int64_t last;              /* of the new tokens */
  const char **input_names, **output_names;
  OrtValue **inputs, **outputs; /* NULL between steps */
};

static jpq_result tensor(const ort_backend *self, void *data, size_t bytes, const int64_t *dims, size_t rank, int type,
                         OrtValue **out, jpq_error *error) {
  return ort_check(self->api, ORT(self->api, CreateTensorWithDataAsOrtValue)(self->cpu, data, bytes, dims, rank, type, out),
                   "tensor", error);
}

static void release(const ort_backend *self, OrtValue **values, size_t count) {
  for (size_t i = 0; i < count; i++) {
    if (values[i]) ORT(self->api, ReleaseValue)(values[i]);
    values[i] = NULL;
  }
}

void ort_cache_free(backend_cache *cache) {
  if (!cache) return;
  free(cache->sides[0]), free(cache->sides[1]);
  free(cache->offsets), free(cache->positions), free(cache->mask);
  free(cache->input_names), free(cache->output_names);
  free(cache->inputs), free(cache->outputs);
  free(cache);
}

static unsigned char *block(size_t bytes) {
  void *made = NULL; /* not cleared: pages are touched only as far as they are used */
  return posix_memalign(&made, ALIGNMENT, bytes + ALIGNMENT) ? NULL : made;
}

jpq_result ort_cache_new(const backend *base, int64_t capacity, backend_cache **out, jpq_error *error) {
  const ort_backend *self = (const ort_backend *)base;
  const size_t count = self->cached_count;
  backend_cache *cache = calloc(1, sizeof *cache);
  if (!cache) return jpq_no_memory(error);
  cache->owner = self, cache->capacity = capacity;
  cache->offsets = calloc(count + 1, sizeof *cache->offsets);
  size_t bytes = 0;
  for (size_t i = 0; cache->offsets && i < count; i++) {
    const ort_cached *each = self->cached + i;
    cache->offsets[i] = bytes;
    /* Below 2^50 each, see the limits in spec.c; a multiple of the alignment. */
    const uint64_t one = (uint64_t)capacity * (uint64_t)each->kv_heads * (uint64_t)each->width * each->item;
    bytes += (size_t)((one + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
  }
  cache->sides[0] = block(bytes), cache->sides[1] = block(count && self->cached[0].grows ? 0 : bytes);
  cache->positions = malloc((size_t)capacity * sizeof(int64_t));
  cache->mask = malloc((size_t)capacity * sizeof(int64_t));
  cache->input_names = calloc(count + FIXED_INPUTS, sizeof(char *));
  cache->output_names = calloc(count + FIXED_OUTPUTS, sizeof(char *));
  cache->inputs = calloc(count + FIXED_INPUTS, sizeof(OrtValue *));
  cache->outputs = calloc(count + FIXED_OUTPUTS, sizeof(OrtValue *));
  if (!cache->offsets || !cache->sides[0] || !cache->sides[1] || !cache->positions || !cache->mask || !cache->input_names ||
      !cache->output_names || !cache->inputs || !cache->outputs)
    return ort_cache_free(cache), jpq_no_memory(error);
  for (int64_t i = 0; i < capacity; i++) cache->positions[i] = i, cache->mask[i] = 1;
  return *out = cache, JPQ_SUCCESS;
}

/* ids, mask, positions and which logits are wanted, as far as the graph takes them; `used` counts them. */
static jpq_result bind_tokens(backend_cache *c, int64_t past, const int64_t *ids, int64_t count, size_t *used,
                              jpq_error *error) {
  const ort_backend *self = c->owner;
  const int64_t row[2] = {1, count}, whole[2] = {1, past + count};
  const size_t bytes = (size_t)count * sizeof(int64_t), all = (size_t)(past + count) * sizeof(int64_t);
  /* onnxruntime does not write to inputs. */
  c->input_names[*used] = "input_ids";
  JPQ_TRY(tensor(self, (void *)(uintptr_t)ids, bytes, row, 2, ORT_INT64, c->inputs + (*used)++, error));
  if (self->takes_mask) {
    c->input_names[*used] = "attention_mask";
    JPQ_TRY(tensor(self, c->mask, all, whole, 2, ORT_INT64, c->inputs + (*used)++, error));
  }
  if (self->takes_positions) {
    c->input_names[*used] = "position_ids";
    JPQ_TRY(tensor(self, c->positions + past, bytes, row, 2, ORT_INT64, c->inputs + (*used)++, error));
  }
  if (self->takes_from) {
    c->last = count - 1;
    c->input_names[*used] = "logits_from";
    JPQ_TRY(tensor(self, &c->last, sizeof c->last, row, 1, ORT_INT64, c->inputs + (*used)++, error));
  }
  return JPQ_SUCCESS;
}

static jpq_result bind_cache(backend_cache *c, int64_t past, int64_t count, size_t first, jpq_error *error) {
  const ort_backend *self = c->owner;
  for (size_t i = 0; i < self->cached_count; i++) {
    const ort_cached *each = self->cached + i;
    const int64_t heads = each->kv_heads, width = each->width;
    if (each->grows) {
      const int64_t dims[4] = {c->capacity, 1, heads, width};
      unsigned char *data = c->sides[0] + c->offsets[i];
      const size_t all = (size_t)(c->capacity * heads * width) * each->item;
      c->input_names[first + i] = each->past;
      c->output_names[FIXED_OUTPUTS + i] = each->present;
      JPQ_TRY(tensor(self, data, all, dims, 4, each->type, c->inputs + first + i, error));
      JPQ_TRY(tensor(self, data, all, dims, 4, each->type, c->outputs + FIXED_OUTPUTS + i, error));
      continue;
    }
    const int64_t before[4] = {1, heads, past, width}, after[4] = {1, heads, past + count, width};
    unsigned char *from = c->sides[c->current] + c->offsets[i], *to = c->sides[!c->current] + c->offsets[i];
    const size_t row = (size_t)(heads * width) * each->item;
    c->input_names[first + i] = each->past;
    c->output_names[FIXED_OUTPUTS + i] = each->present;
    JPQ_TRY(tensor(self, from, row * (size_t)past, before, 4, each->type, c->inputs + first + i, error));
    JPQ_TRY(tensor(self, to, row * (size_t)(past + count), after, 4, each->type, c->outputs + FIXED_OUTPUTS + i, error));
  }
  return JPQ_SUCCESS;
}

/* The output's floats, after checking that there are as many as we are going to read. */
static jpq_result read_floats(const ort_backend *self, OrtValue *value, size_t expected, const char *name,
                              const float **out, jpq_error *error) {
  const OrtApi *api = self->api;
  OrtTensorInfo *info;
  size_t count = 0;
  int type = 0;
  void *data = NULL;
  ORT_TRY(self, ORT(api, GetTensorTypeAndShape)(value, &info), name);
  OrtStatus *status = ORT(api, GetTensorShapeElementCount)(info, &count);
  if (!status) status = ORT(api, GetTensorElementType)(info, &type);
  ORT(api, ReleaseTensorTypeAndShapeInfo)(info);
  ORT_TRY(self, status, name);
  if (count != expected || type != ORT_FLOAT)
    return jpq_fail(error, JPQ_BAD_BUNDLE, "model.onnx: %s has %zu values, expected %zu floats; export the bundle again", name,
                    count, expected);
  ORT_TRY(self, ORT(api, GetTensorMutableData)(value, &data), name);
  return *out = data, JPQ_SUCCESS;
}

static jpq_result run_step(backend_cache *c, int64_t past, const int64_t *ids, int64_t count, float *logits, jpq_error *error) {
  const ort_backend *self = c->owner;
  const int64_t vocab = self->base.spec.vocab, one[3] = {1, 1, vocab};
  const int one_row = count == 1 || self->takes_from;
  size_t inputs = 0;
  const float *got;
  JPQ_TRY(bind_tokens(c, past, ids, count, &inputs, error));
  JPQ_TRY(bind_cache(c, past, count, inputs, error));
  inputs += self->cached_count;
  c->output_names[0] = "logits";
  if (one_row) JPQ_TRY(tensor(self, logits, (size_t)vocab * sizeof(float), one, 3, ORT_FLOAT, c->outputs, error));
  ORT_TRY(self,
          ORT(self->api, Run)(self->session, NULL, c->input_names, (const OrtValue *const *)c->inputs, inputs,
                              c->output_names, FIXED_OUTPUTS + self->cached_count, c->outputs),
          "model.onnx");
  if (one_row) return JPQ_SUCCESS;
  JPQ_TRY(read_floats(self, c->outputs[0], (size_t)(count * vocab), "logits", &got, error));
  memcpy(logits, got + (count - 1) * vocab, (size_t)vocab * sizeof(float));
  return JPQ_SUCCESS;
}

jpq_result ort_step(const backend *base, backend_cache *cache, int64_t past, const int64_t *ids, int64_t count, float *logits,
                    jpq_error *error) {
  const ort_backend *self = (const ort_backend *)base;
  if (past + count > cache->capacity) return jpq_fail(error, JPQ_BAD_ARGUMENT, "cache: full");
  const jpq_result result = run_step(cache, past, ids, count, logits, error);
  release(self, cache->inputs, self->cached_count + FIXED_INPUTS);
  release(self, cache->outputs, self->cached_count + FIXED_OUTPUTS);
  if (!result) cache->current = !cache->current;
  return result;
}

jpq_result ort_embed(const backend *base, const int64_t *ids, const int64_t *mask, int64_t batch, int64_t seq, float *out,
                     jpq_error *error) {
  const ort_backend *self = (const ort_backend *)base;
  const int64_t dims[2] = {batch, seq};
  const size_t bytes = (size_t)(batch * seq) * sizeof(int64_t), floats = (size_t)(batch * base->embedding);
  static const char *const inputs[] = {"input_ids", "attention_mask"}, *const outputs[] = {"embedding"};
  OrtValue *values[3] = {NULL, NULL, NULL};
  const float *got;
  jpq_result result = tensor(self, (void *)(uintptr_t)ids, bytes, dims, 2, ORT_INT64, values, error);
  if (!result) result = tensor(self, (void *)(uintptr_t)mask, bytes, dims, 2, ORT_INT64, values + 1, error);
  if (!result)
    result = ort_check(self->api,
                       ORT(self->api, Run)(self->session, NULL, inputs, (const OrtValue *const *)values,
                                           self->takes_mask ? 2 : 1, outputs, 1, values + 2),
                       "model.onnx", error);
  if (!result) result = read_floats(self, values[2], floats, "embedding", &got, error);
  if (!result) memcpy(out, got, floats * sizeof(float));
  release(self, values, 3);
  return result;
}
