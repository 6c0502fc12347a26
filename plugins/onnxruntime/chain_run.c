/* A run of `jpq::LowBitChain`: few rows pass all links in one call of ParallelFor (crew.h), with at most MOST_SHARES
 * threads; many link by link, in blocks for which ROOM holds what lies between. */
#include <stdlib.h>
#include <string.h>

#include "../core/rowwise.h"
#include "chain.h"

enum {
  FEW_ROWS = 8,                              /* that pass all links at once */
  FEW_TASK = 32, TASK = 64, MOST_TASKS = 64, /* rows of a weight in a task: of few rows, of many; tasks a weight at most */
  SMALL = 1 << 17,                           /* products that one thread has done before others have woken */
  TASK_NUMBERS = 1 << 13,                    /* of a task between products */
  ROOM = 24 << 20, LEAST_BLOCK = 128,        /* bytes; rows of a block, of which each unpacks all weights */
};

typedef struct work {
  const chain *k;
  int64_t m; /* rows of X */
  const float *stream;
  jpq_product products[MOST_ALL];
  int64_t rows[MOST_ALL]; /* of a task */
  float *y[MOST_ALL];     /* of each product */
  float *x, *zeros;       /* what the next link is given [m, widest]; zeros [hidden], for norms without a sum */
  float *sums[MOST_LINKS], *given; /* the stream after each, outputs or, of those nobody asks for, `carried`; the last norm */
  float *carried;                  /* [m, hidden] */
  int sum;                /* sums so far */
  atomic_int status;
} work;

static void note(work *all, jpq_status status) {
  if (status) atomic_store_explicit(&all->status, status, memory_order_relaxed);
}

static int64_t tasks_of(const work *all, int64_t part) {
  return (all->k->parts[part].shape.n + all->rows[part] - 1) / all->rows[part];
}

static void task(void *data, int l, int i) {
  work *all = data;
  int64_t part = all->k->link[l].first, at = i;
  while (at >= tasks_of(all, part)) at -= tasks_of(all, part++);
  const int64_t n = all->k->parts[part].shape.n, first = at * all->rows[part], last = first + all->rows[part];
  if (!atomic_load_explicit(&all->status, memory_order_relaxed)) note(all, jpq_matmul_rows(all->products + part, first, last < n ? last : n));
}

/* Bring what link `l` is given into the form its products want. */
static void prepare(work *all, int l, const float *x) {
  const chain_link *link = all->k->link + l;
  for (int64_t i = link->first; i < link->first + link->count; i++) {
    all->products[i] = (jpq_product){.weight = &all->k->parts[i].shape, .x = x, .bias = all->k->bias[i], .y = all->y[i],
                                     .m = all->m, .activations = all->k->activations};
    note(all, i == link->first ? jpq_prepare(all->products + i) : jpq_prepare_like(all->products + i, all->products + link->first));
  }
}

static void release(work *all, int l) {
  const chain_link *link = all->k->link + l;
  for (int64_t i = link->first + link->count - 1; i >= link->first; i--) jpq_release(all->products + i);
}

/* Rows [first, last) of what stands behind the products of link `l`. */
static void finish_rows(work *all, int l, int64_t first, int64_t last) {
  const chain *k = all->k;
  const chain_link *link = k->link + l;
  float *y = all->y[link->first];
  if (link->then == SILU || link->then == GELU_TANH) {
    const int64_t n = k->parts[link->first].shape.n, at = first * n;
    note(all, jpq_gated(link->then == SILU ? JPQ_SILU : JPQ_GELU_TANH, y + at, all->y[link->first + 1] + at, (last - first) * n, all->x + at, NULL));
    return;
  }
  const int64_t width = k->hidden;
  const float *stream = all->sum ? all->sums[all->sum - 1] : all->stream;
  float *sums = all->sums[all->sum], *normed = l + 1 == k->links ? all->given : all->x;
  for (int64_t at = first * width; at < last * width; at += width) {
    if (link->post) note(all, jpq_add_norm(y + at, all->zeros, link->post, k->epsilon, 1, width, y + at, y + at, NULL));
    if (link->norm)
      note(all, jpq_add_norm(stream + at, y + at, link->norm, k->epsilon, 1, width, sums + at, normed + at, NULL));
    else
      for (int64_t j = at; j < at + width; j++) sums[j] = stream[j] + y[j];
  }
}

static void next(work *all, int l) {
  if (all->k->link[l].then == SUM_NORM || all->k->link[l].then == SUM) all->sum++;
  if (l + 1 < all->k->links) prepare(all, l + 1, all->x);
}

static void between(void *data, int l) {
  work *all = data;
  release(all, l);
  if (atomic_load_explicit(&all->status, memory_order_relaxed)) return;
  if (all->k->link[l].then != GIVE) finish_rows(all, l, 0, all->m);
  next(all, l);
}

/* What lies between links: memory that stays from one call to the next, of all chains, as one runs at a time. */
typedef struct room {
  size_t bytes;
  float numbers[];
} room;
static _Atomic(room *) spare;

static room *take_room(size_t bytes) {
  room *r = atomic_exchange(&spare, NULL);
  if (r && r->bytes >= bytes) return r;
  free(r);
  r = malloc(sizeof *r + bytes);
  if (r) r->bytes = bytes;
  return r;
}

static void give_room(room *r) { free(atomic_exchange(&spare, r)); }

/* Outputs, and room for what lies between of a block of `*block` rows, which is to be given back. */
static OrtStatus *make_room(const chain *k, OrtKernelContext *context, work *all, const tensor *stream, const tensor *x, int64_t *block, room **memory) {
  const chain_link *last = k->link + k->links - 1;
  int64_t products = 0, widest = k->hidden;
  size_t output = 0;
  for (int l = 0; l < k->links; l++) {
    int64_t here = 0;
    for (int64_t i = k->link[l].first; i < k->link[l].first + k->link[l].count; i++) {
      here += k->parts[i].shape.n;
      widest = k->parts[i].shape.n > widest ? k->parts[i].shape.n : widest;
    }
    products = here > products ? here : products;
  }
  int64_t rows = ROOM / ((int64_t)sizeof(float) * (products + widest + k->hidden));
  rows = rows < LEAST_BLOCK ? LEAST_BLOCK : rows;
  *block = rows = rows < all->m ? rows : all->m;
  *memory = take_room(sizeof(float) * (size_t)(rows * (products + widest + k->hidden) + k->hidden));
  if (!*memory) return fail(k->api, "out of memory", "run");
  all->x = (*memory)->numbers + rows * products, all->carried = all->x + rows * widest;
  all->zeros = all->carried + rows * k->hidden;
  memset(all->zeros, 0, sizeof(float) * (size_t)k->hidden);
  for (int l = 0; l < k->links; l++) {
    float *at = (*memory)->numbers;
    for (int64_t i = k->link[l].first; i < k->link[l].first + k->link[l].count; at += rows * k->parts[i++].shape.n) all->y[i] = at;
  }
  tensor like = *x;
  OrtValue *value;
  for (int64_t i = 0; i < k->sums + (last->then == SUM_NORM); i++) {
    TRY(ORT(k->api, KernelContext_GetOutput)(context, output++, stream->dims, stream->rank, &value));
    float **to = i < k->sums ? all->sums + i : &all->given;
    *to = all->carried; /* where an output has no name, there is none */
    if (value) TRY(ORT(k->api, GetTensorMutableData)(value, (void **)to));
  }
  for (int64_t i = last->first; last->then == GIVE && i < last->first + last->count; i++) {
    like.dims[like.rank - 1] = k->parts[i].shape.n;
    TRY(ORT(k->api, KernelContext_GetOutput)(context, output++, like.dims, like.rank, &value));
    TRY(ORT(k->api, GetTensorMutableData)(value, (void **)(all->y + i)));
  }
  return NULL;
}

typedef struct stage { /* of many rows */
  work *all;
  int link;
  int64_t step; /* rows of a task between products */
} stage;
static void stage_task(void *data, size_t i) { task(((stage *)data)->all, ((stage *)data)->link, (int)i); }
static void stage_rows(void *data, size_t i) {
  const stage *s = data;
  const int64_t first = (int64_t)i * s->step, last = first + s->step;
  finish_rows(s->all, s->link, first, last < s->all->m ? last : s->all->m);
}

/* A call of ParallelFor for every link, and one for what stands behind it. */
static OrtStatus *pass_links(const chain *k, const OrtKernelContext *context, work *all, const int *tasks) {
  for (int l = 0; l < k->links && !atomic_load_explicit(&all->status, memory_order_relaxed); l++) {
    stage s = {all, l, 1 + TASK_NUMBERS / k->parts[k->link[l].first].shape.n};
    OrtStatus *failed = ORT(k->api, KernelContext_ParallelFor)(context, stage_task, (size_t)tasks[l], 0, &s);
    release(all, l);
    if (!failed && k->link[l].then != GIVE)
      failed = ORT(k->api, KernelContext_ParallelFor)(context, stage_rows, (size_t)((all->m + s.step - 1) / s.step), 0, &s);
    if (failed) return failed;
    next(all, l);
  }
  return NULL;
}

static OrtStatus *many_rows(const chain *k, const OrtKernelContext *context, work *all, const float *x, int64_t block, const int *tasks) {
  const chain_link *last = k->link + k->links - 1;
  for (int64_t row = 0; row < all->m && !all->status; row += block) {
    work here = *all;
    here.m = all->m - row < block ? all->m - row : block;
    here.stream += row * k->hidden;
    if (here.given && here.given != here.carried) here.given += row * k->hidden;
    for (int64_t i = 0; i < k->sums; i++)
      if (here.sums[i] != here.carried) here.sums[i] += row * k->hidden;
    for (int64_t i = last->first; last->then == GIVE && i < last->first + last->count; i++) here.y[i] += row * k->parts[i].shape.n;
    prepare(&here, 0, x + row * k->parts[0].shape.k);
    OrtStatus *failed = pass_links(k, context, &here, tasks);
    if (failed) return failed;
    note(all, (jpq_status)atomic_load_explicit(&here.status, memory_order_relaxed));
  }
  return NULL;
}

static OrtStatus *few_rows(chain *k, const OrtKernelContext *context, work *all, const float *x, const int *tasks, int alone) {
  crew c = {.steps = (int)k->links, .shares = atomic_load_explicit(&k->threads, memory_order_relaxed), .task = task, .between = between, .data = all};
  int most = 1;
  for (int l = 0; l < c.steps; l++) {
    c.tasks[l] = tasks[l];
    most = tasks[l] > most ? tasks[l] : most;
  }
  if (alone) c.shares = 1;
  prepare(all, 0, x);
  crew_begin(&c);
  if (alone) return crew_help(&c, 0), NULL;
  OrtStatus *failed = ORT(k->api, KernelContext_ParallelFor)(context, crew_help, (size_t)(most < MOST_SHARES ? most : MOST_SHARES), 0, &c);
  if (failed && c.step < c.steps) release(all, c.step);
  const int worked = atomic_load_explicit(&c.worked, memory_order_relaxed);
  if (worked != c.shares) atomic_store_explicit(&k->threads, worked < 1 ? 1 : worked, memory_order_relaxed);
  return failed;
}

OrtStatus *jpq_chain_run(chain *k, OrtKernelContext *context) {
  tensor x, stream;
  work all = {.k = k};
  room *memory = NULL;
  size_t given;
  int tasks[MOST_LINKS] = {0};
  int64_t units = 0, block;
  TRY(ORT(k->api, KernelContext_GetInputCount)(context, &given));
  if (given != k->inputs) return fail(k->api, "more inputs than the attributes say", "inputs");
  TRY(input(k->api, context, 0, &x));
  TRY(input(k->api, context, 1, &stream));
  if (!x.rank || x.dims[x.rank - 1] != k->parts[0].shape.k) return fail(k->api, "the last dimension of X must be K", "input 0");
  all.m = x.count / k->parts[0].shape.k, all.stream = stream.data;
  if (k->hidden && (stream.rank != x.rank || stream.dims[x.rank - 1] != k->hidden || memcmp(stream.dims, x.dims, (x.rank - 1) * sizeof *x.dims)))
    return fail(k->api, "must be [..., hidden] of the rows of X", "stream");
  for (int l = 0; l < k->links; l++)
    for (int64_t i = k->link[l].first; i < k->link[l].first + k->link[l].count; i++) {
      const jpq_weight *w = &k->parts[i].shape;
      const int64_t rows = all.m <= FEW_ROWS ? FEW_TASK : TASK, most = rows * MOST_TASKS;
      all.rows[i] = rows * ((w->n + most - 1) / most);
      tasks[l] += (int)tasks_of(&all, i);
      units += w->n * w->k * all.m;
    }
  OrtStatus *failed = make_room(k, context, &all, &stream, &x, &block, &memory);
  if (!failed && all.m)
    failed = all.m <= FEW_ROWS ? few_rows(k, context, &all, x.data, tasks, units <= SMALL) : many_rows(k, context, &all, x.data, block, tasks);
  give_room(memory);
  if (failed) return failed;
  const int status = atomic_load_explicit(&all.status, memory_order_relaxed);
  return status ? fail(k->api, status == JPQ_NO_MEMORY ? "out of memory" : "cannot compute this weight", "run") : NULL;
}
