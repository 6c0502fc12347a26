/* What becomes of one piece of text: byte-pair encoding (Sennrich et al., 2016) and WordPiece (Schuster, Nakajima, 2012). */
#include <stdlib.h>
#include <string.h>

#include "utf8.h"
#include "vocabulary.h"

enum { ON_STACK = 64 };
#define NONE SIZE_MAX

/* A symbol of the word, linked to its neighbours; `id` NO_TOKEN once it went into its left one. */
typedef struct symbol {
  uint32_t id;
  size_t before, after;
} symbol;

/* A merge that was possible when it was pushed: lowest rank first, then leftmost. */
typedef struct candidate {
  size_t at;
  const merge *found;
} candidate;

static int sooner(const candidate *a, const candidate *b) {
  return a->found->rank != b->found->rank ? a->found->rank < b->found->rank : a->at < b->at;
}

static void push(candidate *heap, size_t *count, candidate added) {
  size_t at = (*count)++;
  for (; at > 0 && sooner(&added, heap + (at - 1) / 2); at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
  heap[at] = added;
}

static candidate pop(candidate *heap, size_t *count) {
  const candidate first = heap[0], last = heap[--*count];
  size_t at = 0;
  for (size_t child; (child = 2 * at + 1) < *count; at = child) {
    if (child + 1 < *count && sooner(heap + child + 1, heap + child)) child++;
    if (!sooner(heap + child, &last)) break;
    heap[at] = heap[child];
  }
  heap[at] = last;
  return first;
}

static void consider(const merges *m, const symbol *word, size_t at, candidate *heap, size_t *count) {
  if (at == NONE || word[at].after == NONE) return;
  const merge *found = merges_find(m, word[at].id, word[word[at].after].id);
  if (found) push(heap, count, (candidate){at, found});
}

static void merge_all(const merges *m, symbol *word, size_t length, candidate *heap) {
  size_t waiting = 0;
  for (size_t i = 0; i + 1 < length; i++) consider(m, word, i, heap, &waiting);
  while (waiting) {
    const candidate next = pop(heap, &waiting);
    symbol *left = word + next.at;
    if (left->id != next.found->left || left->after == NONE || word[left->after].id != next.found->right) continue;
    symbol *right = word + left->after;
    left->id = next.found->result, left->after = right->after, right->id = NO_TOKEN;
    if (left->after != NONE) word[left->after].before = next.at;
    consider(m, word, left->before, heap, &waiting);
    consider(m, word, next.at, heap, &waiting);
  }
}

jpq_result bpe(const vocabulary *v, const merges *m, const uint32_t bytes_to_ids[256], int whole, const char *text,
               size_t count, ids *out, jpq_error *error) {
  symbol few[ON_STACK], *word = few;
  candidate few_waiting[3 * ON_STACK], *heap = few_waiting;
  jpq_result result = JPQ_SUCCESS;
  if (!count) return result;
  const int64_t known = whole ? vocabulary_find(v, text, count) : -1;
  if (known >= 0) return ids_add(out, known, error);
  if (count > ON_STACK) {
    if (count > SIZE_MAX / sizeof *word / 4) return jpq_no_memory(error);
    /* Every merge takes one candidate and adds at most two: never more than 3 a symbol. */
    word = malloc(count * sizeof *word), heap = malloc(3 * count * sizeof *heap);
    if (!word || !heap) return free(word), free(heap), jpq_no_memory(error);
  }
  size_t length = 0;
  for (size_t i = 0; i < count; i++) {
    const uint32_t id = bytes_to_ids[(unsigned char)text[i]];
    if (id == NO_TOKEN) continue;
    word[length] = (symbol){id, length ? length - 1 : NONE, length + 1};
    length++;
  }
  if (length) word[length - 1].after = NONE;
  merge_all(m, word, length, heap);
  for (size_t at = length ? 0 : NONE; at != NONE && !result; at = word[at].after) result = ids_add(out, word[at].id, error);
  if (word != few) free(word), free(heap);
  return result;
}

static size_t characters(const char *text, size_t count) {
  size_t n = 0;
  for (size_t i = 0; i < count; i++) n += ((unsigned char)text[i] & 0xc0) != 0x80;
  return n;
}

/* The longest token at the start of the text; its bytes in *taken. `key` has room for prefix and text. */
static int64_t longest(const vocabulary *v, const wordpiece *w, int inside, const char *text, size_t count, char *key,
                       size_t *taken) {
  const size_t prefix = inside ? w->prefix_bytes : 0;
  memcpy(key, w->prefix, prefix);
  memcpy(key + prefix, text, count);
  for (size_t n = count; n > 0; n--) {
    if (n < count && ((unsigned char)text[n] & 0xc0) == 0x80) continue; /* not between characters */
    const int64_t id = vocabulary_find(v, key, prefix + n);
    if (id >= 0) return *taken = n, id;
  }
  return -1;
}

jpq_result wordpiece_split(const vocabulary *v, const wordpiece *w, const char *text, size_t count, ids *out,
                           jpq_error *error) {
  const size_t before = out->count;
  if (!count) return JPQ_SUCCESS;
  if (characters(text, count) > w->most_characters) return ids_add(out, w->unknown, error);
  char *key = malloc(w->prefix_bytes + count);
  jpq_result result = key ? JPQ_SUCCESS : jpq_no_memory(error);
  for (size_t at = 0, taken; at < count && !result; at += taken) {
    const int64_t id = longest(v, w, at > 0, text + at, count - at, key, &taken);
    if (id < 0) {
      out->count = before;
      result = ids_add(out, w->unknown, error);
      break;
    }
    result = ids_add(out, id, error);
  }
  free(key);
  return result;
}
