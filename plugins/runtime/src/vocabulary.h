/* Token texts by id, ids by text, and the merges of a byte-pair encoding. */
#ifndef JPQ_RUNTIME_VOCABULARY_H
#define JPQ_RUNTIME_VOCABULARY_H

#include "buffer.h"

typedef struct vocabulary {
  bytes pool;                 /* all texts, one after the other */
  size_t *starts, *lengths;   /* [size], in pool */
  unsigned char *known;       /* [size]: this id has a text */
  size_t size;                /* ids are below it */
  uint32_t *slots;            /* id + 1 by hash of the text; a power of two of them */
  size_t slot_count;
} vocabulary;

/* `size`: ids are below it; `most`: so many texts will be added. */
jpq_result vocabulary_new(vocabulary *v, size_t size, size_t most, jpq_error *error);
void vocabulary_free(vocabulary *v);
/* Set the text of an id; `searchable`: vocabulary_find shall find it. */
jpq_result vocabulary_add(vocabulary *v, size_t id, const char *text, size_t count, int searchable, jpq_error *error);
/* -1 when there is none. */
int64_t vocabulary_find(const vocabulary *v, const char *text, size_t count);

#define NO_TOKEN UINT32_MAX

typedef struct merge {
  uint32_t left, right, result, rank;
} merge;

typedef struct merges {
  merge *slots; /* rank is UINT32_MAX where there is none */
  size_t slot_count;
} merges;

jpq_result merges_new(merges *m, size_t most, jpq_error *error);
void merges_free(merges *m);
/* Of two for one pair the later counts. */
void merges_add(merges *m, merge added);
const merge *merges_find(const merges *m, uint32_t left, uint32_t right);

/* Ids of one piece of text. `bytes_to_ids` [256]: a byte without a token is left out; `whole`: take the piece itself when it is a token. */
jpq_result bpe(const vocabulary *v, const merges *m, const uint32_t bytes_to_ids[256], int whole, const char *text,
               size_t count, ids *out, jpq_error *error);

/* WordPiece: the longest tokens from the left, all but the first written with `prefix`. */
typedef struct wordpiece {
  const char *prefix;
  size_t prefix_bytes, most_characters; /* of a word; longer ones are unknown */
  int64_t unknown;
} wordpiece;
jpq_result wordpiece_split(const vocabulary *v, const wordpiece *w, const char *text, size_t count, ids *out,
                           jpq_error *error);

#endif
