/* Opening a bundle's graph in onnxruntime: the library, our kernels, the session, and what the graph takes and gives. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "libraries.h"
#include "ort_backend.h"

#define GRAPH "model.onnx"
#define SPEC_KEY "jpq.spec"
#define KERNELS "libjpq_cpu.so"
enum { MOST_VALUES = 1 << 14, STEP_TOKENS = 512 }; /* logits of 512 positions: 100 MB at a vocabulary of 49152 */

jpq_result ort_check(const OrtApi *api, OrtStatus *status, const char *what, jpq_error *error) {
  if (!status) return JPQ_SUCCESS;
  jpq_fail(error, JPQ_BACKEND, "%s: onnxruntime says: %.700s", what, ORT(api, GetErrorMessage)(status));
  ORT(api, ReleaseStatus)(status);
  return JPQ_BACKEND;
}

static jpq_result open_library(const char *path, ort_backend *self, jpq_error *error) {
  const OrtApiBase *(ORT_CALL *get)(void) = NULL;
  JPQ_TRY(library_open(path, "libonnxruntime.so", "libonnxruntime.so.1", &self->library, error));
  library_symbol(self->library, "OrtGetApiBase", &get);
  if (!get) return jpq_fail(error, JPQ_BACKEND, "library: not onnxruntime (no OrtGetApiBase); give libonnxruntime.so");
  self->api = get()->GetApi(JPQ_ORT_API);
  if (self->api) return JPQ_SUCCESS;
  return jpq_fail(error, JPQ_BACKEND, "library: onnxruntime %.40s is too old; install 1.%d or later",
                  get()->GetVersionString(), JPQ_ORT_API);
}

/* The kernels to register: what the caller asks for, the bundle's own, those beside us; 0 when there are none. */
static jpq_result find_kernels(const char *folder, const manifest *m, const char *asked, char path[PATH_MOST], int *found,
                               jpq_error *error) {
  *found = 0;
  if (asked && !strcmp(asked, "none")) return JPQ_SUCCESS;
  if (asked) {
    /* With a slash in it, so that it is this file and not one the system's search finds. */
    const int n = snprintf(path, PATH_MOST, "%s%s", strchr(asked, '/') ? "" : "./", asked);
    if (n < 0 || n >= PATH_MOST) return jpq_fail(error, JPQ_BAD_ARGUMENT, "kernels: path longer than %d bytes", PATH_MOST);
    return *found = 1, JPQ_SUCCESS;
  }
  const json *entry = manifest_file(m, "plugins/" KERNELS);
  if (entry) {
    JPQ_TRY(manifest_check(folder, entry, error));
    return *found = 1, bundle_path(folder, entry->name, path, error);
  }
  return *found = library_beside(KERNELS, path), JPQ_SUCCESS;
}

/* What `fast` rounds activations to: 16 bits, or 8 where JPQ_FAST_BITS says so, as in Python. */
static jpq_result fast_activations(const char **out, jpq_error *error) {
  const char *asked = getenv("JPQ_FAST_BITS");
  *out = asked && !strcmp(asked, "8") ? "int8" : "int16";
  if (!asked || !strcmp(asked, "8") || !strcmp(asked, "16")) return JPQ_SUCCESS;
  return jpq_fail(error, JPQ_BAD_ARGUMENT, "JPQ_FAST_BITS=%.40s: expected 16 or 8; correct it or unset it", asked);
}

static jpq_result set_options(ort_backend *self, const char *folder, const manifest *m, const jpq_load_options *asked,
                              OrtSessionOptions *options, jpq_error *error) {
  const OrtApi *api = self->api;
  char kernels[PATH_MOST];
  const char *fast;
  int found;
  JPQ_TRY(fast_activations(&fast, error));
  if (asked->threads > 0) ORT_TRY(self, ORT(api, SetIntraOpNumThreads)(options, asked->threads), "threads");
  /* Threads spin during a pass, or waking them costs more than they give, but not between the tokens of a stream. */
  ORT_TRY(self, ORT(api, AddSessionConfigEntry)(options, "session.force_spinning_stop", "1"), "options");
  ORT_TRY(self, ORT(api, AddSessionConfigEntry)(options, "session.qdq_matmulnbits_accuracy_level", asked->fast ? "4" : "1"), "options");
  ORT_TRY(self, ORT(api, AddSessionConfigEntry)(options, "jpq.activations", asked->fast ? fast : "fp32"), "options");
  JPQ_TRY(find_kernels(folder, m, asked->kernels, kernels, &found, error));
  if (found) ORT_TRY(self, ORT(api, RegisterCustomOpsLibrary)(options, kernels, &self->kernels), kernels);
  snprintf(self->base.path, sizeof self->base.path, "onnxruntime CPU, %s, activations %s",
           found ? "jpq kernels" : "function bodies",
           !asked->fast ? "in fp32" : !found ? "rounded to 8 bits" : strcmp(fast, "int8") ? "in 16 bits" : "in 8 bits");
  return JPQ_SUCCESS;
}

static jpq_result open_session(ort_backend *self, const char *folder, const manifest *m, const jpq_load_options *asked,
                               jpq_error *error) {
  const OrtApi *api = self->api;
  OrtSessionOptions *options = NULL;
  char graph[PATH_MOST];
  JPQ_TRY(bundle_path(folder, GRAPH, graph, error));
  ORT_TRY(self, ORT(api, CreateEnv)(ORT_LOG_ERROR, "jpq", &self->env), "environment");
  ORT_TRY(self, ORT(api, CreateCpuMemoryInfo)(ORT_ARENA_ALLOCATOR, ORT_MEMORY_DEFAULT, &self->cpu), "memory");
  ORT_TRY(self, ORT(api, CreateSessionOptions)(&options), "options");
  jpq_result result = set_options(self, folder, m, asked, options, error);
  if (!result) result = ort_check(api, ORT(api, CreateSession)(self->env, graph, options, &self->session), graph, error);
  ORT(api, ReleaseSessionOptions)(options);
  return result;
}

static jpq_result read_spec(ort_backend *self, const char *folder, jpq_error *error) {
  const OrtApi *api = self->api;
  OrtAllocator *allocator;
  OrtModelMetadata *metadata;
  char *found = NULL, *copy = NULL;
  ORT_TRY(self, ORT(api, GetAllocatorWithDefaultOptions)(&allocator), "allocator");
  ORT_TRY(self, ORT(api, SessionGetModelMetadata)(self->session, &metadata), "metadata");
  jpq_result result = ort_check(api, ORT(api, ModelMetadataLookupCustomMetadataMap)(metadata, allocator, SPEC_KEY, &found), "metadata", error);
  if (found && (copy = malloc(strlen(found) + 1))) strcpy(copy, found);
  const int given = found != NULL;
  if (found) result = ort_check(api, ORT(api, AllocatorFree)(allocator, found), "allocator", error);
  ORT(api, ReleaseModelMetadata)(metadata);
  if (!given) return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: not written by jpq-export (no " SPEC_KEY "); export it again", folder);
  if (!copy) return jpq_no_memory(error);
  if (result) return free(copy), result;
  json_document *document;
  JPQ_TRY(json_parse(copy, strlen(copy), SPEC_KEY, &document, error));
  result = spec_read(json_root(document), SPEC_KEY, &self->base.spec, error);
  json_free(document);
  return result;
}

enum { MOST_RANK = 8 };

/* Element type and dimensions of an output, -1 for those of any size; a graph from anywhere might declare others than
 * ours. */
static jpq_result output_shape(ort_backend *self, size_t i, int *type, int64_t dims[MOST_RANK], size_t *rank, jpq_error *error) {
  const OrtApi *api = self->api;
  OrtTypeInfo *info;
  const OrtTensorInfo *tensor = NULL;
  ORT_TRY(self, ORT(api, SessionGetOutputTypeInfo)(self->session, i, &info), "outputs");
  OrtStatus *status = ORT(api, CastTypeInfoToTensorInfo)(info, &tensor);
  if (!status && tensor) status = ORT(api, GetTensorElementType)(tensor, type);
  if (!status && tensor) status = ORT(api, GetDimensionsCount)(tensor, rank);
  if (!status && tensor && *rank <= MOST_RANK) status = ORT(api, GetDimensions)(tensor, dims, *rank);
  ORT(api, ReleaseTypeInfo)(info);
  if (*rank > MOST_RANK) *rank = 0;
  return ort_check(api, status, "outputs", error);
}

/* `present.{i}.key` or `.value`, with int8 codes `.key_scale` or `.value_scale` too: a cache tensor of layer i. */
static jpq_result add_cached(ort_backend *self, const char *name, int type, const int64_t *dims, size_t rank, jpq_error *error) {
  const model_spec *spec = &self->base.spec;
  char *end;
  const unsigned long layer = strtoul(name + 8, &end, 10);
  if (strlen(name) >= NAME_MOST || layer >= spec->layers || !spec->kv_heads[layer] || !spec->head_dim || rank != 4)
    return jpq_fail(error, JPQ_BAD_BUNDLE, GRAPH ": output %.60s: no such layer in " SPEC_KEY "; export the bundle again", name);
  ort_cached *made = self->cached + self->cached_count++;
  snprintf(made->present, NAME_MOST, "%s", name);
  snprintf(made->past, NAME_MOST, "past.%s", name + 8);
  const size_t length = strlen(name);
  made->kv_heads = spec->kv_heads[layer];
  made->grows = dims[1] < 1; /* the batch, of any size, comes second; otherwise the heads do */
  made->width = length > 6 && !strcmp(name + length - 6, "_scale") ? 1 : spec->head_dim;
  made->type = type, made->item = type == ORT_INT8 ? 1 : sizeof(float);
  return JPQ_SUCCESS;
}

static jpq_result read_output(ort_backend *self, size_t i, const char *name, int *logits, jpq_error *error) {
  int type = 0;
  size_t rank = 0;
  int64_t dims[MOST_RANK] = {0};
  const int embedding = !strcmp(name, "embedding"), ours = embedding || !strcmp(name, "logits") || !strncmp(name, "present.", 8);
  if (!ours) return JPQ_SUCCESS;
  JPQ_TRY(output_shape(self, i, &type, dims, &rank, error));
  if (type != ORT_FLOAT && !(type == ORT_INT8 && !strncmp(name, "present.", 8)))
    return jpq_fail(error, JPQ_UNSUPPORTED, GRAPH ": output %.60s is not float32; export the bundle for a CPU target", name);
  if (embedding) {
    const int64_t last = rank ? dims[rank - 1] : 0;
    if (last < 1 || last > 1 << 20)
      return jpq_fail(error, JPQ_BAD_BUNDLE, GRAPH ": embedding of %lld values; export the bundle again", (long long)last);
    self->base.embedding = last;
    return JPQ_SUCCESS;
  }
  if (!strcmp(name, "logits")) return *logits = 1, JPQ_SUCCESS;
  return add_cached(self, name, type, dims, rank, error);
}

/* Whether there is an input with a default of this name. */
static jpq_result has_default(ort_backend *self, const char *wanted, int *found, jpq_error *error) {
  const OrtApi *api = self->api;
  OrtAllocator *allocator;
  size_t count;
  ORT_TRY(self, ORT(api, GetAllocatorWithDefaultOptions)(&allocator), "allocator");
  ORT_TRY(self, ORT(api, SessionGetOverridableInitializerCount)(self->session, &count), "inputs");
  for (size_t i = 0; i < count && !*found; i++) {
    char *name;
    ORT_TRY(self, ORT(api, SessionGetOverridableInitializerName)(self->session, i, allocator, &name), "inputs");
    *found = !strcmp(name, wanted);
    ORT_TRY(self, ORT(api, AllocatorFree)(allocator, name), "allocator");
  }
  return JPQ_SUCCESS;
}

static jpq_result read_names(ort_backend *self, jpq_error *error) {
  const OrtApi *api = self->api;
  OrtAllocator *allocator;
  size_t inputs, outputs;
  int logits = 0;
  ORT_TRY(self, ORT(api, GetAllocatorWithDefaultOptions)(&allocator), "allocator");
  ORT_TRY(self, ORT(api, SessionGetInputCount)(self->session, &inputs), "inputs");
  ORT_TRY(self, ORT(api, SessionGetOutputCount)(self->session, &outputs), "outputs");
  if (inputs > MOST_VALUES || outputs > MOST_VALUES)
    return jpq_fail(error, JPQ_BAD_BUNDLE, GRAPH ": %zu inputs, %zu outputs; export the bundle again", inputs, outputs);
  self->cached = calloc(outputs + 1, sizeof *self->cached);
  if (!self->cached) return jpq_no_memory(error);
  for (size_t i = 0; i < inputs + outputs; i++) {
    char *name;
    jpq_result result = JPQ_SUCCESS;
    if (i < inputs) {
      ORT_TRY(self, ORT(api, SessionGetInputName)(self->session, i, allocator, &name), "inputs");
      self->takes_mask |= !strcmp(name, "attention_mask");
      self->takes_positions |= !strcmp(name, "position_ids");
    } else {
      ORT_TRY(self, ORT(api, SessionGetOutputName)(self->session, i - inputs, allocator, &name), "outputs");
      result = read_output(self, i - inputs, name, &logits, error);
    }
    ORT_TRY(self, ORT(api, AllocatorFree)(allocator, name), "allocator");
    JPQ_TRY(result);
  }
  if (logits || self->base.embedding) return JPQ_SUCCESS;
  return jpq_fail(error, JPQ_BAD_BUNDLE, GRAPH ": neither logits nor embedding among its outputs; export the bundle again");
}

/* In this order: the session uses the kernels, the kernels' library uses onnxruntime. */
static void close_all(backend *base) {
  ort_backend *self = (ort_backend *)base;
  if (self->session) ORT(self->api, ReleaseSession)(self->session);
  if (self->cpu) ORT(self->api, ReleaseMemoryInfo)(self->cpu);
  if (self->env) ORT(self->api, ReleaseEnv)(self->env);
  library_close(self->kernels);
  library_close(self->library);
  spec_free(&base->spec);
  free(self->cached);
  free(self);
}

jpq_result ort_backend_open(const char *folder, const manifest *m, const jpq_load_options *options, backend **out,
                            jpq_error *error) {
  ort_backend *self = calloc(1, sizeof *self);
  if (!self) return jpq_no_memory(error);
  self->base.free = close_all;
  self->base.cache_new = ort_cache_new, self->base.cache_free = ort_cache_free;
  self->base.step = ort_step, self->base.embed = ort_embed;
  self->base.most_new = STEP_TOKENS, self->base.most_past = INT64_MAX, self->base.limit = "model";
  jpq_result result = open_library(options->library, self, error);
  if (!result) result = open_session(self, folder, m, options, error);
  if (!result) result = read_spec(self, folder, error);
  if (!result) result = read_names(self, error);
  if (!result) result = has_default(self, "logits_from", &self->takes_from, error);
  if (result) return close_all(&self->base), result;
  return *out = &self->base, JPQ_SUCCESS;
}
