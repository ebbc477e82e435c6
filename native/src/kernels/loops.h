/* How the kernels' small functions and their loops over a tile are compiled. */
#ifndef PKV_LOOPS_H
#define PKV_LOOPS_H

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))

/* A loop that is unrolled.  gcc keeps an array in memory where it unrolls the loop over it of its own accord,
 * and later; clang where it is told to. */
#ifdef __clang__
#define EACH(i, count) for (int i = 0; i < (count); i++)
#else
#define EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < (count); i++)
#endif

#endif
