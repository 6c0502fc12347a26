/* Growing arrays of bytes and of ids. */
#ifndef JPQ_RUNTIME_BUFFER_H
#define JPQ_RUNTIME_BUFFER_H

#include <stddef.h>
#include <stdint.h>

#include "error.h"

typedef struct bytes {
  char *data;
  size_t count, capacity;
} bytes;

typedef struct ids {
  int64_t *data;
  size_t count, capacity;
} ids;

/* Both fail only for want of memory; free(x.data) in the end. */
jpq_result bytes_add(bytes *out, const char *data, size_t count, jpq_error *error);
jpq_result ids_add(ids *out, int64_t id, jpq_error *error);

#endif
