/* What the tokenizers ask of Unicode; the tables are made by tools/make_unicode_tables.py. */
#ifndef JPQ_RUNTIME_UNICODE_H
#define JPQ_RUNTIME_UNICODE_H

#include "buffer.h"

/* Bits of a class. LETTER and NUMBER as regular expressions see them (\p{L}, \p{N}), DIGIT as the Digits pre-tokenizer,
 * PUNCTUATION, CONTROL (to be removed) and MARK (an accent) as BERT. */
enum { UNICODE_LETTER = 1, UNICODE_NUMBER = 2, UNICODE_DIGIT = 4, UNICODE_PUNCTUATION = 8, UNICODE_CONTROL = 16, UNICODE_MARK = 32 };

unsigned unicode_class(uint32_t code);
int unicode_space(uint32_t code); /* White_Space */
int unicode_chinese(uint32_t code); /* what BERT puts spaces around */
uint32_t unicode_lower(uint32_t code); /* of those with one lower-case character */

/* Append the canonical decomposition (NFD) or composition (NFC) of valid UTF-8. */
jpq_result unicode_nfd(const char *text, size_t count, bytes *out, jpq_error *error);
jpq_result unicode_nfc(const char *text, size_t count, bytes *out, jpq_error *error);

#endif
