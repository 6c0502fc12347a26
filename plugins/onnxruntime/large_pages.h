/* Weights in large pages.
 *
 * onnxruntime maps every weight of a file by itself, in pages of 4 KB, and a token reads all of them once: a processor then
 * looks up an address every 4 KB, and its prefetching stops there. Weights that lie together in pages of 2 MB are read
 * faster (see the README). The file's pages are given back; of a table that is looked up too (a tied embedding) those around
 * a row come again when it is. But the codes are the process's own then: processes of one bundle do not share them, and they
 * cannot be dropped and read again when memory runs out.
 */
#ifndef JPQ_LARGE_PAGES_H
#define JPQ_LARGE_PAGES_H

#include "../core/low_bit.h"
#include "ort_inputs.h"

typedef struct block block; /* of memory, which kernels share */

/* Copy the codes of `count` weights into large pages and let `parts` point to them; what to release when the kernel ends.
 * NULL, and nothing is copied: where there are no such pages, for few bytes, with JPQ_LARGE_PAGES=off, and for codes that are
 * not mapped from a file as they are there, whose memory could not be given back. */
block *jpq_to_large_pages(part *parts, int64_t count);
void jpq_release_block(block *b);

#endif
