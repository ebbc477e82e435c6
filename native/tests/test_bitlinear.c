/* Products of every kernel against sums written out: exact, for any number of rows, inputs and outputs. */
#undef NDEBUG
#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/product.h"
#include "linear.h"

enum { MOST_OUT = 50, MOST_IN = 1100, MOST_ROWS = 19 };

static uint8_t codes[MOST_OUT * MOST_IN], unpacked[MOST_OUT * MOST_IN];
static float x[MOST_ROWS * MOST_IN], expected[MOST_ROWS * MOST_OUT], out[MOST_ROWS * MOST_OUT], scales[64];

static uint32_t state = 1;
static uint32_t next_random(void) { return (state = state * 1664525 + 1013904223) >> 8; }

/* The activations are integers and their largest is 127, so that nothing is rounded: sums are known. */
static void fill(int64_t num_rows, int64_t num_out, int64_t num_in) {
  for (int64_t i = 0; i < num_out * num_in; i++) codes[i] = (uint8_t)(next_random() % 3);
  for (int64_t row = 0; row < num_rows; row++)
    for (int64_t i = 0; i < num_in; i++) {
      int value = i == 0 ? 127 : (int)(next_random() % 255) - 127;
      x[row * num_in + i] = (float)value;
    }
  for (int64_t i = 0; i < num_out; i++) scales[i] = (float)(1 << i % 5);
  for (int64_t row = 0; row < num_rows; row++)
    for (int64_t o = 0; o < num_out; o++) {
      float sum = 0;
      for (int64_t i = 0; i < num_in; i++) sum += (float)(codes[o * num_in + i] - 1) * x[row * num_in + i];
      expected[row * num_out + o] = sum * scales[o];
    }
}

static void ternary_sums_are_exact(pkv_threads *threads, int64_t num_rows, int64_t num_out, int64_t num_in) {
  fill(num_rows, num_out, num_in);
  int64_t num_bytes = (num_out + 15) / 16 * 16 * ((num_in + 15) / 16 * 16) / 4;
  uint8_t *packed = malloc((size_t)num_bytes);
  pkv_pack_ternary(codes, num_out, num_in, packed);
  memset(unpacked, 9, sizeof unpacked);
  pkv_unpack_ternary(packed, num_out, num_in, unpacked);
  assert(memcmp(codes, unpacked, (size_t)(num_out * num_in)) == 0);
  pkv_matrix matrix = {.weights = packed,
                       .scales = scales,
                       .num_out = num_out,
                       .num_in = num_in,
                       .kind = PKV_TERNARY,
                       .bits = 2};
  pkv_linear call = {.x = x,
                     .x_stride = num_in,
                     .num_rows = num_rows,
                     .out = out,
                     .out_stride = num_out,
                     .epilogue = PKV_STORE};
  for (int64_t i = 0; i < num_rows * num_out; i++) out[i] = NAN;
  assert(pkv_multiply(threads, &matrix, &call) == PKV_OK);
  assert(memcmp(out, expected, (size_t)(num_rows * num_out) * sizeof *out) == 0);
  call.epilogue = PKV_ADD;
  assert(pkv_multiply(threads, &matrix, &call) == PKV_OK);
  for (int64_t i = 0; i < num_rows * num_out; i++) assert(out[i] == 2 * expected[i]);
  free(packed);
}

/* Weights of 8 bits, integers whose largest is 127 in every group, so that scales are powers of two: near,
 * and the same alone. */
static void weights_of_8_bits(pkv_threads *threads, int64_t num_rows, int64_t num_in) {
  enum { NUM_OUT = 21, NUM_BLOCKS = 2 };
  float *weights = malloc((size_t)(NUM_OUT * num_in) * sizeof *weights);
  uint8_t *packed_weights = malloc((size_t)(NUM_BLOCKS * ((num_in + 31) / 32) * PKV_INT8_GROUP_BYTES));
  for (int64_t i = 0; i < NUM_OUT * num_in; i++) {
    int64_t in = i % num_in;
    float power = in / 32 % 2 ? 0.25f : 8;
    weights[i] = power * (in % 32 == 0 ? 127 : (float)(next_random() % 255) - 127);
  }
  for (int64_t i = 0; i < num_rows * num_in; i++) x[i] = (float)(next_random() % 2001) / 1000 - 1;
  pkv_pack_int8(weights, NUM_OUT, num_in, 0, packed_weights);
  for (int i = 0; i < NUM_OUT; i++) scales[i] = 1;
  pkv_matrix matrix = {.weights = packed_weights,
                       .scales = scales,
                       .num_out = NUM_OUT,
                       .num_in = num_in,
                       .kind = PKV_INT8_WEIGHTS,
                       .bits = 8};
  pkv_linear call = {.x = x, .x_stride = num_in, .num_rows = num_rows, .out = out, .out_stride = NUM_OUT};
  assert(pkv_multiply(threads, &matrix, &call) == PKV_OK);
  for (int64_t row = 0; row < num_rows; row++)
    for (int o = 0; o < NUM_OUT; o++) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < num_in; i++) {
        sum += (double)weights[o * num_in + i] * (double)x[row * num_in + i];
        size += fabs((double)weights[o * num_in + i]);
      }
      assert(fabs(sum - (double)out[row * NUM_OUT + o]) < 2e-5 * size);
    }
  memcpy(expected, out, (size_t)(num_rows * NUM_OUT) * sizeof *out);
  call.num_rows = 1;
  for (int64_t row = 0; row < num_rows; row++) {
    call.x = x + row * num_in;
    assert(pkv_multiply(NULL, &matrix, &call) == PKV_OK);
    assert(memcmp(out, expected + row * NUM_OUT, NUM_OUT * sizeof *out) == 0);
  }
  free(packed_weights);
  free(weights);
}

/* Weights of bfloat16 as [out / 16][in / 2][16][2]: small integers, so that sums are exact. */
static void weights_of_16_bits(pkv_threads *threads, int64_t num_rows, int64_t num_in) {
  enum { NUM_OUT = 32 };
  uint16_t *weights = malloc((size_t)(NUM_OUT * num_in) * sizeof *weights);
  for (int64_t i = 0; i < num_rows * num_in; i++) x[i] = (float)(next_random() % 9) - 4;
  for (int64_t i = 0; i < num_rows * NUM_OUT; i++) expected[i] = 0;
  for (int64_t i = 0; i < num_in; i++)
    for (int o = 0; o < NUM_OUT; o++) {
      float weight = (float)(next_random() % 9) - 4;
      uint32_t bits;
      memcpy(&bits, &weight, sizeof bits);
      weights[(o / 16 * num_in + i / 2 * 2) * 16 + o % 16 * 2 + i % 2] = (uint16_t)(bits >> 16);
      for (int64_t row = 0; row < num_rows; row++)
        expected[row * NUM_OUT + o] += weight * x[row * num_in + i];
    }
  pkv_matrix matrix = {.weights = weights,
                       .scales = scales,
                       .num_out = NUM_OUT,
                       .num_in = num_in,
                       .kind = PKV_BFLOAT16_WEIGHTS,
                       .bits = 16};
  pkv_linear call = {.x = x, .x_stride = num_in, .num_rows = num_rows, .out = out, .out_stride = NUM_OUT};
  for (int64_t i = 0; i < num_rows * NUM_OUT; i++) out[i] = NAN;
  assert(pkv_multiply(threads, &matrix, &call) == PKV_OK);
  for (int64_t i = 0; i < num_rows * NUM_OUT; i++) assert(out[i] == expected[i]);
  free(weights);
}

int main(void) {
  pkv_threads *threads;
  assert(pkv_threads_create(3, &threads) == PKV_OK);
  int num_kernels = 0;
  for (int32_t kernel = 0; pkv_kernel_name(kernel); kernel++) {
    if (!pkv_kernel_is_available(kernel)) continue;
    assert(pkv_kernel_select(kernel) == PKV_OK);
    num_kernels++;
    for (int64_t num_rows = 1; num_rows <= MOST_ROWS; num_rows += num_rows < 9 ? 1 : 5) {
      ternary_sums_are_exact(threads, num_rows, 16, 16);
      ternary_sums_are_exact(threads, num_rows, MOST_OUT, MOST_IN);
      ternary_sums_are_exact(threads, num_rows, 1, 7);
      ternary_sums_are_exact(NULL, num_rows, 33, 256);
      weights_of_8_bits(threads, num_rows, 1024);
      weights_of_8_bits(threads, num_rows, 45);
      weights_of_16_bits(threads, num_rows, 1024);
      weights_of_16_bits(NULL, num_rows, 16);
    }
  }
  assert(num_kernels > 0);
  pkv_threads_destroy(threads);
  return 0;
}
