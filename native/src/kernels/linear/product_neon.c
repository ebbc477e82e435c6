/* Products with NEON, which every 64-bit ARM has: bytes times bytes in 16 bits, summed for 256 inputs,
 * then in 32.
 *
 * Lane j of a quarter of a group is output j / 4 of four, and input j % 4; pairwise additions sum the
 * lanes of an output. */
#include <arm_neon.h>
#include <string.h>

#include "activations.h"

enum { ROWS = 2 };

/* Broadcast four bytes of a row, or two shorts. */
ALWAYS_INLINE int32x4_t repeated(const void *x) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  return vdupq_n_s32(four);
}

/* One row's products with a quarter of each of up to PKV_GROUPS_ADDED groups: four outputs. */
ALWAYS_INLINE int32x4_t quarter(const uint8_t *weights, int64_t num_groups, const int8_t *x) {
  const uint8x16_t three = vdupq_n_u8(3);
  int16x8_t low = vdupq_n_s16(0), high = low;
  for (int64_t group = 0; group < num_groups; group++, weights += PKV_GROUP_BYTES, x += PKV_IN_GROUP) {
    uint8x16_t packed = vld1q_u8(weights);
    for (int i = 0; i < 4; i++) {
      int8x16_t codes = vreinterpretq_s8_u8(vandq_u8(packed, three));
      int8x16_t four = vreinterpretq_s8_s32(repeated(x + 4 * i));
      low = vmlal_s8(low, vget_low_s8(codes), vget_low_s8(four));
      high = vmlal_high_s8(high, codes, four);
      packed = vshrq_n_u8(packed, 2);
    }
  }
  return vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
}

static void ternary(const uint8_t *weights, int64_t num_groups, const int8_t *rows, int64_t row_stride,
                    int32_t num_rows, int32_t sums[][PKV_OUT_BLOCK]) {
  memset(sums, 0, (size_t)num_rows * sizeof *sums);
  for (int64_t group = 0; group < num_groups; group += PKV_GROUPS_ADDED) {
    int64_t count = num_groups - group < PKV_GROUPS_ADDED ? num_groups - group : PKV_GROUPS_ADDED;
    for (int32_t row = 0; row < num_rows; row++)
      for (int i = 0; i < 4; i++) {
        int32_t *sum = sums[row] + 4 * i;
        const uint8_t *from = weights + group * PKV_GROUP_BYTES + PKV_GROUP_BYTES / 4 * i;
        const int8_t *x = rows + row * row_stride + group * PKV_IN_GROUP;
        vst1q_s32(sum, vaddq_s32(vld1q_s32(sum), quarter(from, count, x)));
      }
  }
}

static void int8(const uint8_t *weights, int64_t num_groups, const int16_t *rows, int64_t row_stride,
                 int32_t num_rows, float sums[][PKV_OUT_BLOCK]) {
  for (int32_t row = 0; row < num_rows; row++) {
    const char *x = (const char *)rows + row * row_stride;
    const uint8_t *from = weights;
    float32x4_t totals[4] = {};
    for (int64_t group = 0; group < num_groups; group++, from += PKV_INT8_GROUP_BYTES) {
      const int8_t *weight = (const int8_t *)from + PKV_SCALE_BYTES;
      int32x4_t added[4] = {};
      for (int i = 0; i < PKV_INT8_GROUP; i += 2, weight += 2 * PKV_OUT_BLOCK, x += 4) {
        int16x8_t two = vreinterpretq_s16_s32(repeated(x));
        for (int j = 0; j < 4; j++) {
          int16x8_t widened = vmovl_s8(vld1_s8(weight + 8 * j));
          int32x4_t low = vmull_s16(vget_low_s16(widened), vget_low_s16(two));
          added[j] = vaddq_s32(added[j], vpaddq_s32(low, vmull_high_s16(widened, two)));
        }
      }
      for (int j = 0; j < 4; j++) {
        uint32x4_t bits = vshll_n_u16(vld1_u16((const uint16_t *)from + 4 * j), 16);
        float32x4_t scaled = vmulq_f32(vcvtq_f32_s32(added[j]), vreinterpretq_f32_u32(bits));
        totals[j] = vaddq_f32(totals[j], scaled);
      }
    }
    for (int j = 0; j < 4; j++) vst1q_f32(sums[row] + 4 * j, totals[j]);
  }
}

/* ---- weights in bfloat16: four rows with a block keep their sums in sixteen registers */

enum { FLOAT_ROWS = 4 };

ALWAYS_INLINE void bfloat16_rows(const uint16_t *weights, int64_t num_in, const float *rows,
                                 int64_t row_stride, const int num_rows, float sums[][PKV_OUT_BLOCK]) {
  const uint32x4_t upper = vdupq_n_u32(0xffff0000);
  float32x4_t totals[FLOAT_ROWS][4] = {};
  for (int64_t i = 0; i < num_in; i += 2, weights += 2 * PKV_OUT_BLOCK)
    EACH (half, 2)
      EACH (j, 4) {
        uint32x4_t pairs = vreinterpretq_u32_u16(vld1q_u16(weights + 8 * j));
        float32x4_t widened = vreinterpretq_f32_u32(half ? vandq_u32(pairs, upper) : vshlq_n_u32(pairs, 16));
        EACH (r, num_rows) {
          float x = ((const float *)((const char *)rows + r * row_stride))[i + half];
          totals[r][j] = vfmaq_n_f32(totals[r][j], widened, x);
        }
      }
  EACH (r, num_rows)
    EACH (j, 4) vst1q_f32(sums[r] + 4 * j, totals[r][j]);
}

static void bfloat16(const uint16_t *weights, int64_t num_in, int32_t num_blocks, const float *rows,
                     int64_t row_stride, int32_t num_rows, float sums[][PKV_OUT_BLOCK]) {
  for (; num_blocks > 0; num_blocks--, weights += num_in * PKV_OUT_BLOCK, sums += num_rows)
    switch (num_rows) {
      case 1: bfloat16_rows(weights, num_in, rows, row_stride, 1, sums); break;
      case 2: bfloat16_rows(weights, num_in, rows, row_stride, 2, sums); break;
      case 3: bfloat16_rows(weights, num_in, rows, row_stride, 3, sums); break;
      default: bfloat16_rows(weights, num_in, rows, row_stride, FLOAT_ROWS, sums); break;
    }
}

const pkv_product pkv_product_neon = {.name = "neon",
                                      .row_tile = ROWS,
                                      .ternary = ternary,
                                      .int8 = int8,
                                      .float_tile = FLOAT_ROWS,
                                      .bfloat16 = bfloat16,
                                      ACTIVATIONS};
