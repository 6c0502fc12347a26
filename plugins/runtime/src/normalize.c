/* Normalizers: Unicode forms, lower case, and what BERT does to text before it is cut. */
#include <stdlib.h>

#include "tokenizer.h"
#include "unicode.h"
#include "utf8.h"

static jpq_result put(bytes *out, uint32_t code, jpq_error *error) {
  char text[4];
  return bytes_add(out, text, utf8_write(code, text), error);
}

static jpq_result clean(uint32_t code, bytes *out, jpq_error *error) {
  if (unicode_class(code) & UNICODE_CONTROL) return JPQ_SUCCESS;
  return put(out, unicode_space(code) ? ' ' : code, error);
}

static jpq_result spaced(uint32_t code, bytes *out, jpq_error *error) {
  const int chinese = unicode_chinese(code);
  if (chinese) JPQ_TRY(put(out, ' ', error));
  JPQ_TRY(put(out, code, error));
  return chinese ? put(out, ' ', error) : JPQ_SUCCESS;
}

static jpq_result strip(uint32_t code, bytes *out, jpq_error *error) {
  return unicode_class(code) & UNICODE_MARK ? JPQ_SUCCESS : put(out, code, error);
}

static jpq_result lower(uint32_t code, bytes *out, jpq_error *error) {
  JPQ_TRY(put(out, code == 0x130 ? 'i' : unicode_lower(code), error));
  return code == 0x130 ? put(out, 0x307, error) : JPQ_SUCCESS; /* the only one that becomes two */
}

typedef jpq_result (*each_code)(uint32_t code, bytes *out, jpq_error *error);

static jpq_result map(each_code one, const char *text, size_t count, bytes *out, jpq_error *error) {
  for (size_t at = 0; at < count;) {
    uint32_t code;
    at += utf8_read(text + at, count - at, &code);
    JPQ_TRY(one(code, out, error));
  }
  return JPQ_SUCCESS;
}

static jpq_result apply(unsigned flag, const bytes *in, bytes *out, jpq_error *error) {
  switch (flag) {
    case NORMALIZE_CLEAN: return map(clean, in->data, in->count, out, error);
    case NORMALIZE_CHINESE: return map(spaced, in->data, in->count, out, error);
    case NORMALIZE_NFD: return unicode_nfd(in->data, in->count, out, error);
    case NORMALIZE_STRIP: return map(strip, in->data, in->count, out, error);
    case NORMALIZE_LOWER: return map(lower, in->data, in->count, out, error);
    default: return unicode_nfc(in->data, in->count, out, error);
  }
}

jpq_result normalize(const tokenizer *t, const char *text, size_t count, bytes *out, jpq_error *error) {
  JPQ_TRY(bytes_add(out, text, count, error));
  for (size_t i = 0; i < t->normalize_count; i++)
    for (unsigned flag = 1; flag <= NORMALIZE_NFC; flag *= 2) { /* BERT's order is that of the flags */
      if (!(t->normalize[i] & flag)) continue;
      bytes next = {0};
      const jpq_result result = apply(flag, out, &next, error);
      free(out->data);
      *out = next;
      JPQ_TRY(result);
    }
  return JPQ_SUCCESS;
}
