/* What an instruction set provides for products of small integers with activations of 8 bits.
 *
 * Ternary weights, 2 bits each (code = value + 1), are packed in blocks of 16 outputs:
 *
 *   [out / 16][in / 16 groups][64 bytes]      out and in rounded up, with zeros
 *
 * Byte b of a group holds the weights of output b / 4, for the inputs 16 * group + 4 * i + b % 4, i = 0
 * .. 3, in the bits 2i and 2i + 1.  So four inputs, repeated, are multiplied with all 16 outputs in one
 * instruction, and no sum crosses lanes.  16 bits can sum 256 inputs: 64 pairs of products within [-512,
 * 508].
 *
 * Weights of 8 bits have a scale for each output and each group of 32 inputs, and activations 16 bits.  A
 * group of a block is 16 scales in bfloat16, then [in / 2][16 outputs][2 inputs]:
 *
 *   [out / 16][in / 32 groups][32 bytes of scales | 512 bytes of weights]
 *
 * The integer sums of a group fit 32 bits; scaled, they are added one group after the other.  Integer sums
 * are exact, and scaled sums are added in one order: the same bits on every kernel.
 *
 * Weights in bfloat16 are [out / 16][in / 2][16 outputs][2 inputs], so that a 32-bit lane becomes one float
 * by a shift and the other by a mask; activations are floats.  Each sum is one chain over the inputs, of
 * fused multiply-adds where the instruction set has them: the same bits for any number of rows. */
#ifndef PKV_PRODUCT_H
#define PKV_PRODUCT_H
#include <stdbool.h>
#include <stdint.h>

/* The factor of a row before rounding, NaN when it held a NaN or an infinity; and, where weights are
 * codes (values + 1), the sum of its integers, by which each sum is too large. */
typedef struct {
  float factor;
  int32_t sum;
} pkv_rounded;

enum {
  PKV_OUT_BLOCK = 16,
  PKV_IN_GROUP = 16,
  PKV_GROUP_BYTES = PKV_OUT_BLOCK * PKV_IN_GROUP / 4,
  PKV_INT8_GROUP = 32,
  PKV_SCALE_BYTES = 2 * PKV_OUT_BLOCK,
  PKV_INT8_GROUP_BYTES = PKV_SCALE_BYTES + PKV_OUT_BLOCK * PKV_INT8_GROUP,
  PKV_GROUPS_ADDED = 16, /* summed in 16 bits, before they are added in 32 */
  PKV_MAX_ROWS = 8,      /* of a tile */
  PKV_MAX_FLOAT_ROWS = 12,
  PKV_PAIR_BYTES = 5376, /* bytes of scratch for two blocks of ternary_many */
};

typedef struct {
  const char *name;
  int32_t row_tile; /* rows at a time: as many as have their sums in registers */
  /* sums[row][16] of codes times activations, over num_groups groups of weights, for 1 to row_tile rows,
   * row_stride bytes apart. */
  void (*ternary)(const uint8_t *weights, int64_t num_groups, const int8_t *rows, int64_t row_stride,
                  int32_t num_rows, int32_t sums[][PKV_OUT_BLOCK]);
  /* Scaled sums[row][16] of groups of 8-bit weights times activations of 16 bits. */
  void (*int8)(const uint8_t *weights, int64_t num_groups, const int16_t *rows, int64_t row_stride,
               int32_t num_rows, float sums[][PKV_OUT_BLOCK]);
  /* kernels/linear/activations.h */
  pkv_rounded (*round_row)(void *values, int64_t padded, const float *x, int64_t count, const float *norm,
                           float eps, int32_t max_int, bool is_ternary, float *buffer);
  void (*store_rows)(float *out, int64_t out_stride, int32_t (*sums)[PKV_OUT_BLOCK], const pkv_rounded *rows,
                     int32_t num_rows, const float *scales, int64_t count, int32_t epilogue);
  void (*store_scaled)(float *out, int64_t out_stride, float (*sums)[PKV_OUT_BLOCK], const pkv_rounded *rows,
                       int32_t num_rows, const float *scales, int64_t count, int32_t epilogue);
  /* The same for weights in bfloat16, [num_in][16 outputs], and rows of floats. */
  void (*norm_or_copy)(float *to, int64_t padded, const float *x, int64_t count, const float *norm,
                       float eps);
  int32_t float_tile; /* rows at a time of bfloat16; at most PKV_MAX_FLOAT_ROWS */
  /* sums[block * num_rows + row][16], of one or two consecutive blocks. */
  void (*bfloat16)(const uint16_t *weights, int64_t num_in, int32_t num_blocks, const float *rows,
                   int64_t row_stride, int32_t num_rows, float sums[][PKV_OUT_BLOCK]);
  void (*store_values)(float *out, const float *values, int64_t count, int32_t epilogue);
  /* NULL, or ternary weights of an even number of consecutive blocks, with a multiple of 8 rows:
   * sums[block][row][16].  scratch: PKV_PAIR_BYTES for each two blocks, aligned to a cache line. */
  void (*ternary_many)(const uint8_t *weights, int64_t num_groups, int64_t num_blocks, const int8_t *rows,
                       int64_t row_stride, int64_t num_rows, int32_t (*sums)[PKV_OUT_BLOCK], void *scratch);
} pkv_product;

extern const pkv_product pkv_product_portable;
#ifdef __aarch64__
extern const pkv_product pkv_product_neon;
#endif
#ifdef PKV_HAVE_AVX2
extern const pkv_product pkv_product_avx2;
#endif
#ifdef PKV_HAVE_VNNI
extern const pkv_product pkv_product_vnni, pkv_product_vnni_lookups;
#endif

/* The best product that the active kernel's instruction set allows. */
const pkv_product *pkv_active_product(void);

#endif
