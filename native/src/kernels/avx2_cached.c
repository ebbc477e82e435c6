/* The kernel of avx2.c for rows that lie in a cache: they are asked for ahead, but not touched in memory's
 * order before they are met.  The same bits. */
#define KERNEL pkv_kernel_avx2_cached
#define FROM_CACHE
#include "avx2.c"
