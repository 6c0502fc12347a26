/* What `jpq-export build` wrote down beside the engine (device.json): which board, TensorRT, plugin and hashes. */
#ifndef JPQ_RUNTIME_TRT_RECORD_H
#define JPQ_RUNTIME_TRT_RECORD_H

#include "../bundle.h"

typedef struct trt_record {
  json_document *document;
  char engine[PATH_MOST], path[PATH_MOST]; /* of the engine, of the record */
  const char *engine_sha256, *plugin_sha256, *tensorrt; /* `tensorrt`: its version, "10.3.0.30" */
  int64_t sm;
  int ahead_of_time; /* the kernels are inside the engine: there is no plugin library */
} trt_record;

/* Read the record of `engine` (NULL: the bundle's own, in device/); free it with trt_record_free. */
jpq_result trt_record_read(const char *folder, const char *engine, trt_record *out, jpq_error *error);
void trt_record_free(trt_record *record);
/* The engine's bytes, from malloc, after comparing them with the record. */
jpq_result trt_record_engine(const trt_record *record, char **data, size_t *bytes, jpq_error *error);
/* Path of the plugin library with the recorded sha256: `asked`, or one that the manifest lists, or the one beside the
 * engine. Empty when the engine needs none. */
jpq_result trt_record_plugin(const trt_record *record, const char *folder, const manifest *m, const char *asked,
                             char out[PATH_MOST], jpq_error *error);

#endif
