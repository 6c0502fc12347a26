/* Reading device.json, and finding the files it speaks of. Nothing is loaded whose hash is not the recorded one. */
#include "trt_record.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../sha256.h"

#define FORMAT "jpq-device/1"
#define ENGINE "device/model.engine"
#define RECORD "device.json"
#define PLUGIN "libjpq_tensorrt.so"
#define AHEAD_OF_TIME "kernels compiled ahead of time" /* `origin` in jpq_export/engine/aot.py */
static const size_t MOST_RECORD = 16 << 20, MOST_LIBRARY = (size_t)1 << 32, MOST_ENGINE = (size_t)1 << 40;

static int is_hash(const char *text) {
  return text && strlen(text) == 64 && strspn(text, "0123456789abcdef") == 64;
}

static jpq_result beside(const char *path, const char *name, char out[PATH_MOST], jpq_error *error) {
  const char *slash = strrchr(path, '/');
  const int n = snprintf(out, PATH_MOST, "%.*s%s", slash ? (int)(slash - path + 1) : 0, path, name);
  if (n >= 0 && n < PATH_MOST) return JPQ_SUCCESS;
  return jpq_fail(error, JPQ_BAD_ARGUMENT, "engine: path longer than %d bytes; move the bundle", PATH_MOST);
}

static jpq_result read_fields(trt_record *r, jpq_error *error) {
  const json *root = json_root(r->document), *plugin = json_get(root, "plugin");
  const char *format = json_text(root, "format"), *origin = json_text(plugin, "origin");
  if (!format || strcmp(format, FORMAT))
    return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: expected \"format\": \"" FORMAT "\", got '%.60s'; build again with this version",
                    r->path, format ? format : "none");
  if (!json_true(root, "passed"))
    return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: the engine did not compute what was recorded; build it again", r->path);
  r->engine_sha256 = json_text(json_get(root, "engine"), "sha256"), r->plugin_sha256 = json_text(plugin, "sha256");
  r->tensorrt = json_text(json_get(root, "versions"), "tensorrt");
  r->ahead_of_time = origin && !strcmp(origin, AHEAD_OF_TIME);
  JPQ_TRY(json_integer(json_get(root, "device"), "sm", 0, r->path, &r->sm, error));
  if (is_hash(r->engine_sha256) && is_hash(r->plugin_sha256) && r->tensorrt && r->sm > 0) return JPQ_SUCCESS;
  return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: malformed record (engine, plugin, versions or device); build again", r->path);
}

jpq_result trt_record_read(const char *folder, const char *engine, trt_record *out, jpq_error *error) {
  char *data;
  size_t bytes;
  memset(out, 0, sizeof *out);
  if (!engine) JPQ_TRY(bundle_path(folder, ENGINE, out->engine, error));
  if (engine && snprintf(out->engine, PATH_MOST, "%s", engine) >= PATH_MOST)
    return jpq_fail(error, JPQ_BAD_ARGUMENT, "engine: path longer than %d bytes; move the bundle", PATH_MOST);
  JPQ_TRY(beside(out->engine, RECORD, out->path, error));
  if (read_file(out->path, MOST_RECORD, &data, &bytes, error)) /* its own advice would be to export again */
    return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: cannot be read; build the engine on this board: jpq-export build %.200s",
                    out->path, folder);
  JPQ_TRY(json_parse(data, bytes, out->path, &out->document, error));
  const jpq_result result = read_fields(out, error);
  if (result) trt_record_free(out);
  return result;
}

void trt_record_free(trt_record *record) {
  json_free(record->document);
  record->document = NULL;
}

static void hash_of(const char *data, size_t bytes, char hex[65]) {
  sha256 hash;
  sha256_start(&hash);
  sha256_add(&hash, data, bytes);
  sha256_finish(&hash, hex);
}

jpq_result trt_record_engine(const trt_record *record, char **data, size_t *bytes, jpq_error *error) {
  char hex[65];
  JPQ_TRY(read_file(record->engine, MOST_ENGINE, data, bytes, error));
  hash_of(*data, *bytes, hex);
  if (!strcmp(hex, record->engine_sha256)) return JPQ_SUCCESS;
  free(*data);
  return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: expected sha256 %.12s..., got %.12s...; build it again on this board",
                  record->engine, record->engine_sha256, hex);
}

static jpq_result check_plugin(const trt_record *record, const char *path, jpq_error *error) {
  char *data, hex[65];
  size_t bytes;
  JPQ_TRY(read_file(path, MOST_LIBRARY, &data, &bytes, error));
  hash_of(data, bytes, hex);
  free(data);
  if (!strcmp(hex, record->plugin_sha256)) return JPQ_SUCCESS;
  return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: expected sha256 %.12s..., got %.12s...; it is not loaded: build again on this board",
                  path, record->plugin_sha256, hex);
}

/* The manifest's name for a prebuilt library with this hash; NULL when there is none. */
static const char *prebuilt(const manifest *m, const char *sha256) {
  const json *list = json_get(json_get(json_root(m->document), "device"), "binaries");
  for (const json *entry = list ? list->child : NULL; entry; entry = entry->next) {
    const char *hash = json_text(entry, "sha256"), *name = json_text(entry, "file");
    const json *listed = name ? manifest_file(m, name) : NULL; /* names of files were checked, these were not */
    if (hash && listed && !strcmp(hash, sha256)) return listed->name;
  }
  return NULL;
}

jpq_result trt_record_plugin(const trt_record *record, const char *folder, const manifest *m, const char *asked,
                             char out[PATH_MOST], jpq_error *error) {
  *out = 0;
  if (record->ahead_of_time) return JPQ_SUCCESS;
  if (asked && !strcmp(asked, "none"))
    return jpq_fail(error, JPQ_BAD_ARGUMENT, "kernels: \"none\", but the engine needs its plugin library; leave it out");
  const char *name = prebuilt(m, record->plugin_sha256);
  if (asked) {
    if (snprintf(out, PATH_MOST, "%s%s", strchr(asked, '/') ? "" : "./", asked) >= PATH_MOST)
      return jpq_fail(error, JPQ_BAD_ARGUMENT, "kernels: path longer than %d bytes", PATH_MOST);
  } else if (name) {
    JPQ_TRY(bundle_path(folder, name, out, error));
  } else {
    JPQ_TRY(beside(record->engine, PLUGIN, out, error));
  }
  return check_plugin(record, out, error);
}
