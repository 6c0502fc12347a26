/* JSON by recursive descent; strings are decoded where they lie, values come from large blocks. */
#include "json.h"

#include <stdlib.h>
#include <string.h>

#include "utf8.h"

enum { MOST_DEPTH = 64, BLOCK = 4096 };

typedef struct block {
  struct block *next;
  size_t used;
  json values[BLOCK];
} block;

struct json_document {
  char *data;
  block *blocks;
  json root;
};

typedef struct parser {
  json_document *document;
  char *at, *end;
  const char *wrong; /* NULL while all is well */
} parser;

static json *make(parser *p) {
  block *b = p->document->blocks;
  if (!b || b->used == BLOCK) {
    b = malloc(sizeof *b);
    if (!b) return p->wrong = "too large for the memory", NULL;
    b->next = p->document->blocks, b->used = 0;
    p->document->blocks = b;
  }
  memset(b->values + b->used, 0, sizeof(json));
  return b->values + b->used++;
}

static int fail(parser *p, const char *what) {
  if (!p->wrong) p->wrong = what;
  return 0;
}

static void skip_space(parser *p) {
  while (p->at < p->end && (*p->at == ' ' || *p->at == '\t' || *p->at == '\n' || *p->at == '\r')) p->at++;
}

static int take(parser *p, const char *word) {
  size_t n = strlen(word);
  if ((size_t)(p->end - p->at) < n || memcmp(p->at, word, n)) return 0;
  p->at += n;
  return 1;
}

static int hex4(parser *p, uint32_t *out) {
  if (p->end - p->at < 4) return fail(p, "cut \\u escape");
  *out = 0;
  for (int i = 0; i < 4; i++) {
    const char c = *p->at++;
    if (c >= '0' && c <= '9') *out = *out << 4 | (uint32_t)(c - '0');
    else if ((c | 32) >= 'a' && (c | 32) <= 'f') *out = *out << 4 | (uint32_t)((c | 32) - 'a' + 10);
    else return fail(p, "bad \\u escape");
  }
  return 1;
}

/* After the backslash; writes at most as many bytes as were read. */
static int escape(parser *p, char **out) {
  static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
  if (p->at == p->end) return fail(p, "cut string");
  const char c = *p->at++;
  if (c == 'u') {
    uint32_t code, low;
    if (!hex4(p, &code)) return 0;
    if (code >= 0xdc00 && code < 0xe000) return fail(p, "half a surrogate pair");
    if (code >= 0xd800 && code < 0xdc00) {
      if (!take(p, "\\u") || !hex4(p, &low) || low < 0xdc00 || low > 0xdfff) return fail(p, "half a surrogate pair");
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    *out += utf8_write(code, *out);
    return 1;
  }
  const char *found = c ? strchr(from, c) : NULL;
  if (!found) return fail(p, "unknown escape");
  *(*out)++ = to[found - from];
  return 1;
}

static int string(parser *p, const char **text, size_t *bytes) {
  if (!take(p, "\"")) return fail(p, "expected a string");
  char *const start = p->at, *out = start;
  while (p->at < p->end && *p->at != '"') {
    const unsigned char c = (unsigned char)*p->at;
    if (c < 0x20) return fail(p, "control character in a string");
    if (c == '\\') {
      p->at++;
      if (!escape(p, &out)) return 0;
    } else {
      uint32_t code;
      const size_t n = utf8_read(p->at, (size_t)(p->end - p->at), &code);
      if (code == UTF8_INVALID) return fail(p, "invalid UTF-8");
      memmove(out, p->at, n);
      out += n, p->at += n;
    }
  }
  if (p->at == p->end) return fail(p, "cut string");
  p->at++;
  *out = 0; /* at most where the closing quote was */
  *text = start, *bytes = (size_t)(out - start);
  return 1;
}

static size_t digits(parser *p) {
  const char *start = p->at;
  while (p->at < p->end && *p->at >= '0' && *p->at <= '9') p->at++;
  return (size_t)(p->at - start);
}

/* Integers exactly, others as decimal digits times a power of ten: strtod would heed the program's locale. */
static int number(parser *p, json *out) {
  const int negative = take(p, "-");
  const char *first = p->at;
  const size_t whole = digits(p);
  if (!whole || (whole > 1 && *first == '0')) return fail(p, "malformed number");
  int64_t value = 0, exponent = 0;
  double real = 0, scale = 1;
  for (size_t i = 0; i < whole; i++) {
    real = real * 10 + (first[i] - '0');
    if (value > (INT64_MAX - 9) / 10) value = -1; /* stays so: not an integer of ours */
    if (value >= 0) value = value * 10 + (first[i] - '0');
  }
  out->kind = value >= 0 ? JSON_INTEGER : JSON_REAL;
  if (take(p, ".")) {
    first = p->at, out->kind = JSON_REAL;
    if (!digits(p)) return fail(p, "malformed number");
    for (; first < p->at; first++) real += (*first - '0') * (scale /= 10);
  }
  if (p->at < p->end && (*p->at | 32) == 'e') {
    p->at++, out->kind = JSON_REAL;
    const int down = take(p, "-");
    if (!down) take(p, "+");
    first = p->at;
    if (!digits(p)) return fail(p, "malformed number");
    for (; first < p->at && exponent < 400; first++) exponent = exponent * 10 + (*first - '0');
    for (; exponent > 0; exponent--) real = down ? real / 10 : real * 10;
  }
  out->integer = negative ? -value : value;
  out->real = negative ? -real : real;
  return 1;
}

static int value(parser *p, json *out, int depth);

/* What stands between brackets. */
static int members(parser *p, json *out, int depth, char close) {
  const json **link = &out->child;
  for (skip_space(p); p->at < p->end && *p->at != close; skip_space(p)) {
    if (out->count && !take(p, ",")) return fail(p, "expected a comma");
    json *item = make(p);
    if (!item) return 0;
    skip_space(p);
    if (close == '}') {
      if (!string(p, &item->name, &item->name_bytes)) return 0;
      skip_space(p);
      if (!take(p, ":")) return fail(p, "expected a colon");
    }
    if (!value(p, item, depth + 1)) return 0;
    *link = item, link = &item->next, out->count++;
  }
  if (p->at == p->end) return fail(p, "it ends too early");
  p->at++;
  return 1;
}

static int value(parser *p, json *out, int depth) {
  if (depth > MOST_DEPTH) return fail(p, "nested too deeply");
  skip_space(p);
  if (p->at == p->end) return fail(p, "it ends too early");
  const char c = *p->at;
  if (c == '{' || c == '[') {
    p->at++, out->kind = c == '{' ? JSON_OBJECT : JSON_ARRAY;
    return members(p, out, depth, c == '{' ? '}' : ']');
  }
  if (c == '"') return out->kind = JSON_STRING, string(p, &out->text, &out->bytes);
  if (c == '-' || (c >= '0' && c <= '9')) return number(p, out);
  if (take(p, "null")) return out->kind = JSON_NULL, 1;
  if (take(p, "false")) return out->kind = JSON_FALSE, 1;
  if (take(p, "true")) return out->kind = JSON_TRUE, 1;
  return fail(p, "unexpected character");
}

jpq_result json_parse(char *data, size_t bytes, const char *where, json_document **out, jpq_error *error) {
  json_document *document = calloc(1, sizeof *document);
  if (!document) return free(data), jpq_no_memory(error);
  document->data = data;
  parser p = {document, data, data + bytes, NULL};
  if (value(&p, &document->root, 0)) {
    skip_space(&p);
    if (p.at != p.end) fail(&p, "something follows the value");
  }
  if (!p.wrong) return *out = document, JPQ_SUCCESS;
  const size_t at = (size_t)(p.at - data);
  json_free(document);
  return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: not readable JSON (%s at byte %zu); export the bundle again", where, p.wrong, at);
}

void json_free(json_document *document) {
  if (!document) return;
  for (block *b = document->blocks, *next; b; b = next) next = b->next, free(b);
  free(document->data);
  free(document);
}

const json *json_root(const json_document *document) { return &document->root; }

const json *json_get(const json *value, const char *name) {
  const json *found = NULL;
  if (!value || value->kind != JSON_OBJECT) return NULL;
  for (const json *item = value->child; item; item = item->next)
    if (!strcmp(item->name, name) && strlen(name) == item->name_bytes) found = item; /* the last wins, as in Python */
  return found;
}

const char *json_text(const json *value, const char *name) {
  const json *found = json_get(value, name);
  return found && found->kind == JSON_STRING && strlen(found->text) == found->bytes ? found->text : NULL;
}

jpq_result json_integer(const json *value, const char *name, int64_t otherwise, const char *where, int64_t *out,
                        jpq_error *error) {
  const json *found = json_get(value, name);
  if (!found || found->kind == JSON_NULL) return *out = otherwise, JPQ_SUCCESS;
  if (found->kind != JSON_INTEGER)
    return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: %s is not an integer; export the bundle again", where, name);
  return *out = found->integer, JPQ_SUCCESS;
}

int json_true(const json *value, const char *name) {
  const json *found = json_get(value, name);
  return found && found->kind == JSON_TRUE;
}
