// What both halves of the stand-in share: its log, what a test wants to go wrong, and the stream everything is queued in.
// NOT CUDA and NOT TensorRT: it proves order and parameters of calls, sizes of buffers, and what is read when.
#ifndef JPQ_FAKE_GPU_H
#define JPQ_FAKE_GPU_H

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

// A line in the file FAKE_LOG names.
__attribute__((format(printf, 1, 2))) inline void record(char const *format, ...) {
  char line[400];
  va_list values;
  va_start(values, format);
  std::vsnprintf(line, sizeof line, format, values);
  va_end(values);
  FILE *file = std::getenv("FAKE_LOG") ? std::fopen(std::getenv("FAKE_LOG"), "a") : nullptr;
  if (!file) return;
  std::fprintf(file, "%s\n", line);
  std::fclose(file);
}

// Wrong use that the real thing would not survive either: no test may go on after it.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void never(char const *format, ...) {
  va_list values;
  va_start(values, format);
  std::fputs("stand-in: ", stderr);
  std::vfprintf(stderr, format, values);
  va_end(values);
  std::fputs("\n", stderr);
  std::abort();
}

// FAKE_BROKEN="name" or "name 3": whether this call of `name` is the (third) one to fail.
bool broken(char const *name);
// FAKE_BROKEN's last number: the code CUDA's functions fail with.
int broken_code();

void need_context();                                      // somebody entered the GPU's context on this thread
void queue(void *stream, std::function<void()> action);  // runs when the stream is synchronised, in order

#endif
