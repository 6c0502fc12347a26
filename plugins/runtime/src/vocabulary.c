/* Hash tables with open addressing, at most half full. */
#include "vocabulary.h"

#include <stdlib.h>
#include <string.h>

static size_t slots_for(size_t most) {
  size_t count = 16;
  while (count < most * 2) count *= 2;
  return count;
}

static size_t hash_text(const char *text, size_t count) {
  uint64_t hash = 14695981039346656037u; /* FNV-1a, then mixed: the low bits choose the slot */
  for (size_t i = 0; i < count; i++) hash = (hash ^ (unsigned char)text[i]) * 1099511628211u;
  return (size_t)((hash ^ hash >> 29) * 0x9e3779b97f4a7c15u >> 16);
}

static size_t hash_pair(uint32_t left, uint32_t right) {
  return (size_t)(((uint64_t)left << 32 | right) * 0x9e3779b97f4a7c15u >> 24);
}

jpq_result vocabulary_new(vocabulary *v, size_t size, size_t most, jpq_error *error) {
  memset(v, 0, sizeof *v);
  v->size = size, v->slot_count = slots_for(most);
  v->starts = calloc(size, sizeof *v->starts), v->lengths = calloc(size, sizeof *v->lengths);
  v->known = calloc(size, 1), v->slots = calloc(v->slot_count, sizeof *v->slots);
  return v->starts && v->lengths && v->known && v->slots ? JPQ_SUCCESS : jpq_no_memory(error);
}

void vocabulary_free(vocabulary *v) {
  free(v->pool.data), free(v->starts), free(v->lengths), free(v->known), free(v->slots);
  memset(v, 0, sizeof *v);
}

static size_t slot_of(const vocabulary *v, const char *text, size_t count) {
  for (size_t at = hash_text(text, count);; at++) {
    const uint32_t held = v->slots[at &= v->slot_count - 1];
    if (!held || (v->lengths[held - 1] == count && !memcmp(v->pool.data + v->starts[held - 1], text, count))) return at;
  }
}

jpq_result vocabulary_add(vocabulary *v, size_t id, const char *text, size_t count, int searchable, jpq_error *error) {
  const size_t start = v->pool.count;
  JPQ_TRY(bytes_add(&v->pool, text, count, error));
  if (!v->known[id]) v->starts[id] = start, v->lengths[id] = count, v->known[id] = 1;
  if (!searchable) return v->starts[id] = start, v->lengths[id] = count, JPQ_SUCCESS;
  const size_t at = slot_of(v, text, count);
  if (!v->slots[at]) v->slots[at] = (uint32_t)id + 1;
  return JPQ_SUCCESS;
}

int64_t vocabulary_find(const vocabulary *v, const char *text, size_t count) {
  return (int64_t)v->slots[slot_of(v, text, count)] - 1;
}

jpq_result merges_new(merges *m, size_t most, jpq_error *error) {
  m->slot_count = slots_for(most);
  m->slots = malloc(m->slot_count * sizeof *m->slots);
  if (!m->slots) return jpq_no_memory(error);
  for (size_t i = 0; i < m->slot_count; i++) m->slots[i].rank = UINT32_MAX;
  return JPQ_SUCCESS;
}

void merges_free(merges *m) {
  free(m->slots);
  memset(m, 0, sizeof *m);
}

static merge *place(const merges *m, uint32_t left, uint32_t right) {
  for (size_t at = hash_pair(left, right);; at++) {
    merge *held = m->slots + (at &= m->slot_count - 1);
    if (held->rank == UINT32_MAX || (held->left == left && held->right == right)) return held;
  }
}

void merges_add(merges *m, merge added) {
  *place(m, added.left, added.right) = added; /* of two the later one counts, as in the library */
}

const merge *merges_find(const merges *m, uint32_t left, uint32_t right) {
  const merge *found = place(m, left, right);
  return found->rank == UINT32_MAX ? NULL : found;
}
