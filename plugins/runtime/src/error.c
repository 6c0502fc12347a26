/* One line in the caller's error record. */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>

jpq_result jpq_fail(jpq_error *error, jpq_result code, const char *format, ...) {
  if (!error) return code;
  va_list values;
  va_start(values, format);
  vsnprintf(error->text, sizeof error->text, format, values);
  va_end(values);
  error->code = code;
  for (char *c = error->text; *c; c++)
    if (*c == '\n' || *c == '\r') *c = ' '; /* other people's messages have several lines */
  return code;
}

jpq_result jpq_no_memory(jpq_error *error) {
  return jpq_fail(error, JPQ_OUT_OF_MEMORY, "out of memory; use a smaller model, prompt or capacity");
}

jpq_result jpq_done(jpq_error *error) {
  if (error) error->code = JPQ_SUCCESS, error->text[0] = 0;
  return JPQ_SUCCESS;
}
