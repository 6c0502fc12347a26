/* Look-ups in the Unicode tables, and normalisation forms D and C (Unicode Standard Annex 15). */
#include "unicode.h"

#include <stdlib.h>

#include "utf8.h"

typedef struct unicode_triple {
  uint32_t a, b, c;
} unicode_triple;
typedef struct unicode_pair {
  uint32_t a, b;
} unicode_pair;

#include "unicode_tables.inc"

#define COUNT(table) (sizeof(table) / sizeof *(table))
/* Hangul syllables are arithmetic. */
enum { S_BASE = 0xac00, L_BASE = 0x1100, V_BASE = 0x1161, T_BASE = 0x11a7, L_COUNT = 19, V_COUNT = 21, T_COUNT = 28, S_COUNT = 11172 };

/* Value of the last range that starts at or before the code. */
static unsigned in_ranges(const uint32_t *ranges, size_t count, uint32_t code) {
  size_t low = 0, high = count; /* ranges[0] starts at 0 */
  while (high - low > 1) {
    const size_t middle = (low + high) / 2;
    if (ranges[middle] >> 8 <= code) low = middle;
    else high = middle;
  }
  return ranges[low] & 0xff;
}

unsigned unicode_class(uint32_t code) {
  if ((code | 32) - 'a' < 26) return UNICODE_LETTER;
  return in_ranges(class_ranges, COUNT(class_ranges), code);
}

int unicode_space(uint32_t code) {
  if (code < 0x80) return code == ' ' || (code >= 9 && code <= 13);
  return code == 0x85 || code == 0xa0 || code == 0x1680 || (code >= 0x2000 && code <= 0x200a) || code == 0x2028 ||
         code == 0x2029 || code == 0x202f || code == 0x205f || code == 0x3000;
}

int unicode_chinese(uint32_t code) {
  static const unicode_pair blocks[] = {{0x3400, 0x4dbf},   {0x4e00, 0x9fff},   {0xf900, 0xfaff},  {0x20000, 0x2a6df},
                                        {0x2a700, 0x2b81f}, {0x2b920, 0x2ceaf}, {0x2f800, 0x2fa1f}};
  for (size_t i = 0; i < COUNT(blocks); i++)
    if (code >= blocks[i].a && code <= blocks[i].b) return 1;
  return 0;
}

uint32_t unicode_lower(uint32_t code) {
  if (code < 0x80) return code >= 'A' && code <= 'Z' ? code + 32 : code;
  size_t low = 0, high = COUNT(lower_case);
  while (low < high) {
    const size_t middle = (low + high) / 2;
    if (lower_case[middle].a == code) return lower_case[middle].b;
    if (lower_case[middle].a < code) low = middle + 1;
    else high = middle;
  }
  return code;
}

static unsigned combining(uint32_t code) { return code < 0x300 ? 0 : in_ranges(combining_ranges, COUNT(combining_ranges), code); }


/* Full decomposition of one character: at most 4 code points, each step's tail last. */
static size_t decompose(uint32_t code, uint32_t out[8]) {
  if (code - S_BASE < S_COUNT) {
    const uint32_t at = code - S_BASE, tail = at % T_COUNT;
    out[0] = L_BASE + at / (V_COUNT * T_COUNT), out[1] = V_BASE + at % (V_COUNT * T_COUNT) / T_COUNT;
    if (tail) out[2] = T_BASE + tail;
    return tail ? 3 : 2;
  }
  size_t low = 0, high = COUNT(decompositions);
  while (low < high) {
    const size_t middle = (low + high) / 2;
    const unicode_triple *found = decompositions + middle;
    if (found->a == code) {
      size_t n = decompose(found->b, out);
      if (found->c) out[n++] = found->c; /* the second part never decomposes further */
      return n;
    }
    if (found->a < code) low = middle + 1;
    else high = middle;
  }
  out[0] = code;
  return 1;
}

/* Decomposed and in canonical order; memory from malloc, NULL when there is none. */
static uint32_t *decomposed(const char *text, size_t bytes_count, size_t *count) {
  uint32_t *out = malloc((bytes_count * 2 + 8) * sizeof *out), parts[8]; /* a character of 2 bytes has at most 4 parts */
  *count = 0;
  for (size_t at = 0; out && at < bytes_count;) {
    uint32_t code;
    at += utf8_read(text + at, bytes_count - at, &code);
    const size_t n = decompose(code, parts);
    for (size_t i = 0; i < n; i++) {
      const unsigned rank = combining(parts[i]);
      size_t to = (*count)++;
      for (; rank && to > 0 && combining(out[to - 1]) > rank; to--) out[to] = out[to - 1];
      out[to] = parts[i];
    }
  }
  return out;
}

static uint32_t compose(uint32_t a, uint32_t b) {
  if (a - L_BASE < L_COUNT && b - V_BASE < V_COUNT) return S_BASE + ((a - L_BASE) * V_COUNT + (b - V_BASE)) * T_COUNT;
  if (a - S_BASE < S_COUNT && (a - S_BASE) % T_COUNT == 0 && b - T_BASE - 1 < T_COUNT - 1) return a + (b - T_BASE);
  size_t low = 0, high = COUNT(compositions);
  while (low < high) {
    const size_t middle = (low + high) / 2;
    const unicode_triple *found = compositions + middle;
    if (found->a == a && found->b == b) return found->c;
    if (found->a < a || (found->a == a && found->b < b)) low = middle + 1;
    else high = middle;
  }
  return 0;
}

/* In place: each mark joins the last starter unless one of the same or a higher class stands between. */
static size_t composed(uint32_t *codes, size_t count) {
  size_t kept = 0, starter = SIZE_MAX;
  for (size_t i = 0; i < count; i++) {
    const unsigned rank = combining(codes[i]);
    const unsigned last = kept && starter != kept - 1 ? combining(codes[kept - 1]) : 0;
    const int blocked = starter == SIZE_MAX || (starter != kept - 1 && (last >= rank || last == 0));
    const uint32_t joined = blocked ? 0 : compose(codes[starter], codes[i]);
    if (joined) {
      codes[starter] = joined;
      continue;
    }
    if (!rank) starter = kept;
    codes[kept++] = codes[i];
  }
  return kept;
}

static jpq_result write_all(uint32_t *codes, size_t count, bytes *out, jpq_error *error) {
  jpq_result result = codes ? JPQ_SUCCESS : jpq_no_memory(error);
  char text[4];
  for (size_t i = 0; i < count && !result; i++) result = bytes_add(out, text, utf8_write(codes[i], text), error);
  free(codes);
  return result;
}

jpq_result unicode_nfd(const char *text, size_t bytes_count, bytes *out, jpq_error *error) {
  size_t count;
  uint32_t *codes = decomposed(text, bytes_count, &count);
  return write_all(codes, count, out, error);
}

jpq_result unicode_nfc(const char *text, size_t bytes_count, bytes *out, jpq_error *error) {
  size_t count;
  uint32_t *codes = decomposed(text, bytes_count, &count);
  return write_all(codes, codes ? composed(codes, count) : 0, out, error);
}
