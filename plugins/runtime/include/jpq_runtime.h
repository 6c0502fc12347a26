/* Run a jpq-export bundle from C: load, tokenise, prefill, decode, sample, generate, embed.
 *
 * Errors: every function that can fail returns a jpq_result and fills the caller's jpq_error (which may be NULL) with one
 * line: what, where, got, expected, remedy. Nothing is printed, nothing ends the process, there are no global variables.
 *
 * Threads: a jpq_model never changes after jpq_model_load, so any number of threads may use one at the same time. A
 * jpq_sequence or a jpq_sampler belongs to one thread at a time. A model must outlive its sequences.
 *
 * Ownership: whoever got an object from jpq_*_load or jpq_*_new frees it with jpq_*_free, which takes NULL too.
 *
 * Trust: a bundle may bring native code: plugins/libjpq_cpu.so, and in device/ what `jpq-export build` made (an engine and
 * its plugin library). Their sha256 is compared with the record before they are loaded, which finds damage, not malice:
 * for a bundle of unknown origin set `kernels` to "none".
 */
#ifndef JPQ_RUNTIME_H
#define JPQ_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(JPQ_RUNTIME_STATIC)
#define JPQ_API
#elif defined(_WIN32)
#define JPQ_API __declspec(dllimport)
#else
#define JPQ_API __attribute__((visibility("default")))
#endif

typedef enum jpq_result {
  JPQ_SUCCESS = 0,
  JPQ_BAD_ARGUMENT = 1,  /* the call is wrong */
  JPQ_BAD_BUNDLE = 2,    /* the files are damaged, hostile, or of another version */
  JPQ_UNSUPPORTED = 3,   /* the bundle is fine, but needs something this library has not */
  JPQ_BACKEND = 4,       /* onnxruntime or TensorRT is missing or failed */
  JPQ_OUT_OF_MEMORY = 5,
  JPQ_TOO_SMALL = 6      /* the caller's buffer: the size needed was written */
} jpq_result;

typedef struct jpq_error {
  jpq_result code;
  char text[1020]; /* one line, empty on success */
} jpq_error;

typedef struct jpq_model jpq_model;
typedef struct jpq_sequence jpq_sequence;
typedef struct jpq_sampler jpq_sampler;

/* JPQ_AUTO: the environment's JPQ_BACKEND (onnxruntime or tensorrt) if set, else TensorRT when the bundle has an engine for
 * this machine's GPU, else onnxruntime; jpq_model_info.path says which. JPQ_TENSORRT needs a library built with TensorRT's
 * headers (JPQ_UNSUPPORTED otherwise) and decoders; it was compiled and its calls were tested, it was not run on a GPU. */
typedef enum jpq_backend_kind { JPQ_ONNXRUNTIME = 0, JPQ_TENSORRT = 1, JPQ_AUTO = 2 } jpq_backend_kind;

/* Fill with jpq_load_defaults, then change what you want. */
typedef struct jpq_load_options {
  size_t size; /* of this structure, so that it may grow */
  jpq_backend_kind backend;
  const char *library; /* libonnxruntime.so, or its folder; NULL: beside this library, then as dlopen does */
  const char *kernels; /* libjpq_cpu.so; NULL: the bundle's, then the one beside this library; "none": onnxruntime's own */
  /* With JPQ_TENSORRT they are libnvinfer.so and libjpq_tensorrt.so; when JPQ_AUTO comes to TensorRT they are not used. */
  const char *engine;  /* TensorRT: the engine `jpq-export build` wrote, its device.json beside it; NULL: the bundle's */
  int threads;         /* 0: the backend's choice */
  int fast;            /* round activations to 16 bits where that is faster, 8 with JPQ_FAST_BITS=8; 0: fp32 */
  int check;           /* first compare every file with the manifest's sha256 */
} jpq_load_options;

typedef struct jpq_model_info {
  size_t size;
  int64_t vocab;         /* logits a token */
  int64_t max_positions; /* prompt and new tokens together */
  int64_t embedding;     /* floats a text; 0 for a decoder */
  const char *path;      /* what computes, for people; lives as long as the model */
} jpq_model_info;

/* Greedy when temperature is 0. The same seed gives the same tokens as `jpq_export.runtime` in Python. top_p counts what
 * top_k left; of equal logits the lower ids are kept. */
typedef struct jpq_sampling {
  size_t size;
  double temperature;
  int64_t top_k; /* 0: all */
  double top_p;  /* (0, 1]; 1: all */
  uint64_t seed;
} jpq_sampling;

typedef struct jpq_generate_options {
  size_t size;
  int64_t max_new_tokens;
  jpq_sampling sampling;
  const int64_t *stop_ids; /* NULL: the model's own */
  size_t stop_count;
} jpq_generate_options;

/* A new token and the text it completes (UTF-8, `bytes` long, NUL-terminated; empty while a character is unfinished).
 * token is -1 for text left over at the end. Return 0 to go on, anything else to stop. */
typedef int (*jpq_on_token)(void *user, int64_t token, const char *text, size_t bytes);

/* ---- models ---- */

JPQ_API void jpq_load_defaults(jpq_load_options *options);
/* `options` may be NULL. */
JPQ_API jpq_result jpq_model_load(const char *folder, const jpq_load_options *options, jpq_model **out, jpq_error *error);
JPQ_API void jpq_model_free(jpq_model *model);
/* Set info->size first. */
JPQ_API jpq_result jpq_model_describe(const jpq_model *model, jpq_model_info *info, jpq_error *error);

/* ---- text and tokens ---- */

/* Ids of `bytes` bytes of text (invalid UTF-8 becomes U+FFFD), as the bundle's tokenizer.json says, with its special
 * tokens. `count` gets how many there are; JPQ_TOO_SMALL when that is more than `capacity`. */
JPQ_API jpq_result jpq_tokenize(const jpq_model *model, const char *text, size_t bytes, int64_t *ids, size_t capacity,
                                size_t *count, jpq_error *error);
/* Text of ids without special tokens, NUL-terminated; `bytes` gets its length, JPQ_TOO_SMALL when capacity <= length. */
JPQ_API jpq_result jpq_detokenize(const jpq_model *model, const int64_t *ids, size_t count, char *text, size_t capacity,
                                  size_t *bytes, jpq_error *error);

/* ---- one growing sequence ---- */

/* `capacity`: positions its KV cache holds, 0 for the model's limit. Memory is touched only as far as it is used. */
JPQ_API jpq_result jpq_sequence_new(const jpq_model *model, int64_t capacity, jpq_sequence **out, jpq_error *error);
JPQ_API void jpq_sequence_free(jpq_sequence *sequence);
JPQ_API void jpq_sequence_reset(jpq_sequence *sequence);
JPQ_API int64_t jpq_sequence_length(const jpq_sequence *sequence);
/* Append `count` tokens; *logits (may be NULL): [vocab] of the last one, valid until the sequence is used again. What is
 * refused changes nothing; after JPQ_BACKEND jpq_sequence_length says how many tokens went in (they go in parts). */
JPQ_API jpq_result jpq_prefill(jpq_sequence *sequence, const int64_t *ids, size_t count, const float **logits,
                               jpq_error *error);
/* The same for one token. */
JPQ_API jpq_result jpq_decode(jpq_sequence *sequence, int64_t id, const float **logits, jpq_error *error);

/* ---- choosing tokens ---- */

JPQ_API void jpq_sampling_defaults(jpq_sampling *sampling);
JPQ_API jpq_result jpq_sampler_new(const jpq_sampling *sampling, int64_t vocab, jpq_sampler **out, jpq_error *error);
JPQ_API void jpq_sampler_free(jpq_sampler *sampler);
JPQ_API jpq_result jpq_sample(jpq_sampler *sampler, const float *logits, int64_t *token, jpq_error *error);

/* ---- all of it together ---- */

JPQ_API void jpq_generate_defaults(jpq_generate_options *options);
/* Stream the continuation of a NUL-terminated prompt; `options` may be NULL. A stop token ends it and is not given. */
JPQ_API jpq_result jpq_generate(const jpq_model *model, const char *prompt, const jpq_generate_options *options,
                                jpq_on_token on_token, void *user, jpq_error *error);
/* The same from ids; works without a tokenizer (then the text is always empty). */
JPQ_API jpq_result jpq_generate_ids(const jpq_model *model, const int64_t *ids, size_t count,
                                    const jpq_generate_options *options, jpq_on_token on_token, void *user,
                                    jpq_error *error);
/* out: float [count, info.embedding], one row a text; all texts go through the model as one padded batch. A text with
 * more tokens than the model's positions is refused, as in Python: cut it where its meaning allows. */
JPQ_API jpq_result jpq_embed(const jpq_model *model, const char *const *texts, size_t count, float *out, jpq_error *error);

#ifdef __cplusplus
}
#endif
#endif
