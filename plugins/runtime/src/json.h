/* A strict JSON reader (RFC 8259) for files that may come from anywhere: sizes and depth are limited. */
#ifndef JPQ_RUNTIME_JSON_H
#define JPQ_RUNTIME_JSON_H

#include <stddef.h>
#include <stdint.h>

#include "error.h"

typedef enum json_kind { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_INTEGER, JSON_REAL, JSON_STRING, JSON_ARRAY, JSON_OBJECT } json_kind;

/* A value; `name` when it is a member. Strings are UTF-8, NUL-terminated, and may hold NUL: `bytes` is their length. */
typedef struct json {
  json_kind kind;
  const char *name;
  size_t name_bytes;
  const char *text;
  size_t bytes;
  int64_t integer;
  double real; /* of JSON_REAL and JSON_INTEGER */
  size_t count;
  const struct json *child, *next;
} json;

typedef struct json_document json_document;

/* Parse `bytes` bytes; takes over `data` (from malloc) whether it succeeds or not. `where` names it in errors. */
jpq_result json_parse(char *data, size_t bytes, const char *where, json_document **out, jpq_error *error);
void json_free(json_document *document);
const json *json_root(const json_document *document);

/* Member of an object; NULL when it is none or has no such member. */
const json *json_get(const json *value, const char *name);
/* Text of a string member; NULL otherwise. */
const char *json_text(const json *value, const char *name);
/* An integer member, or `otherwise` when it is absent or null. JPQ_BAD_BUNDLE when it is something else. */
jpq_result json_integer(const json *value, const char *name, int64_t otherwise, const char *where, int64_t *out,
                        jpq_error *error);
/* 1 for true, 0 for false or absent. */
int json_true(const json *value, const char *name);

#endif
