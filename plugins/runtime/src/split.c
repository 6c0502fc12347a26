/* The regular expressions and pre-tokenizers that are in use, each written out as what it matches first. */
#include "split.h"

#include <string.h>

#include "unicode.h"
#include "utf8.h"

#define TAIL " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define HEAD "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
static const char GPT2[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
static const char QWEN2[] = HEAD "\\p{N}|" TAIL;
static const char LLAMA3[] = HEAD "\\p{N}{1,3}|" TAIL;

int split_of_regex(const char *pattern, split_kind *out) {
  if (!strcmp(pattern, GPT2)) return *out = SPLIT_GPT2, 1;
  if (!strcmp(pattern, QWEN2)) return *out = SPLIT_QWEN2, 1;
  if (!strcmp(pattern, LLAMA3)) return *out = SPLIT_LLAMA3, 1;
  return 0;
}

enum { LETTER = 1, NUMBER = 2, OTHER = 4, SPACE = 8 }; /* \p{L}, \p{N}, [^\s\p{L}\p{N}], \s */

static int kind_of(uint32_t code) {
  if (unicode_space(code)) return SPACE;
  const unsigned found = unicode_class(code);
  return found & UNICODE_LETTER ? LETTER : found & UNICODE_NUMBER ? NUMBER : OTHER;
}

/* Bytes of the longest run of at most `most` characters of these kinds. */
static size_t run(const char *text, size_t bytes, int kinds, size_t most) {
  size_t at = 0;
  for (uint32_t code; at < bytes && most > 0; most--) {
    const size_t n = utf8_read(text + at, bytes - at, &code);
    if (!(kind_of(code) & kinds)) break;
    at += n;
  }
  return at;
}

static size_t line_ends(const char *text, size_t bytes) {
  size_t at = 0;
  while (at < bytes && (text[at] == '\r' || text[at] == '\n')) at++;
  return at;
}

/* \s+(?!\S)|\s+ : the last space of several is left for the word it precedes. */
static size_t spaces(const char *text, size_t bytes) {
  const size_t all = run(text, bytes, SPACE, SIZE_MAX);
  if (all == bytes) return all;
  size_t last = all - 1;
  while (last > 0 && ((unsigned char)text[last] & 0xc0) == 0x80) last--;
  return last ? last : all;
}

/* 's 't 're 've 'm 'll 'd; 0 when there is none. U+017F is another case of s. */
static size_t contraction(const char *text, size_t bytes, int any_case) {
  if (bytes < 2 || text[0] != '\'') return 0;
  const char a = any_case && text[1] >= 'A' && text[1] <= 'Z' ? (char)(text[1] | 32) : text[1];
  const char b = bytes < 3 ? 0 : any_case && text[2] >= 'A' && text[2] <= 'Z' ? (char)(text[2] | 32) : text[2];
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
  if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
  return any_case && bytes > 2 && !memcmp(text + 1, "\xc5\xbf", 2) ? 3 : 0;
}

static size_t gpt2(const char *text, size_t bytes) {
  const size_t short_form = contraction(text, bytes, 0), space = text[0] == ' ';
  if (short_form) return short_form;
  for (int kind = LETTER; kind <= OTHER; kind *= 2) {
    const size_t n = run(text + space, bytes - space, kind, SIZE_MAX);
    if (n) return space + n;
  }
  return spaces(text, bytes);
}

/* Qwen2's and Llama 3's, which differ in how many digits go together. */
static size_t lines_apart(const char *text, size_t bytes, size_t most_digits) {
  const size_t short_form = contraction(text, bytes, 1), space = text[0] == ' ';
  if (short_form) return short_form;
  uint32_t code;
  const size_t first = utf8_read(text, bytes, &code);
  size_t before = kind_of(code) & (LETTER | NUMBER) || code == '\r' || code == '\n' ? 0 : first;
  size_t n = run(text + before, bytes - before, LETTER, SIZE_MAX);
  if (n) return before + n;
  n = run(text, bytes, NUMBER, most_digits);
  if (n) return n;
  n = run(text + space, bytes - space, OTHER, SIZE_MAX);
  if (n) return space + n + line_ends(text + space + n, bytes - space - n);
  const size_t all = run(text, bytes, SPACE, SIZE_MAX);
  for (n = all; n > 0; n--) /* \s*[\r\n]+ : up to the last line end among the spaces */
    if (text[n - 1] == '\r' || text[n - 1] == '\n') return n;
  return spaces(text, bytes);
}

static size_t digits(const char *text, size_t bytes, size_t most) {
  uint32_t code;
  size_t at = utf8_read(text, bytes, &code), count = 1;
  const int first = (unicode_class(code) & UNICODE_DIGIT) != 0;
  for (size_t n; at < bytes && (!first || count < most); at += n, count++) {
    n = utf8_read(text + at, bytes - at, &code);
    if (((unicode_class(code) & UNICODE_DIGIT) != 0) != first) break;
  }
  return at;
}

static size_t bert(const char *text, size_t bytes, int *dropped) {
  uint32_t code;
  size_t at = utf8_read(text, bytes, &code);
  *dropped = unicode_space(code);
  if (*dropped || unicode_class(code) & UNICODE_PUNCTUATION) return at;
  for (size_t n; at < bytes; at += n) {
    n = utf8_read(text + at, bytes - at, &code);
    if (unicode_space(code) || unicode_class(code) & UNICODE_PUNCTUATION) break;
  }
  return at;
}

size_t split_next(split_kind kind, const char *text, size_t bytes, int *dropped) {
  *dropped = 0;
  switch (kind) {
    case SPLIT_GPT2: return gpt2(text, bytes);
    case SPLIT_QWEN2: return lines_apart(text, bytes, 1);
    case SPLIT_LLAMA3: return lines_apart(text, bytes, 3);
    case SPLIT_DIGITS: return digits(text, bytes, 1);
    case SPLIT_DIGIT_RUNS: return digits(text, bytes, SIZE_MAX);
    default: return bert(text, bytes, dropped);
  }
}
