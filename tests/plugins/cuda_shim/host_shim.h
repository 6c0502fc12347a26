/* Just enough CUDA to run plugins/core/low_bit_cuda.cu on a CPU, compiled by g++ as C++: numerics without a GPU.
 *
 * Each thread of a block is a fiber (ucontext); __syncthreads, __syncwarp, shuffles and mma are rendezvous of the block
 * or the warp; blocks run one after the other. Shared memory is of exactly the size asked for and starts as NaN.
 * Right for: indexing, packing, edges, reductions, the fragment layout of mma as PTX documents it.
 * BLIND to: races (fibers only switch at rendezvous), barriers that a GPU needs but this order does not, the mma
 * instruction itself and the order of its sums, inline PTX, occupancy, speed. Misaligned vectors are seen only in the
 * build with -fsanitize=alignment. Never a substitute for a run on a GPU.
 */
#ifndef JPQ_HOST_SHIM_H
#define JPQ_HOST_SHIM_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define JPQ_SHARED_BYTES(NAME) unsigned char *NAME = shim::shared.data()
#define JPQ_LAUNCH(KERNEL, GRID, THREADS, SHARED, STREAM, ...) \
  ((void)(STREAM), shim::launch(GRID, THREADS, SHARED, [&] { KERNEL(__VA_ARGS__); }))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

/* Bytes of y above those of x, taken by the lowest three bits of each of four fields. */
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned fields) {
  unsigned out = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned at = fields >> (4 * i) & 7;
    out |= ((at < 4 ? x : y) >> (at % 4 * 8) & 255) << (8 * i);
  }
  return out;
}

static dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace shim {

static inline float half_to_float(uint16_t h) {
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023u;
  float f = exponent == 31 ? (mantissa ? NAN : INFINITY)
            : exponent     ? ldexpf((float)(1024 + mantissa), (int)exponent - 25)
                           : ldexpf((float)mantissa, -24);
  return h & 0x8000 ? -f : f;
}

/* To nearest, ties to even: the step at this size is a power of two, and rintf rounds so. */
static inline uint16_t float_to_half(float f) {
  const uint16_t sign = signbit(f) ? 0x8000 : 0;
  const float size = fabsf(f);
  if (isnan(f)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = 0;
  frexpf(size, &exponent); /* size in [2^(e-1), 2^e) */
  if (size == 0 || exponent < -13) exponent = -13; /* subnormal: the step stays 2^-24 */
  const unsigned steps = (unsigned)rintf(ldexpf(size, 11 - exponent));
  return (uint16_t)(sign | (steps + ((unsigned)(exponent + 13) << 10))); /* a carry moves into the exponent by itself */
}

/* Who waits for whom: a rendezvous of `size` fibers, told apart by generation. */
struct Meeting {
  int size = 0, arrived = 0;
  long generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  const Meeting *waits = nullptr;
  long since = 0;
  bool done = false;
};

constexpr int WARP = 32;
constexpr size_t STACK = 256 * 1024;

struct Exchange { /* of a warp; two sides, so that a fast lane never overwrites what a slow one still reads */
  Meeting meeting;
  uint32_t slots[2][WARP][6];
};

static std::vector<unsigned char> shared;
static std::vector<Fiber> fibers;
static std::vector<Exchange> warps;
static Meeting block;
static ucontext_t scheduler;
static const std::function<void()> *body;
static size_t current;

/* Wait until all of the meeting have come. */
static void meet(Meeting &meeting) {
  Fiber &self = fibers[current];
  self.since = meeting.generation;
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    meeting.generation++;
    return;
  }
  self.waits = &meeting;
  swapcontext(&self.context, &scheduler);
}

static void entry() {
  (*body)();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

static void start(size_t i) {
  Fiber &fiber = fibers[i];
  fiber.stack.resize(STACK);
  fiber.done = false;
  fiber.waits = nullptr;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

/* Run every fiber until all are done. Threads that leave early while others wait are a dead kernel: say so and stop. */
static void run_block(int threads) {
  for (int left = threads; left;) {
    bool moved = false;
    for (current = 0; current < (size_t)threads; current++) {
      Fiber &fiber = fibers[current];
      if (fiber.done || (fiber.waits && fiber.waits->generation == fiber.since)) continue;
      fiber.waits = nullptr;
      threadIdx = dim3((unsigned)current);
      swapcontext(&scheduler, &fiber.context);
      moved = true;
      left -= fiber.done;
    }
    if (!moved) {
      fprintf(stderr, "host_shim: %d threads wait for a rendezvous that others left\n", left);
      abort();
    }
  }
}

static void launch(dim3 grid, int threads, size_t bytes, const std::function<void()> &kernel) {
  body = &kernel;
  gridDim = grid, blockDim = dim3((unsigned)threads);
  if (fibers.size() < (size_t)threads) fibers.resize(threads);
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = dim3(x, y, z);
        std::vector<unsigned char>(bytes, 0xff).swap(shared); /* NaN, as fp16 and as fp32 */
        warps.assign((threads + WARP - 1) / WARP, Exchange());
        for (auto &warp : warps) warp.meeting.size = WARP;
        block = Meeting();
        block.size = threads;
        for (int i = 0; i < threads; i++) start(i);
        run_block(threads);
      }
}

/* Publish up to 6 words, meet the warp, and get the side on which everybody's lie. */
static uint32_t (*publish(const uint32_t *words, int count))[6] {
  Exchange &warp = warps[current / WARP];
  auto *side = warp.slots[warp.meeting.generation & 1];
  memcpy(side[current % WARP], words, count * sizeof *words);
  meet(warp.meeting);
  return side;
}

static float half_of(const uint32_t word, int upper) { return half_to_float((uint16_t)(word >> (16 * upper))); }

/* D += A . B in the fragment layout of m16n8k16: this lane's four sums from everybody's fragments. */
static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const int lane = current % WARP;
  auto *all = publish(mine, 6);
  for (int c = 0; c < 4; c++) {
    const int row = lane / 4 + c / 2 * 8, column = lane % 4 * 2 + c % 2;
    double sum = d[c];
    for (int k = 0; k < 16; k++) {
      const int t = k % 8 / 2, far = k / 8;
      const uint32_t left = all[row % 8 * 4 + t][row / 8 + 2 * far], right = all[column * 4 + t][4 + far];
      sum += (double)half_of(left, k % 2) * half_of(right, k % 2);
    }
    d[c] = (float)sum;
  }
}

}  // namespace shim

static inline void __syncthreads() { shim::meet(shim::block); }
static inline void __syncwarp() { shim::meet(shim::warps[shim::current / shim::WARP].meeting); }
static inline float __uint_as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
static inline float __shfl_xor_sync(uint32_t mask, float value, int step) {
  uint32_t word;
  if (mask != 0xffffffffu) abort(); /* part of a warp: not known here */
  memcpy(&word, &value, sizeof word);
  const int from = (shim::current % shim::WARP) ^ step;
  return __uint_as_float(shim::publish(&word, 1)[from][0]);
}

#endif
