/* Vector functions of NEON, which every 64-bit ARM has. */
#include <arm_neon.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "paged_kv.h"
#include "kernels/kernel.h"

#include "four_lanes.h"

static inline vec vec_fma(vec a, vec b, vec c) {
  return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}

static inline vec vec_from_bfloat16(halves x) { return (vec)vshlq_n_u32(vmovl_u16((uint16x4_t)x), 16); }

static inline vec vec_from_float16(halves x) { return (vec)vcvt_f32_f16((float16x4_t)x); }

static inline halves vec_to_float16(vec x) { return (halves)vcvt_f16_f32((float32x4_t)x); }

/* sum + a * b, of two words a lane. */
static inline ivec words_dot(ivec sum, words a, words b) {
  int32x4_t low = vmull_s16(vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
  int32x4_t high = vmull_high_s16((int16x8_t)a, (int16x8_t)b);
  return sum + (ivec)vpaddq_s32(low, high);
}

/* The low 16 bits of each lane, whose high bits are zero. */
static inline halves vec_low_halves(ivec bits) { return (halves)vmovn_u32((uint32x4_t)bits); }
