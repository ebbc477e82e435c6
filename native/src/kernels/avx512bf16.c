/* The verbs in AVX-512, and pairs of bfloat16 multiplied at once, as CPUs do since Cooper Lake and Zen 4.
 *
 * Products of bfloat16 are exact in float32, and summed there: so scores are as near as by multiply-adds of
 * widened keys, but that what is below 2^-126 counts as 0. */
#ifndef KERNEL /* avx512bf16_cached.c has another name */
#define KERNEL pkv_kernel_avx512bf16
#endif
#define KERNEL_NAME "avx512bf16"
#define MULTIPLIES_PAIRS
#include "avx512.c"
