/* Finding and loading shared libraries at run time. */
#ifndef JPQ_RUNTIME_LIBRARIES_H
#define JPQ_RUNTIME_LIBRARIES_H

#include "bundle.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Path of the first file in `folder` (sorted) whose name starts with `prefix`; 0 when there is none. */
int library_in(const char *folder, const char *prefix, char out[PATH_MOST]);
/* The same in the folder this library (or, linked statically, the program) lies in. */
int library_beside(const char *prefix, char out[PATH_MOST]);
/* Load `asked` (a file or its folder), else the one beside us, else `otherwise` as dlopen searches. */
jpq_result library_open(const char *asked, const char *prefix, const char *otherwise, void **out, jpq_error *error);
/* Load by name, as dlopen searches; 0 when it is not there. */
int library_find(const char *name, void **out);
void library_close(void *library);
/* Address of a function; NULL when it has none. Stored through `out`, since C has no cast for it. */
void library_symbol(void *library, const char *name, void *out);

#ifdef __cplusplus
}
#endif

#endif
