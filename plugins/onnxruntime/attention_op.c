/* `jpq::Attention` and `jpq::Int8Attention` for onnxruntime on the CPU: new keys and values join the cache, queries look
 * at all of it.
 *
 *     query [batch, seq, heads * dim], key, value [batch, seq, kv_heads * dim], mask bool [batch, 1, seq, total],
 *     past_key, past_value [room, batch, kv_heads, dim], cos, sin [batch, seq, dim / 2] or neither
 *     -> output like query, present_key, present_value [max(room, total), batch, kv_heads, dim]
 *
 * The second has instead of key and value, and of past and present, four each: int8 codes of both, then their scales
 * [..., kv_heads, 1]; new ones come as [batch, seq, kv_heads, ...] from `jpq::CacheCodes`, which has turned the keys.
 *
 * Of the past, the first total - seq rows hold something. Present is past with the new rows behind those: where both are
 * the same memory (room for them was left, and the caller bound one buffer to both) only the new rows are written.
 */
#include <stdlib.h>
#include <string.h>

#include "../core/attention.h"
#define JPQ_SPEAKER "jpq Attention"
#include "ort_inputs.h"
#include "ort_operator.h"

extern const OrtCustomOp jpq_cache_codes_operator; /* cache_codes_op.c */
enum { INT8_PARTS = 4, CACHE_INPUTS = 4 + 2 * INT8_PARTS };
enum { SMALL = 1 << 15 }; /* products of Q and K that one thread has done before others have woken */

/* An operator and where its inputs are: query, `parts` new, mask, `parts` past, cos, sin. */
typedef struct operator_ {
  OrtCustomOp base; /* first: onnxruntime hands back a pointer to it */
  const char *name;
  int parts; /* of a cache: two of floats; or four, of which the first two are codes */
} operator_;
enum { QUERY, NEW };
static int mask_of(const operator_ *op) { return NEW + op->parts; }
static int past_of(const operator_ *op) { return NEW + op->parts + 1; }
static int tables_of(const operator_ *op) { return NEW + 2 * op->parts + 1; }
static int coded(const operator_ *op, int part) { return op->parts == INT8_PARTS && part < 2; }

typedef struct kernel {
  const OrtApi *api;
  const operator_ *op;
  int64_t heads, kv_heads;
  float scale;
} kernel;

static const operator_ *of(const OrtCustomOp *op) { return (const operator_ *)op; }
static const char *ORT_CALL name(const OrtCustomOp *op) { return of(op)->name; }
static int ORT_CALL input_type(const OrtCustomOp *op, size_t i) {
  const int at = (int)i, past = past_of(of(op));
  if (at == mask_of(of(op))) return ORT_BOOL;
  if (at == QUERY || at >= tables_of(of(op))) return ORT_FLOAT;
  return coded(of(op), at < past ? at - NEW : at - past) ? ORT_INT8 : ORT_FLOAT;
}
static int ORT_CALL output_type(const OrtCustomOp *op, size_t i) {
  return i > 0 && coded(of(op), (int)i - 1) ? ORT_INT8 : ORT_FLOAT;
}
static size_t ORT_CALL input_count(const OrtCustomOp *op) { return (size_t)tables_of(of(op)) + 2; }
static size_t ORT_CALL output_count(const OrtCustomOp *op) { return (size_t)of(op)->parts + 1; }
static int ORT_CALL input_kind(const OrtCustomOp *op, size_t i) {
  return (int)i < tables_of(of(op)) ? ORT_REQUIRED : ORT_OPTIONAL;
}

static OrtStatus *ORT_CALL create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  kernel made = {.api = api, .op = of(op)};
  TRY(ORT(api, KernelInfoGetAttribute_int64)(info, "heads", &made.heads));
  TRY(ORT(api, KernelInfoGetAttribute_int64)(info, "kv_heads", &made.kv_heads));
  TRY(ORT(api, KernelInfoGetAttribute_float)(info, "scale", &made.scale));
  if (made.kv_heads < 1 || made.heads < made.kv_heads || made.heads % made.kv_heads)
    return fail(api, "heads must be a multiple of kv_heads", "attributes");
  kernel *k = malloc(sizeof *k);
  if (!k) return fail(api, "out of memory", "kernel");
  *k = made;
  return *out = k, NULL;
}

static void ORT_CALL destroy(void *k) { free(k); }

static int has_shape(const tensor *t, size_t rank, int64_t a, int64_t b, int64_t c, int64_t d) {
  const int64_t wanted[4] = {a, b, c, d};
  if (!t->data || t->rank != rank) return 0;
  for (size_t i = 0; i < rank; i++)
    if (t->dims[i] != wanted[i]) return 0;
  return 1;
}

static int64_t width(const operator_ *op, int part, const jpq_attention *a) {
  return op->parts == 2 || coded(op, part) ? a->dim : 1;
}

static void *writable(const tensor *t) { return (void *)(uintptr_t)t->data; }

/* New keys and values, or their codes and scales. */
static OrtStatus *read_new(const kernel *k, const tensor *in, jpq_attention *a) {
  const int64_t row = a->kv_heads * a->dim;
  const tensor *new = in + NEW;
  for (int i = 0; k->op->parts == 2 && i < 2; i++)
    if (!has_shape(new + i, 3, a->batch, a->seq, row, 0)) return fail(k->api, "must be [batch, seq, kv_heads * dim]", "key and value");
  for (int i = 0; k->op->parts != 2 && i < k->op->parts; i++)
    if (!has_shape(new + i, 4, a->batch, a->seq, a->kv_heads, coded(k->op, i) ? a->dim : 1))
      return fail(k->api, "must be [batch, seq, kv_heads, dim or 1]", "codes and scales");
  if (k->op->parts == 2)
    a->k = new[0].data, a->v = new[1].data;
  else
    a->fresh = (jpq_int8_cache){writable(new), writable(new + 1), writable(new + 2), writable(new + 3)};
  return NULL;
}

/* Sizes from the query, the mask and the attributes; everything else must agree with them. */
static OrtStatus *read_inputs(const kernel *k, const OrtKernelContext *context, tensor *in, jpq_attention *a) {
  const OrtApi *api = k->api;
  const tensor *q = in + QUERY, *mask = in + mask_of(k->op), *past = in + past_of(k->op), *tables = in + tables_of(k->op);
  size_t given;
  TRY(ORT(api, KernelContext_GetInputCount)(context, &given));
  memset(in, 0, CACHE_INPUTS * sizeof *in);
  for (size_t i = 0; i < given && i < CACHE_INPUTS; i++) TRY(input(api, context, i, in + i));
  if (q->rank != 3 || mask->rank != 4 || q->dims[2] % k->heads) return fail(api, "must be [batch, seq, heads * dim]", "query");
  *a = (jpq_attention){.batch = q->dims[0], .seq = q->dims[1], .total = mask->dims[3], .heads = k->heads,
                       .kv_heads = k->kv_heads, .dim = q->dims[2] / k->heads, .scale = k->scale};
  if (!has_shape(mask, 4, a->batch, 1, a->seq, a->total) || a->total < a->seq)
    return fail(api, "must be [batch, 1, seq, total]", "mask");
  TRY(read_new(k, in, a));
  for (int i = 0; i < k->op->parts; i++)
    if (!has_shape(past + i, 4, past->dims[0], a->batch, a->kv_heads, width(k->op, i, a)) || past->dims[0] < a->total - a->seq)
      return fail(api, "must be [past or more, batch, kv_heads, dim or, of scales, 1]", "past");
  if (!tables[0].data != !tables[1].data) return fail(api, "one without the other", "cos and sin");
  for (int i = 0; i < 2 && tables[i].data; i++)
    if (!has_shape(tables + i, 3, a->batch, a->seq, a->dim / 2, 0)) return fail(api, "must be [batch, seq, dim / 2]", "cos and sin");
  a->q = q->data, a->mask = mask->data, a->cos = tables[0].data, a->sin = tables[1].data;
  return NULL;
}

/* Part `i` of present, with everything of the past that is not where it should be already. */
static OrtStatus *make_present(const kernel *k, OrtKernelContext *context, int i, const tensor *past,
                               const jpq_attention *a, void **out) {
  const int64_t room = past->dims[0], wide = width(k->op, i, a);
  const int64_t dims[4] = {room > a->total ? room : a->total, a->batch, a->kv_heads, wide};
  const size_t row = (coded(k->op, i) ? 1 : sizeof(float)) * (size_t)(a->batch * a->kv_heads * wide);
  const size_t kept = (size_t)(a->total - a->seq) * row;
  OrtValue *output;
  void *data;
  TRY(ORT(k->api, KernelContext_GetOutput)(context, (size_t)i + 1, dims, 4, &output));
  TRY(ORT(k->api, GetTensorMutableData)(output, &data));
  if (data != past->data) {
    if (kept) memcpy(data, past->data, kept);
    if (room > a->total)
      memcpy((char *)data + (size_t)a->total * row, (const char *)past->data + (size_t)a->total * row, (size_t)(room - a->total) * row);
  }
  return *out = data, NULL;
}

typedef struct work {
  jpq_attention attention;
  int failed; /* several threads may set it, all to the same */
} work;

static void task(void *data, size_t i) {
  work *all = data;
  if (jpq_attention_task(&all->attention, (int64_t)i)) all->failed = 1;
}

static OrtStatus *ORT_CALL compute(void *data, OrtKernelContext *context) {
  const kernel *k = data;
  const OrtApi *api = k->api;
  tensor in[CACHE_INPUTS];
  work all = {.failed = 0};
  jpq_attention *a = &all.attention;
  OrtValue *output;
  void *y, *present[INT8_PARTS];
  TRY(read_inputs(k, context, in, a));
  TRY(ORT(api, KernelContext_GetOutput)(context, 0, in[QUERY].dims, 3, &output));
  TRY(ORT(api, GetTensorMutableData)(output, &y));
  for (int i = 0; i < k->op->parts; i++) TRY(make_present(k, context, i, in + past_of(k->op) + i, a, present + i));
  if (k->op->parts == 2)
    a->keys = present[0], a->values = present[1];
  else
    a->codes = (jpq_int8_cache){present[0], present[1], present[2], present[3]};
  a->y = y;
  jpq_status status = jpq_attention_begin(a);
  OrtStatus *failed = NULL;
  if (!status && a->batch * a->seq * a->heads * a->total * a->dim <= SMALL)
    for (int64_t i = 0; i < a->tasks; i++) task(&all, (size_t)i);
  else if (!status && a->tasks)
    failed = ORT(api, KernelContext_ParallelFor)(context, task, (size_t)a->tasks, 0, &all);
  if (!status && !failed && !all.failed) jpq_attention_finish(a);
  jpq_attention_end(a);
  if (failed) return failed;
  return status || all.failed ? fail(api, status == JPQ_NOT_HERE ? "no implementation" : "out of memory", "run") : NULL;
}

#define OPERATOR(NAME, PARTS)                                                                                           \
  {{JPQ_ORT_API, NULL, name, on_the_cpu, input_type, input_count, output_type, output_count, NULL, destroy, input_kind, \
    all_required, default_memory, one, one, one, one, create, compute, NULL, one, last_version, NULL, NULL, NULL, NULL},   \
   NAME, PARTS}

static const operator_ operators[] = {OPERATOR("Attention", 2), OPERATOR("Int8Attention", INT8_PARTS)};
const OrtCustomOp *const jpq_attention_operators[] = {&operators[0].base, &operators[1].base, &jpq_cache_codes_operator, NULL};
