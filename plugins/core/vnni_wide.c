/* AVX-512 VNNI: products of 4 to 8 bits; 7 are left to others. */
#define NAME jpq_vnni_wide
#define EACH(DO)                                                                                       \
  DO(4, 0) DO(4, 1) DO(4, 3) DO(5, 0) DO(5, 1) DO(5, 2) DO(5, 3) DO(6, 0) DO(6, 1) DO(6, 2) DO(6, 3)   \
  DO(8, 0) DO(8, 2) DO(8, 3) DO(36, 0) DO(36, 2) DO(36, 3) DO(37, 0) DO(37, 2) DO(37, 3) DO(38, 0) DO(38, 2) DO(38, 3)
#include "vnni_rows.inc"
