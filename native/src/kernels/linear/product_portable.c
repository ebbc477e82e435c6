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

static void int8(const int8_t *weights, int64_t num_in, const int16_t *rows, int64_t row_stride,
                 int32_t num_rows, int32_t sums[][PKV_OUT_BLOCK]) {
  memset(sums, 0, (size_t)num_rows * sizeof *sums);
  for (int64_t i = 0; i < num_in; i += 2, weights += 2 * PKV_OUT_BLOCK)
    for (int32_t row = 0; row < num_rows; row++) {
      const int16_t *x = (const int16_t *)((const char *)rows + row * row_stride) + i;
      for (int out = 0; out < PKV_OUT_BLOCK; out++)
        sums[row][out] += weights[2 * out] * x[0] + weights[2 * out + 1] * x[1];
    }
}

const pkv_product pkv_product_portable = {"portable", PKV_MAX_ROWS, ternary,  int8,         round_row,
                                          store_rows, norm_or_copy, bfloat16, store_values, NULL};
