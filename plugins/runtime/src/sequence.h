/* A loaded model, as the files of this library see it. */
#ifndef JPQ_RUNTIME_SEQUENCE_H
#define JPQ_RUNTIME_SEQUENCE_H

#include "backend.h"
#include "tokenizer.h"

struct jpq_model {
  backend *backend;
  tokenizer *tokenizer;   /* NULL: text is refused with what follows; ids still work */
  jpq_error no_tokenizer;
};

/* Success when the model has a tokenizer, otherwise why it has none. */
jpq_result text_needs_tokenizer(const jpq_model *model, jpq_error *error);
/* Append the bytes a token stands for, nothing for a special one. */
jpq_result token_bytes(const jpq_model *model, int64_t id, bytes *out, jpq_error *error);

#endif
