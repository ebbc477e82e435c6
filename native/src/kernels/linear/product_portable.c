/* Products in plain C: the ones to read first, which run anywhere. */
#include <string.h>

#include "activations.h"

static void ternary(const uint8_t *weights, int64_t num_groups, const int8_t *rows, int64_t row_stride,
                    int32_t num_rows, int32_t sums[][PKV_OUT_BLOCK]) {
  memset(sums, 0, (size_t)num_rows * sizeof *sums);
  for (int64_t group = 0; group < num_groups; group++, weights += PKV_GROUP_BYTES)
    for (int32_t row = 0; row < num_rows; row++) {
      const int8_t *x = rows + row * row_stride + 16 * group;
      for (int i = 0; i < 4; i++)
        for (int b = 0; b < 64; b++) sums[row][b / 4] += (weights[b] >> 2 * i & 3) * x[4 * i + b % 4];
    }
}

static float scale_of(const uint8_t *group, int out) {
  uint16_t stored;
  memcpy(&stored, group + 2 * out, sizeof stored);
  uint32_t bits = (uint32_t)stored << 16;
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return scale;
}

static void int8(const uint8_t *weights, int64_t num_groups, const int16_t *rows, int64_t row_stride,
                 int32_t num_rows, float sums[][PKV_OUT_BLOCK]) {
  memset(sums, 0, (size_t)num_rows * sizeof *sums);
  for (int64_t group = 0; group < num_groups; group++, weights += PKV_INT8_GROUP_BYTES)
    for (int32_t row = 0; row < num_rows; row++) {
      const int16_t *x = (const int16_t *)((const char *)rows + row * row_stride) + PKV_INT8_GROUP * group;
      const int8_t *two = (const int8_t *)weights + PKV_SCALE_BYTES;
      int32_t added[PKV_OUT_BLOCK] = {0};
      for (int i = 0; i < PKV_INT8_GROUP; i += 2, two += 2 * PKV_OUT_BLOCK)
        for (int out = 0; out < PKV_OUT_BLOCK; out++)
          added[out] += two[2 * out] * x[i] + two[2 * out + 1] * x[i + 1];
      for (int out = 0; out < PKV_OUT_BLOCK; out++)
        sums[row][out] += (float)added[out] * scale_of(weights, out);
    }
}

/* Without fused multiply-add. */
static void bfloat16(const uint16_t *weights, int64_t num_in, int32_t num_blocks, const float *rows,
                     int64_t row_stride, int32_t num_rows, float sums[][PKV_OUT_BLOCK]) {
  memset(sums, 0, (size_t)(num_blocks * num_rows) * sizeof *sums);
  for (int32_t block = 0; block < num_blocks; block++, sums += num_rows)
    for (int64_t i = 0; i < num_in; i += 2, weights += 2 * PKV_OUT_BLOCK) {
      float first[PKV_OUT_BLOCK], second[PKV_OUT_BLOCK];
      uint32_t bits[PKV_OUT_BLOCK];
      memcpy(bits, weights, sizeof bits);
      for (int out = 0; out < PKV_OUT_BLOCK; out++) {
        uint32_t halves[2] = {bits[out] << 16, bits[out] & 0xffff0000};
        memcpy(first + out, halves, sizeof *first);
        memcpy(second + out, halves + 1, sizeof *second);
      }
      for (int32_t row = 0; row < num_rows; row++) {
        const float *x = (const float *)((const char *)rows + row * row_stride) + i;
        for (int out = 0; out < PKV_OUT_BLOCK; out++) {
          sums[row][out] += first[out] * x[0];
          sums[row][out] += second[out] * x[1];
        }
      }
    }
}

const pkv_product pkv_product_portable = {.name = "portable",
                                          .row_tile = PKV_MAX_ROWS,
                                          .ternary = ternary,
                                          .int8 = int8,
                                          .float_tile = PKV_MAX_ROWS,
                                          .bfloat16 = bfloat16,
                                          ACTIVATIONS};
