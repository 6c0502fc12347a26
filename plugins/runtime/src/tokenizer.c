/* Text to ids: added tokens, normalisation, pieces, the model, special tokens around it; and bytes back to text. */
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "unicode.h"
#include "utf8.h"

enum { MOST_FILE = 256 << 20 };

static jpq_result read_all(tokenizer *t, const json *root, const model_spec *spec, const char *path, jpq_error *error) {
  JPQ_TRY(tokenizer_read_model(t, json_get(root, "model"), spec->vocab, path, error));
  JPQ_TRY(tokenizer_read_steps(t, root, path, error));
  return tokenizer_read_added(t, json_get(root, "added_tokens"), path, error); /* last: some are normalised */
}

jpq_result tokenizer_load(const char *folder, const model_spec *spec, tokenizer **out, jpq_error *error) {
  char path[PATH_MOST], *data;
  size_t count;
  json_document *document;
  *out = NULL;
  JPQ_TRY(bundle_path(folder, "tokenizer.json", path, error));
  JPQ_TRY(read_file(path, MOST_FILE, &data, &count, error));
  JPQ_TRY(json_parse(data, count, path, &document, error));
  tokenizer *t = calloc(1, sizeof *t);
  jpq_result result = t ? read_all(t, json_root(document), spec, path, error) : jpq_no_memory(error);
  json_free(document);
  if (result) return tokenizer_free(t), result;
  t->bos_id = spec->add_bos ? spec->bos_id : -1;
  return *out = t, JPQ_SUCCESS;
}

void tokenizer_free(tokenizer *t) {
  if (!t) return;
  for (size_t i = 0; i < t->added_count; i++) free(t->added[i].text);
  vocabulary_free(&t->vocabulary);
  merges_free(&t->merges);
  free(t->added), free(t->special);
  free(t);
}

jpq_result utf8_repair(const char *text, size_t count, bytes *out, size_t *cut, jpq_error *error) {
  if (cut) *cut = 0;
  for (size_t at = 0, n; at < count; at += n) {
    uint32_t code;
    n = utf8_read(text + at, count - at, &code);
    if (code == UTF8_CUT && cut) return *cut = n, JPQ_SUCCESS;
    const int valid = code != UTF8_CUT && code != UTF8_INVALID;
    JPQ_TRY(bytes_add(out, valid ? text + at : "\xef\xbf\xbd", valid ? n : 3, error));
  }
  return JPQ_SUCCESS;
}

/* One piece after another through the pre-tokenizers from `step` on, then the model. */
static jpq_result encode_piece(const tokenizer *t, size_t step, const char *text, size_t count, ids *out, jpq_error *error) {
  if (step == t->split_count)
    return t->is_wordpiece ? wordpiece_split(&t->vocabulary, &t->wordpiece, text, count, out, error)
                           : bpe(&t->vocabulary, &t->merges, t->bytes_to_ids, t->whole, text, count, out, error);
  for (size_t at = 0, n; at < count; at += n) {
    int dropped;
    n = split_next(t->splits[step], text + at, count - at, &dropped);
    if (!dropped) JPQ_TRY(encode_piece(t, step + 1, text + at, n, out, error));
  }
  return JPQ_SUCCESS;
}

/* The longest added token at `text`; NULL when there is none. */
static const added_token *added_at(const tokenizer *t, int normalized, const char *text, size_t count) {
  const added_token *found = NULL;
  for (size_t i = 0; i < t->added_count; i++) {
    const added_token *one = t->added + i;
    if (one->normalized != normalized || !one->bytes || one->bytes > count || one->text[0] != *text) continue;
    if (!memcmp(one->text, text, one->bytes) && (!found || one->bytes > found->bytes)) found = one;
  }
  return found;
}

/* Where the spaces before `at` begin, not before `first`; and where those from `at` on end. */
static size_t spaces_before(const char *text, size_t first, size_t at) {
  while (at > first) {
    size_t to = at - 1;
    uint32_t code;
    while (to > first && ((unsigned char)text[to] & 0xc0) == 0x80) to--;
    utf8_read(text + to, at - to, &code);
    if (!unicode_space(code)) break;
    at = to;
  }
  return at;
}

static size_t spaces_after(const char *text, size_t at, size_t count) {
  uint32_t code;
  for (size_t n; at < count; at += n) {
    n = utf8_read(text + at, count - at, &code);
    if (!unicode_space(code)) break;
  }
  return at;
}

static jpq_result between(const tokenizer *t, int normalized, const char *text, size_t count, ids *out, jpq_error *error);

/* Cut at added tokens; what lies between is normalised and cut again, then encoded. */
static jpq_result encode_part(const tokenizer *t, int normalized, const char *text, size_t count, ids *out, jpq_error *error) {
  size_t start = 0;
  for (size_t at = 0; at < count;) {
    const added_token *found = added_at(t, normalized, text + at, count - at);
    if (!found) {
      at++;
      continue;
    }
    const size_t end = found->left_strip ? spaces_before(text, start, at) : at;
    JPQ_TRY(between(t, normalized, text + start, end - start, out, error));
    JPQ_TRY(ids_add(out, found->id, error));
    at += found->bytes;
    if (found->right_strip) at = spaces_after(text, at, count);
    start = at;
  }
  return between(t, normalized, text + start, count - start, out, error);
}

static jpq_result between(const tokenizer *t, int normalized, const char *text, size_t count, ids *out, jpq_error *error) {
  if (!count) return JPQ_SUCCESS;
  if (normalized) return encode_piece(t, 0, text, count, out, error);
  bytes changed = {0};
  jpq_result result = normalize(t, text, count, &changed, error);
  if (!result) result = encode_part(t, 1, changed.data, changed.count, out, error);
  free(changed.data);
  return result;
}

static jpq_result finish(const tokenizer *t, const ids *plain, ids *out, jpq_error *error) {
  const size_t kept = plain->count;
  const int64_t first = t->before_count ? t->before[0] : kept ? plain->data[0] : -1;
  if (t->bos_id >= 0 && first != t->bos_id) JPQ_TRY(ids_add(out, t->bos_id, error));
  for (size_t i = 0; i < t->before_count; i++) JPQ_TRY(ids_add(out, t->before[i], error));
  for (size_t i = 0; i < kept; i++) JPQ_TRY(ids_add(out, plain->data[i], error));
  for (size_t i = 0; i < t->after_count; i++) JPQ_TRY(ids_add(out, t->after[i], error));
  return JPQ_SUCCESS;
}

jpq_result tokenizer_encode(const tokenizer *t, const char *text, size_t count, ids *out, jpq_error *error) {
  bytes valid = {0};
  ids plain = {0};
  jpq_result result = utf8_repair(text, count, &valid, NULL, error);
  if (!result) result = encode_part(t, 0, valid.data, valid.count, &plain, error);
  if (!result) result = finish(t, &plain, out, error);
  free(valid.data), free(plain.data);
  return result;
}
