/* UTF-8 (Unicode, table 3-7): no overlong forms, no surrogates, nothing beyond U+10FFFF. */
#include "utf8.h"

size_t utf8_read(const char *text, size_t bytes, uint32_t *code) {
  const unsigned char *c = (const unsigned char *)text;
  if (c[0] < 0x80) return *code = c[0], 1;
  const size_t length = c[0] >= 0xf0 ? 4 : c[0] >= 0xe0 ? 3 : 2;
  *code = UTF8_INVALID;
  if (c[0] < 0xc2 || c[0] > 0xf4) return 1;
  uint32_t value = c[0] & (0x7fu >> length);
  /* Only the second byte has a range of its own. */
  unsigned low = c[0] == 0xe0 ? 0xa0 : c[0] == 0xf0 ? 0x90 : 0x80;
  unsigned high = c[0] == 0xed ? 0x9f : c[0] == 0xf4 ? 0x8f : 0xbf;
  for (size_t i = 1; i < length; i++, low = 0x80, high = 0xbf) {
    if (i == bytes) return *code = UTF8_CUT, i;
    if (c[i] < low || c[i] > high) return i;
    value = value << 6 | (c[i] & 0x3f);
  }
  *code = value;
  return length;
}

size_t utf8_write(uint32_t code, char *out) {
  if (code < 0x80) return out[0] = (char)code, 1;
  const size_t length = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
  for (size_t i = length - 1; i > 0; i--, code >>= 6) out[i] = (char)(0x80 | (code & 0x3f));
  out[0] = (char)((0xf00u >> length & 0xf0) | code);
  return length;
}
