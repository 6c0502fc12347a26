/* Which backend a bundle is loaded with: the one asked for, the one of JPQ_BACKEND, or what the bundle has for this GPU. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend.h"

#define VARIABLE "JPQ_BACKEND"
#define ENGINE "device/model.engine"

static jpq_result from_environment(jpq_backend_kind *kind, jpq_error *error) {
  const char *asked = getenv(VARIABLE);
  if (!asked || !*asked) return JPQ_SUCCESS;
  if (!strcmp(asked, "onnxruntime")) return *kind = JPQ_ONNXRUNTIME, JPQ_SUCCESS;
  if (!strcmp(asked, "tensorrt")) return *kind = JPQ_TENSORRT, JPQ_SUCCESS;
  return jpq_fail(error, JPQ_BAD_ARGUMENT, VARIABLE ": got '%.60s', expected onnxruntime or tensorrt; or unset it", asked);
}

/* A caller who distrusts the bundle: nothing native of it is loaded. */
static int no_kernels(const jpq_load_options *options) { return options->kernels && !strcmp(options->kernels, "none"); }

/* An engine for this GPU is used, whatever happens then; one for another is left alone, and `note` says why. */
static jpq_result from_bundle(const char *folder, const jpq_load_options *options, jpq_backend_kind *kind, jpq_error *note,
                              jpq_error *error) {
  char path[PATH_MOST];
  const char *engine = options->engine;
  *kind = JPQ_ONNXRUNTIME;
  if (!engine) JPQ_TRY(bundle_path(folder, ENGINE, path, error));
  if (!engine && access(path, F_OK)) return JPQ_SUCCESS;
  if (no_kernels(options)) return jpq_fail(note, JPQ_UNSUPPORTED, "kernels is \"none\""), JPQ_SUCCESS;
  if (trt_backend_fits(folder, engine, note) == JPQ_SUCCESS) *kind = JPQ_TENSORRT;
  return JPQ_SUCCESS;
}

jpq_result backend_open(const char *folder, const manifest *m, const jpq_load_options *options, backend **out, jpq_error *error) {
  jpq_load_options asked = *options;
  jpq_error note = {JPQ_SUCCESS, ""};
  if (asked.backend == JPQ_AUTO) {
    JPQ_TRY(from_environment(&asked.backend, error));
    if (asked.backend == JPQ_AUTO) JPQ_TRY(from_bundle(folder, options, &asked.backend, &note, error));
    if (asked.backend == JPQ_TENSORRT) asked.library = NULL; /* it names onnxruntime's, as do kernels, unless "none" */
    if (asked.backend == JPQ_TENSORRT && !no_kernels(options)) asked.kernels = NULL;
  }
  if (asked.backend == JPQ_TENSORRT) return trt_backend_open(folder, m, &asked, out, error);
  if (asked.backend != JPQ_ONNXRUNTIME)
    return jpq_fail(error, JPQ_BAD_ARGUMENT, "backend: got %d, expected one of jpq_backend_kind", (int)asked.backend);
  JPQ_TRY(ort_backend_open(folder, m, &asked, out, error));
  char *path = (*out)->path;
  const size_t used = strlen(path);
  if (note.code) snprintf(path + used, sizeof (*out)->path - used, "; the engine is not used: %.300s", note.text);
  return JPQ_SUCCESS;
}
