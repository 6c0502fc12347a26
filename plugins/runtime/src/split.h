/* Pre-tokenizers: how text is cut into the pieces that a model then sees one by one. */
#ifndef JPQ_RUNTIME_SPLIT_H
#define JPQ_RUNTIME_SPLIT_H

#include <stddef.h>

typedef enum split_kind {
  SPLIT_GPT2,          /* the regular expression of ByteLevel */
  SPLIT_QWEN2,         /* that of Qwen2: digits alone */
  SPLIT_LLAMA3,        /* and of Llama 3: up to three digits */
  SPLIT_DIGITS,        /* each digit alone */
  SPLIT_DIGIT_RUNS,
  SPLIT_BERT           /* spaces go, punctuation stands alone */
} split_kind;

/* Length of the first piece of valid UTF-8 (`bytes` > 0). *dropped: it is not part of the result. */
size_t split_next(split_kind kind, const char *text, size_t bytes, int *dropped);

/* The kind a regular expression of tokenizer.json is; 0 when it is none of these. */
int split_of_regex(const char *pattern, split_kind *out);

#endif
