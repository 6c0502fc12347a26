/* tokenizer.json: the vocabulary, its merges, the added tokens. */
#include <stdlib.h>
#include <string.h>

#include "tokenizer.h"
#include "utf8.h"

enum { MOST_TOKENS = 1 << 24, MOST_MERGES = 1 << 23, MOST_ADDED = 1 << 14, MOST_TOKEN_BYTES = 1 << 16 };

static jpq_result damaged(const char *path, const char *what, const char *which, jpq_error *error) {
  return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: %s '%.60s'; export the bundle again", path, what, which);
}

/* The byte a character stands for in byte-level tokens: printable ones themselves, the others from U+0100 on. */
static int byte_of(uint32_t code) {
  if ((code >= 33 && code <= 126) || (code >= 161 && code <= 172) || (code >= 174 && code <= 255)) return (int)code;
  if (code < 256 || code >= 256 + 68) return -1;
  code -= 256;
  return code <= 32 ? (int)code : code <= 66 ? (int)(127 + code - 33) : 173;
}

/* Bytes of a byte-level token; 0 when a character stands for none. `out` has room for `count` bytes. */
static int to_bytes(const char *text, size_t count, char *out, size_t *written) {
  *written = 0;
  for (size_t at = 0; at < count;) {
    uint32_t code;
    at += utf8_read(text + at, count - at, &code);
    const int byte = byte_of(code);
    if (byte < 0) return 0;
    out[(*written)++] = (char)byte;
  }
  return 1;
}

/* A token's text as bytes; those that are not byte-level keep their text and are never found. */
static jpq_result add_token(tokenizer *t, size_t id, const char *text, size_t count, int searchable, const char *path,
                            jpq_error *error) {
  if (count > MOST_TOKEN_BYTES) return damaged(path, "token longer than 65536 bytes", text, error);
  if (t->is_wordpiece) return vocabulary_add(&t->vocabulary, id, text, count, searchable, error);
  char *raw = malloc(count + 1);
  size_t n;
  if (!raw) return jpq_no_memory(error);
  const int mapped = to_bytes(text, count, raw, &n);
  const jpq_result result = mapped ? vocabulary_add(&t->vocabulary, id, raw, n, searchable, error)
                                   : vocabulary_add(&t->vocabulary, id, text, count, 0, error);
  free(raw);
  return result;
}

static jpq_result read_vocabulary(tokenizer *t, const json *list, int64_t vocab, const char *path, jpq_error *error) {
  if (!list || list->kind != JSON_OBJECT || !list->count || list->count > MOST_TOKENS)
    return damaged(path, "malformed", "model.vocab", error);
  JPQ_TRY(vocabulary_new(&t->vocabulary, (size_t)vocab, list->count, error));
  t->special = calloc((size_t)vocab, 1);
  if (!t->special) return jpq_no_memory(error);
  for (const json *item = list->child; item; item = item->next) {
    if (item->kind != JSON_INTEGER || item->integer < 0 || item->integer >= vocab)
      return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: the id of '%.60s' is not below the model's %lld; it belongs to another model",
                      path, item->name, (long long)vocab);
    JPQ_TRY(add_token(t, (size_t)item->integer, item->name, item->name_bytes, 1, path, error));
  }
  return JPQ_SUCCESS;
}

/* The two tokens of a merge: ["a", "b"] or "a b". */
static int two_parts(const json *item, const char **texts, size_t *counts) {
  if (item->kind == JSON_ARRAY && item->count == 2 && item->child->kind == JSON_STRING && item->child->next->kind == JSON_STRING) {
    texts[0] = item->child->text, counts[0] = item->child->bytes;
    texts[1] = item->child->next->text, counts[1] = item->child->next->bytes;
    return 1;
  }
  const char *space = item->kind == JSON_STRING ? memchr(item->text, ' ', item->bytes) : NULL;
  if (!space) return 0;
  texts[0] = item->text, counts[0] = (size_t)(space - item->text);
  texts[1] = space + 1, counts[1] = item->bytes - counts[0] - 1;
  return 1;
}

static jpq_result read_merge(tokenizer *t, const json *item, uint32_t rank, char *raw, const char *path, jpq_error *error) {
  const char *texts[2];
  size_t counts[2], a, b;
  if (!two_parts(item, texts, counts) || counts[0] + counts[1] > MOST_TOKEN_BYTES)
    return damaged(path, "malformed merge", item->kind == JSON_STRING ? item->text : "list", error);
  if (!to_bytes(texts[0], counts[0], raw, &a) || !to_bytes(texts[1], counts[1], raw + a, &b))
    return damaged(path, "merge of what is not byte-level", texts[0], error);
  const int64_t left = vocabulary_find(&t->vocabulary, raw, a), right = vocabulary_find(&t->vocabulary, raw + a, b);
  const int64_t result = vocabulary_find(&t->vocabulary, raw, a + b);
  if (left < 0 || right < 0 || result < 0) return damaged(path, "merge of tokens that do not exist:", texts[0], error);
  merges_add(&t->merges, (merge){(uint32_t)left, (uint32_t)right, (uint32_t)result, rank});
  return JPQ_SUCCESS;
}

static jpq_result read_merges(tokenizer *t, const json *list, const char *path, jpq_error *error) {
  if (!list || list->kind != JSON_ARRAY || list->count > MOST_MERGES) return damaged(path, "malformed", "model.merges", error);
  JPQ_TRY(merges_new(&t->merges, list->count, error));
  char *raw = malloc(MOST_TOKEN_BYTES + 1);
  jpq_result result = raw ? JPQ_SUCCESS : jpq_no_memory(error);
  uint32_t rank = 0;
  for (const json *item = list->child; item && !result; item = item->next)
    result = read_merge(t, item, rank++, raw, path, error);
  free(raw);
  return result;
}

static jpq_result read_bpe(tokenizer *t, const json *model, const char *path, jpq_error *error) {
  static const char *const strange[] = {"dropout", "continuing_subword_prefix", "end_of_word_suffix"};
  for (int i = 0; i < 3; i++) {
    const json *found = json_get(model, strange[i]);
    if (found && found->kind != JSON_NULL && !(found->kind == JSON_STRING && !found->bytes))
      return tokenizer_refuse(path, "BPE with", strange[i], error);
  }
  if (json_true(model, "byte_fallback")) return tokenizer_refuse(path, "BPE with", "byte_fallback", error);
  for (int i = 0; i < 256; i++) {
    const char byte = (char)i;
    const int64_t id = vocabulary_find(&t->vocabulary, &byte, 1);
    if (id < 0 && json_text(model, "unk_token")) return tokenizer_refuse(path, "BPE with", "unk_token", error);
    t->bytes_to_ids[i] = id < 0 ? NO_TOKEN : (uint32_t)id;
  }
  t->whole = json_true(model, "ignore_merges");
  return read_merges(t, json_get(model, "merges"), path, error);
}

static jpq_result read_wordpiece(tokenizer *t, const json *model, const char *path, jpq_error *error) {
  const char *unknown = json_text(model, "unk_token"), *prefix = json_text(model, "continuing_subword_prefix");
  int64_t most;
  JPQ_TRY(json_integer(model, "max_input_chars_per_word", 100, path, &most, error));
  if (!unknown || !prefix || strlen(prefix) >= sizeof t->prefix || most < 0 || most > MOST_TOKEN_BYTES)
    return damaged(path, "malformed", "model", error);
  strcpy(t->prefix, prefix);
  t->wordpiece = (wordpiece){t->prefix, strlen(prefix), (size_t)most, vocabulary_find(&t->vocabulary, unknown, strlen(unknown))};
  return t->wordpiece.unknown < 0 ? damaged(path, "unk_token is no token:", unknown, error) : JPQ_SUCCESS;
}

jpq_result tokenizer_read_model(tokenizer *t, const json *model, int64_t vocab, const char *path,
                                jpq_error *error) {
  const char *type = json_text(model, "type");
  t->is_wordpiece = type && !strcmp(type, "WordPiece");
  if (!t->is_wordpiece && (!type || strcmp(type, "BPE"))) return tokenizer_refuse(path, "model", type ? type : "of no type", error);
  JPQ_TRY(read_vocabulary(t, json_get(model, "vocab"), vocab, path, error));
  return t->is_wordpiece ? read_wordpiece(t, model, path, error) : read_bpe(t, model, path, error);
}

static jpq_result read_added(tokenizer *t, const json *item, const char *path, jpq_error *error) {
  added_token *made = t->added + t->added_count;
  const json *content = json_get(item, "content");
  JPQ_TRY(json_integer(item, "id", -1, path, &made->id, error));
  if (!content || content->kind != JSON_STRING || !content->bytes || content->bytes > MOST_TOKEN_BYTES || made->id < 0 ||
      made->id >= (int64_t)t->vocabulary.size)
    return damaged(path, "malformed or beyond the model's vocabulary: added token", content && content->text ? content->text : "", error);
  if (json_true(item, "single_word")) return tokenizer_refuse(path, "added token with", "single_word", error);
  made->left_strip = json_true(item, "lstrip"), made->right_strip = json_true(item, "rstrip");
  made->normalized = json_true(item, "normalized");
  if (json_true(item, "special")) t->special[made->id] = 1;
  JPQ_TRY(add_token(t, (size_t)made->id, content->text, content->bytes, 0, path, error));
  bytes text = {0};
  const jpq_result result = made->normalized ? normalize(t, content->text, content->bytes, &text, error)
                                             : bytes_add(&text, content->text, content->bytes, error);
  made->text = text.data, made->bytes = text.count, t->added_count++;
  return result;
}

jpq_result tokenizer_read_added(tokenizer *t, const json *added, const char *path, jpq_error *error) {
  if (!added || added->kind == JSON_NULL) return JPQ_SUCCESS;
  if (added->kind != JSON_ARRAY || added->count > MOST_ADDED) return damaged(path, "malformed", "added_tokens", error);
  t->added = calloc(added->count + 1, sizeof *t->added);
  if (!t->added) return jpq_no_memory(error);
  for (const json *item = added->child; item; item = item->next) JPQ_TRY(read_added(t, item, path, error));
  return JPQ_SUCCESS;
}
