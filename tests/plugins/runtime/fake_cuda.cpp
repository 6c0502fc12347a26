// libcuda.so.1 for tests: memory of the GPU is the host's, filled with NaN; a stream runs when it is synchronised.
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "fake_gpu.h"

static std::recursive_mutex one;  // the functions may come from several threads
static std::map<void *, std::vector<std::function<void()>>> streams;
static thread_local int depth;
static int retained;

bool broken(char const *name) {
  static std::map<std::string, int> calls;
  std::lock_guard<std::recursive_mutex> lock(one);
  char asked[80] = "";
  int which = 1;
  if (std::getenv("FAKE_BROKEN")) std::sscanf(std::getenv("FAKE_BROKEN"), "%79s %d", asked, &which);
  return !std::strcmp(asked, name) && ++calls[name] == which;
}

int broken_code() {
  int code = 1;
  std::sscanf(std::getenv("FAKE_BROKEN"), "%*s %*d %d", &code);
  return code;
}

void need_context() {
  if (depth < 1 || !retained) never("no context is current on this thread");
}

void queue(void *stream, std::function<void()> action) {
  need_context();
  std::lock_guard<std::recursive_mutex> lock(one);
  if (!streams.count(stream)) never("no such stream");
  streams[stream].push_back(std::move(action));
}

#define CALL(name)  \
  record(#name);    \
  if (broken(#name)) return broken_code()
#define CALL_INSIDE(name) \
  CALL(name);             \
  need_context()

extern "C" {

int cuInit(unsigned) {
  CALL(cuInit);
  return 0;
}
int cuDeviceGet(int *out, int index) {
  CALL(cuDeviceGet);
  *out = index;
  return 0;
}
int cuDeviceGetAttribute(int *out, int which, int) {
  const int sm = std::getenv("FAKE_SM") ? std::atoi(std::getenv("FAKE_SM")) : 87;
  if (which != 75 && which != 76) never("attribute %d", which);
  *out = which == 75 ? sm / 10 : sm % 10;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **out, int) {
  CALL(cuDevicePrimaryCtxRetain);
  retained++;
  *out = &retained;
  return 0;
}
int cuDevicePrimaryCtxRelease_v2(int) {
  CALL(cuDevicePrimaryCtxRelease_v2);
  if (--retained < 0 || depth) never("a context released twice, or while it is current");
  return 0;
}
int cuCtxPushCurrent_v2(void *context) {
  if (broken("cuCtxPushCurrent_v2")) return broken_code();
  if (context != &retained) never("another context");
  depth++;
  return 0;
}
int cuCtxPopCurrent_v2(void **) {
  if (--depth < 0) never("left more often than entered");
  return 0;
}
int cuStreamCreate(void **out, unsigned flags) {
  CALL_INSIDE(cuStreamCreate);
  if (flags != 1) never("the stream waits for the default one");
  std::lock_guard<std::recursive_mutex> lock(one);
  streams[*out = std::malloc(1)];
  return 0;
}
int cuStreamDestroy_v2(void *stream) {
  CALL_INSIDE(cuStreamDestroy_v2);
  std::lock_guard<std::recursive_mutex> lock(one);
  if (!streams.erase(stream)) never("no such stream");
  std::free(stream);
  return 0;
}
int cuStreamSynchronize(void *stream) {
  need_context();
  std::vector<std::function<void()>> actions;
  {
    std::lock_guard<std::recursive_mutex> lock(one);
    actions.swap(streams[stream]);
  }
  for (auto &action : actions) action();
  return broken("cuStreamSynchronize") ? broken_code() : 0;
}
int cuMemAlloc_v2(uint64_t *out, size_t bytes) {
  record("cuMemAlloc_v2 %zu", bytes);
  if (broken("cuMemAlloc_v2")) return broken_code();
  need_context();
  void *made = nullptr;
  if (!bytes || posix_memalign(&made, 256, bytes)) never("%zu bytes", bytes);
  std::memset(made, 0xff, bytes);
  *out = reinterpret_cast<uint64_t>(made);
  return 0;
}
int cuMemFree_v2(uint64_t address) {
  record("cuMemFree_v2");
  need_context();
  std::free(reinterpret_cast<void *>(address));
  return 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, void const *from, size_t bytes, void *stream) {
  CALL_INSIDE(cuMemcpyHtoDAsync_v2);
  queue(stream, [=] { std::memcpy(reinterpret_cast<void *>(to), from, bytes); });
  return 0;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
  CALL_INSIDE(cuMemcpyDtoHAsync_v2);
  queue(stream, [=] { std::memcpy(to, reinterpret_cast<void *>(from), bytes); });
  return 0;
}
}
