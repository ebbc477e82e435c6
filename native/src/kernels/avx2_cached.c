/* The kernel of avx2.c for rows in a cache and for many queries (from_cache.h).  The same bits. */
#define KERNEL pkv_kernel_avx2_cached
#define FROM_CACHE
#include "avx2.c"
