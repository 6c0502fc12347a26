/* The runtime library driven from a test, as one program so that the sanitizers see everything.
 *
 *     harness ids LIBRARY KERNELS FOLDER COUNT ID...     COUNT greedy tokens by prefill and decode
 *     harness text LIBRARY KERNELS FOLDER                ids of every text on standard input and the text of those ids
 *     harness sample LIBRARY KERNELS FOLDER COUNT SEED ID...    COUNT drawn tokens by jpq_generate_ids
 *     harness pair LIBRARY KERNELS FOLDER COUNT ID ID... two threads: COUNT greedy tokens after the first ID, after the others
 *     harness choose LIBRARY KERNELS SEED TEMPERATURE TOP_K TOP_P VOCAB    a token of every VOCAB floats on standard input
 *     harness load LIBRARY KERNELS FOLDER TIMES          load, run and free; prints kB of memory after each
 *
 * LIBRARY and KERNELS may be empty. In the environment: BACKEND, the number of a jpq_backend_kind; ENGINE, options.engine.
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "jpq_runtime.h"

enum { MOST = 4096 };

static int refuse(const jpq_error *error) {
  fprintf(stderr, "%d %s\n", error->code, error->text);
  return 3;
}

static jpq_result open_model(char **arguments, jpq_model **model, jpq_error *error) {
  jpq_load_options options;
  jpq_load_defaults(&options);
  if (getenv("BACKEND")) options.backend = (jpq_backend_kind)atoi(getenv("BACKEND"));
  options.engine = getenv("ENGINE");
  options.library = *arguments[0] ? arguments[0] : NULL, options.kernels = *arguments[1] ? arguments[1] : NULL, options.threads = 1;
  options.check = getenv("CHECK") != NULL;
  return jpq_model_load(arguments[2], &options, model, error);
}

static int64_t best(const float *logits, int64_t vocab) {
  int64_t found = 0;
  for (int64_t i = 1; i < vocab; i++)
    if (logits[i] > logits[found]) found = i;
  return found;
}

static int run_ids(char **arguments, int count) {
  jpq_error error;
  jpq_model *model;
  jpq_sequence *sequence = NULL;
  jpq_model_info info = {.size = sizeof info};
  int64_t ids[MOST];
  const float *logits;
  const int prompt = count - 4 < MOST ? count - 4 : MOST;
  for (int i = 0; i < prompt; i++) ids[i] = atoll(arguments[4 + i]);
  if (open_model(arguments, &model, &error)) return refuse(&error);
  jpq_model_describe(model, &info, &error);
  fprintf(stderr, "%s\n", info.path);
  jpq_result result = jpq_sequence_new(model, 0, &sequence, &error);
  if (!result) result = jpq_prefill(sequence, ids, (size_t)prompt, &logits, &error);
  for (int i = atoi(arguments[3]); i > 0 && !result; i--) {
    const int64_t token = best(logits, info.vocab);
    printf("%" PRId64 "\n", token);
    if (i > 1) result = jpq_decode(sequence, token, &logits, &error);
  }
  jpq_sequence_free(sequence);
  jpq_model_free(model);
  return result ? refuse(&error) : 0;
}

static int print(void *user, int64_t token, const char *text, size_t bytes) {
  (void)user, (void)text, (void)bytes;
  return token >= 0 && printf("%" PRId64 "\n", token) < 0;
}

static int run_sample(char **arguments, int count) {
  jpq_error error;
  jpq_model *model;
  jpq_generate_options options;
  int64_t ids[MOST];
  const int prompt = count - 5 < MOST ? count - 5 : MOST;
  for (int i = 0; i < prompt; i++) ids[i] = atoll(arguments[5 + i]);
  jpq_generate_defaults(&options);
  options.max_new_tokens = atoll(arguments[3]), options.sampling.seed = strtoull(arguments[4], NULL, 10);
  options.sampling.temperature = 1.5, options.sampling.top_p = 0.9;
  if (open_model(arguments, &model, &error)) return refuse(&error);
  const jpq_result result = jpq_generate_ids(model, ids, (size_t)prompt, &options, print, NULL, &error);
  jpq_model_free(model);
  return result ? refuse(&error) : 0;
}

typedef struct strand {
  const jpq_model *model;
  int64_t ids[MOST], out[MOST];
  size_t prompt;
  int count;
  jpq_result result;
  jpq_error error;
} strand;

static void *greedy(void *given) {
  strand *s = given;
  jpq_sequence *sequence;
  jpq_model_info info = {.size = sizeof info};
  const float *logits;
  jpq_model_describe(s->model, &info, NULL);
  s->result = jpq_sequence_new(s->model, 0, &sequence, &s->error);
  if (!s->result) s->result = jpq_prefill(sequence, s->ids, s->prompt, &logits, &s->error);
  for (int i = 0; i < s->count && !s->result; i++) {
    s->out[i] = best(logits, info.vocab);
    s->result = jpq_decode(sequence, s->out[i], &logits, &s->error);
  }
  jpq_sequence_free(sequence);
  return NULL;
}

static int run_pair(char **arguments, int count) {
  static strand both[2];
  jpq_error error;
  jpq_model *model;
  pthread_t thread;
  const int prompt = count - 5 < MOST ? count - 5 : MOST;
  both[0].ids[0] = atoll(arguments[4]), both[0].prompt = 1, both[1].prompt = (size_t)prompt;
  for (int i = 0; i < prompt; i++) both[1].ids[i] = atoll(arguments[5 + i]);
  if (open_model(arguments, &model, &error)) return refuse(&error);
  for (int i = 0; i < 2; i++) both[i].model = model, both[i].count = atoi(arguments[3]);
  if (both->count > MOST || pthread_create(&thread, NULL, greedy, both)) return 4;
  greedy(both + 1);
  pthread_join(thread, NULL);
  jpq_model_free(model);
  for (int i = 0; i < 2; i++) {
    if (both[i].result) return refuse(&both[i].error);
    for (int t = 0; t < both[i].count; t++) printf("%" PRId64 "\n", both[i].out[t]);
  }
  return 0;
}

/* All resident memory in kB, and what of it is no file's: pages of a library that the system took away come back by themselves. */
static void print_memory(void) {
  long resident = 0, shared = 0, kb = sysconf(_SC_PAGESIZE) / 1024;
  FILE *file = fopen("/proc/self/statm", "r");
  if (!file || fscanf(file, "%*s %ld %ld", &resident, &shared) != 2) resident = shared = 0;
  if (file) fclose(file);
  printf("%ld %ld\n", resident * kb, (resident - shared) * kb);
}

static int run_load(char **arguments) {
  jpq_error error;
  for (int i = atoi(arguments[3]); i > 0; i--) {
    jpq_model *model;
    jpq_sequence *sequence = NULL;
    const int64_t ids[] = {1, 2, 3};
    jpq_result result = open_model(arguments, &model, &error);
    if (!result) result = jpq_sequence_new(model, 0, &sequence, &error);
    if (!result) result = jpq_prefill(sequence, ids, 3, NULL, &error);
    jpq_sequence_free(sequence);
    jpq_model_free(model);
    if (result) return refuse(&error);
    print_memory();
  }
  return 0;
}

/* Texts come as 4 bytes of length and the bytes; out goes a line of ids, then length and bytes of what they decode to. */
static int run_text(char **arguments) {
  static char back[1 << 23];
  static int64_t ids[1 << 22];
  jpq_error error;
  jpq_model *model;
  uint32_t length;
  if (open_model(arguments, &model, &error)) return refuse(&error);
  jpq_result result = JPQ_SUCCESS;
  while (!result && fread(&length, sizeof length, 1, stdin) == 1) {
    size_t count = 0, bytes = 0;
    char *exact = malloc(length ? length : 1); /* so that reading one byte too far is seen */
    if (!exact || fread(exact, 1, length, stdin) != length) return 4;
    result = jpq_tokenize(model, exact, length, ids, sizeof ids / sizeof *ids, &count, &error);
    free(exact);
    for (size_t i = 0; i < count; i++) printf("%" PRId64 " ", ids[i]);
    printf("\n");
    if (!result && !getenv("NO_DECODE")) result = jpq_detokenize(model, ids, count, back, sizeof back, &bytes, &error);
    length = (uint32_t)bytes;
    fwrite(&length, sizeof length, 1, stdout);
    fwrite(back, 1, bytes, stdout);
  }
  jpq_model_free(model);
  return result ? refuse(&error) : 0;
}

static int run_choose(char **arguments) {
  static float logits[1 << 16];
  const int64_t vocab = atoll(arguments[6]);
  jpq_sampling sampling;
  jpq_sampler *sampler;
  jpq_error error;
  int64_t token;
  jpq_sampling_defaults(&sampling);
  sampling.seed = strtoull(arguments[2], NULL, 10), sampling.temperature = atof(arguments[3]);
  sampling.top_k = atoll(arguments[4]), sampling.top_p = atof(arguments[5]);
  if (vocab < 1 || vocab > 1 << 16) return 2;
  jpq_result result = jpq_sampler_new(&sampling, vocab, &sampler, &error);
  while (!result && fread(logits, sizeof *logits, (size_t)vocab, stdin) == (size_t)vocab) {
    result = jpq_sample(sampler, logits, &token, &error);
    if (!result) printf("%" PRId64 "\n", token);
  }
  jpq_sampler_free(sampler);
  return result ? refuse(&error) : 0;
}

int main(int count, char **arguments) {
  const char *what = count > 1 ? arguments[1] : "";
  if (!strcmp(what, "ids") && count > 6) return run_ids(arguments + 2, count - 2);
  if (!strcmp(what, "sample") && count > 7) return run_sample(arguments + 2, count - 2);
  if (!strcmp(what, "pair") && count > 7) return run_pair(arguments + 2, count - 2);
  if (!strcmp(what, "text") && count == 5) return run_text(arguments + 2);
  if (!strcmp(what, "choose") && count == 9) return run_choose(arguments + 2);
  if (!strcmp(what, "load") && count == 6) return run_load(arguments + 2);
  return 2;
}
