/* Linear maps of weights in 2 or 8 bits: a row of activations is normed, rounded to small integers,
 * multiplied, and what comes out is scaled, and stored, added or gated.
 *
 *   x ── norm ── q = round(x * s), s = most / max |x| ── sums = q W ── y = sums / s * scale ── out
 *
 * A row's bits depend on nothing but itself: its sums are exact integers, its norm adds in one order.  Few
 * rows are rounded by every thread for itself, which costs less than waiting; many are shared out first.
 *
 * Source: Ma et al., The Era of 1-bit LLMs, 2024.
 */
#include "bitlinear.h"

#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "../include/paged_kv.h"
#include "threads.h"

enum { CHUNKS_PER_WORKER = 8, LANES = 16 };

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t int_lanes __attribute__((vector_size(4 * LANES), aligned(4)));

/* Rows that were rounded: integers of 1 or 2 bytes, zeros behind; what they were multiplied by; their sums.
 */
typedef struct {
  char *values;
  float *factors;
  int32_t *sums;
} rounded;

typedef struct {
  const pkv_product *product;
  const pkv_matrix *matrix;
  const pkv_linear *call;
  int64_t in_padded;
  int64_t num_blocks; /* of 16 outputs */
  int64_t chunk;      /* blocks that a worker takes at a time */
  int32_t most;       /* the largest magnitude of an activation */
  bool is_shared;     /* the rows are rounded once for all workers */
  char *scratch;      /* of each worker: a row of floats, and its own rounded rows */
  size_t scratch_bytes;
  rounded shared;
  atomic_llong next;
} job;

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static int64_t value_bytes(const job *job) { return job->matrix->kind == PKV_TERNARY ? 1 : 2; }

/* ---- one row */

/* Added in one order: lane i has every sixteenth value, then halves onto each other. */
static float sum_of_squares(const float *x, int64_t count) {
  lanes sums = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    lanes values;
    memcpy(&values, x + i, sizeof values);
    sums += values * values;
  }
  for (int lane = 0; i < count; i++, lane++) sums[lane] += x[i] * x[i];
  for (int width = LANES / 2; width; width /= 2)
    for (int lane = 0; lane < width; lane++) sums[lane] += sums[lane + width];
  return sums[0];
}

static void norm_row(float *to, const float *x, const float *weight, int64_t count, float eps) {
  float root = sqrtf(sum_of_squares(x, count) / (float)count + eps);
  for (int64_t i = 0; i < count; i++) to[i] = x[i] / root * weight[i];
}

/* The bits of the largest magnitude; those of a NaN are larger than those of any number. */
static int32_t largest_bits(const float *x, int64_t count) {
  int_lanes largest = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    int_lanes bits;
    memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    int_lanes is_larger = bits > largest;
    largest = (bits & is_larger) | (largest & ~is_larger);
  }
  for (int lane = 0; i < count; i++, lane++) {
    int32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    if (bits > largest[lane]) largest[lane] = bits;
  }
  int32_t result = 0;
  for (int lane = 0; lane < LANES; lane++)
    if (largest[lane] > result) result = largest[lane];
  return result;
}

/* Round a row to integers; a row that holds a NaN or an infinity has the factor NaN, and so is its result. */
static void round_row(const job *job, rounded to, int64_t row, float *x) {
  int64_t num_in = job->matrix->num_in;
  int32_t bits = largest_bits(x, num_in);
  char *values = to.values + row * job->in_padded * value_bytes(job);
  memset(values, 0, (size_t)(job->in_padded * value_bytes(job)));
  to.sums[row] = 0;
  to.factors[row] = NAN;
  if (bits >= 0x7f800000) return;
  float largest;
  memcpy(&largest, &bits, sizeof largest);
  float factor = to.factors[row] = (float)job->most / (largest < 1e-5f ? 1e-5f : largest);
  /* Adding 1.5 * 2^23 leaves the nearest integer, of halves the even one, in the low bits. */
  const float to_integer = 0x1.8p23f;
  int32_t sum = 0;
  if (job->matrix->kind == PKV_TERNARY) {
    int8_t *bytes = (int8_t *)values;
    for (int64_t i = 0; i < num_in; i++) {
      float shifted = x[i] * factor + to_integer;
      int32_t integer;
      memcpy(&integer, &shifted, sizeof integer);
      bytes[i] = (int8_t)integer;
      sum += bytes[i];
    }
  } else {
    int16_t *shorts = (int16_t *)values;
    for (int64_t i = 0; i < num_in; i++) {
      float shifted = x[i] * factor + to_integer;
      int32_t integer;
      memcpy(&integer, &shifted, sizeof integer);
      shorts[i] = (int16_t)integer;
    }
  }
  to.sums[row] = sum;
}

static void prepare_row(const job *job, rounded to, int64_t row, float *buffer) {
  const pkv_linear *call = job->call;
  const float *x = call->x + row * call->x_stride;
  if (call->norm)
    norm_row(buffer, x, call->norm, job->matrix->num_in, call->eps);
  else
    memcpy(buffer, x, (size_t)job->matrix->num_in * sizeof *buffer);
  round_row(job, to, row, buffer);
}

/* ---- outputs */

static void put_row(const job *job, int64_t block, int64_t row, const int32_t *sums, rounded from) {
  const pkv_matrix *matrix = job->matrix;
  const pkv_linear *call = job->call;
  const float *scales = matrix->scales + block * PKV_OUT_BLOCK;
  float values[PKV_OUT_BLOCK], factor = from.factors[row];
  /* Codes are values + 1, so each sum has the activations once too often. */
  int32_t excess = matrix->kind == PKV_TERNARY ? from.sums[row] : 0;
  for (int i = 0; i < PKV_OUT_BLOCK; i++) values[i] = (float)(sums[i] - excess) / factor * scales[i];
  float *out = call->out + row * call->out_stride;
  int64_t first = block * PKV_OUT_BLOCK, count = matrix->num_out - first;
  if (count > PKV_OUT_BLOCK) count = PKV_OUT_BLOCK;
  switch (call->then) {
    case PKV_STORE: memcpy(out + first, values, (size_t)count * sizeof *values); break;
    case PKV_ADD:
      for (int64_t i = 0; i < count; i++) out[first + i] += values[i];
      break;
    case PKV_RELU2_GATE: /* eight gates, and the eight that they gate */
      for (int64_t i = 0; i < count / 2; i++) {
        float gate = values[i] > 0 || values[i] != values[i] ? values[i] : 0;
        out[first / 2 + i] = gate * gate * values[8 + i];
      }
      break;
    case PKV_SILU_GATE:
      for (int64_t i = 0; i < count / 2; i++)
        out[first / 2 + i] = values[i] / (1.0f + expf(-values[i])) * values[8 + i];
      break;
  }
}

static void multiply_block(const job *job, int64_t block, rounded from) {
  const pkv_matrix *matrix = job->matrix;
  int64_t row_stride = job->in_padded * value_bytes(job), num_rows = job->call->num_rows;
  int64_t num_in_blocks = job->in_padded / PKV_IN_BLOCK;
  int32_t sums[PKV_ROW_TILE][PKV_OUT_BLOCK];
  for (int64_t row = 0; row < num_rows; row += PKV_ROW_TILE) {
    int32_t count = num_rows - row < PKV_ROW_TILE ? (int32_t)(num_rows - row) : PKV_ROW_TILE;
    const char *rows = from.values + row * row_stride;
    if (matrix->kind == PKV_TERNARY)
      job->product->ternary((const uint8_t *)matrix->weights + block * num_in_blocks * PKV_BLOCK_BYTES,
                            num_in_blocks, (const int8_t *)rows, row_stride, count, sums);
    else
      job->product->int8((const int8_t *)matrix->weights + block * PKV_OUT_BLOCK * job->in_padded,
                         job->in_padded, (const int16_t *)rows, row_stride, count, sums);
    for (int32_t i = 0; i < count; i++) put_row(job, block, row + i, sums[i], from);
  }
}

/* ---- workers */

static rounded rounded_in(const job *job, char *memory) {
  int64_t num_rows = job->call->num_rows;
  rounded rows = {.factors = (float *)memory};
  rows.sums = (int32_t *)(rows.factors + round_up(num_rows, 16));
  rows.values = (char *)(rows.sums + round_up(num_rows, 16));
  return rows;
}

static int64_t rounded_bytes(const job *job) {
  return 2 * 4 * round_up(job->call->num_rows, 16) + job->call->num_rows * job->in_padded * value_bytes(job);
}

static float *buffer_of(const job *job, int32_t worker) {
  return (float *)(job->scratch + (size_t)worker * job->scratch_bytes);
}

static void round_shared(void *context, int32_t worker) {
  job *job = context;
  long long row;
  while ((row = atomic_fetch_add(&job->next, 1)) < job->call->num_rows)
    prepare_row(job, job->shared, row, buffer_of(job, worker));
}

static void multiply_chunks(void *context, int32_t worker) {
  job *job = context;
  rounded rows = job->shared;
  if (!job->is_shared) {
    rows = rounded_in(job, (char *)(buffer_of(job, worker) + job->in_padded));
    for (int64_t row = 0; row < job->call->num_rows; row++)
      prepare_row(job, rows, row, buffer_of(job, worker));
  }
  long long chunk;
  while ((chunk = atomic_fetch_add(&job->next, 1)) * job->chunk < job->num_blocks)
    for (int64_t block = chunk * job->chunk; block < (chunk + 1) * job->chunk && block < job->num_blocks;
         block++)
      multiply_block(job, block, rows);
}

static pkv_status multiply_with(pkv_threads *threads, int32_t num_workers, job *job) {
  const int64_t bytes_worth_a_thread = 64 << 10;
  int64_t weight_bytes = job->num_blocks * PKV_OUT_BLOCK * job->in_padded * job->matrix->bits / 8;
  if (weight_bytes * (job->call->num_rows + 3) / 4 < bytes_worth_a_thread) num_workers = 1;
  job->is_shared = num_workers > 1 && job->call->num_rows > PKV_ROW_TILE;
  job->chunk = round_up(job->num_blocks, (int64_t)num_workers * CHUNKS_PER_WORKER) /
               ((int64_t)num_workers * CHUNKS_PER_WORKER);
  int64_t own_bytes = job->in_padded * (int64_t)sizeof(float) + (job->is_shared ? 0 : rounded_bytes(job));
  job->scratch_bytes = (size_t)round_up(own_bytes, 64);
  size_t shared_bytes = job->is_shared ? (size_t)round_up(rounded_bytes(job), 64) : 0;
  size_t num_bytes = shared_bytes + (size_t)num_workers * job->scratch_bytes;
  char *memory = threads ? pkv_threads_scratch(threads, num_bytes) : aligned_alloc(64, num_bytes);
  if (!memory) return PKV_OUT_OF_MEMORY;
  job->scratch = memory + shared_bytes;
  if (job->is_shared) {
    job->shared = rounded_in(job, memory);
    pkv_threads_run(threads, num_workers, round_shared, job);
    atomic_store(&job->next, 0);
  }
  if (num_workers > 1)
    pkv_threads_run(threads, num_workers, multiply_chunks, job);
  else
    multiply_chunks(job, 0);
  if (!threads) free(memory);
  return PKV_OK;
}

pkv_status pkv_multiply(pkv_threads *threads, const pkv_matrix *matrix, const pkv_linear *call) {
  bool is_gated = call->then == PKV_RELU2_GATE || call->then == PKV_SILU_GATE;
  if (matrix->num_in < 1 || matrix->num_out < 1 || (is_gated && matrix->num_out % PKV_OUT_BLOCK))
    return PKV_BAD_ARGUMENT;
  job job = {.product = pkv_active_product(), .matrix = matrix, .call = call};
  if (!job.product) return PKV_BAD_ARGUMENT;
  job.in_padded = round_up(matrix->num_in, PKV_IN_BLOCK);
  job.num_blocks = round_up(matrix->num_out, PKV_OUT_BLOCK) / PKV_OUT_BLOCK;
  /* 127 * most * num_in must not leave 32 bits; 127 is what ternary models are trained with. */
  job.most = matrix->kind == PKV_TERNARY ? 127 : (int32_t)(INT32_MAX / 128 / matrix->num_in);
  if (job.most > INT16_MAX) job.most = INT16_MAX;
  if (job.most < 127 || matrix->num_in > INT32_MAX / 512) return PKV_BAD_ARGUMENT;
  int32_t num_workers = pkv_threads_claim(threads);
  if (num_workers == 0) return multiply_with(NULL, 1, &job);
  pkv_status status = multiply_with(threads, num_workers, &job);
  pkv_threads_release(threads);
  return status;
}
