/* Running the engine. The cache lies on the GPU in two sets of buffers of the sequence's own: the engine reads one and
 * writes the other, so that nothing of it is copied from token to token; of the logits the last row comes to the host, and
 * only it is computed where the engine asks whose are wanted. */
#include <stdlib.h>

#include "trt_backend.h"

enum { NON_BLOCKING = 1 /* CU_STREAM_NON_BLOCKING */ };

struct backend_cache {
  const trt_backend *owner;
  trt_context *context;
  cuda_stream stream;
  int64_t capacity;
  int32_t profile; /* of the context; -1: none yet */
  int current;     /* the side that holds what is valid */
  cuda_address ids, positions, mask, wanted, logits;
  cuda_address *sides[2]; /* [cached_count] each */
  int64_t *counting;      /* 0, 1, 2 ..., on the host */
};

static void release(const trt_backend *self, cuda_address address) {
  if (address) self->cuda.cuMemFree_v2(address);
}

/* With the GPU's context current. */
static void free_all(backend_cache *c) {
  const trt_backend *self = c->owner;
  if (c->stream) self->cuda.cuStreamSynchronize(c->stream);
  if (c->context) trt_context_free(self->engine, c->context);
  release(self, c->ids), release(self, c->positions), release(self, c->mask);
  release(self, c->wanted), release(self, c->logits);
  for (int side = 0; side < 2; side++)
    for (size_t i = 0; c->sides[side] && i < self->cached_count; i++) release(self, c->sides[side][i]);
  if (c->stream) self->cuda.cuStreamDestroy_v2(c->stream);
}

void trt_cache_free(backend_cache *cache) {
  if (!cache) return;
  if (cuda_enter(&cache->owner->cuda, NULL) == JPQ_SUCCESS) {
    free_all(cache);
    cuda_leave(&cache->owner->cuda);
  }
  free(cache->sides[0]), free(cache->sides[1]), free(cache->counting);
  free(cache);
}

static jpq_result upload(backend_cache *c, cuda_address to, const int64_t *from, int64_t count, jpq_error *error) {
  CUDA_TRY(&c->owner->cuda, cuMemcpyHtoDAsync_v2, (to, from, (size_t)count * sizeof *from, c->stream));
  return JPQ_SUCCESS;
}

static jpq_result synchronize(backend_cache *c, jpq_error *error) {
  CUDA_TRY(&c->owner->cuda, cuStreamSynchronize, (c->stream));
  return JPQ_SUCCESS;
}

static int64_t longest_step(const backend_cache *c) {
  const int64_t most = c->owner->base.most_new;
  return most < c->capacity ? most : c->capacity;
}

static jpq_result allocate(backend_cache *c, jpq_error *error) {
  const trt_backend *self = c->owner;
  const size_t step = (size_t)longest_step(c), all = (size_t)c->capacity, one = sizeof(int64_t);
  const size_t rows = self->takes_wanted ? 1 : step;
  CUDA_TRY(&self->cuda, cuStreamCreate, (&c->stream, NON_BLOCKING));
  JPQ_TRY(trt_context_new(self->engine, &c->context, error));
  CUDA_TRY(&self->cuda, cuMemAlloc_v2, (&c->ids, step * one));
  if (self->takes_positions) CUDA_TRY(&self->cuda, cuMemAlloc_v2, (&c->positions, step * one));
  if (self->takes_mask) CUDA_TRY(&self->cuda, cuMemAlloc_v2, (&c->mask, all * one));
  if (self->takes_wanted) CUDA_TRY(&self->cuda, cuMemAlloc_v2, (&c->wanted, one));
  CUDA_TRY(&self->cuda, cuMemAlloc_v2, (&c->logits, rows * (size_t)self->base.spec.vocab * sizeof(float)));
  for (int side = 0; side < 2; side++)
    for (size_t i = 0; i < self->cached_count; i++) {
      const size_t row = (size_t)(self->cached[i].kv_heads * self->base.spec.head_dim) * sizeof(float);
      CUDA_TRY(&self->cuda, cuMemAlloc_v2, (c->sides[side] + i, all * row));
    }
  return JPQ_SUCCESS;
}

/* The mask is all ones and stays as it is: a step is told how much of it counts. */
static jpq_result fill_mask(backend_cache *c, jpq_error *error) {
  if (!c->mask) return JPQ_SUCCESS;
  for (int64_t i = 0; i < c->capacity; i++) c->counting[i] = 1;
  jpq_result result = upload(c, c->mask, c->counting, c->capacity, error);
  const jpq_result done = synchronize(c, result ? NULL : error); /* whatever happened: the host's array is used again */
  return result ? result : done;
}

jpq_result trt_cache_new(const backend *base, int64_t capacity, backend_cache **out, jpq_error *error) {
  const trt_backend *self = (const trt_backend *)base;
  backend_cache *c = calloc(1, sizeof *c);
  if (!c) return jpq_no_memory(error);
  c->owner = self, c->capacity = capacity, c->profile = -1;
  c->counting = malloc((size_t)capacity * sizeof *c->counting);
  for (int side = 0; side < 2; side++) c->sides[side] = calloc(self->cached_count + 1, sizeof **c->sides);
  jpq_result result = c->counting && c->sides[0] && c->sides[1] ? cuda_enter(&self->cuda, error) : jpq_no_memory(error);
  if (!result) {
    result = allocate(c, error);
    if (!result) result = fill_mask(c, error);
    cuda_leave(&self->cuda);
  }
  if (result) return trt_cache_free(c), result;
  for (int64_t i = 0; i < capacity; i++) c->counting[i] = i;
  return *out = c, JPQ_SUCCESS;
}

static jpq_result bind(backend_cache *c, const char *name, trt_dims shape, cuda_address address, jpq_error *error) {
  return trt_context_bind(c->owner->engine, c->context, name, shape.rank ? &shape : NULL, address, error);
}

static jpq_result bind_tokens(backend_cache *c, int64_t past, const int64_t *ids, int64_t count, jpq_error *error) {
  const trt_backend *self = c->owner;
  const trt_dims row = {2, {1, count}}, whole = {2, {1, past + count}}, last = {1, {1}}, output = {0, {0}};
  JPQ_TRY(upload(c, c->ids, ids, count, error));
  JPQ_TRY(bind(c, "input_ids", row, c->ids, error));
  if (self->takes_mask) JPQ_TRY(bind(c, "attention_mask", whole, c->mask, error));
  if (self->takes_positions) {
    JPQ_TRY(upload(c, c->positions, c->counting + past, count, error));
    JPQ_TRY(bind(c, "position_ids", row, c->positions, error));
  }
  if (self->takes_wanted) {
    JPQ_TRY(upload(c, c->wanted, c->counting + count - 1, 1, error));
    JPQ_TRY(bind(c, "logits_at", last, c->wanted, error));
  }
  return bind(c, "logits", output, c->logits, error);
}

static jpq_result bind_cache(backend_cache *c, int64_t past, jpq_error *error) {
  const trt_dims output = {0, {0}};
  for (size_t i = 0; i < c->owner->cached_count; i++) {
    const trt_cached *one = c->owner->cached + i;
    const trt_dims before = {4, {1, one->kv_heads, past, c->owner->base.spec.head_dim}};
    JPQ_TRY(bind(c, one->past, before, c->sides[c->current][i], error));
    JPQ_TRY(bind(c, one->present, output, c->sides[!c->current][i], error));
  }
  return JPQ_SUCCESS;
}

/* Changing the profile costs the engine some set-up: once after a prompt, not from token to token. */
static jpq_result choose_profile(backend_cache *c, int32_t profile, jpq_error *error) {
  if (c->profile == profile) return JPQ_SUCCESS;
  c->profile = -1;
  JPQ_TRY(trt_context_profile(c->owner->engine, c->context, profile, c->stream, error));
  return c->profile = profile, JPQ_SUCCESS;
}

static jpq_result run_step(backend_cache *c, int64_t past, const int64_t *ids, int64_t count, float *logits, jpq_error *error) {
  const trt_backend *self = c->owner;
  const size_t row = (size_t)self->base.spec.vocab * sizeof *logits;
  JPQ_TRY(choose_profile(c, count == 1 && past ? TRT_DECODE : TRT_PREFILL, error));
  JPQ_TRY(bind_tokens(c, past, ids, count, error));
  JPQ_TRY(bind_cache(c, past, error));
  JPQ_TRY(trt_context_run(self->engine, c->context, c->stream, error));
  const size_t before = self->takes_wanted ? 0 : (size_t)(count - 1) * row;
  CUDA_TRY(&self->cuda, cuMemcpyDtoHAsync_v2, (logits, c->logits + before, row, c->stream));
  return JPQ_SUCCESS;
}

jpq_result trt_step(const backend *base, backend_cache *c, int64_t past, const int64_t *ids, int64_t count, float *logits,
                    jpq_error *error) {
  const trt_backend *self = (const trt_backend *)base;
  if (past + count > c->capacity || count > longest_step(c)) return jpq_fail(error, JPQ_BAD_ARGUMENT, "cache: full");
  JPQ_TRY(cuda_enter(&self->cuda, error));
  jpq_result result = run_step(c, past, ids, count, logits, error);
  const jpq_result done = synchronize(c, result ? NULL : error); /* also after a failure: the caller's arrays are in use */
  cuda_leave(&self->cuda);
  if (!result) result = done;
  if (!result) c->current = !c->current;
  return result;
}
