/* AVX-512 VNNI: products of 1 to 3 bits and ternary ones. */
#define NAME jpq_vnni_narrow
#define EACH(DO) DO(1, 0) DO(1, 1) DO(1, 3) DO(2, 0) DO(2, 1) DO(2, 3) DO(3, 0) DO(3, 1) DO(3, 3) DO(16, 0) DO(16, 2) DO(35, 0) DO(35, 2) DO(35, 3)
#include "vnni_rows.inc"
