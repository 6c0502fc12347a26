/* `jpq::AddRMSNormalization` and `jpq::SiluMul`, `jpq::GeluTanhMul` for onnxruntime on the CPU (see rowwise.h).
 *
 *     a, b [..., width], weight [width], attribute epsilon -> a + b, its norm, like a
 *     x, factor of one shape -> gate(x) * factor
 */
#include <stdlib.h>

#include "../core/rowwise.h"
#define JPQ_SPEAKER "jpq"
#include "ort_inputs.h"
#include "ort_operator.h"

enum { SMALL = 1 << 14, TASK_NUMBERS = 1 << 13 }; /* numbers that one thread has done before others have woken; of a task */
enum { ADD_NORM = -1 };

typedef struct operator_ {
  OrtCustomOp base; /* first: onnxruntime hands back a pointer to it */
  const char *name;
  int gate; /* a jpq_gate, or ADD_NORM */
} operator_;

typedef struct kernel {
  const OrtApi *api;
  const operator_ *op;
  float epsilon;
} kernel;

static const operator_ *of(const OrtCustomOp *op) { return (const operator_ *)op; }
static const char *ORT_CALL name(const OrtCustomOp *op) { return of(op)->name; }
static int ORT_CALL value_type(const OrtCustomOp *op, size_t i) {
  (void)op, (void)i;
  return ORT_FLOAT;
}
static size_t ORT_CALL input_count(const OrtCustomOp *op) { return of(op)->gate == ADD_NORM ? 3 : 2; }
static size_t ORT_CALL output_count(const OrtCustomOp *op) { return of(op)->gate == ADD_NORM ? 2 : 1; }

static OrtStatus *ORT_CALL create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  kernel made = {.api = api, .op = of(op)};
  if (made.op->gate == ADD_NORM) TRY(ORT(api, KernelInfoGetAttribute_float)(info, "epsilon", &made.epsilon));
  kernel *k = malloc(sizeof *k);
  if (!k) return fail(api, "out of memory", made.op->name);
  *k = made;
  return *out = k, NULL;
}

static void ORT_CALL destroy(void *k) { free(k); }

typedef struct work {
  const kernel *k;
  const float *x, *other, *weight;
  float *sum, *y;
  int64_t width, rows; /* all there are; of a gate, rows are any stretches of numbers */
  int64_t step;        /* rows of a task */
} work;

static void task(void *data, size_t i) {
  const work *all = data;
  const int64_t first = (int64_t)i * all->step, left = all->rows - first;
  const int64_t rows = left < all->step ? left : all->step, at = first * all->width;
  if (all->k->op->gate == ADD_NORM)
    jpq_add_norm(all->x + at, all->other + at, all->weight, all->k->epsilon, rows, all->width, all->sum + at,
                 all->y + at, NULL);
  else
    jpq_gated((jpq_gate)all->k->op->gate, all->x + at, all->other + at, rows * all->width, all->y + at, NULL);
}

static int alike(const tensor *a, const tensor *b) {
  return a->type == ORT_FLOAT && b->type == ORT_FLOAT && a->rank == b->rank && !memcmp(a->dims, b->dims, a->rank * sizeof *a->dims);
}

static OrtStatus *make(const OrtApi *api, OrtKernelContext *context, size_t i, const tensor *like, float **out) {
  OrtValue *output;
  void *data;
  TRY(ORT(api, KernelContext_GetOutput)(context, i, like->dims, like->rank, &output));
  TRY(ORT(api, GetTensorMutableData)(output, &data));
  return *out = data, NULL;
}

static OrtStatus *ORT_CALL compute(void *data, OrtKernelContext *context) {
  const kernel *k = data;
  const OrtApi *api = k->api;
  const int norm = k->op->gate == ADD_NORM;
  tensor x, other, weight = {0};
  TRY(input(api, context, 0, &x));
  TRY(input(api, context, 1, &other));
  if (!x.rank || !alike(&x, &other)) return fail(api, "both must be float, of one shape", k->op->name);
  const int64_t width = x.dims[x.rank - 1];
  if (norm) TRY(input(api, context, 2, &weight));
  if (norm && (!weight.data || weight.type != ORT_FLOAT || weight.rank != 1 || weight.count != width))
    return fail(api, "must be float [width]", "weight");
  work all = {.k = k, .x = x.data, .other = other.data, .weight = weight.data, .width = width,
              .rows = width ? x.count / width : 0};
  if (norm) TRY(make(api, context, 0, &x, &all.sum));
  TRY(make(api, context, norm ? 1 : 0, &x, &all.y));
  if (!all.rows) return NULL;
  all.step = x.count <= SMALL ? all.rows : 1 + TASK_NUMBERS / width;
  const size_t tasks = (size_t)((all.rows + all.step - 1) / all.step);
  if (tasks > 1) return ORT(api, KernelContext_ParallelFor)(context, task, tasks, 0, &all);
  return task(&all, 0), NULL;
}

#define OPERATOR(NAME, GATE)                                                                                           \
  {{JPQ_ORT_API, NULL, name, on_the_cpu, value_type, input_count, value_type, output_count, NULL, destroy, all_required, \
    all_required, default_memory, one, one, one, one, create, compute, NULL, one, last_version, NULL, NULL, NULL, NULL},  \
   NAME, GATE}

static const operator_ operators[] = {OPERATOR("AddRMSNormalization", ADD_NORM), OPERATOR("SiluMul", JPQ_SILU),
                                      OPERATOR("GeluTanhMul", JPQ_GELU_TANH)};
const OrtCustomOp *const jpq_rowwise_operators[] = {&operators[0].base, &operators[1].base, &operators[2].base, NULL};
