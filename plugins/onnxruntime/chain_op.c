/* `jpq::LowBitChain` for onnxruntime on the CPU: what lies between one attention and the next, products and all.
 *
 *     X [..., K of the first link], stream [..., hidden], then of each link its weights, post norm, norm
 *     -> the stream after every sum, then what the last link gives (nothing when that is a sum alone)
 *
 * A link multiplies what it is given with one weight or several, and then, as its attribute "then" says,
 *
 *     0  gives the products, which only the last link does
 *     1  adds the product to the stream and gives the norm of the sum (after a norm of the product where there is "post")
 *     2  gives silu(first) * second
 *     3  gives gelu_tanh(first) * second
 *     4  adds the product to the stream, which only the last link does
 *
 * All weights must be constants of the graph.
 */
#include <stdlib.h>
#include <string.h>

#include "chain.h"
#include "ort_operator.h"

typedef struct operator_ {
  OrtCustomOp base; /* first: onnxruntime hands back a pointer to it */
  jpq_activations activations;
} operator_;

/* ---- description ---- */

static const char *ORT_CALL name(const OrtCustomOp *op) {
  (void)op;
  return "LowBitChain";
}
static int ORT_CALL input_type(const OrtCustomOp *op, size_t i) {
  (void)op;
  return i < 2 ? ORT_FLOAT : ORT_ANY;
}
static size_t ORT_CALL input_count(const OrtCustomOp *op) {
  (void)op;
  return 3;
}
static int ORT_CALL input_kind(const OrtCustomOp *op, size_t i) {
  (void)op;
  return i < 2 ? ORT_REQUIRED : ORT_VARIADIC;
}
static int ORT_CALL output_kind(const OrtCustomOp *op, size_t i) {
  (void)op, (void)i;
  return ORT_VARIADIC;
}

/* ---- creation ---- */

static OrtStatus *read_vector(const source *from, size_t *at, int64_t count, const char *what, const float **out) {
  tensor t;
  TRY(input_of(from, (*at)++, &t));
  if (!t.data || t.type != ORT_FLOAT || t.rank != 1 || t.count != count)
    return fail(from->api, "must be a constant float [N]", what);
  return *out = t.data, NULL;
}

static OrtStatus *read_number(const source *from, const char *what, int i, int64_t *out) {
  char text[32];
  snprintf(text, sizeof text, "%s_%d", what, i);
  return ORT(from->api, KernelInfoGetAttribute_int64)(from->info, text, out);
}

/* A link's weights and norms, inputs from `*at` on; it is given `width` numbers, afterwards those it gives. */
static OrtStatus *read_link(const source *from, chain *k, int l, size_t *at, int64_t *width) {
  chain_link *link = k->link + l;
  TRY(read_number(from, "count", l, &link->count));
  TRY(read_number(from, "then", l, &link->then));
  TRY(read_number(from, "post", l, &link->has_post));
  const int sum = link->then == SUM_NORM || link->then == SUM, gate = link->then == SILU || link->then == GELU_TANH;
  const int last = l + 1 == k->links, ends = link->then == GIVE || link->then == SUM;
  link->first = k->all;
  if (link->then < GIVE || link->then > SUM || (ends && !last) || (gate && last) || (link->has_post && !sum))
    return fail(from->api, "this may not stand here", "then");
  if (link->count < 1 || link->count > MOST_PARTS || k->all + link->count > MOST_ALL || (sum && link->count != 1) || (gate && link->count != 2))
    return fail(from->api, "a sum has one weight, a gate two, a link at most 4, a chain 16", "count");
  for (int64_t i = 0; i < link->count; i++, k->all++) {
    part *each = k->parts + k->all;
    TRY(read_part(from->api, from->info, OF_EACH_X, (int)k->all, each));
    jpq_weight *w = &each->shape;
    if (!jpq_is_width(w->bits)) return fail(from->api, "bits must be 1 to 8, 16 for ternary codes, 35 to 38 for normal levels", "bits");
    if (w->k < 1 || w->n < 1 || w->group_size < 1 || w->k % w->group_size) return fail(from->api, "K must be a multiple of group_size, N positive", "weight");
    if (*width && w->k != *width) return fail(from->api, "is not what the link before gives", "K");
    *width = w->k;
    TRY(read_weight(from, at, each->symmetric, w));
    if (each->biased) TRY(read_vector(from, at, w->n, "bias", k->bias + k->all));
    if (gate && w->n != k->parts[link->first].shape.n) return fail(from->api, "a gate's two weights have one N", "N");
  }
  *width = k->parts[link->first].shape.n;
  if (!sum) return NULL;
  if (k->hidden && k->hidden != *width) return fail(from->api, "sums differ in width", "N");
  k->hidden = *width, k->sums++;
  if (link->has_post) TRY(read_vector(from, at, *width, "post norm", &link->post));
  return link->then == SUM_NORM ? read_vector(from, at, *width, "norm", &link->norm) : NULL;
}

static OrtStatus *ORT_CALL create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  const source constants = {api, NULL, info};
  chain made = {.api = api, .activations = ((const operator_ *)op)->activations};
  int64_t width = 0;
  size_t at = 2;
  TRY(ORT(api, KernelInfoGetAttribute_int64)(info, "links", &made.links));
  TRY(ORT(api, KernelInfoGetAttribute_float)(info, "epsilon", &made.epsilon));
  if (made.links < 1 || made.links > MOST_LINKS) return fail(api, "must be 1 to 8", "links");
  for (int l = 0; l < made.links; l++) TRY(read_link(&constants, &made, l, &at, &width));
  made.inputs = at;
  chain *k = malloc(sizeof *k);
  if (!k) return fail(api, "out of memory", "kernel");
  memcpy(k, &made, sizeof made);
  k->codes = jpq_to_large_pages(k->parts, k->all);
  atomic_init(&k->threads, 1);
  return *out = k, NULL;
}

static void ORT_CALL destroy(void *k) {
  jpq_release_block(((chain *)k)->codes);
  free(k);
}

static OrtStatus *ORT_CALL compute(void *k, OrtKernelContext *context) { return jpq_chain_run(k, context); }

#define OPERATOR(MODE)                                                                                                   \
  {{JPQ_ORT_API, NULL, name, on_the_cpu, input_type, input_count, a_float, a_single, NULL, destroy, input_kind,  \
    output_kind, default_memory, one, none, one, one, create, compute, NULL, one, last_version, NULL, NULL, NULL, NULL}, \
   MODE}

static const operator_ operators[] = {OPERATOR(JPQ_FP32), OPERATOR(JPQ_INT8), OPERATOR(JPQ_INT16)};

/* The operator of an activations mode, in the order of jpq_activations. */
const OrtCustomOp *jpq_chain_operator(int mode) { return &operators[mode].base; }
