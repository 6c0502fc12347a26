/* AVX-512 VNNI: products of 4 to 8 bits; 7 are left to others. */
#define NAME jpq_vnni_wide
#define EACH(DO)                                                                                       \
  DO(4, 0) DO(4, 1) DO(4, 3) DO(5, 0) DO(5, 1) DO(5, 2) DO(5, 3) DO(6, 0) DO(6, 1) DO(6, 2) DO(6, 3)   \
  DO(8, 0) DO(8, 2) DO(8, 3)
#include "vnni_rows.inc"
