#define _GNU_SOURCE /* for mmap's and madvise's flags */
#include <inttypes.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../core/low_bit.h"
#define JPQ_SPEAKER "jpq"
#include "large_pages.h"

#ifdef __linux__
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

enum {
  LARGE = 2 << 20,          /* bytes of a page */
  BLOCK = 16 * (int)LARGE,  /* asked of the system at once; what is not used of it takes no memory */
  WORTH = 64 << 10,         /* bytes of a kernel's codes: below, its pages are few anyway */
  STEP = 1 << 20,           /* bytes copied before the file's are given back */
  LINE = 64,
  LOOKED_AT = 512, /* pages at a time */
};
#define SETTINGS "/sys/kernel/mm/transparent_hugepage/"
#define ABOUT_PAGE "/proc/self/pagemap" /* 8 bytes for each */
#define IN_MEMORY (1ull << 63)
#define SWAPPED (1ull << 62)
#define OF_FILE (1ull << 61)

struct block {
  uint8_t *memory; /* mapped, its first large page at `pages` */
  size_t mapped;
  uint8_t *pages;
  size_t size, used;
  int kernels; /* that have codes in it, and one more while it is the latest */
};

static block *latest; /* with room perhaps */
static atomic_flag busy = ATOMIC_FLAG_INIT; /* around all that reads or writes blocks: sessions may be made side by side */

static void enter(void) {
  while (atomic_flag_test_and_set_explicit(&busy, memory_order_acquire)) sched_yield();
}
static void leave(void) { atomic_flag_clear_explicit(&busy, memory_order_release); }

static void release(block *b) {
  if (!b || --b->kernels) return;
  munmap(b->memory, b->mapped);
  free(b);
}

static block *new_block(size_t bytes) {
  block *b = calloc(1, sizeof *b);
  if (!b) return NULL;
  b->size = ((bytes > BLOCK ? bytes : BLOCK) + LARGE - 1) / LARGE * LARGE, b->mapped = b->size + LARGE, b->kernels = 1;
  b->memory = mmap(NULL, b->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (b->memory == MAP_FAILED) return free(b), NULL;
  b->pages = (uint8_t *)(((uintptr_t)b->memory + LARGE - 1) & ~(uintptr_t)(LARGE - 1));
  if (!madvise(b->pages, b->size, MADV_HUGEPAGE)) return b;
  release(b);
  return NULL;
}

/* Room for `bytes` in the latest block or a new one, which then has a kernel more. */
static block *take(size_t bytes, uint8_t **at) {
  if (!latest || latest->size - latest->used < bytes) {
    block *made = new_block(bytes);
    if (!made) return NULL;
    release(latest);
    latest = made;
  }
  *at = latest->pages + latest->used;
  latest->used += bytes, latest->kernels++;
  return latest;
}

static size_t whole_lines(size_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }
static size_t code_bytes(const jpq_weight *w) { return (size_t)(w->n * jpq_bytes(w->k, w->bits)); }

static int file_says(const char *path, const char *what) {
  char text[64] = "";
  FILE *file = fopen(path, "r");
  if (!file) return 0;
  if (!fgets(text, sizeof text, file)) text[0] = 0;
  fclose(file);
  return strstr(text, what) != NULL;
}

/* Whether the system gives pages of LARGE bytes to who asks: the advice alone is taken, and does nothing, where it does not. */
static int has_large_pages(void) {
  char size[24];
  snprintf(size, sizeof size, "%d\n", LARGE);
  return file_says(SETTINGS "hpage_pmd_size", size) && !file_says(SETTINGS "enabled", "[never]") && prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 0;
}

/* Whether all of `bytes` from `data` on are as the file has them: of pages that were written to, nobody else has the content. */
static int is_clean(int about, const uint8_t *data, size_t bytes) {
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), last = ((uintptr_t)data + bytes + page - 1) / page;
  for (uintptr_t at = (uintptr_t)data / page; at < last; at += LOOKED_AT) {
    uint64_t pages[LOOKED_AT];
    const size_t count = last - at < LOOKED_AT ? last - at : LOOKED_AT;
    if (pread(about, pages, count * sizeof *pages, (off_t)(at * sizeof *pages)) != (ssize_t)(count * sizeof *pages)) return 0;
    for (size_t i = 0; i < count; i++)
      if ((pages[i] & SWAPPED) || ((pages[i] & IN_MEMORY) && !(pages[i] & OF_FILE))) return 0;
  }
  return 1;
}

/* Whether all codes lie in private mappings of files, found in the system's list of what is mapped, and unchanged. */
static int from_files(const part *parts, int64_t count) {
  FILE *list = fopen("/proc/self/maps", "r");
  char line[512];
  uint64_t found = 0;
  if (!list) return 0;
  while (fgets(line, sizeof line, list)) {
    uintptr_t first, last;
    unsigned long long inode;
    char kind[5], name[16] = "";
    if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %4s %*s %*s %llu %15s", &first, &last, kind, &inode, name) < 4) continue; /* the rest of a long line */
    if (!inode || kind[3] != 'p' || !strcmp(name, "/dev/zero") || !strcmp(name, "/anon_hugepage")) continue;
    for (int64_t i = 0; i < count; i++) {
      const uintptr_t at = (uintptr_t)parts[i].shape.packed;
      if (at >= first && at + code_bytes(&parts[i].shape) <= last) found |= 1ull << i;
    }
  }
  fclose(list);
  if (found != (1ull << count) - 1) return 0;
  const int about = open(ABOUT_PAGE, O_RDONLY | O_CLOEXEC);
  int clean = about >= 0;
  for (int64_t i = 0; i < count && clean; i++) clean = is_clean(about, parts[i].shape.packed, code_bytes(&parts[i].shape));
  if (about >= 0) close(about);
  return clean;
}

/* The memory of whole pages of a file: whoever reads them again gets them from the file. 0 where it must stay (mlock). */
static int give_back(const uint8_t *data, size_t bytes) {
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  const uintptr_t first = ((uintptr_t)data + page - 1) & ~(page - 1), last = ((uintptr_t)data + bytes) & ~(page - 1);
  return last <= first || !madvise((void *)first, last - first, MADV_DONTNEED);
}

/* Step by step, so that little is there twice; 0 where it would be. */
static int move(uint8_t *to, const uint8_t *from, size_t bytes) {
  for (size_t at = 0; at < bytes; at += STEP) {
    const size_t size = bytes - at < STEP ? bytes - at : STEP;
    memcpy(to + at, from + at, size);
    if (!give_back(from + at, size)) return 0;
  }
  return 1;
}

block *jpq_to_large_pages(part *parts, int64_t count) {
  const char *asked = getenv("JPQ_LARGE_PAGES");
  size_t bytes = 0;
  uint8_t *at;
  for (int64_t i = 0; i < count; i++) bytes += whole_lines(code_bytes(&parts[i].shape));
  if (bytes < WORTH || (asked && !strcmp(asked, "off")) || !has_large_pages() || !from_files(parts, count)) return NULL;
  enter();
  block *b = take(bytes, &at);
  leave();
  for (int64_t i = 0; b && i < count; i++) {
    const size_t size = code_bytes(&parts[i].shape);
    if (!move(at, parts[i].shape.packed, size)) break; /* the rest stays where it is */
    parts[i].shape.packed = at;
    at += whole_lines(size);
  }
  return b;
}

void jpq_release_block(block *b) {
  enter();
  release(b);
  if (latest && latest->kernels == 1) { /* of no kernel any more */
    release(latest);
    latest = NULL;
  }
  leave();
}

#else
block *jpq_to_large_pages(part *parts, int64_t count) {
  (void)parts, (void)count;
  return NULL;
}
void jpq_release_block(block *b) { (void)b; }
#endif
