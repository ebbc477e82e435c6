/* Rows before and after a product: norm and rounding, scaling and gating.  Written once, compiled for each
 * instruction set.
 *
 * All of it is elementwise or adds in one order, without fused multiply-add: the same bits everywhere. */
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "linear.h"
#include "kernels/product.h"
#include "kernels/loops.h"

/* Sixteen values at a time, in two vectors: gcc keeps wider ones in memory. */
enum { LANES = 8, STEP = 2 * LANES };
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t int_lanes __attribute__((vector_size(4 * LANES)));

/* Sums in one order: lane i adds every sixteenth value, then halves are added until one lane is left. */
static float sum_of_squares(const float *x, int64_t count) {
  lanes low = {}, high = {}, a, b;
  int64_t i = 0;
  for (; i + STEP <= count; i += STEP) {
    memcpy(&a, x + i, sizeof a);
    memcpy(&b, x + i + LANES, sizeof b);
    low += a * a;
    high += b * b;
  }
  float added[STEP];
  memcpy(added, &low, sizeof low);
  memcpy(added + LANES, &high, sizeof high);
  for (; i < count; i++) added[i % STEP] += x[i] * x[i];
  for (int width = LANES; width; width /= 2)
    for (int lane = 0; lane < width; lane++) added[lane] += added[lane + width];
  return added[0];
}

static void norm_row(float *restrict to, const float *restrict x, const float *restrict weight, int64_t count,
                     float eps) {
  float root = sqrtf(sum_of_squares(x, count) / (float)count + eps);
  for (int64_t i = 0; i < count; i++) to[i] = x[i] / root * weight[i];
}

/* The bits of the largest magnitude; those of a NaN are larger than those of any number. */
static int32_t largest_bits(const float *x, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; i++) {
    int32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

/* The nearest integer, ties to even: adding 1.5 * 2^23 leaves it in the low bits. */
static inline int32_t nearest(float x) {
  float shifted = x + 0x1.8p23f;
  int32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4b400000;
}

static int32_t round_to_bytes(int8_t *restrict to, const float *restrict x, int64_t count, float factor) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; i++) {
    int32_t integer = nearest(x[i] * factor);
    to[i] = (int8_t)integer;
    sum += integer;
  }
  return sum;
}

static void round_to_shorts(int16_t *restrict to, const float *restrict x, int64_t count, float factor) {
  for (int64_t i = 0; i < count; i++) to[i] = (int16_t)nearest(x[i] * factor);
}

/* Round a row to integers of 1 or 2 bytes, zeros behind; `buffer` holds a row of floats. */
static pkv_rounded round_row(void *to, int64_t padded, const float *x, int64_t count, const float *norm,
                             float eps, int32_t max_int, bool is_ternary, float *buffer) {
  if (norm) {
    norm_row(buffer, x, norm, count, eps);
    x = buffer;
  }
  int32_t bits = largest_bits(x, count);
  size_t item = is_ternary ? sizeof(int8_t) : sizeof(int16_t);
  bool is_number = bits < 0x7f800000;
  int64_t num_rounded = is_number ? count : 0;
  memset((char *)to + (size_t)num_rounded * item, 0, (size_t)(padded - num_rounded) * item);
  if (!is_number) return (pkv_rounded){NAN, 0};
  float largest;
  memcpy(&largest, &bits, sizeof largest);
  pkv_rounded rounded = {(float)max_int / (largest < 1e-5f ? 1e-5f : largest), 0};
  if (is_ternary)
    rounded.sum = round_to_bytes(to, x, count, rounded.factor);
  else
    round_to_shorts(to, x, count, rounded.factor);
  return rounded;
}

/* 2^x in place, within 2^-126 and 2^126 (gcc would pass vectors in memory).  The polynomial is 2^f on [-1/2,
 * 1/2], least squares at Chebyshev points, relative error 9e-8. */
static inline void exp2_lanes(lanes *in_place) {
  lanes x = *in_place;
  const float to_integer = 0x1.8p23f; /* adding it leaves the nearest integer in the low bits */
  x = (lanes)(((int_lanes)x & ~(x > 126.0f)) | ((int_lanes)((lanes){} + 126.0f) & (x > 126.0f)));
  x = (lanes)(((int_lanes)x & ~(x < -126.0f)) | ((int_lanes)((lanes){} - 126.0f) & (x < -126.0f)));
  lanes shifted = x + to_integer, f = x - (shifted - to_integer);
  lanes p = f * 0x1.444004p-13f + 0x1.5f0896p-10f;
  p = p * f + 0x1.3b2a1cp-7f;
  p = p * f + 0x1.c6af6cp-5f;
  p = p * f + 0x1.ebfbe0p-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  *in_place = p * (lanes)(((int_lanes)shifted << 23) + (127 << 23));
}

/* Store 16 values of a row, of which `count` are outputs. */
static inline void store_values(float *restrict out, const float *restrict values, int64_t count,
                                int32_t epilogue) {
  switch (epilogue) {
    case PKV_STORE: memcpy(out, values, (size_t)count * sizeof *values); break;
    case PKV_ADD:
      for (int64_t i = 0; i < count; i++) out[i] += values[i];
      break;
    case PKV_RELU2_GATE: { /* eight gates, and the eight values that they gate */
      /* In explicit vectors: gcc would unroll the loop first, into unpredictable branches. */
      lanes gates, gated;
      memcpy(&gates, values, sizeof gates);
      memcpy(&gated, values + LANES, sizeof gated);
      gates = (lanes)((int_lanes)gates & ~(gates < 0));
      gated *= gates * gates;
      memcpy(out, &gated, sizeof gated);
      break;
    }
    case PKV_SILU_GATE: {
      lanes gates, gated;
      memcpy(&gates, values, sizeof gates);
      memcpy(&gated, values + LANES, sizeof gated);
      lanes power = gates * -0x1.715476p+0f;
      exp2_lanes(&power);
      gated *= gates / (1.0f + power);
      memcpy(out, &gated, sizeof gated);
      break;
    }
  }
}

/* Scale 16 sums of each row, and store them. */
static void store_rows(float *restrict out, int64_t out_stride, int32_t (*restrict sums)[PKV_OUT_BLOCK],
                       const pkv_rounded *restrict rows, int32_t num_rows, const float *restrict scales,
                       int64_t count, int32_t epilogue) {
  for (int32_t row = 0; row < num_rows; row++, out += out_stride) {
    float values[PKV_OUT_BLOCK];
    for (int i = 0; i < PKV_OUT_BLOCK; i++)
      values[i] = (float)(sums[row][i] - rows[row].sum) / rows[row].factor * scales[i];
    store_values(out, values, count, epilogue);
  }
}

/* The same for sums that are scaled already. */
static void store_scaled(float *restrict out, int64_t out_stride, float (*restrict sums)[PKV_OUT_BLOCK],
                         const pkv_rounded *restrict rows, int32_t num_rows, const float *restrict scales,
                         int64_t count, int32_t epilogue) {
  for (int32_t row = 0; row < num_rows; row++, out += out_stride) {
    float values[PKV_OUT_BLOCK];
    for (int i = 0; i < PKV_OUT_BLOCK; i++) values[i] = sums[row][i] / rows[row].factor * scales[i];
    store_values(out, values, count, epilogue);
  }
}

/* ---- rows for weights in bfloat16 */

static void norm_or_copy(float *restrict to, int64_t padded, const float *restrict x, int64_t count,
                         const float *restrict norm, float eps) {
  if (norm)
    norm_row(to, x, norm, count, eps);
  else
    memcpy(to, x, (size_t)count * sizeof *to);
  memset(to + count, 0, (size_t)(padded - count) * sizeof *to);
}

/* What an instruction set's pkv_product takes from here. */
#define ACTIVATIONS                                                               \
  .round_row = round_row, .store_rows = store_rows, .store_scaled = store_scaled, \
  .norm_or_copy = norm_or_copy, .store_values = store_values
