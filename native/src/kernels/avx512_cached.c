/* The kernel of avx512.c for rows in a cache and for many queries (from_cache.h).  The same bits. */
#define KERNEL pkv_kernel_avx512_cached
#define FROM_CACHE
#include "avx512.c"
