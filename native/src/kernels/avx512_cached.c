/* The kernel of avx512.c for rows that lie in a cache: they are asked for ahead, but not touched in memory's
 * order before they are met.  The same bits. */
#define KERNEL pkv_kernel_avx512_cached
#define FROM_CACHE
#include "avx512.c"
