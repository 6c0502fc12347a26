/* How every file here fails: one line in the caller's record. */
#ifndef JPQ_RUNTIME_ERROR_H
#define JPQ_RUNTIME_ERROR_H

#include "../include/jpq_runtime.h"

#ifdef __cplusplus
extern "C" {
#endif

#define JPQ_TRY(call)                       \
  do {                                      \
    jpq_result result_ = (call);            \
    if (result_ != JPQ_SUCCESS) return result_; \
  } while (0)

/* Write the line and return `code`; `error` may be NULL. */
jpq_result jpq_fail(jpq_error *error, jpq_result code, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;
jpq_result jpq_no_memory(jpq_error *error);
/* Success, with an empty line. */
jpq_result jpq_done(jpq_error *error);

#ifdef __cplusplus
}
#endif

#endif
