/* tokenizer.json interpreted: text to ids and back. */
#ifndef JPQ_RUNTIME_TOKENIZER_H
#define JPQ_RUNTIME_TOKENIZER_H

#include "bundle.h"

typedef struct tokenizer tokenizer;

/* JPQ_UNSUPPORTED, naming the part, when it is of a kind we do not interpret. */
jpq_result tokenizer_load(const char *folder, const model_spec *spec, tokenizer **out, jpq_error *error);
void tokenizer_free(tokenizer *t);

#endif
