/* `jpq::CacheCodes` for onnxruntime on the CPU: new keys and values as an int8 cache keeps them (see attention.h).
 *
 *     key, value [batch, seq, kv_heads * dim], cos, sin [batch, seq, dim / 2], to turn the keys with first, or neither
 *     -> key, value int8 [batch, seq, kv_heads, dim], key_scale, value_scale [batch, seq, kv_heads, 1]
 */
#include <stdlib.h>

#include "../core/attention.h"
#define JPQ_SPEAKER "jpq CacheCodes"
#include "ort_inputs.h"
#include "ort_operator.h"

enum { KEY, VALUE, COS, SIN, INPUTS, OUTPUTS = 4 };

typedef struct kernel {
  const OrtApi *api;
  int64_t kv_heads;
} kernel;

static const char *ORT_CALL name(const OrtCustomOp *op) {
  (void)op;
  return "CacheCodes";
}
static int ORT_CALL input_type(const OrtCustomOp *op, size_t i) {
  (void)op, (void)i;
  return ORT_FLOAT;
}
static int ORT_CALL output_type(const OrtCustomOp *op, size_t i) {
  (void)op;
  return i < 2 ? ORT_INT8 : ORT_FLOAT;
}
static size_t ORT_CALL input_count(const OrtCustomOp *op) {
  (void)op;
  return INPUTS;
}
static size_t ORT_CALL output_count(const OrtCustomOp *op) {
  (void)op;
  return OUTPUTS;
}
static int ORT_CALL input_kind(const OrtCustomOp *op, size_t i) {
  (void)op;
  return i < COS ? ORT_REQUIRED : ORT_OPTIONAL;
}

static OrtStatus *ORT_CALL create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)op;
  kernel made = {.api = api};
  TRY(ORT(api, KernelInfoGetAttribute_int64)(info, "kv_heads", &made.kv_heads));
  if (made.kv_heads < 1) return fail(api, "must be 1 or more", "kv_heads");
  kernel *k = malloc(sizeof *k);
  if (!k) return fail(api, "out of memory", "kernel");
  *k = made;
  return *out = k, NULL;
}

static void ORT_CALL destroy(void *k) { free(k); }

static int has_shape(const tensor *t, const tensor *like, int64_t last) {
  return t->data && t->rank == 3 && t->dims[0] == like->dims[0] && t->dims[1] == like->dims[1] && t->dims[2] == last;
}

static OrtStatus *ORT_CALL compute(void *data, OrtKernelContext *context) {
  const kernel *k = data;
  const OrtApi *api = k->api;
  tensor in[INPUTS] = {{0}};
  size_t given;
  TRY(ORT(api, KernelContext_GetInputCount)(context, &given));
  for (size_t i = 0; i < given && i < INPUTS; i++) TRY(input(api, context, i, in + i));
  const tensor *key = in + KEY;
  if (key->rank != 3 || key->dims[2] % k->kv_heads || !has_shape(in + VALUE, key, key->dims[2]))
    return fail(api, "must be [batch, seq, kv_heads * dim]", "key and value");
  const int64_t dim = key->dims[2] / k->kv_heads, positions = key->dims[0] * key->dims[1];
  if (!in[COS].data != !in[SIN].data) return fail(api, "one without the other", "cos and sin");
  if (in[COS].data && (!has_shape(in + COS, key, dim / 2) || !has_shape(in + SIN, key, dim / 2)))
    return fail(api, "must be [batch, seq, dim / 2]", "cos and sin");
  void *made[OUTPUTS];
  for (size_t i = 0; i < OUTPUTS; i++) {
    const int64_t dims[4] = {key->dims[0], key->dims[1], k->kv_heads, i < 2 ? dim : 1};
    OrtValue *output;
    TRY(ORT(api, KernelContext_GetOutput)(context, i, dims, 4, &output));
    TRY(ORT(api, GetTensorMutableData)(output, made + i));
  }
  const jpq_int8_cache out = {made[0], made[1], made[2], made[3]};
  jpq_status status = jpq_to_int8(key->data, in[VALUE].data, in[COS].data, in[SIN].data, positions, k->kv_heads, dim, &out);
  return status ? fail(api, status == JPQ_NO_MEMORY ? "out of memory" : "these sizes do not fit", "run") : NULL;
}

const OrtCustomOp jpq_cache_codes_operator = {
    JPQ_ORT_API, NULL, name, on_the_cpu, input_type, input_count, output_type, output_count, NULL, destroy,
    input_kind, all_required, default_memory, one, one, one, one, create, compute, NULL, one, last_version, NULL, NULL,
    NULL, NULL};
