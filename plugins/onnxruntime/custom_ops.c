/* `jpq::LowBitMatMul` and `jpq::LowBitGather` (`jpq::Attention` is in attention_op.c) for onnxruntime on the CPU, over plugins/core.
 *
 * The session option "jpq.activations" ("fp32" when absent, "int16", "int8"), set before the library is registered,
 * says what may happen to X. Work is split over the session's own threads.
 */
#include <stdlib.h>
#include <string.h>

#include "../core/low_bit.h"
#define JPQ_SPEAKER "jpq"
#include "ort_inputs.h"
#include "ort_operator.h"

#define CONFIG_KEY "jpq.activations"
extern const OrtCustomOp jpq_attention_operator; /* attention_op.c */
enum { TASK_ROWS = 64, MOST_TASKS = 64 }; /* TASK_ROWS: the widest panel of the core */

/* An operator: what onnxruntime calls, and what we need to know when it does. */
typedef struct operator_ {
  OrtCustomOp base; /* first: onnxruntime hands back a pointer to it */
  const char *name;
  int gather;
  jpq_activations activations;
} operator_;

typedef struct kernel {
  const OrtApi *api;
  jpq_weight shape; /* pointers are filled in at each run */
  int symmetric, gather;
  jpq_activations activations;
} kernel;

/* ---- description ---- */

static const char *ORT_CALL name(const OrtCustomOp *op) { return ((const operator_ *)op)->name; }

/* X or indices, packed, scales, then zeros unless symmetric, then an optional bias. */
static int ORT_CALL input_type(const OrtCustomOp *op, size_t i) {
  static const int types[] = {ORT_FLOAT, ORT_UINT8, ORT_FLOAT16, ORT_ANY, ORT_FLOAT};
  return i == 0 && ((const operator_ *)op)->gather ? ORT_INT64 : types[i];
}
static size_t ORT_CALL input_count(const OrtCustomOp *op) { return ((const operator_ *)op)->gather ? 4 : 5; }
static int ORT_CALL output_type(const OrtCustomOp *op, size_t i) {
  (void)op, (void)i;
  return ORT_FLOAT;
}
static size_t ORT_CALL output_count(const OrtCustomOp *op) {
  (void)op;
  return 1;
}
static int ORT_CALL input_kind(const OrtCustomOp *op, size_t i) {
  (void)op;
  return i < 3 ? ORT_REQUIRED : ORT_OPTIONAL;
}

/* ---- creation ---- */

static OrtStatus *ORT_CALL create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  static const char *const names[] = {"bits", "K", "N", "group_size", "symmetric"};
  int64_t values[5];
  for (int i = 0; i < 5; i++) TRY(ORT(api, KernelInfoGetAttribute_int64)(info, names[i], values + i));
  const operator_ *self = (const operator_ *)op;
  if ((values[0] < 1 || values[0] > 8) && values[0] != JPQ_TERNARY)
    return fail(api, "bits must be 1 to 8, or 16 for ternary codes", self->name);
  if (values[1] < 1 || values[2] < 0 || values[3] < 1 || values[3] > values[1] || values[1] % values[3])
    return fail(api, "K must be a multiple of group_size, N not negative", self->name);
  kernel *k = calloc(1, sizeof *k);
  if (!k) return fail(api, "out of memory", self->name);
  k->api = api;
  k->shape.bits = (int32_t)values[0], k->shape.k = values[1], k->shape.n = values[2];
  k->shape.group_size = (int32_t)values[3], k->symmetric = values[4] != 0;
  k->gather = self->gather, k->activations = self->activations;
  *out = k;
  return NULL;
}

static void ORT_CALL destroy(void *k) { free(k); }

/* ---- a run ---- */

typedef struct work {
  jpq_product product;
  int64_t rows; /* of a task */
  jpq_status status[MOST_TASKS];
} work;

static void task(void *data, size_t i) {
  work *all = data;
  int64_t first = (int64_t)i * all->rows, last = first + all->rows;
  if (last > all->product.weight->n) last = all->product.weight->n;
  all->status[i] = jpq_matmul_rows(&all->product, first, last);
}

static OrtStatus *multiply(const kernel *k, const OrtKernelContext *context, const jpq_weight *w, const tensor *x,
                           const float *bias, float *y) {
  work all = {.product = {.weight = w, .x = x->data, .bias = bias, .y = y, .m = x->count / w->k, .activations = k->activations}};
  jpq_status status = jpq_prepare(&all.product);
  int64_t tasks = (w->n + TASK_ROWS - 1) / TASK_ROWS;
  if (tasks > MOST_TASKS) tasks = MOST_TASKS;
  OrtStatus *failed = NULL;
  if (!status && all.product.m > 0 && tasks > 0) {
    all.rows = (w->n + tasks * TASK_ROWS - 1) / (tasks * TASK_ROWS) * TASK_ROWS;
    tasks = (w->n + all.rows - 1) / all.rows;
    failed = ORT(k->api, KernelContext_ParallelFor)(context, task, (size_t)tasks, 0, &all);
    for (int64_t i = 0; i < tasks; i++) status = all.status[i] ? all.status[i] : status;
  }
  jpq_release(&all.product);
  if (failed) return failed;
  return status ? fail(k->api, status == JPQ_NO_MEMORY ? "out of memory" : "cannot compute this weight", "LowBitMatMul") : NULL;
}

static OrtStatus *ORT_CALL compute(void *data, OrtKernelContext *context) {
  const kernel *k = data;
  const OrtApi *api = k->api;
  tensor x;
  jpq_weight w = k->shape;
  const void *bias;
  void *y;
  TRY(input(api, context, 0, &x));
  TRY(read_weight(api, context, k->symmetric, !k->gather, &w, &bias));
  TRY(make_output(api, context, &w, k->gather, &x, &y));
  if (!k->gather) return multiply(k, context, &w, &x, bias, y);
  jpq_status status = jpq_gather(&w, x.data, x.count, y, NULL);
  if (status) return fail(api, status == JPQ_BAD_INDEX ? "an index is out of range" : "cannot read this weight", "LowBitGather");
  return NULL;
}

/* onnxruntime calls the second versions where they are given; these satisfy its check that a kernel can be made. */
#define OPERATOR(NAME, GATHER, MODE)                                                                              \
  {{JPQ_ORT_API, NULL, name, on_the_cpu, input_type, input_count, output_type, output_count, NULL, destroy,          \
    input_kind, all_required, default_memory, one, one, one, one, create, compute, NULL, one, last_version, NULL, NULL, \
    NULL, NULL},                                                                                                   \
   NAME, GATHER, MODE}

static const operator_ gather = OPERATOR("LowBitGather", 1, JPQ_FP32);
static const operator_ matmuls[] = {
    OPERATOR("LowBitMatMul", 0, JPQ_FP32),
    OPERATOR("LowBitMatMul", 0, JPQ_INT8),
    OPERATOR("LowBitMatMul", 0, JPQ_INT16),
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
  return i == 0 ? &matmuls[mode].base : i == 1 ? &gather.base : NULL;
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
  TRY(ORT(api, CustomOpDomain_Add)(domain, &matmuls[mode].base));
  TRY(ORT(api, CustomOpDomain_Add)(domain, &gather.base));
  TRY(ORT(api, CustomOpDomain_Add)(domain, &jpq_attention_operator));
  return ORT(api, AddCustomOpDomain)(options, domain);
}
