/* numpy's default generator (PCG64 seeded by SeedSequence), so that a seed means the same in C and in Python. */
#ifndef JPQ_RUNTIME_RANDOM_H
#define JPQ_RUNTIME_RANDOM_H

#include <stdint.h>

typedef struct random_state {
  uint64_t high, low;           /* of the 128-bit state */
  uint64_t step_high, step_low; /* of the odd increment */
} random_state;

void random_seed(random_state *state, uint64_t seed);
/* Uniform in [0, 1), 53 bits. */
double random_uniform(random_state *state);

#endif
