/* Linear maps of weights in 2, 8 or 16 bits, and rotary positions: what a model needs besides attention.
 *
 * bitlinear.c, rotate.c.  Strides are in the units that each field names.
 */
#ifndef PKV_LINEAR_H
#define PKV_LINEAR_H
#include <stdint.h>

#include "paged_kv.h"

typedef enum { PKV_TERNARY = 0, PKV_INT8_WEIGHTS, PKV_BFLOAT16_WEIGHTS } pkv_matrix_kind;

/* Weights in blocks of 16 outputs, num_out and num_in rounded up to multiples of 16 with zeros: ternary as
 * [out / 16][in / 16][64 bytes], where byte b of group g holds the codes (value + 1) of output b / 4 for the
 * inputs 16 g + 4 i + b % 4 in the bits 2i, 2i + 1; int8 as [out / 16][in / 32][16 scales in bfloat16, then
 * [16 pairs of inputs][16][2]], num_in rounded up to multiples of 32; bfloat16 as [out / 16][in / 2][16][2].
 */
typedef struct {
  const void *weights;
  const float *scales; /* of each output, rounded up; of ternary and int8 weights */
  int64_t num_out;
  int64_t num_in;
  int32_t kind; /* pkv_matrix_kind */
  int32_t bits; /* of a weight */
} pkv_matrix;

typedef enum {
  PKV_STORE = 0,  /* out = y */
  PKV_ADD,        /* out += y */
  PKV_RELU2_GATE, /* outputs are eight gates, then the eight values `up` that they gate: out = relu(gate)^2 *
                     up */
  PKV_SILU_GATE,  /* out = gate / (1 + e^-gate) * up */
} pkv_epilogue;

typedef struct {
  const float *x; /* [num_rows, num_in], rows x_stride floats apart */
  int64_t x_stride;
  int64_t num_rows;
  /* [num_in]: x is divided by its root mean square and multiplied by this; NULL: no norm. */
  const float *norm;
  float eps;
  float *out;         /* [num_rows, num_out], half as wide when gated */
  int64_t out_stride; /* floats */
  int32_t epilogue;   /* pkv_epilogue */
} pkv_linear;

/* y = round(x * s) W / s * scale, s = max_int / max |x| for each row; max_int is 127 for ternary weights, and
 * 32767 for int8, whose scales are those of each 32 inputs and of the output.  Sums are exact, and scaled
 * ones are added in one order, so a row's bits are the same on every kernel, for any threads and beside any
 * rows. A row with a NaN or an infinity becomes NaN.  With bfloat16 weights nothing is rounded, and each sum
 * is one chain over the inputs: the same bits for any threads and beside any rows, but not on every kernel.
 */
pkv_status pkv_multiply(pkv_threads *threads, const pkv_matrix *matrix, const pkv_linear *call);
/* Pack ternary codes, [num_out, num_in] bytes of 0, 1, 2, into the blocks of pkv_matrix; and back. */
void pkv_pack_ternary(const uint8_t *codes, int64_t num_out, int64_t num_in, uint8_t *packed);
void pkv_unpack_ternary(const uint8_t *packed, int64_t num_out, int64_t num_in, uint8_t *codes);
/* Round weights, [num_out, num_in] floats, to 8 bits, and pack them into the blocks of pkv_matrix.  A scale
 * is the largest magnitude of 32 inputs, divided by 127 and rounded to bfloat16; or, above 0, the one that is
 * given, of which every weight is at most 127. */
void pkv_pack_int8(const float *weights, int64_t num_out, int64_t num_in, float scale, uint8_t *packed);
/* Rotate heads of float32, [num_tokens, num_heads, head_dim], in place by their tokens' positions: element i
 * pairs with i + head_dim / 2; cosines and sines are [num_positions, head_dim / 2].  PKV_BAD_ARGUMENT, and
 * nothing has changed, when a position is not below num_positions. */
pkv_status pkv_rotate(pkv_threads *threads, const pkv_tensor *rows, int64_t num_tokens, int32_t num_heads,
                      int32_t head_dim, const int32_t *positions, int64_t num_positions, const float *cosines,
                      const float *sines);

/* Rows of a projection, [q heads | k heads | v heads], on their way to attention: the bias is added, heads of
 * q and of k are normed and rotated. */
typedef struct {
  float *rows;
  int64_t stride; /* floats from a row to the next */
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  const float *bias;   /* of a row; NULL: none */
  const float *q_norm; /* [head_dim]; NULL: none */
  const float *k_norm;
  float eps;
  int32_t is_rotated;
} pkv_heads;

/* The tokens of a forward pass, and the tables of the positions below num_positions. */
typedef struct {
  int64_t num_rows;
  const int32_t *positions;
  int64_t num_positions;
  const float *cosines;
  const float *sines;
} pkv_tokens;

/* A product and the bias that is added to what it stored, NULL for none; or, without a matrix, heads. */
typedef struct {
  const pkv_matrix *matrix;
  pkv_linear product; /* with as many rows as there are tokens */
  const float *bias;
  pkv_heads heads;
} pkv_op;

/* Do operations one after the other.  PKV_BAD_ARGUMENT, and nothing has changed, when a position is not below
 * num_positions. */
pkv_status pkv_run_ops(pkv_threads *threads, const pkv_op *ops, int64_t num_ops, const pkv_tokens *tokens);

#endif
