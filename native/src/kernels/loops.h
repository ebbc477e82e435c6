/* Macros for the kernels' small functions and their unrolled loops. */
#ifndef PKV_LOOPS_H
#define PKV_LOOPS_H

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))

/* A loop that is unrolled early.  gcc keeps an array in memory when it unrolls the loop over it on its
 * own, which is later; clang does with an unroll pragma. */
#if defined(__clang__) || \
    defined(PKV_EMULATED) /* an emulated instruction is a function: unrolled, it takes minutes */
#define EACH(i, count) for (int i = 0; i < (count); i++)
#else
#define EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < (count); i++)
#endif

#endif
