/* What both libraries of onnxruntime operators do with a run's inputs, in C and C++: read them, check them against the
 * attributes. Include the core's header with jpq_weight first, and define JPQ_SPEAKER, who complains.
 */
#ifndef JPQ_ORT_INPUTS_H
#define JPQ_ORT_INPUTS_H

#include <stdio.h>
#include <string.h>

#include "ort_api.h"

#define TRY(call)                \
  do {                           \
    OrtStatus *status_ = (call); \
    if (status_) return status_; \
  } while (0)

enum { MOST_RANK = 16 };

static inline OrtStatus *fail(const OrtApi *api, const char *what, const char *where) {
  char text[200];
  snprintf(text, sizeof text, JPQ_SPEAKER ": %s (%s)", what, where);
  return ORT(api, CreateStatus)(ORT_INVALID_ARGUMENT, text);
}

/* An input's place and shape; NULL data when it was not given. */
typedef struct tensor {
  const void *data;
  int type;
  size_t rank;
  int64_t dims[MOST_RANK];
  int64_t count;
} tensor;

static inline OrtStatus *read_info(const OrtApi *api, const OrtTensorInfo *info, tensor *out) {
  size_t count;
  TRY(ORT(api, GetTensorElementType)(info, &out->type));
  TRY(ORT(api, GetDimensionsCount)(info, &out->rank));
  if (out->rank > MOST_RANK) return fail(api, "too many dimensions", "input");
  TRY(ORT(api, GetDimensions)(info, out->dims, out->rank));
  TRY(ORT(api, GetTensorShapeElementCount)(info, &count));
  out->count = (int64_t)count;
  return NULL;
}

static inline OrtStatus *read_tensor(const OrtApi *api, const OrtValue *value, tensor *out) {
  OrtTensorInfo *info;
  void *data;
  memset(out, 0, sizeof *out);
  if (!value) return NULL;
  TRY(ORT(api, GetTensorTypeAndShape)(value, &info));
  OrtStatus *status = read_info(api, info, out);
  ORT(api, ReleaseTensorTypeAndShapeInfo)(info);
  if (status) return status;
  TRY(ORT(api, GetTensorMutableData)((OrtValue *)value, &data)); /* the only accessor there is; not written to */
  out->data = data;
  return NULL;
}

static inline OrtStatus *input(const OrtApi *api, const OrtKernelContext *context, size_t i, tensor *out) {
  const OrtValue *value = NULL;
  TRY(ORT(api, KernelContext_GetInput)(context, i, &value));
  return read_tensor(api, value, out);
}

/* Where inputs come from: a run, or, when a kernel is made, the constants of the graph, of which each run has the same. */
typedef struct source {
  const OrtApi *api;
  const OrtKernelContext *context; /* NULL: the constants */
  const OrtKernelInfo *info;
} source;

/* Input i; NULL data when it was not given or, of the constants, is none. */
static inline OrtStatus *input_of(const source *from, size_t i, tensor *out) {
  const OrtValue *value = NULL;
  int constant = 0;
  if (from->context) return input(from->api, from->context, i, out);
  TRY(ORT(from->api, KernelInfoGetConstantInput_tensor)(from->info, i, &constant, &value));
  return read_tensor(from->api, constant ? value : NULL, out);
}

/* One weight of an operator, as its attributes describe it. */
typedef struct part {
  jpq_weight shape; /* pointers are filled in at each run, or once where they are constants of the graph */
  int symmetric, biased;
} part;

enum { MOST_PARTS = 4 };

/* How attributes name a part: "bits" of the only one, whose bias is an input that is there or not; "bits_i" and so on of
 * several of one X, whose K is "K"; "K_i" too where each has an X. */
typedef enum naming { SINGLE, OF_ONE_X, OF_EACH_X } naming;

/* Part `i`. */
static inline OrtStatus *read_part(const OrtApi *api, const OrtKernelInfo *info, naming how, int i, part *out) {
  static const char *const names[] = {"bits", "N", "group_size", "symmetric", "bias", "K"};
  int64_t values[6] = {0, 0, 0, 0, 1, 0};
  for (int j = 0; j < 6; j++) {
    char text[32];
    if (how == SINGLE && j == 4) continue;
    snprintf(text, sizeof text, how == SINGLE || (how == OF_ONE_X && j == 5) ? "%s" : "%s_%d", names[j], i);
    TRY(ORT(api, KernelInfoGetAttribute_int64)(info, text, values + j));
  }
  memset(out, 0, sizeof *out);
  out->shape.bits = (int32_t)values[0], out->shape.n = values[1], out->shape.group_size = (int32_t)values[2];
  out->shape.k = values[5], out->symmetric = values[3] != 0, out->biased = values[4] != 0;
  return NULL;
}

/* How many parts there are: the attribute "count", 1 where `single`. */
static inline OrtStatus *read_count(const OrtApi *api, const OrtKernelInfo *info, int single, int64_t *count) {
  *count = 1;
  if (!single) TRY(ORT(api, KernelInfoGetAttribute_int64)(info, "count", count));
  return *count < 1 || *count > MOST_PARTS ? fail(api, "count must be 1 to 4", "LowBitMatMuls") : NULL;
}

static inline int is_matrix(const tensor *t, int type, int64_t rows, int64_t columns) {
  return t->data && t->type == type && t->rank == 2 && t->dims[0] == rows && t->dims[1] == columns;
}

/* Of inputs from `*at` on, which then counts them: the weight, in w that holds the attributes already. */
static inline OrtStatus *read_weight(const source *from, size_t *at, int symmetric, jpq_weight *w) {
  tensor t;
  const int64_t groups = w->k / w->group_size;
  w->zeros = NULL;
  TRY(input_of(from, (*at)++, &t));
  if (!is_matrix(&t, ORT_UINT8, w->n, jpq_bytes(w->k, w->bits)))
    return fail(from->api, "must be uint8 [N, bytes of K codes]", "packed");
  w->packed = (const uint8_t *)t.data;
  TRY(input_of(from, (*at)++, &t));
  if (!is_matrix(&t, ORT_FLOAT16, w->n, groups)) return fail(from->api, "must be float16 [N, K/group_size]", "scales");
  w->scales = (const uint16_t *)t.data;
  if (symmetric) return NULL;
  TRY(input_of(from, (*at)++, &t));
  if (!is_matrix(&t, ORT_UINT8, w->n, jpq_bytes(groups, w->bits)))
    return fail(from->api, "must be uint8 [N, bytes of K/group_size codes]", "zeros");
  w->zeros = (const uint8_t *)t.data;
  return NULL;
}

/* The bias, input `at` of those there are; NULL when it was not given. */
static inline OrtStatus *read_bias(const OrtApi *api, const OrtKernelContext *context, size_t at, const jpq_weight *w,
                                   const void **bias) {
  tensor t;
  size_t inputs;
  *bias = NULL;
  TRY(ORT(api, KernelContext_GetInputCount)(context, &inputs));
  if (at >= inputs) return NULL;
  TRY(input(api, context, at, &t));
  if (t.data && (t.type != ORT_FLOAT || t.count != w->n)) return fail(api, "must be float [N]", "bias");
  *bias = t.data;
  return NULL;
}

/* Where output `i` goes: the shape of X (at least 1-d, its last dimension K, unless it holds indices) with what a row
 * gives. */
static inline OrtStatus *make_output(const OrtApi *api, OrtKernelContext *context, size_t i, const jpq_weight *w,
                                     int gather, const tensor *x, void **y) {
  OrtValue *output;
  tensor made = *x;
  if (gather ? x->rank >= MOST_RANK : !x->rank || x->dims[x->rank - 1] != w->k)
    return fail(api, "the last dimension of X must be K", "input 0");
  if (gather)
    made.dims[made.rank++] = w->k;
  else
    made.dims[made.rank - 1] = w->n;
  TRY(ORT(api, KernelContext_GetOutput)(context, i, made.dims, made.rank, &output));
  return ORT(api, GetTensorMutableData)(output, y);
}

#endif
