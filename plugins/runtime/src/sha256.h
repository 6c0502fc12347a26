/* SHA-256 (FIPS 180-4), for comparing files with the manifest. */
#ifndef JPQ_RUNTIME_SHA256_H
#define JPQ_RUNTIME_SHA256_H

#include <stddef.h>
#include <stdint.h>

typedef struct sha256 {
  uint32_t state[8];
  uint64_t bytes;
  uint8_t block[64];
} sha256;

void sha256_start(sha256 *hash);
void sha256_add(sha256 *hash, const void *data, size_t bytes);
/* 64 lower-case hex digits and a NUL. */
void sha256_finish(sha256 *hash, char hex[65]);

#endif
