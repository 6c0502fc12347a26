/* The bundle's files and manifest. Every name and size in them is distrusted. */
#include "bundle.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "sha256.h"

#define FORMAT "jpq-bundle/1"
enum { MOST_MANIFEST = 64 << 20, CHUNK = 1 << 16 };

jpq_result bundle_path(const char *folder, const char *name, char out[PATH_MOST], jpq_error *error) {
  const int n = snprintf(out, PATH_MOST, "%s/%s", folder, name);
  if (n >= 0 && n < PATH_MOST) return JPQ_SUCCESS;
  return jpq_fail(error, JPQ_BAD_ARGUMENT, "%.60s...: path longer than %d bytes; move the bundle", folder, PATH_MOST);
}

static jpq_result open_regular(const char *path, FILE **file, uint64_t *bytes, jpq_error *error) {
  struct stat info;
  if (stat(path, &info) == 0 && !S_ISREG(info.st_mode)) /* a pipe would block for ever */
    return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: not a regular file; export the bundle again", path);
  *file = fopen(path, "rb");
  if (*file && fstat(fileno(*file), &info) == 0) return *bytes = (uint64_t)info.st_size, JPQ_SUCCESS;
  const int why = errno;
  if (*file) fclose(*file);
  return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: cannot be read (%s); give the folder jpq-export wrote", path, strerror(why));
}

jpq_result read_file(const char *path, size_t most, char **data, size_t *bytes, jpq_error *error) {
  FILE *file;
  uint64_t size;
  JPQ_TRY(open_regular(path, &file, &size, error));
  if (size > most) {
    fclose(file);
    return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: %llu bytes, expected at most %zu; export the bundle again", path,
                    (unsigned long long)size, most);
  }
  char *got = malloc((size_t)size + 1);
  const size_t n = got ? fread(got, 1, (size_t)size, file) : 0;
  fclose(file);
  if (!got) return jpq_no_memory(error);
  if (n != size) {
    free(got);
    return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: %zu of %llu bytes read; try again", path, n, (unsigned long long)size);
  }
  got[n] = 0;
  *data = got, *bytes = n;
  return JPQ_SUCCESS;
}

/* As `safe_name` of jpq_export/format/bundle.py: relative, without "..", ".", empty parts, backslashes or colons. */
static int is_safe(const char *name, size_t bytes) {
  if (!bytes || strlen(name) != bytes || strchr(name, '\\') || strchr(name, ':')) return 0;
  for (const char *part = name;;) {
    const size_t n = strcspn(part, "/");
    if (n == 0 || (n == 1 && part[0] == '.') || (n == 2 && part[0] == '.' && part[1] == '.')) return 0;
    if (!part[n]) return 1;
    part += n + 1;
  }
}

static jpq_result check_entry(const json *entry, const char *path, jpq_error *error) {
  if (!is_safe(entry->name, entry->name_bytes))
    return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: file name '%.200s' points outside the bundle; do not use this bundle", path,
                    entry->name);
  const char *hex = json_text(entry, "sha256");
  const json *bytes = json_get(entry, "bytes");
  if (hex && strlen(hex) == 64 && strspn(hex, "0123456789abcdef") == 64 && bytes && bytes->kind == JSON_INTEGER &&
      bytes->integer >= 0)
    return JPQ_SUCCESS;
  return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: malformed manifest (files, %.200s); export the bundle again", path,
                  entry->name);
}

static jpq_result check_manifest(const char *path, manifest *m, jpq_error *error) {
  const json *root = json_root(m->document);
  const char *format = json_text(root, "format");
  if (!format || strcmp(format, FORMAT))
    return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: expected \"format\": \"" FORMAT "\", got '%.60s'; export it again with this version",
                    path, format ? format : "none");
  m->files = json_get(root, "files");
  if (!m->files || m->files->kind != JSON_OBJECT)
    return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: malformed manifest (no files); export the bundle again", path);
  for (const json *entry = m->files->child; entry; entry = entry->next) JPQ_TRY(check_entry(entry, path, error));
  return JPQ_SUCCESS;
}

jpq_result manifest_read(const char *folder, manifest *out, jpq_error *error) {
  char path[PATH_MOST], *data;
  size_t bytes;
  memset(out, 0, sizeof *out);
  JPQ_TRY(bundle_path(folder, "manifest.json", path, error));
  JPQ_TRY(read_file(path, MOST_MANIFEST, &data, &bytes, error));
  JPQ_TRY(json_parse(data, bytes, path, &out->document, error));
  const jpq_result result = check_manifest(path, out, error);
  if (result) manifest_free(out);
  return result;
}

void manifest_free(manifest *m) {
  json_free(m->document);
  memset(m, 0, sizeof *m);
}

const json *manifest_file(const manifest *m, const char *name) { return json_get(m->files, name); }

jpq_result manifest_check(const char *folder, const json *entry, jpq_error *error) {
  char path[PATH_MOST], hex[65];
  static const size_t chunk = CHUNK;
  FILE *file;
  uint64_t size;
  JPQ_TRY(bundle_path(folder, entry->name, path, error));
  JPQ_TRY(open_regular(path, &file, &size, error));
  const int64_t expected = json_get(entry, "bytes")->integer;
  char *buffer = malloc(chunk);
  sha256 hash;
  sha256_start(&hash);
  for (size_t n; buffer && size == (uint64_t)expected && (n = fread(buffer, 1, chunk, file)) > 0;) sha256_add(&hash, buffer, n);
  sha256_finish(&hash, hex);
  fclose(file);
  if (!buffer) return jpq_no_memory(error);
  free(buffer);
  if (size != (uint64_t)expected)
    return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: expected %lld bytes, got %llu; copy or export the bundle again", path,
                    (long long)expected, (unsigned long long)size);
  if (!strcmp(hex, json_text(entry, "sha256"))) return JPQ_SUCCESS;
  return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: expected sha256 %.12s..., got %.12s...; copy or export the bundle again", path,
                  json_text(entry, "sha256"), hex);
}

jpq_result manifest_check_all(const char *folder, const manifest *m, jpq_error *error) {
  for (const json *entry = m->files->child; entry; entry = entry->next) JPQ_TRY(manifest_check(folder, entry, error));
  return JPQ_SUCCESS;
}
