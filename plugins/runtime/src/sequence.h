/* A loaded model and a growing sequence, as the files of this library see them. */
#ifndef JPQ_RUNTIME_SEQUENCE_H
#define JPQ_RUNTIME_SEQUENCE_H

#include "backend.h"
#include "tokenizer.h"

struct jpq_model {
  backend *backend;
  tokenizer *tokenizer;   /* NULL: text is refused with what follows; ids still work */
  jpq_error no_tokenizer;
};

#endif
