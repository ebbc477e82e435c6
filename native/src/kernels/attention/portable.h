/* Vector functions in plain C, on vectors of four floats: the instruction set to read first, which runs
 * anywhere. */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "paged_kv.h"
#include "kernels/kernel.h"

enum { WIDTH = 4, TILE_SUMS = 8 };
typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));

static inline vec vec_fma(vec a, vec b, vec c) { return a * b + c; }

/* Broadcast one float. */
static inline vec vec_all(const float *x) { return (vec){*x, *x, *x, *x}; }

static inline vec vec_in_register(vec x) { return x; }

/* The sum as a tree: halves are added until one lane is left. */
static inline float vec_sum(vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }

/* The largest lane.  Either all lanes are NaN, or none is. */
static inline float vec_maximum(vec x) {
  float low = x[0] > x[2] ? x[0] : x[2], high = x[1] > x[3] ? x[1] : x[3];
  return low > high ? low : high;
}

/* Is any lane of a comparison true? */
static inline int vec_any(ivec mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }

static inline vec vec_from_bits(ivec bits) { return (vec)bits; }

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

/* The low 16 bits of each lane, whose high bits are zero. */
static inline halves vec_low_halves(ivec bits) { return __builtin_convertvector(bits, halves); }
