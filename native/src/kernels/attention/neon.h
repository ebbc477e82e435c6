/* Vector functions of NEON, which every 64-bit ARM has. */
#include <arm_neon.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "paged_kv.h"
#include "kernels/kernel.h"

enum { WIDTH = 4, TILE_SUMS = 8 };
typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));

static inline vec vec_fma(vec a, vec b, vec c) {
  return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}

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

static inline vec vec_from_bfloat16(halves x) { return (vec)vshlq_n_u32(vmovl_u16((uint16x4_t)x), 16); }

static inline vec vec_from_float16(halves x) { return (vec)vcvt_f32_f16((float16x4_t)x); }

static inline halves vec_to_float16(vec x) { return (halves)vcvt_f16_f32((float32x4_t)x); }

/* The low 16 bits of each lane, whose high bits are zero. */
static inline halves vec_low_halves(ivec bits) { return (halves)vmovn_u32((uint32x4_t)bits); }
