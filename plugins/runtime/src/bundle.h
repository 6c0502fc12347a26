/* The files of a bundle: reading them, the manifest and its hashes, the model's facts. */
#ifndef JPQ_RUNTIME_BUNDLE_H
#define JPQ_RUNTIME_BUNDLE_H

#include "error.h"
#include "json.h"

enum { PATH_MOST = 4096 };

/* Facts about the model, from `jpq.spec` inside the graph; see jpq_export/format/spec.py. */
typedef struct model_spec {
  int64_t vocab, max_positions, head_dim, bos_id; /* bos_id -1: none */
  int add_bos;
  size_t layers, eos_count;
  int64_t *kv_heads; /* [layers]; 0: attention removed, no cache */
  int64_t *eos_ids;
} model_spec;

typedef struct manifest {
  json_document *document;
  const json *files;
} manifest;

/* `folder`/`name` in `out`; JPQ_BAD_ARGUMENT when it is too long. */
jpq_result bundle_path(const char *folder, const char *name, char out[PATH_MOST], jpq_error *error);
/* Contents of a regular file of at most `most` bytes, with a NUL behind them, from malloc. */
jpq_result read_file(const char *path, size_t most, char **data, size_t *bytes, jpq_error *error);

/* Check version and that no name points outside the folder. */
jpq_result manifest_read(const char *folder, manifest *out, jpq_error *error);
void manifest_free(manifest *m);
/* Entry of manifest.files by name; NULL when it has none. */
const json *manifest_file(const manifest *m, const char *name);
/* Compare size and sha256 of one file, or of all. */
jpq_result manifest_check(const char *folder, const json *entry, jpq_error *error);
jpq_result manifest_check_all(const char *folder, const manifest *m, jpq_error *error);

/* `value`: the parsed record; limits are checked, since everything later is sized by it. */
jpq_result spec_read(const json *value, const char *where, model_spec *out, jpq_error *error);
void spec_free(model_spec *spec);

#endif
