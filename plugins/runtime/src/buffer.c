/* Arrays that double when they are full. */
#include "buffer.h"

#include <stdlib.h>
#include <string.h>

static void *grown(void *data, size_t needed, size_t *capacity, size_t item) {
  size_t to = *capacity ? *capacity : 64;
  while (to < needed)
    if (to > SIZE_MAX / 2 / item) return NULL;
    else to *= 2;
  void *made = realloc(data, to * item);
  if (made) *capacity = to;
  return made;
}

jpq_result bytes_add(bytes *out, const char *data, size_t count, jpq_error *error) {
  if (out->capacity - out->count < count || !out->capacity) {
    char *made = count > SIZE_MAX / 4 ? NULL : grown(out->data, out->count + count, &out->capacity, 1);
    if (!made) return jpq_no_memory(error);
    out->data = made;
  }
  if (count) memcpy(out->data + out->count, data, count);
  out->count += count;
  return JPQ_SUCCESS;
}

jpq_result ids_add(ids *out, int64_t id, jpq_error *error) {
  if (out->count == out->capacity) {
    int64_t *made = grown(out->data, out->count + 1, &out->capacity, sizeof *made);
    if (!made) return jpq_no_memory(error);
    out->data = made;
  }
  out->data[out->count++] = id;
  return JPQ_SUCCESS;
}
