/* `jpq::Attention` for onnxruntime on the CPU: new keys and values join the cache, queries look at all of it.
 *
 *     query [batch, seq, heads * dim], key, value [batch, seq, kv_heads * dim], mask bool [batch, 1, seq, total],
 *     past_key, past_value [room, batch, kv_heads, dim], cos, sin [batch, seq, dim / 2] or neither
 *     -> output like query, present_key, present_value [max(room, total), batch, kv_heads, dim]
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

enum { QUERY, KEY, VALUE, MASK, PAST_KEY, PAST_VALUE, COS, SIN, INPUTS };
enum { SMALL = 1 << 15 }; /* products of Q and K that one thread has done before others have woken */

typedef struct kernel {
  const OrtApi *api;
  int64_t heads, kv_heads;
  float scale;
} kernel;

static const char *ORT_CALL name(const OrtCustomOp *op) {
  (void)op;
  return "Attention";
}
static int ORT_CALL input_type(const OrtCustomOp *op, size_t i) {
  (void)op;
  return i == MASK ? ORT_BOOL : ORT_FLOAT;
}
static int ORT_CALL output_type(const OrtCustomOp *op, size_t i) {
  (void)op, (void)i;
  return ORT_FLOAT;
}
static size_t ORT_CALL input_count(const OrtCustomOp *op) {
  (void)op;
  return INPUTS;
}
static size_t ORT_CALL output_count(const OrtCustomOp *op) {
  (void)op;
  return 3;
}
static int ORT_CALL input_kind(const OrtCustomOp *op, size_t i) {
  (void)op;
  return i < COS ? ORT_REQUIRED : ORT_OPTIONAL;
}

static OrtStatus *ORT_CALL create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)op;
  kernel made = {.api = api};
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

/* Sizes from the query, the mask and the attributes; everything else must agree with them. */
static OrtStatus *read_inputs(const kernel *k, const OrtKernelContext *context, tensor *in, jpq_attention *a) {
  const OrtApi *api = k->api;
  size_t given;
  TRY(ORT(api, KernelContext_GetInputCount)(context, &given));
  memset(in, 0, INPUTS * sizeof *in);
  for (size_t i = 0; i < given && i < INPUTS; i++) TRY(input(api, context, i, in + i));
  const tensor *q = in + QUERY, *mask = in + MASK;
  if (q->rank != 3 || mask->rank != 4 || q->dims[2] % k->heads) return fail(api, "must be [batch, seq, heads * dim]", "query");
  *a = (jpq_attention){.batch = q->dims[0], .seq = q->dims[1], .total = mask->dims[3], .heads = k->heads,
                       .kv_heads = k->kv_heads, .dim = q->dims[2] / k->heads, .scale = k->scale};
  const int64_t row = a->kv_heads * a->dim, room = in[PAST_KEY].dims[0];
  if (!has_shape(mask, 4, a->batch, 1, a->seq, a->total) || a->total < a->seq)
    return fail(api, "must be [batch, 1, seq, total]", "mask");
  if (!has_shape(in + KEY, 3, a->batch, a->seq, row, 0) || !has_shape(in + VALUE, 3, a->batch, a->seq, row, 0))
    return fail(api, "must be [batch, seq, kv_heads * dim]", "key and value");
  for (int i = PAST_KEY; i <= PAST_VALUE; i++)
    if (!has_shape(in + i, 4, room, a->batch, a->kv_heads, a->dim) || room < a->total - a->seq)
      return fail(api, "must be [past or more, batch, kv_heads, dim]", "past_key and past_value");
  if (!in[COS].data != !in[SIN].data) return fail(api, "one without the other", "cos and sin");
  for (int i = COS; i <= SIN && in[i].data; i++)
    if (!has_shape(in + i, 3, a->batch, a->seq, a->dim / 2, 0)) return fail(api, "must be [batch, seq, dim / 2]", "cos and sin");
  a->q = in[QUERY].data, a->k = in[KEY].data, a->v = in[VALUE].data, a->mask = mask->data;
  a->cos = in[COS].data, a->sin = in[SIN].data;
  return NULL;
}

/* Present, with everything of the past that is not where it should be already. */
static OrtStatus *make_present(const kernel *k, OrtKernelContext *context, size_t i, const tensor *past,
                               const jpq_attention *a, float **out) {
  const int64_t room = past->dims[0], dims[4] = {room > a->total ? room : a->total, a->batch, a->kv_heads, a->dim};
  const size_t row = sizeof(float) * (size_t)(a->batch * a->kv_heads * a->dim), kept = (size_t)(a->total - a->seq) * row;
  OrtValue *output;
  void *data;
  TRY(ORT(k->api, KernelContext_GetOutput)(context, i, dims, 4, &output));
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
  tensor in[INPUTS];
  work all = {.failed = 0};
  jpq_attention *a = &all.attention;
  OrtValue *output;
  void *y;
  TRY(read_inputs(k, context, in, a));
  TRY(ORT(api, KernelContext_GetOutput)(context, 0, in[QUERY].dims, 3, &output));
  TRY(ORT(api, GetTensorMutableData)(output, &y));
  TRY(make_present(k, context, 1, in + PAST_KEY, a, &a->keys));
  TRY(make_present(k, context, 2, in + PAST_VALUE, a, &a->values));
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

const OrtCustomOp jpq_attention_operator = {
    JPQ_ORT_API, NULL, name, on_the_cpu, input_type, input_count, output_type, output_count, NULL, destroy,
    input_kind, all_required, default_memory, one, one, one, one, create, compute, NULL, one, last_version, NULL, NULL,
    NULL, NULL};
