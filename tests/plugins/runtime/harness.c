/* The runtime library driven from a test, as one program so that the sanitizers see everything.
 *
 *     harness ids LIBRARY KERNELS FOLDER COUNT ID...     COUNT greedy tokens by prefill and decode
 *     harness text LIBRARY KERNELS FOLDER                ids of every text on standard input and the text of those ids
 *     harness load LIBRARY KERNELS FOLDER TIMES          load, run and free; prints the resident kB after each
 */
#include <inttypes.h>
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
  options.library = arguments[0], options.kernels = *arguments[1] ? arguments[1] : NULL, options.threads = 1;
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

static long resident_kb(void) {
  long pages = 0;
  FILE *file = fopen("/proc/self/statm", "r");
  if (!file || fscanf(file, "%*s %ld", &pages) != 1) pages = 0;
  if (file) fclose(file);
  return pages * (sysconf(_SC_PAGESIZE) / 1024);
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
    printf("%ld\n", resident_kb());
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

int main(int count, char **arguments) {
  const char *what = count > 1 ? arguments[1] : "";
  if (!strcmp(what, "ids") && count > 6) return run_ids(arguments + 2, count - 2);
  if (!strcmp(what, "text") && count == 5) return run_text(arguments + 2);
  if (!strcmp(what, "load") && count == 6) return run_load(arguments + 2);
  return 2;
}
