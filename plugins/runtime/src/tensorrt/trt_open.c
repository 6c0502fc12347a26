/* Opening the engine that `jpq-export build` left: GPU, TensorRT, plugin, engine, and what it takes and gives. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../libraries.h"
#include "trt_backend.h"
#include "trt_record.h"

enum { MOST_TENSORS = 1 << 14 };

/* Whether a tensor is what we are going to size by the model's facts; `sizes`: -1 where it may vary. */
static jpq_result check_tensor(const trt_tensor *t, int32_t type, int32_t rank, const int64_t *sizes, jpq_error *error) {
  if (t->type != type)
    return jpq_fail(error, JPQ_UNSUPPORTED, "engine: %.60s has element type %d, expected %d; export the bundle again", t->name,
                    (int)t->type, (int)type);
  int fits = t->dims.rank == rank;
  for (int32_t i = 0; fits && i < rank; i++) fits = sizes[i] < 0 || t->dims.sizes[i] < 0 || t->dims.sizes[i] == sizes[i];
  if (fits) return JPQ_SUCCESS;
  return jpq_fail(error, JPQ_BAD_BUNDLE, "engine: %.60s has another shape than this bundle's model; build it again", t->name);
}

/* `past.{i}.key` and the like: the heads of layer i. */
static jpq_result cached_heads(const model_spec *spec, const trt_tensor *t, const char *layer, int64_t *heads, jpq_error *error) {
  char *end;
  const unsigned long i = strtoul(layer, &end, 10);
  if (strlen(t->name) >= TRT_NAME_MOST || end == layer || i >= spec->layers || !spec->kv_heads[i] || !spec->head_dim)
    return jpq_fail(error, JPQ_BAD_BUNDLE, "engine: %.60s: no such layer in this bundle's model; build it again", t->name);
  *heads = spec->kv_heads[i];
  const int64_t sizes[4] = {1, *heads, -1, spec->head_dim};
  return check_tensor(t, TRT_FLOAT, 4, sizes, error);
}

static jpq_result read_tensor(trt_backend *self, const trt_tensor *t, size_t *pasts, int *seen, jpq_error *error) {
  static const int64_t row[2] = {1, -1}, wanted[1] = {-1};
  const model_spec *spec = &self->base.spec;
  const int64_t logits[3] = {1, -1, spec->vocab};
  int64_t heads;
  if (t->input && !strncmp(t->name, "past.", 5)) return ++*pasts, cached_heads(spec, t, t->name + 5, &heads, error);
  if (!t->input && !strncmp(t->name, "present.", 8)) {
    JPQ_TRY(cached_heads(spec, t, t->name + 8, &heads, error));
    trt_cached *made = self->cached + self->cached_count++;
    snprintf(made->present, sizeof made->present, "%s", t->name), snprintf(made->past, sizeof made->past, "past.%s", t->name + 8);
    return made->kv_heads = heads, JPQ_SUCCESS;
  }
  if (!t->input && !strcmp(t->name, "logits")) return *seen |= 1, check_tensor(t, TRT_FLOAT, 3, logits, error);
  if (t->input && !strcmp(t->name, "input_ids")) return *seen |= 2, check_tensor(t, TRT_INT64, 2, row, error);
  if (t->input && !strcmp(t->name, "attention_mask")) return self->takes_mask = 1, check_tensor(t, TRT_INT64, 2, row, error);
  if (t->input && !strcmp(t->name, "position_ids")) return self->takes_positions = 1, check_tensor(t, TRT_INT64, 2, row, error);
  if (t->input && !strcmp(t->name, "logits_at")) return self->takes_wanted = 1, check_tensor(t, TRT_INT64, 1, wanted, error);
  return jpq_fail(error, JPQ_UNSUPPORTED, "engine: %.60s: not an input or output of a decoder; load the bundle with JPQ_ONNXRUNTIME",
                  t->name);
}

static jpq_result read_tensors(trt_backend *self, jpq_error *error) {
  const int32_t count = trt_engine_tensors(self->engine);
  size_t pasts = 0;
  int seen = 0;
  if (count < 0 || count > MOST_TENSORS || trt_engine_profiles(self->engine) != TRT_PROFILES)
    return jpq_fail(error, JPQ_BAD_BUNDLE, "engine: %d tensors and %d profiles, expected a decode and a prefill profile; build it again",
                    (int)count, (int)trt_engine_profiles(self->engine));
  self->cached = calloc((size_t)count + 1, sizeof *self->cached);
  if (!self->cached) return jpq_no_memory(error);
  for (int32_t i = 0; i < count; i++) {
    trt_tensor tensor;
    trt_engine_tensor(self->engine, i, &tensor);
    JPQ_TRY(read_tensor(self, &tensor, &pasts, &seen, error));
  }
  if (seen == 3 && pasts == self->cached_count) return JPQ_SUCCESS;
  return jpq_fail(error, JPQ_BAD_BUNDLE, "engine: input_ids, logits or a cache tensor is missing; build it again");
}

static int64_t largest(const trt_backend *self, const char *name, int32_t profile, int axis) {
  const trt_dims dims = trt_engine_largest(self->engine, name, profile);
  return axis < dims.rank ? dims.sizes[axis] : 0;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* How long a sequence and a step may be, by both profiles. Decode: one token after 1 or more; prefill: up to so many after
 * few enough. Beyond that many, tokens go one by one. */
static jpq_result read_limits(trt_backend *self, jpq_error *error) {
  int64_t total = self->base.spec.max_positions, prefill = total;
  const int64_t step = largest(self, "input_ids", TRT_PREFILL, 1);
  if (self->takes_mask) {
    total = least(total, largest(self, "attention_mask", TRT_DECODE, 1));
    prefill = least(prefill, largest(self, "attention_mask", TRT_PREFILL, 1));
  }
  self->base.most_past = prefill - step;
  if (self->cached_count) {
    total = least(total, largest(self, self->cached->past, TRT_DECODE, 2) + 1);
    self->base.most_past = least(self->base.most_past, largest(self, self->cached->past, TRT_PREFILL, 2));
  }
  self->base.most_new = step, self->base.spec.max_positions = total, self->base.limit = "engine";
  if (step > 0 && total > 0 && prefill > 0) return JPQ_SUCCESS;
  return jpq_fail(error, JPQ_BAD_BUNDLE, "engine: profiles of no tokens (%lld new, %lld in all); build it again", (long long)step,
                  (long long)total);
}

static jpq_result open_engine(trt_backend *self, void *library, const trt_record *record, const char *plugin, jpq_error *error) {
  char *data;
  size_t bytes;
  JPQ_TRY(trt_record_engine(record, &data, &bytes, error));
  jpq_result result = cuda_enter(&self->cuda, error);
  if (!result) {
    result = trt_engine_open(library, plugin, data, bytes, record->engine, &self->engine, error);
    cuda_leave(&self->cuda);
  }
  free(data);
  return result;
}

static jpq_result open_all(trt_backend *self, const char *folder, const manifest *m, const jpq_load_options *options,
                           const trt_record *record, jpq_error *error) {
  char plugin[PATH_MOST];
  void *library; /* stays loaded: CUDA's runtime inside it does not expect to go before the process */
  const json *spec = json_get(json_get(json_root(m->document), "model"), "spec");
  if (!spec) return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: manifest.json has no model spec; export the bundle again", folder);
  JPQ_TRY(spec_read(spec, "manifest.json: spec", &self->base.spec, error));
  JPQ_TRY(cuda_open(&self->cuda, error));
  if (record->sm != self->cuda.sm)
    return jpq_fail(error, JPQ_BACKEND, "%s: built for sm_%d, this GPU is sm_%d; build it again on this board", record->engine,
                    (int)record->sm, self->cuda.sm);
  JPQ_TRY(library_open(options->library, "libnvinfer.so", trt_library_name(), &library, error));
  JPQ_TRY(trt_check_version(library, record->tensorrt, error));
  JPQ_TRY(trt_record_plugin(record, folder, m, options->kernels, plugin, error));
  JPQ_TRY(cuda_retain(&self->cuda, error));
  JPQ_TRY(open_engine(self, library, record, plugin, error));
  snprintf(self->base.path, sizeof self->base.path, "TensorRT %.40s, sm_%d, %s", record->tensorrt, self->cuda.sm,
           *plugin ? "jpq plugin" : "kernels inside the engine");
  JPQ_TRY(read_tensors(self, error));
  return read_limits(self, error);
}

static void close_all(backend *base) {
  trt_backend *self = (trt_backend *)base;
  if (self->engine && cuda_enter(&self->cuda, NULL) == JPQ_SUCCESS) {
    trt_engine_free(self->engine);
    cuda_leave(&self->cuda);
  }
  cuda_release(&self->cuda);
  spec_free(&base->spec);
  free(self->cached);
  free(self);
}

jpq_result trt_backend_open(const char *folder, const manifest *m, const jpq_load_options *options, backend **out,
                            jpq_error *error) {
  trt_record *record = calloc(1, sizeof *record);
  trt_backend *self = calloc(1, sizeof *self);
  jpq_result result = record && self ? trt_record_read(folder, options->engine, record, error) : jpq_no_memory(error);
  if (!result) {
    self->base.free = close_all;
    self->base.cache_new = trt_cache_new, self->base.cache_free = trt_cache_free, self->base.step = trt_step;
    result = open_all(self, folder, m, options, record, error);
    trt_record_free(record);
    if (result) close_all(&self->base), self = NULL;
  }
  free(record);
  if (result) return free(self), result;
  return *out = &self->base, JPQ_SUCCESS;
}

jpq_result trt_backend_fits(const char *folder, const char *engine, jpq_error *why) {
  trt_record *record = calloc(1, sizeof *record);
  cuda_driver *cuda = calloc(1, sizeof *cuda);
  jpq_result result = record && cuda ? trt_record_read(folder, engine, record, why) : jpq_no_memory(why);
  if (!result) {
    result = cuda_open(cuda, why);
    if (!result && cuda->sm != record->sm)
      result = jpq_fail(why, JPQ_BACKEND, "built for sm_%d, this GPU is sm_%d", (int)record->sm, cuda->sm);
    trt_record_free(record);
  }
  free(cuda), free(record);
  return result;
}
