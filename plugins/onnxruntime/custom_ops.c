/* `jpq::LowBitMatMul`, `jpq::LowBitMatMuls` (several of one X) and `jpq::LowBitGather` for onnxruntime on the CPU, over
 * plugins/core; attention is in attention_op.c and cache_codes_op.c, what stands between products in rowwise_op.c, and
 * products with what stands between them, as one operator, in chain_op.c.
 *
 * The session option "jpq.activations" ("fp32" when absent, "int16", "int8"), set before the library is registered,
 * says what may happen to X. Work is split over the session's own threads.
 */
#include <stdlib.h>
#include <string.h>

#include "../core/low_bit.h"
#define JPQ_SPEAKER "jpq"
#include "large_pages.h"
#include "ort_inputs.h"
#include "ort_operator.h"

#define CONFIG_KEY "jpq.activations"
enum {
  TASK_ROWS = 64, /* the widest panel of the core */
  MOST_TASKS = 64,
  SMALL = 1 << 17, /* products that one thread has done before others have woken */
};

typedef enum kind { MATMUL, MATMULS, GATHER } kind;

/* An operator: what onnxruntime calls, and what we need to know when it does. */
typedef struct operator_ {
  OrtCustomOp base; /* first: onnxruntime hands back a pointer to it */
  const char *name;
  kind kind;
  jpq_activations activations;
} operator_;

typedef struct kernel {
  const OrtApi *api;
  const operator_ *op;
  int count;
  part parts[MOST_PARTS];
  int constant; /* the parts have their weights; asking for each at every run takes 0.2 ms of a token's 6 */
  block *codes;  /* of the parts, where they were moved */
} kernel;

extern const OrtCustomOp *const jpq_attention_operators[], *const jpq_rowwise_operators[]; /* NULL ends them */
extern const OrtCustomOp *jpq_chain_operator(int mode);

/* ---- description ---- */

static const char *ORT_CALL name(const OrtCustomOp *op) { return ((const operator_ *)op)->name; }
static kind kind_of(const OrtCustomOp *op) { return ((const operator_ *)op)->kind; }

/* X or indices, packed, scales, then zeros unless symmetric, then an optional bias; of several, all that for each. */
static int ORT_CALL input_type(const OrtCustomOp *op, size_t i) {
  static const int types[] = {ORT_FLOAT, ORT_UINT8, ORT_FLOAT16, ORT_ANY, ORT_FLOAT};
  if (i == 0) return kind_of(op) == GATHER ? ORT_INT64 : ORT_FLOAT;
  return kind_of(op) == MATMULS ? ORT_ANY : types[i];
}
static size_t ORT_CALL input_count(const OrtCustomOp *op) {
  static const size_t counts[] = {[MATMUL] = 5, [MATMULS] = 2, [GATHER] = 4};
  return counts[kind_of(op)];
}
static int ORT_CALL input_kind(const OrtCustomOp *op, size_t i) {
  if (kind_of(op) == MATMULS) return i ? ORT_VARIADIC : ORT_REQUIRED;
  return i < 3 ? ORT_REQUIRED : ORT_OPTIONAL;
}
static int ORT_CALL output_kind(const OrtCustomOp *op, size_t i) {
  (void)i;
  return kind_of(op) == MATMULS ? ORT_VARIADIC : ORT_REQUIRED;
}

/* ---- creation ---- */

static OrtStatus *check(const OrtApi *api, const operator_ *op, const jpq_weight *w) {
  if (!jpq_is_width(w->bits)) return fail(api, "bits must be 1 to 8, 16 for ternary codes, 35 to 38 for normal levels", op->name);
  if (w->k < 1 || w->n < 0 || w->group_size < 1 || w->group_size > w->k || w->k % w->group_size)
    return fail(api, "K must be a multiple of group_size, N not negative", op->name);
  return NULL;
}

/* Whether all weights are constants of the graph, which then are in the parts. What is wrong with one, a run will say. */
static int read_constants(const OrtApi *api, const OrtKernelInfo *info, kernel *k) {
  const source constants = {api, NULL, info};
  size_t at = 1;
  for (int i = 0; i < k->count; i++) {
    OrtStatus *status = read_weight(&constants, &at, k->parts[i].symmetric, &k->parts[i].shape);
    if (status) return ORT(api, ReleaseStatus)(status), 0;
    if (k->op->kind == MATMULS && k->parts[i].biased) at++;
  }
  return 1;
}

static OrtStatus *ORT_CALL create(const OrtCustomOp *base, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  const operator_ *op = (const operator_ *)base;
  const int single = op->kind != MATMULS;
  kernel made = {.api = api, .op = op};
  int64_t count;
  TRY(read_count(api, info, single, &count));
  for (; made.count < count; made.count++) {
    TRY(read_part(api, info, single ? SINGLE : OF_ONE_X, made.count, made.parts + made.count));
    TRY(check(api, op, &made.parts[made.count].shape));
  }
  made.constant = read_constants(api, info, &made);
  kernel *k = malloc(sizeof *k);
  if (!k) return fail(api, "out of memory", op->name);
  *k = made;
  if (k->constant && op->kind != GATHER) k->codes = jpq_to_large_pages(k->parts, k->count); /* rows that are looked up stay in the file */
  return *out = k, NULL;
}

static void ORT_CALL destroy(void *k) {
  jpq_release_block(((kernel *)k)->codes);
  free(k);
}

/* ---- a run ---- */

typedef struct work {
  int count;
  jpq_product products[MOST_PARTS];
  int64_t rows[MOST_PARTS]; /* of a task */
  int64_t tasks[MOST_PARTS];
  jpq_status status[MOST_PARTS * MOST_TASKS];
} work;

static void task(void *data, size_t i) {
  work *all = data;
  int64_t at = (int64_t)i;
  int p = 0;
  while (at >= all->tasks[p]) at -= all->tasks[p++];
  int64_t first = at * all->rows[p], last = first + all->rows[p], n = all->products[p].weight->n;
  all->status[i] = jpq_matmul_rows(all->products + p, first, last < n ? last : n);
}

/* X in the form each product wants, which may be that of the first. */
static jpq_status prepare(work *all) {
  jpq_status status = JPQ_OK;
  for (int i = 0; i < all->count && !status; i++)
    status = i ? jpq_prepare_like(all->products + i, all->products) : jpq_prepare(all->products);
  return status;
}

static OrtStatus *multiply(const kernel *k, const OrtKernelContext *context, work *all) {
  jpq_status status = prepare(all);
  int64_t tasks = 0, work_units = 0;
  OrtStatus *failed = NULL;
  for (int i = 0; i < all->count; i++) {
    const jpq_weight *w = all->products[i].weight;
    int64_t here = all->products[i].m > 0 ? (w->n + TASK_ROWS - 1) / TASK_ROWS : 0;
    if (here > MOST_TASKS) here = MOST_TASKS;
    all->rows[i] = here ? (w->n + here * TASK_ROWS - 1) / (here * TASK_ROWS) * TASK_ROWS : 1;
    tasks += all->tasks[i] = here ? (w->n + all->rows[i] - 1) / all->rows[i] : 0;
    work_units += w->n * w->k * all->products[i].m;
  }
  if (!status && work_units <= SMALL)
    for (int64_t i = 0; i < tasks; i++) task(all, (size_t)i);
  else if (!status && tasks)
    failed = ORT(k->api, KernelContext_ParallelFor)(context, task, (size_t)tasks, 0, all);
  for (int64_t i = 0; i < tasks && !failed; i++) status = status ? status : all->status[i];
  for (int i = all->count - 1; i >= 0; i--) jpq_release(all->products + i);
  if (failed) return failed;
  return status ? fail(k->api, status == JPQ_NO_MEMORY ? "out of memory" : "cannot compute this weight", k->op->name) : NULL;
}

static OrtStatus *ORT_CALL compute(void *data, OrtKernelContext *context) {
  const kernel *k = data;
  const OrtApi *api = k->api;
  const int gather = k->op->kind == GATHER;
  const source run = {api, context, NULL};
  jpq_weight weights[MOST_PARTS];
  work all = {.count = k->count};
  tensor x;
  void *y;
  size_t at = 1;
  TRY(input(api, context, 0, &x));
  for (int i = 0; i < k->count; i++) {
    const part *each = k->parts + i;
    const void *bias = NULL;
    weights[i] = each->shape;
    if (k->constant)
      at += each->symmetric ? 2 : 3;
    else
      TRY(read_weight(&run, &at, each->symmetric, weights + i));
    if (!gather && each->biased) TRY(read_bias(api, context, at++, weights + i, &bias));
    TRY(make_output(api, context, (size_t)i, weights + i, gather, &x, &y));
    all.products[i] = (jpq_product){.weight = weights + i, .x = x.data, .bias = bias, .y = y, .m = x.count / weights[i].k,
                                    .activations = k->op->activations};
  }
  if (!gather) return multiply(k, context, &all);
  jpq_status status = jpq_gather(weights, x.data, x.count, y, NULL);
  if (status) return fail(api, status == JPQ_BAD_INDEX ? "an index is out of range" : "cannot read this weight", "LowBitGather");
  return NULL;
}

/* onnxruntime calls the second versions where they are given; these satisfy its check that a kernel can be made. The
 * inputs of several products are of several types, their outputs are not. */
#define OPERATOR(NAME, KIND, MODE)                                                                                  \
  {{JPQ_ORT_API, NULL, name, on_the_cpu, input_type, input_count, a_float, a_single, NULL, destroy,          \
    input_kind, output_kind, default_memory, one, none, one, one, create, compute, NULL, one, last_version, NULL,    \
    NULL, NULL, NULL},                                                                                               \
   NAME, KIND, MODE}

static const operator_ gather = OPERATOR("LowBitGather", GATHER, JPQ_FP32);
static const operator_ matmuls[][2] = {
    {OPERATOR("LowBitMatMul", MATMUL, JPQ_FP32), OPERATOR("LowBitMatMuls", MATMULS, JPQ_FP32)},
    {OPERATOR("LowBitMatMul", MATMUL, JPQ_INT8), OPERATOR("LowBitMatMuls", MATMULS, JPQ_INT8)},
    {OPERATOR("LowBitMatMul", MATMUL, JPQ_INT16), OPERATOR("LowBitMatMuls", MATMULS, JPQ_INT16)},
};

/* ---- registration ---- */

static OrtStatus *read_mode(const OrtApi *api, const OrtSessionOptions *options, int *mode) {
  static const char *const names[] = {"fp32", "int8", "int16"}; /* in the order of jpq_activations */
  char text[16] = "fp32";
  size_t size = sizeof text;
  int given = 0;
  TRY(ORT(api, HasSessionConfigEntry)(options, CONFIG_KEY, &given));
  if (given) TRY(ORT(api, GetSessionConfigEntry)(options, CONFIG_KEY, text, &size));
  for (*mode = 0; *mode < 3; ++*mode)
    if (!strcmp(text, names[*mode])) return NULL;
  return fail(api, CONFIG_KEY " must be fp32, int16 or int8", text);
}

/* Operator i of activations mode `mode`, NULL past the last: cuda_ops.cu registers them in its domain beside its own. */
JPQ_EXPORT const OrtCustomOp *jpq_cpu_operator(int mode, int i) {
  return i < 2 ? &matmuls[mode][i].base : i == 2 ? &gather.base : NULL;
}

JPQ_EXPORT OrtStatus *ORT_CALL RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  const OrtApi *api = base->GetApi(JPQ_ORT_API);
  if (!api) { /* older than 1.18: a status can still be made, its slot is the first */
    const OrtApi *first = base->GetApi(1);
    return first ? fail(first, "onnxruntime 1.18 or later is needed", base->GetVersionString()) : NULL;
  }
  OrtCustomOpDomain *domain;
  int mode;
  TRY(read_mode(api, options, &mode));
  TRY(ORT(api, CreateCustomOpDomain)("jpq", &domain)); /* lives as long as the library, as onnxruntime asks */
  for (int i = 0; i < 3; i++) TRY(ORT(api, CustomOpDomain_Add)(domain, jpq_cpu_operator(mode, i)));
  TRY(ORT(api, CustomOpDomain_Add)(domain, jpq_chain_operator(mode)));
  for (int i = 0; jpq_attention_operators[i]; i++) TRY(ORT(api, CustomOpDomain_Add)(domain, jpq_attention_operators[i]));
  for (int i = 0; jpq_rowwise_operators[i]; i++) TRY(ORT(api, CustomOpDomain_Add)(domain, jpq_rowwise_operators[i]));
  return ORT(api, AddCustomOpDomain)(options, domain);
}
