/* tokenizer.json interpreted: byte-level BPE and WordPiece, with the normalizers, pre-tokenizers and post-processors that
 * go with them. Everything else is refused by name. */
#ifndef JPQ_RUNTIME_TOKENIZER_H
#define JPQ_RUNTIME_TOKENIZER_H

#include "bundle.h"
#include "split.h"
#include "vocabulary.h"

enum { MOST_STEPS = 16, MOST_SPECIAL = 64 };

/* Text that is always one token, found before anything is cut. */
typedef struct added_token {
  char *text; /* as it is looked for: normalised when `normalized` */
  size_t bytes;
  int64_t id;
  int left_strip, right_strip; /* take the spaces there along */
  int normalized;              /* look for it after normalisation */
} added_token;

enum { NORMALIZE_CLEAN = 1, NORMALIZE_CHINESE = 2, NORMALIZE_NFD = 4, NORMALIZE_STRIP = 8, NORMALIZE_LOWER = 16, NORMALIZE_NFC = 32 };

typedef struct tokenizer {
  vocabulary vocabulary;
  unsigned char *special; /* [vocabulary.size]: not part of decoded text */
  int is_wordpiece;
  merges merges;
  uint32_t bytes_to_ids[256];
  int whole; /* a piece that is a token needs no merges */
  wordpiece wordpiece;
  char prefix[32];
  unsigned normalize[MOST_STEPS]; /* flags of one normalizer each, in order */
  size_t normalize_count;
  split_kind splits[MOST_STEPS];
  size_t split_count;
  added_token *added;
  size_t added_count;
  int64_t before[MOST_SPECIAL], after[MOST_SPECIAL]; /* special tokens around the text's */
  size_t before_count, after_count;
  int64_t bos_id;   /* put first unless it is there already; -1: do not */
  int decodes;      /* the decoder is ByteLevel */
} tokenizer;

/* JPQ_UNSUPPORTED, naming the part, when it is of a kind we do not interpret. */
jpq_result tokenizer_load(const char *folder, const model_spec *spec, tokenizer **out, jpq_error *error);
void tokenizer_free(tokenizer *t);

/* Ids with special tokens. */
jpq_result tokenizer_encode(const tokenizer *t, const char *text, size_t bytes, ids *out, jpq_error *error);

/* Append `text` to `out`, with U+FFFD for what is no UTF-8. `cut`: how many last bytes begin an unfinished character;
 * NULL: nothing follows, so they become U+FFFD as well. */
jpq_result utf8_repair(const char *text, size_t count, bytes *out, size_t *cut, jpq_error *error);

jpq_result normalize(const tokenizer *t, const char *text, size_t count, bytes *out, jpq_error *error);

/* Reading parts of tokenizer.json; `path` for errors. */
jpq_result tokenizer_read_model(tokenizer *t, const json *model, int64_t vocab, const char *path,
                                jpq_error *error);
jpq_result tokenizer_read_added(tokenizer *t, const json *added, const char *path, jpq_error *error);
jpq_result tokenizer_read_steps(tokenizer *t, const json *root, const char *path, jpq_error *error);
jpq_result tokenizer_refuse(const char *path, const char *part, const char *got, jpq_error *error);

#endif
