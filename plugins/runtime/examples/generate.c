/* Stream text from a bundle: generate BUNDLE "prompt" [new tokens [temperature [seed [top_p]]]]
 *
 * JPQ_ONNXRUNTIME: libonnxruntime.so or its folder, when it is neither beside libjpq_runtime nor installed. JPQ_THREADS:
 * how many. With JPQ_IDS set, token ids are printed instead of text. A bundle with an engine for this GPU runs in TensorRT,
 * unless JPQ_BACKEND is onnxruntime (see jpq_runtime.h).
 */
#include <inttypes.h>
#include <jpq_runtime.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct shown {
  int ids;
  long tokens;
} shown;

static int show(void *user, int64_t token, const char *text, size_t bytes) {
  shown *s = user;
  s->tokens += token >= 0;
  if (s->ids && token >= 0) printf("%" PRId64 "\n", token);
  if (!s->ids) fwrite(text, 1, bytes, stdout);
  return fflush(stdout) != 0; /* a closed pipe ends it */
}

int main(int count, char **arguments) {
  jpq_error error;
  jpq_model *model = NULL;
  jpq_load_options load;
  jpq_generate_options options;
  shown s = {getenv("JPQ_IDS") != NULL, 0};
  if (count < 3) {
    fprintf(stderr, "usage: %s BUNDLE \"prompt\" [new tokens [temperature [seed [top_p]]]]\n", arguments[0]);
    return 2;
  }
  jpq_load_defaults(&load);
  load.library = getenv("JPQ_ONNXRUNTIME");
  load.threads = getenv("JPQ_THREADS") ? atoi(getenv("JPQ_THREADS")) : 0;
  jpq_generate_defaults(&options);
  if (count > 3) options.max_new_tokens = atoll(arguments[3]);
  if (count > 4) options.sampling.temperature = atof(arguments[4]);
  if (count > 5) options.sampling.seed = strtoull(arguments[5], NULL, 10);
  if (count > 6) options.sampling.top_p = atof(arguments[6]);

  jpq_result result = jpq_model_load(arguments[1], &load, &model, &error);
  if (!result) result = jpq_generate(model, arguments[2], &options, show, &s, &error);
  if (result) fprintf(stderr, "%s: %s\n", arguments[0], error.text);
  if (!result && !s.ids) printf("\n");
  jpq_model_free(model);
  return result != JPQ_SUCCESS;
}
