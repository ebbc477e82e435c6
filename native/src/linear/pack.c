/* Weights on their way into the blocks in which kernels read them (kernels/product.h draws these). */
#include <string.h>

#include "kernels/product.h"
#include "linear.h"

static int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

/* ---- ternary */

/* The byte of an output and input, and the shift of its two bits. */
static int64_t place_of(int64_t num_groups, int64_t out, int64_t in, int *shift) {
  *shift = 2 * (int)(in % PKV_IN_GROUP / 4);
  int64_t group = out / PKV_OUT_BLOCK * num_groups + in / PKV_IN_GROUP;
  return group * PKV_GROUP_BYTES + out % PKV_OUT_BLOCK * 4 + in % 4;
}

void pkv_pack_ternary(const uint8_t *codes, int64_t num_out, int64_t num_in, uint8_t *packed) {
  int64_t num_groups = divide_up(num_in, PKV_IN_GROUP);
  int64_t num_blocks = divide_up(num_out, PKV_OUT_BLOCK);
  memset(packed, 0x55,
         (size_t)(num_blocks * num_groups * PKV_GROUP_BYTES)); /* codes of 1, which is the value 0 */
  for (int64_t out = 0; out < num_out; out++)
    for (int64_t in = 0; in < num_in; in++) {
      int shift;
      uint8_t *byte = packed + place_of(num_groups, out, in, &shift);
      *byte = (uint8_t)((*byte & ~(3 << shift)) | codes[out * num_in + in] << shift);
    }
}

void pkv_unpack_ternary(const uint8_t *packed, int64_t num_out, int64_t num_in, uint8_t *codes) {
  int64_t num_groups = divide_up(num_in, PKV_IN_GROUP);
  for (int64_t out = 0; out < num_out; out++)
    for (int64_t in = 0; in < num_in; in++) {
      int shift;
      uint8_t byte = packed[place_of(num_groups, out, in, &shift)];
      codes[out * num_in + in] = byte >> shift & 3;
    }
}

/* ---- 8 bits */

/* Below this, a scale would be no normal number: the weights count as zeros. */
static const float SMALLEST = 127 * 0x1p-126f;

/* bfloat16's bits, to nearest even. */
static uint16_t bfloat16_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* The scale of some weights, as it is stored; NaN where one of them is no number. */
static uint16_t scale_of(const float *weights, int64_t count) {
  int32_t largest_bits = 0; /* those of a NaN are larger than those of any number */
  for (int64_t i = 0; i < count; i++) {
    int32_t bits;
    memcpy(&bits, weights + i, sizeof bits);
    bits &= 0x7fffffff;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  if (largest_bits >= 0x7f800000) return 0x7fc0;
  float largest;
  memcpy(&largest, &largest_bits, sizeof largest);
  return largest < SMALLEST ? 0 : bfloat16_of(largest / 127);
}

/* Weights of one output and one group, a pair of them for each 16 outputs. */
static void pack_group(const float *weights, int64_t count, uint16_t stored, uint8_t *group, int64_t out) {
  memcpy(group + 2 * out, &stored, sizeof stored);
  uint32_t bits = (uint32_t)stored << 16;
  float scale, integers[PKV_INT8_GROUP] = {0};
  memcpy(&scale, &bits, sizeof scale);
  if (scale > 0)
    for (int64_t i = 0; i < count; i++) {
      /* The scale may be rounded down: the largest weight is at most 127.25 of it.  Adding 1.5 * 2^23
       * rounds to the nearest integer, ties to even. */
      integers[i] = weights[i] / scale + 0x1.8p23f - 0x1.8p23f;
    }
  int8_t *two = (int8_t *)group + PKV_SCALE_BYTES + 2 * out;
  for (int i = 0; i < PKV_INT8_GROUP; i++) two[i / 2 * 2 * PKV_OUT_BLOCK + i % 2] = (int8_t)integers[i];
}

void pkv_pack_int8(const float *weights, int64_t num_out, int64_t num_in, float scale, uint8_t *packed) {
  int64_t num_groups = divide_up(num_in, PKV_INT8_GROUP);
  for (int64_t out = 0; out < divide_up(num_out, PKV_OUT_BLOCK) * PKV_OUT_BLOCK; out++)
    for (int64_t group = 0; group < num_groups; group++) {
      int64_t first = group * PKV_INT8_GROUP, count = num_in - first;
      if (count > PKV_INT8_GROUP) count = PKV_INT8_GROUP;
      if (out >= num_out) count = 0;
      const float *from = weights + out * num_in + first;
      pack_group(from, count, scale > 0 ? bfloat16_of(scale) : scale_of(from, count),
                 packed + (out / PKV_OUT_BLOCK * num_groups + group) * PKV_INT8_GROUP_BYTES,
                 out % PKV_OUT_BLOCK);
    }
}
