/* PCG64, XSL-RR (O'Neill, 2014), and numpy's SeedSequence, whose hash is of O'Neill's seed_seq_fe. */
#include "random.h"

/* High half of a 64 by 64 bit product. */
static uint64_t multiply_high(uint64_t a, uint64_t b) {
  const uint64_t a0 = (uint32_t)a, a1 = a >> 32, b0 = (uint32_t)b, b1 = b >> 32;
  const uint64_t middle = a1 * b0 + (a0 * b0 >> 32), other = a0 * b1 + (uint32_t)middle;
  return a1 * b1 + (middle >> 32) + (other >> 32);
}

static void add(random_state *s, uint64_t high, uint64_t low) {
  s->low += low;
  s->high += high + (s->low < low);
}

static void advance(random_state *s) {
  const uint64_t high = 0x2360ed051fc65da4u, low = 0x4385df649fccf645u;
  s->high = multiply_high(s->low, low) + s->high * low + s->low * high;
  s->low *= low;
  add(s, s->step_high, s->step_low);
}

static uint32_t hash(uint32_t value, uint32_t *constant, uint32_t factor) {
  value ^= *constant;
  *constant *= factor;
  value *= *constant;
  return value ^ value >> 16;
}

static void seed_words(uint64_t seed, uint64_t out[4]) {
  uint32_t pool[4], constant = 0x43b0d7e5u, words[8];
  for (int i = 0; i < 4; i++) pool[i] = hash(i == 0 ? (uint32_t)seed : i == 1 ? (uint32_t)(seed >> 32) : 0, &constant, 0x931e8875u);
  for (int from = 0; from < 4; from++)
    for (int to = 0; to < 4; to++) {
      if (from == to) continue;
      const uint32_t mixed = 0xca01f9ddu * pool[to] - 0x4973f715u * hash(pool[from], &constant, 0x931e8875u);
      pool[to] = mixed ^ mixed >> 16;
    }
  constant = 0x8b51f9ddu;
  for (int i = 0; i < 8; i++) words[i] = hash(pool[i % 4], &constant, 0x58f38dedu);
  for (int i = 0; i < 4; i++) out[i] = words[2 * i] | (uint64_t)words[2 * i + 1] << 32;
}

void random_seed(random_state *s, uint64_t seed) {
  uint64_t words[4];
  seed_words(seed, words);
  s->high = s->low = 0;
  s->step_high = words[2] << 1 | words[3] >> 63, s->step_low = words[3] << 1 | 1;
  advance(s);
  add(s, words[0], words[1]);
  advance(s);
}

double random_uniform(random_state *s) {
  advance(s);
  const uint64_t x = s->high ^ s->low;
  const unsigned turn = (unsigned)(s->high >> 58);
  return (double)((x >> turn | x << (-turn & 63)) >> 11) * (1.0 / 9007199254740992.0);
}
