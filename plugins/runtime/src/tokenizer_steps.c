/* tokenizer.json: normalizer, pre-tokenizer, post-processor, decoder; each kind by its name or refused.
 * Its truncation is left out, as in Python: a text that is too long is refused, never cut. */
#include <string.h>

#include "tokenizer.h"

jpq_result tokenizer_refuse(const char *path, const char *part, const char *got, jpq_error *error) {
  return jpq_fail(error, JPQ_UNSUPPORTED,
                  "%s: %s %.60s is not interpreted here (byte-level BPE and WordPiece are); tokenise with Python's `tokenizers` and use jpq_generate_ids",
                  path, part, got);
}

static const char *type_of(const json *step) {
  const char *type = json_text(step, "type");
  return type ? type : "of no type";
}

typedef jpq_result (*read_step)(tokenizer *t, const json *step, const char *path, jpq_error *error);

/* Nothing, one step, or a Sequence of them under `list`. */
static jpq_result each(tokenizer *t, const json *step, const char *list, read_step read, const char *path, jpq_error *error) {
  if (!step || step->kind == JSON_NULL) return JPQ_SUCCESS;
  if (strcmp(type_of(step), "Sequence")) return read(t, step, path, error);
  const json *steps = json_get(step, list);
  for (const json *item = steps ? steps->child : NULL; item; item = item->next) JPQ_TRY(each(t, item, list, read, path, error));
  return JPQ_SUCCESS;
}

static jpq_result read_normalizer(tokenizer *t, const json *step, const char *path, jpq_error *error) {
  const char *type = type_of(step);
  unsigned flags;
  if (!strcmp(type, "NFC")) flags = NORMALIZE_NFC;
  else if (!strcmp(type, "NFD")) flags = NORMALIZE_NFD;
  else if (!strcmp(type, "Lowercase")) flags = NORMALIZE_LOWER;
  else if (!strcmp(type, "BertNormalizer")) {
    const json *strip = json_get(step, "strip_accents");
    const int lower = json_true(step, "lowercase");
    const int strips = strip && strip->kind != JSON_NULL ? strip->kind == JSON_TRUE : lower; /* null follows lowercase */
    flags = (lower ? NORMALIZE_LOWER : 0u) | (strips ? NORMALIZE_NFD | NORMALIZE_STRIP : 0u);
    flags |= (json_true(step, "clean_text") ? NORMALIZE_CLEAN : 0u) | (json_true(step, "handle_chinese_chars") ? NORMALIZE_CHINESE : 0u);
  } else {
    return tokenizer_refuse(path, "normalizer", type, error);
  }
  if (t->normalize_count == MOST_STEPS) return tokenizer_refuse(path, "normalizer", "of more than 16 steps", error);
  return t->normalize[t->normalize_count++] = flags, JPQ_SUCCESS;
}

static jpq_result add_split(tokenizer *t, split_kind kind, const char *path, jpq_error *error) {
  if (t->split_count == MOST_STEPS) return tokenizer_refuse(path, "pre-tokenizer", "of more than 16 steps", error);
  return t->splits[t->split_count++] = kind, JPQ_SUCCESS;
}

static jpq_result read_split(tokenizer *t, const json *step, const char *path, jpq_error *error) {
  const char *type = type_of(step);
  split_kind kind;
  if (!strcmp(type, "Digits"))
    return add_split(t, json_true(step, "individual_digits") ? SPLIT_DIGITS : SPLIT_DIGIT_RUNS, path, error);
  if (!strcmp(type, "BertPreTokenizer")) return add_split(t, SPLIT_BERT, path, error);
  if (!strcmp(type, "ByteLevel")) {
    if (json_true(step, "add_prefix_space")) return tokenizer_refuse(path, "ByteLevel with", "add_prefix_space", error);
    const json *regex = json_get(step, "use_regex"); /* true when it is absent */
    return regex && regex->kind == JSON_FALSE ? JPQ_SUCCESS : add_split(t, SPLIT_GPT2, path, error);
  }
  if (strcmp(type, "Split")) return tokenizer_refuse(path, "pre-tokenizer", type, error);
  const char *pattern = json_text(json_get(step, "pattern"), "Regex"), *behavior = json_text(step, "behavior");
  const int inverted = json_true(step, "invert"); /* these expressions match everything: removing the rest is the same */
  if (!pattern || !split_of_regex(pattern, &kind)) return tokenizer_refuse(path, "Split by", pattern ? pattern : "a string", error);
  if (!behavior || strcmp(behavior, inverted ? "Removed" : "Isolated"))
    return tokenizer_refuse(path, "Split with behavior", behavior ? behavior : "none", error);
  return add_split(t, kind, path, error);
}

static jpq_result add_special(tokenizer *t, int behind, int64_t id, const char *path, jpq_error *error) {
  int64_t *list = behind ? t->after : t->before;
  size_t *count = behind ? &t->after_count : &t->before_count;
  if (id < 0 || id >= (int64_t)t->vocabulary.size || *count == MOST_SPECIAL)
    return jpq_fail(error, JPQ_BAD_BUNDLE, "%s: malformed post_processor; export the bundle again", path);
  return list[(*count)++] = id, JPQ_SUCCESS;
}

static jpq_result read_template(tokenizer *t, const json *step, const char *path, jpq_error *error) {
  const json *single = json_get(step, "single"), *special = json_get(step, "special_tokens");
  int behind = 0;
  for (const json *part = single ? single->child : NULL; part; part = part->next) {
    const json *token = json_get(part, "SpecialToken");
    behind |= json_get(part, "Sequence") != NULL;
    if (!token) continue;
    const char *name = json_text(token, "id");
    const json *list = name ? json_get(json_get(special, name), "ids") : NULL;
    if (!list) return add_special(t, behind, -1, path, error);
    for (const json *id = list->child; id; id = id->next)
      JPQ_TRY(add_special(t, behind, id->kind == JSON_INTEGER ? id->integer : -1, path, error));
  }
  return JPQ_SUCCESS;
}

static jpq_result read_post(tokenizer *t, const json *step, const char *path, jpq_error *error) {
  const char *type = type_of(step);
  if (!strcmp(type, "ByteLevel")) return JPQ_SUCCESS; /* offsets only */
  if (!strcmp(type, "TemplateProcessing")) return read_template(t, step, path, error);
  if (strcmp(type, "BertProcessing") && strcmp(type, "RobertaProcessing"))
    return tokenizer_refuse(path, "post-processor", type, error);
  for (int behind = 0; behind < 2; behind++) { /* ["[SEP]", 102] */
    const json *pair = json_get(step, behind ? "sep" : "cls");
    const json *id = pair && pair->child ? pair->child->next : NULL;
    JPQ_TRY(add_special(t, behind, id && id->kind == JSON_INTEGER ? id->integer : -1, path, error));
  }
  return JPQ_SUCCESS;
}

jpq_result tokenizer_read_steps(tokenizer *t, const json *root, const char *path, jpq_error *error) {
  JPQ_TRY(each(t, json_get(root, "normalizer"), "normalizers", read_normalizer, path, error));
  JPQ_TRY(each(t, json_get(root, "pre_tokenizer"), "pretokenizers", read_split, path, error));
  JPQ_TRY(each(t, json_get(root, "post_processor"), "processors", read_post, path, error));
  const json *decoder = json_get(root, "decoder");
  t->decodes = !t->is_wordpiece && decoder && !strcmp(type_of(decoder), "ByteLevel");
  return JPQ_SUCCESS;
}
