/* Checking what is asked of a sampler. */
#ifndef JPQ_RUNTIME_SAMPLE_H
#define JPQ_RUNTIME_SAMPLE_H

#include "error.h"

jpq_result sampling_check(const jpq_sampling *sampling, jpq_error *error);

#endif
