/* Vector functions that are the same for every instruction set, written with those of its own header.
 *
 * Attention is written once.  An instruction set's header (portable.h is the one to read first) defines
 * WIDTH, TILE_SUMS, the vector types and a dozen vec_ functions; its .c file includes that header and then
 *
 *   vec.h         loads, exp2, tanh
 *   rows.h        the rows of one kv head, and the queries that read them
 *   ahead.h       what is read next, prefetched
 *   int8.h        scores and weighted sums of rows of 8 bits
 *   stream.h      scores and weighted sums when bandwidth is the limit
 *   compute.h     or when arithmetic is
 *   softmax.h     scores to weights
 *   fold.h        one run of tokens into the states of its q rows
 *   state.h       two states merged
 *   convert.h     stored values to float32 and back
 *   quantise.h    8-bit integers and scales to float32 and back
 *   finish.h      a state to a row of the output
 *
 * Everything is static: a function that is compiled for a newer CPU must not be the copy that the linker
 * keeps for all.
 *
 * Dims are multiples of 8.  Where a vector is wider, the last one of a row may be half full (PART), with
 * zeros behind: prepared q and accumulated values have room for it.
 */
#include <stdbool.h>

#include "kernels/loops.h"

enum {
  HAS_PART = WIDTH > 8,
  PART = WIDTH > 8 ? 8 : WIDTH, /* values in the last vector of a row of 8, 24, 40, ... values */
};

ALWAYS_INLINE vec vec_load(const float *from) {
  vec x;
  memcpy(&x, from, sizeof x);
  return x;
}

ALWAYS_INLINE void vec_store(float *to, vec x) { memcpy(to, &x, sizeof x); }

ALWAYS_INLINE vec vec_select(ivec mask, vec yes, vec no) {
  return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}

#ifndef HAS_PARTIAL_LOADS /* defined by headers whose vectors are wider than 8; the others have whole \
                           * vectors only                                                             \
                           */
ALWAYS_INLINE vec vec_load_part(const float *from) { return vec_load(from); }
ALWAYS_INLINE halves halves_load_part(const char *from) {
  halves x;
  memcpy(&x, from, sizeof x);
  return x;
}
#endif

#ifndef HAS_MAX
/* The larger of each lane; b where one is NaN. */
ALWAYS_INLINE vec vec_max(vec a, vec b) { return vec_select((ivec)(a > b), a, b); }
#endif

#ifndef HAS_HIGH_HALVES
ALWAYS_INLINE halves vec_high_halves(ivec bits) { return vec_low_halves((bits >> 16) & 0xffff); }
#endif

/* `count` values, WIDTH or PART; zeros behind. */
ALWAYS_INLINE vec vec_load_n(const float *from, int count) {
  return count == WIDTH ? vec_load(from) : vec_load_part(from);
}

/* `count` stored values, from element i of a row on.  A pair of bfloat16 is one element and stays as it
 * is. */
ALWAYS_INLINE vec vec_load_stored(const char *row, int32_t i, int count, int32_t dtype) {
  if (dtype == PKV_FLOAT32 || dtype == PKV_BFLOAT16_PAIRS) return vec_load_n((const float *)row + i, count);
  halves x;
  if (count == WIDTH)
    memcpy(&x, row + 2 * i, sizeof x);
  else
    x = halves_load_part(row + 2 * i);
  return dtype == PKV_BFLOAT16 ? vec_from_bfloat16(x) : vec_from_float16(x);
}

/* 2^x for x <= 0; 0 below 2^-125.  NaN stays NaN. The polynomial interpolates 2^x on [-1/2, 1/2] at
 * Chebyshev points, relative error 3e-9. */
ALWAYS_INLINE vec vec_exp2(vec x) {
  const float to_integer = 0x1.8p23f; /* adding it leaves the nearest integer in the low bits */
  vec shifted = x + to_integer;
  vec f = x - (shifted - to_integer);
  vec p = vec_fma(f, (vec){} + 0x1.443ffep-13f, (vec){} + 0x1.5f48c0p-10f);
  p = vec_fma(p, f, (vec){} + 0x1.3b2a1cp-7f);
  p = vec_fma(p, f, (vec){} + 0x1.c6aeccp-5f);
  p = vec_fma(p, f, (vec){} + 0x1.ebfbe0p-3f);
  p = vec_fma(p, f, (vec){} + 0x1.62e430p-1f);
  p = vec_fma(p, f, (vec){} + 1.0f);
  /* Multiply rather than add to the exponent: garbage times NaN is NaN still. */
  vec power = vec_from_bits(((ivec)shifted << 23) + (127 << 23));
  return (vec)((ivec)(p * power) & ~(ivec)(x < -125.0f));
}

/* factor * tanh(x / factor). Below 0.625 an odd polynomial (interpolated at Chebyshev points, relative
 * error 6e-10) is added to x itself, so that a large factor loses nothing; above, (1 - t) / (1 + t) with
 * t = e^(-2 |y|). */
ALWAYS_INLINE vec vec_soft_cap(vec x, float factor) {
  vec y = x / factor, z = y * y;
  ivec sign = (ivec)y & ~0x7fffffff;
  vec magnitude = (vec)((ivec)y & 0x7fffffff);
  vec p = vec_fma(z, (vec){} + 0x1.2c83c0p-9f, (vec){} - 0x1.116a16p-7f);
  p = vec_fma(p, z, (vec){} + 0x1.64a976p-6f);
  p = vec_fma(p, z, (vec){} - 0x1.ba08c4p-5f);
  p = vec_fma(p, z, (vec){} + 0x1.1110eap-3f);
  p = vec_fma(p, z, (vec){} - 0x1.555556p-2f);
  vec small = vec_fma(x, p * z, x);
  vec t = vec_exp2(magnitude * -0x1.715476p+1f);
  vec large = (1.0f - t) / (1.0f + t) * factor;
  return vec_select((ivec)(magnitude < 0.625f), small, (vec)((ivec)large | sign));
}
