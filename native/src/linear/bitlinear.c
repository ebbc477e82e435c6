/* Linear maps of weights in 2, 8 or 16 bits: norm and round a row of activations, multiply, then scale
 * and store, add or gate the sums.
 *
 *   x ── norm ── q = round(x * s), s = max_int / max |x| ── sums = q W ── y = sums / s * scale ── out
 *
 * A row's bits depend on the row alone: integer sums are exact, and what is not an integer is added in one
 * order.
 * Every thread rounds a few rows for itself, which costs less than waiting; many rows are split among
 * the threads first.
 *
 * Weights in bfloat16 multiply the normed floats without rounding; each sum is one chain over the
 * inputs.
 *
 * Source: Ma et al., The Era of 1-bit LLMs, 2024. */
#include "kernels/product.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "linear.h"
#include "linear/ops.h"
#include "runtime/threads.h"

enum {
  CHUNKS_PER_WORKER = 8,
  ROWS_WORTH_LOOKUPS = 32,
  MOST_ROWS_LOOKED_UP = 256,  /* from so many rows on, weights are repacked once for all of them */
  MOST_BLOCKS_LOOKED_UP = 80, /* repacked rows stay in the L2 cache */
  ROWS_WORTH_SHARING =
      16, /* up to so many rows, every worker rounds all of them: the workers start once, not twice */
};

/* Rounded rows: integers of 1 or 2 bytes, zeros behind. */
typedef struct {
  char *values;
  pkv_rounded *rows;
} rounded;

typedef struct {
  const pkv_product *product;
  const pkv_matrix *matrix;
  const pkv_linear *call;
  int64_t in_padded;
  int64_t num_blocks; /* of 16 outputs */
  int64_t chunk;      /* blocks that a worker takes at a time */
  int64_t chunk_rows; /* and rows, when there are many */
  int64_t num_items;  /* of blocks and rows together */
  bool is_many;       /* there are enough rows for product->ternary_many */
  int32_t max_int;    /* the largest integer that an activation is rounded to */
  int32_t gating;     /* outputs of the product per stored output: 2 when gated */
  bool is_shared;     /* the rows are rounded once, for all workers */
  char *scratch;      /* per worker: a row of floats, and its own rounded rows */
  size_t scratch_bytes;
  rounded shared;
  atomic_llong next;
} job;

static int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
static int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

/* Inputs are padded to a multiple of this. */
static int64_t group_inputs(int32_t kind) { return kind == PKV_INT8_WEIGHTS ? PKV_INT8_GROUP : PKV_IN_GROUP; }

/* Of an activation, as the product reads it. */
static int64_t value_bytes(const job *job) {
  return job->matrix->kind == PKV_TERNARY ? 1 : job->matrix->kind == PKV_INT8_WEIGHTS ? 2 : 4;
}

/* Bytes from a row of activations to the next.  Rows that are a multiple of 2 KiB apart would share the sets
 * of an L1 cache. */
static int64_t row_bytes(const job *job) {
  int64_t num_bytes = job->in_padded * value_bytes(job);
  bool is_float = job->matrix->kind == PKV_BFLOAT16_WEIGHTS;
  return is_float && num_bytes % 2048 == 0 ? num_bytes + 64 : num_bytes;
}

/* Rows `row` to `end` - 1 with one or two blocks, in tiles of about the same number of rows. */
static void multiply_floats(const job *job, int64_t block, int32_t num_blocks, const char *values,
                            int64_t row, int64_t end) {
  const pkv_matrix *matrix = job->matrix;
  const uint16_t *weights = (const uint16_t *)matrix->weights + block * PKV_OUT_BLOCK * job->in_padded;
  float sums[2 * PKV_MAX_FLOAT_ROWS][PKV_OUT_BLOCK];
  int64_t num_tiles = divide_up(end - row, job->product->float_tile);
  int64_t tile = num_tiles ? divide_up(end - row, num_tiles) : 0;
  for (; row < end; row += tile) {
    int32_t count = (int32_t)(end - row < tile ? end - row : tile);
    job->product->bfloat16(weights, job->in_padded, num_blocks,
                           (const float *)(values + row * row_bytes(job)), row_bytes(job), count, sums);
    for (int32_t i = 0; i < num_blocks * count; i++) {
      int64_t first = (block + i / count) * PKV_OUT_BLOCK, num_stored = matrix->num_out - first;
      job->product->store_values(
          job->call->out + (row + i % count) * job->call->out_stride + first / job->gating, sums[i],
          num_stored < PKV_OUT_BLOCK ? num_stored : PKV_OUT_BLOCK, job->call->epilogue);
    }
  }
}

/* Rows `row` to `end` - 1 with 16 outputs. */
static void multiply_block(const job *job, int64_t block, rounded from, int64_t row, int64_t end) {
  const pkv_matrix *matrix = job->matrix;
  int64_t row_stride = row_bytes(job);
  int64_t num_groups = job->in_padded / group_inputs(matrix->kind), first = block * PKV_OUT_BLOCK;
  int64_t num_stored = matrix->num_out - first < PKV_OUT_BLOCK ? matrix->num_out - first : PKV_OUT_BLOCK;
  int32_t sums[PKV_MAX_ROWS][PKV_OUT_BLOCK], row_tile = job->product->row_tile;
  float scaled[PKV_MAX_ROWS][PKV_OUT_BLOCK];
  for (; row < end; row += row_tile) {
    int32_t count = end - row < row_tile ? (int32_t)(end - row) : row_tile;
    const char *rows = from.values + row * row_stride;
    float *out = job->call->out + row * job->call->out_stride + first / job->gating;
    for (int32_t i = 0; i < count; i++) __builtin_prefetch(out + i * job->call->out_stride, 1);
    if (matrix->kind == PKV_TERNARY) {
      job->product->ternary((const uint8_t *)matrix->weights + block * num_groups * PKV_GROUP_BYTES,
                            num_groups, (const int8_t *)rows, row_stride, count, sums);
      job->product->store_rows(out, job->call->out_stride, sums, from.rows + row, count,
                               matrix->scales + first, num_stored, job->call->epilogue);
    } else {
      job->product->int8((const uint8_t *)matrix->weights + block * num_groups * PKV_INT8_GROUP_BYTES,
                         num_groups, (const int16_t *)rows, row_stride, count, scaled);
      job->product->store_scaled(out, job->call->out_stride, scaled, from.rows + row, count,
                                 matrix->scales + first, num_stored, job->call->epilogue);
    }
  }
}

/* ---- workers */

static rounded rounded_in(const job *job, char *memory) {
  pkv_rounded *rows = (pkv_rounded *)memory;
  return (rounded){(char *)(rows + round_up(job->call->num_rows, 8)), rows};
}

static int64_t rounded_bytes(const job *job) {
  int64_t num_rows = job->call->num_rows;
  return round_up(num_rows, 8) * (int64_t)sizeof(pkv_rounded) + num_rows * row_bytes(job);
}

static void prepare_row(const job *job, rounded to, int64_t row, float *buffer) {
  const pkv_linear *call = job->call;
  bool is_ternary = job->matrix->kind == PKV_TERNARY;
  if (job->matrix->kind == PKV_BFLOAT16_WEIGHTS) {
    job->product->norm_or_copy((float *)(to.values + row * row_bytes(job)), job->in_padded,
                               call->x + row * call->x_stride, job->matrix->num_in, call->norm, call->eps);
    return;
  }
  to.rows[row] = job->product->round_row(to.values + row * row_bytes(job), job->in_padded,
                                         call->x + row * call->x_stride, job->matrix->num_in, call->norm,
                                         call->eps, job->max_int, is_ternary, buffer);
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

/* The blocks of a chunk, with as many rows as stay in the L2 cache, then with the next rows. */
static void multiply_chunk(const job *job, int64_t chunk, rounded rows) {
  const int64_t bytes_at_once = 256 << 10;
  int64_t num_rows = job->call->num_rows;
  bool is_float = job->matrix->kind == PKV_BFLOAT16_WEIGHTS;
  int64_t rows_at_once =
      round_up(bytes_at_once / row_bytes(job) + 1, is_float ? job->product->float_tile : PKV_MAX_ROWS);
  int64_t first = chunk * job->chunk, past = first + job->chunk;
  if (past > job->num_blocks) past = job->num_blocks;
  for (int64_t row = 0; row < num_rows; row += rows_at_once) {
    int64_t end = num_rows - row < rows_at_once ? num_rows : row + rows_at_once;
    for (int64_t block = first; block < past; block += 1 + is_float)
      if (is_float)
        multiply_floats(job, block, past - block < 2 ? 1 : 2, rows.values, row, end);
      else
        multiply_block(job, block, rows, row, end);
  }
}

/* A chunk of blocks with a chunk of rows.  The rows beyond a multiple of eight, and an odd last block,
 * use the other product. */
static void multiply_many(const job *job, int64_t item, rounded from, char *scratch) {
  const pkv_matrix *matrix = job->matrix;
  int64_t num_chunks = divide_up(job->num_blocks, job->chunk);
  int64_t first = item % num_chunks * job->chunk, row = item / num_chunks * job->chunk_rows;
  int64_t past = job->num_blocks - first < job->chunk ? job->num_blocks : first + job->chunk;
  int64_t end = job->call->num_rows - row < job->chunk_rows ? job->call->num_rows : row + job->chunk_rows;
  int64_t num_rows = (end - row) / PKV_MAX_ROWS * PKV_MAX_ROWS, num_blocks = (past - first) / 2 * 2;
  int64_t num_groups = job->in_padded / PKV_IN_GROUP;
  int32_t (*sums)[PKV_OUT_BLOCK] = (int32_t (*)[PKV_OUT_BLOCK])scratch;
  job->product->ternary_many((const uint8_t *)matrix->weights + first * num_groups * PKV_GROUP_BYTES,
                             num_groups, num_blocks, (const int8_t *)from.values + row * job->in_padded,
                             job->in_padded, num_rows, sums, sums + num_blocks * num_rows);
  for (int64_t i = 0; i < num_rows; i += PKV_MAX_ROWS)
    for (int64_t block = 0; block < num_blocks; block++) {
      int64_t out = (first + block) * PKV_OUT_BLOCK, num_stored = matrix->num_out - out;
      job->product->store_rows(job->call->out + (row + i) * job->call->out_stride + out / job->gating,
                               job->call->out_stride, sums + block * num_rows + i, from.rows + row + i,
                               PKV_MAX_ROWS, matrix->scales + out,
                               num_stored < PKV_OUT_BLOCK ? num_stored : PKV_OUT_BLOCK, job->call->epilogue);
    }
  if (num_rows < end - row)
    for (int64_t block = first; block < past; block++) multiply_block(job, block, from, row + num_rows, end);
  for (int64_t block = first + num_blocks; block < past; block++)
    multiply_block(job, block, from, row, row + num_rows);
}

static void multiply_chunks(void *context, int32_t worker) {
  job *job = context;
  rounded rows = job->shared;
  if (!job->is_shared) {
    rows = rounded_in(job, (char *)(buffer_of(job, worker) + job->in_padded));
    for (int64_t row = 0; row < job->call->num_rows; row++)
      prepare_row(job, rows, row, buffer_of(job, worker));
  }
  long long item;
  while ((item = atomic_fetch_add(&job->next, 1)) < job->num_items)
    if (job->is_many)
      multiply_many(job, item, rows, (char *)buffer_of(job, worker));
    else
      multiply_chunk(job, item, rows);
}

/* The scratch bytes of a worker: its sums and indices, and at least what rounding needs. */
static int64_t share_out_many(job *job, int32_t num_workers, int64_t least_bytes) {
  int64_t num_chunks = round_up(divide_up(job->num_blocks, MOST_BLOCKS_LOOKED_UP), num_workers);
  job->chunk = round_up(divide_up(job->num_blocks, num_chunks), 2);
  job->chunk_rows = job->call->num_rows < MOST_ROWS_LOOKED_UP ? job->call->num_rows : MOST_ROWS_LOOKED_UP;
  job->num_items = divide_up(job->num_blocks, job->chunk) * divide_up(job->call->num_rows, job->chunk_rows);
  int64_t sums_bytes = job->chunk * job->chunk_rows * (int64_t)sizeof(int32_t[PKV_OUT_BLOCK]);
  int64_t num_bytes = sums_bytes + job->chunk / 2 * PKV_PAIR_BYTES;
  return num_bytes > least_bytes ? num_bytes : least_bytes;
}

static pkv_status multiply_with(pkv_threads *threads, int32_t num_workers, job *job) {
  const int64_t bytes_worth_a_thread = 64 << 10;
  int64_t weight_bytes = job->num_blocks * PKV_OUT_BLOCK * job->in_padded * job->matrix->bits / 8;
  if (weight_bytes * (job->call->num_rows + 3) / 4 < bytes_worth_a_thread) num_workers = 1;
  job->is_many = job->matrix->kind == PKV_TERNARY && job->product->ternary_many &&
                 job->call->num_rows >= ROWS_WORTH_LOOKUPS;
  job->is_shared = job->is_many || (num_workers > 1 && job->call->num_rows > ROWS_WORTH_SHARING);
  int64_t own_bytes = job->in_padded * (int64_t)sizeof(float);
  if (job->is_many) {
    own_bytes = share_out_many(job, num_workers, own_bytes);
  } else {
    job->chunk = divide_up(job->num_blocks, (int64_t)num_workers * CHUNKS_PER_WORKER);
    job->num_items = divide_up(job->num_blocks, job->chunk);
    if (!job->is_shared) own_bytes += rounded_bytes(job);
  }
  job->scratch_bytes = (size_t)round_up(own_bytes, 64);
  size_t shared_bytes = job->is_shared ? (size_t)round_up(rounded_bytes(job), 64) : 0;
  size_t num_bytes = shared_bytes + (size_t)num_workers * job->scratch_bytes;
  char *memory = threads ? pkv_threads_scratch(threads, num_bytes) : aligned_alloc(64, num_bytes);
  if (!memory) return PKV_OUT_OF_MEMORY;
  job->scratch = memory + shared_bytes;
  if (job->is_shared) {
    job->shared = rounded_in(job, memory);
    pkv_threads_run(num_workers, round_shared, job);
    atomic_store(&job->next, 0);
  }
  pkv_threads_run(num_workers, multiply_chunks, job);
  if (!threads) free(memory);
  return PKV_OK;
}

pkv_status pkv_multiply_claimed(pkv_threads *threads, int32_t num_workers, const pkv_matrix *matrix,
                                const pkv_linear *call) {
  bool is_gated = call->epilogue == PKV_RELU2_GATE || call->epilogue == PKV_SILU_GATE;
  if (matrix->num_in < 1 || matrix->num_out < 1 || (is_gated && matrix->num_out % PKV_OUT_BLOCK))
    return PKV_BAD_ARGUMENT;
  job job = {.product = pkv_active_product(), .matrix = matrix, .call = call};
  if (!job.product) return PKV_BAD_ARGUMENT;
  job.gating = is_gated ? 2 : 1;
  job.in_padded = round_up(matrix->num_in, group_inputs(matrix->kind));
  job.num_blocks = divide_up(matrix->num_out, PKV_OUT_BLOCK);
  /* 127 is what ternary models are trained with, and their sums must fit 32 bits. */
  job.max_int = matrix->kind == PKV_TERNARY ? 127 : INT16_MAX;
  if (matrix->kind == PKV_TERNARY && matrix->num_in > INT32_MAX / 512) return PKV_BAD_ARGUMENT;
  return num_workers ? multiply_with(threads, num_workers, &job) : multiply_with(NULL, 1, &job);
}

pkv_status pkv_multiply(pkv_threads *threads, const pkv_matrix *matrix, const pkv_linear *call) {
  int32_t num_workers = pkv_threads_claim(threads);
  pkv_status status = pkv_multiply_claimed(threads, num_workers, matrix, call);
  if (num_workers) pkv_threads_release(threads);
  return status;
}
