/* What a `jpq::LowBitChain` is once it is read (chain_op.c), for chain_run.c to compute. */
#ifndef JPQ_CHAIN_H
#define JPQ_CHAIN_H

#include "../core/low_bit.h"
#ifndef JPQ_SPEAKER
#define JPQ_SPEAKER "jpq LowBitChain"
#endif
#include "crew.h"
#include "large_pages.h"
#include "ort_inputs.h"

enum { MOST_LINKS = MOST_STEPS, MOST_ALL = 16 /* weights */ };

typedef enum then { GIVE, SUM_NORM, SILU, GELU_TANH, SUM } then;

typedef struct chain_link {
  int64_t first, count;   /* of its weights */
  int64_t then, has_post; /* attributes */
  const float *post, *norm; /* factors of norms, or NULL */
} chain_link;

typedef struct chain {
  const OrtApi *api;
  jpq_activations activations;
  int64_t links, all, sums; /* all: weights */
  int64_t hidden;           /* width of the stream, 0 when nothing is added to it */
  size_t inputs;            /* with X and the stream */
  float epsilon;
  chain_link link[MOST_LINKS];
  part parts[MOST_ALL];
  block *codes; /* of the parts, where they were moved */
  const float *bias[MOST_ALL];
  atomic_int threads; /* that worked last time */
} chain;

OrtStatus *jpq_chain_run(chain *k, OrtKernelContext *context);

#endif
