/* tokenizer.json interpreted: text to ids and back. */
#include "tokenizer.h"

jpq_result tokenizer_load(const char *folder, const model_spec *spec, tokenizer **out, jpq_error *error) {
  (void)spec;
  *out = NULL;
  return jpq_fail(error, JPQ_UNSUPPORTED, "%s: text is not supported yet; use token ids", folder);
}

void tokenizer_free(tokenizer *t) { (void)t; }
