/* Products with ternary weights in plain C: the ones to read first, which run anywhere. */
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

const pkv_product pkv_product_portable = {"portable", PKV_MAX_ROWS, ternary,      int8,
                                          round_row,  store_rows,   store_scaled, norm_or_copy,
                                          bfloat16,   store_values, NULL};
