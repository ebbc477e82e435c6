/* Vector functions in plain C, on vectors of four floats: the instruction set to read first, which runs
 * anywhere. */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "paged_kv.h"
#include "kernels/kernel.h"

#include "four_lanes.h"

static inline vec vec_fma(vec a, vec b, vec c) { return a * b + c; }

static inline vec vec_from_bfloat16(halves x) { return (vec)(__builtin_convertvector(x, ivec) << 16); }

/* Shift exponent and fraction into place; multiplying by 2^112 corrects the exponent's bias, of
 * subnormals too. */
static inline vec vec_from_float16(halves x) {
  ivec bits = __builtin_convertvector(x, ivec);
  ivec magnitude = bits & 0x7fff;
  ivec is_special = magnitude >= 0x7c00; /* inf and NaN keep the largest exponent */
  vec value = (vec)(magnitude << 13) * 0x1p112f;
  return (vec)((ivec)value | (is_special & 0x7f800000) | (bits & 0x8000) << 16);
}

/* Finite values are within +-65504 here. */
static inline halves vec_to_float16(vec x) {
  ivec bits = (ivec)x;
  ivec magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  ivec normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  /* Below 2^-14, adding 0.5 rounds to multiples of 2^-24, the unit of float16's subnormals. */
  ivec subnormal = (ivec)((vec)magnitude + 0.5f) - 0x3f000000;
  ivec special = 0x7c00 | ((magnitude > 0x7f800000) & 0x200);
  ivec is_subnormal = magnitude < 0x38800000, is_special = magnitude >= 0x7f800000;
  ivec finite = (is_subnormal & subnormal) | (~is_subnormal & normal);
  return __builtin_convertvector(((is_special & special) | (~is_special & finite)) | sign, halves);
}

/* sum + a * b, of two words a lane. */
static inline ivec words_dot(ivec sum, words a, words b) {
  ivec low = ((ivec)a << 16 >> 16) * ((ivec)b << 16 >> 16), high = ((ivec)a >> 16) * ((ivec)b >> 16);
  return sum + low + high;
}

/* The low 16 bits of each lane, whose high bits are zero. */
static inline halves vec_low_halves(ivec bits) { return __builtin_convertvector(bits, halves); }
