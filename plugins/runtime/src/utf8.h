/* Reading and writing UTF-8 one character at a time. */
#ifndef JPQ_RUNTIME_UTF8_H
#define JPQ_RUNTIME_UTF8_H

#include <stddef.h>
#include <stdint.h>

#define UTF8_INVALID 0x80000000u /* these bytes are no character, whatever follows */
#define UTF8_CUT 0x80000001u     /* the beginning of a character that may still be completed */

/* Bytes taken from `text` (at least 1 of `bytes` > 0) and the character in `code`. Of invalid bytes the longest start
 * of a character is taken, so that one U+FFFD stands for as many bytes as in Rust and Python. UTF8_CUT only when the
 * text ends inside a character. */
size_t utf8_read(const char *text, size_t bytes, uint32_t *code);
/* Bytes written, 1 to 4. */
size_t utf8_write(uint32_t code, char *out);

#endif
