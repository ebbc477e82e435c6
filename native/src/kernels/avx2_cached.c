/* The kernel of avx2.c for rows that lie in a cache (from_cache.h).  The same bits. */
#define KERNEL pkv_kernel_avx2_cached
#define FROM_CACHE
#include "avx2.c"
