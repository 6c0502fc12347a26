/* Several steps of parallel work in one call of onnxruntime's ParallelFor: whoever comes helps with the step at hand.
 *
 * Handing tasks to waiting threads costs onnxruntime 5 us each time (two threads, Zen 4), which a token of a small model
 * pays 150 times. Here threads go from a step to the next by themselves. None has to come: a step is over when its tasks
 * are, and tasks are taken only by threads that run, so one thread alone does everything.
 */
#ifndef JPQ_CREW_H
#define JPQ_CREW_H

#include <sched.h>
#include <stdatomic.h>

enum { MOST_STEPS = 8, MOST_SHARES = 32, SPINS = 1 << 12 };

/* Tasks that lie together: reading on is faster than reading here and there. */
typedef struct share {
  _Alignas(64) atomic_int next;
  int last;
} share;

typedef struct crew {
  int steps, shares;           /* a share of each step's tasks for each thread that came last time */
  int tasks[MOST_STEPS];       /* at least one */
  void (*task)(void *data, int step, int i);
  void (*between)(void *data, int step); /* on one thread, after a step's last task and before any of the next */
  void *data;
  share shared[MOST_STEPS][MOST_SHARES];
  atomic_int done[MOST_STEPS];
  _Alignas(64) atomic_int step; /* at hand */
  atomic_int came, worked;      /* threads */
} crew;

static inline void crew_begin(crew *c) {
  for (int s = 0; s < c->steps; s++) {
    atomic_init(&c->done[s], 0);
    for (int i = 0; i < c->shares; i++) {
      atomic_init(&c->shared[s][i].next, c->tasks[s] * i / c->shares);
      c->shared[s][i].last = c->tasks[s] * (i + 1) / c->shares;
    }
  }
  atomic_init(&c->step, 0), atomic_init(&c->came, 0), atomic_init(&c->worked, 0);
}

static inline void crew_pause(int spins) {
  if (spins >= SPINS)
    sched_yield(); /* there may be fewer cores than threads */
#if defined(__x86_64__)
  else
    __builtin_ia32_pause();
#elif defined(__aarch64__)
  else
    __asm__ volatile("yield");
#endif
}

/* Tasks of one step, first of the share at `mine`; returns how many. */
static inline int crew_tasks(crew *c, int s, int mine) {
  int count = 0;
  for (int k = 0; k < c->shares; k++) {
    share *from = &c->shared[s][(mine + k) % c->shares];
    while (atomic_load_explicit(&from->next, memory_order_relaxed) < from->last) {
      const int i = atomic_fetch_add_explicit(&from->next, 1, memory_order_relaxed);
      if (i >= from->last) break;
      c->task(c->data, s, i), count++;
      if (atomic_fetch_add_explicit(&c->done[s], 1, memory_order_acq_rel) + 1 < c->tasks[s]) continue;
      c->between(c->data, s);
      atomic_store_explicit(&c->step, s + 1, memory_order_release);
    }
  }
  return count;
}

/* What every thread does, `i` of ParallelFor; the work is over when all that began have returned. */
static inline void crew_help(void *data, size_t i) {
  crew *c = data;
  (void)i;
  int s = atomic_load_explicit(&c->step, memory_order_acquire), count = 0;
  if (s >= c->steps) return;
  const int mine = atomic_fetch_add_explicit(&c->came, 1, memory_order_relaxed);
  for (; s < c->steps; s++) {
    for (int spins = 0; atomic_load_explicit(&c->step, memory_order_acquire) < s; spins++) crew_pause(spins);
    count += crew_tasks(c, s, mine);
  }
  if (count) atomic_fetch_add_explicit(&c->worked, 1, memory_order_relaxed);
}

#endif
