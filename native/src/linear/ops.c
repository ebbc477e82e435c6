/* Operations of a forward pass, one after the other in one call: products, and what becomes of heads before
 * attention.
 *
 *   q k v ── + bias ── norm of each head of q and k ── rotation ── attention, which is the caller's
 *
 * The team is claimed once.  The tokens of heads are split among the threads where there are many.
 *
 * Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019; Su et al., RoFormer, 2021. */
#include "linear/ops.h"

#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "runtime/threads.h"

enum {
  TOKENS_PER_CHUNK = 16,
  BYTES_WORTH_A_THREAD = 128 << 10,
  LANES = 8,
};

typedef struct {
  const pkv_heads *heads;
  const pkv_tokens *tokens;
  atomic_llong next_chunk;
} job;

/* Squares are added in one order, each eighth one in a lane. */
static void norm_head(float *restrict head, int32_t head_dim, const float *restrict weight, float eps) {
  float lanes[LANES] = {0}, sum = 0;
  for (int32_t i = 0; i < head_dim; i += LANES)
    for (int lane = 0; lane < LANES; lane++) lanes[lane] += head[i + lane] * head[i + lane];
  for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
  float root = sqrtf(sum / (float)head_dim + eps);
  for (int32_t i = 0; i < head_dim; i++) head[i] = head[i] / root * weight[i];
}

static void prepare_token(const job *job, int64_t token) {
  const pkv_heads *heads = job->heads;
  int32_t dim = heads->head_dim, half = dim / 2, num_rotated = heads->num_q_heads + heads->num_kv_heads;
  float *row = heads->rows + token * heads->stride;
  if (heads->bias)
    for (int32_t i = 0; i < (num_rotated + heads->num_kv_heads) * dim; i++) row[i] += heads->bias[i];
  int64_t position = job->tokens->positions[token];
  const float *cosine = job->tokens->cosines + position * half, *sine = job->tokens->sines + position * half;
  for (int32_t head = 0; head < num_rotated; head++) {
    const float *norm = head < heads->num_q_heads ? heads->q_norm : heads->k_norm;
    if (norm) norm_head(row + head * dim, dim, norm, heads->eps);
    if (heads->is_rotated) pkv_rotate_head(row + head * dim, half, cosine, sine);
  }
}

static void prepare_chunks(void *context, int32_t worker) {
  (void)worker;
  job *job = context;
  int64_t begin, num_rows = job->tokens->num_rows;
  while ((begin = atomic_fetch_add(&job->next_chunk, 1) * TOKENS_PER_CHUNK) < num_rows)
    for (int64_t token = begin; token < begin + TOKENS_PER_CHUNK && token < num_rows; token++)
      prepare_token(job, token);
}

static void prepare_heads(int32_t num_workers, const pkv_heads *heads, const pkv_tokens *tokens) {
  job job = {heads, tokens, 0};
  bool is_much = tokens->num_rows * heads->stride * (int64_t)sizeof(float) >= BYTES_WORTH_A_THREAD;
  pkv_threads_run(is_much ? num_workers : 0, prepare_chunks, &job);
}

static pkv_status multiply(pkv_threads *threads, int32_t num_workers, const pkv_op *op, int64_t num_rows) {
  pkv_linear call = op->product;
  call.num_rows = num_rows;
  pkv_status status = pkv_multiply_claimed(threads, num_workers, op->matrix, &call);
  if (status == PKV_OK && op->bias)
    for (int64_t row = 0; row < num_rows; row++)
      for (int64_t i = 0; i < op->matrix->num_out; i++) call.out[row * call.out_stride + i] += op->bias[i];
  return status;
}

pkv_status pkv_run_ops(pkv_threads *threads, const pkv_op *ops, int64_t num_ops, const pkv_tokens *tokens) {
  for (int64_t token = 0; token < tokens->num_rows; token++)
    if (tokens->positions[token] < 0 || tokens->positions[token] >= tokens->num_positions)
      return PKV_BAD_ARGUMENT;
  pkv_status status = PKV_OK;
  int32_t num_workers = pkv_threads_claim(threads);
  for (const pkv_op *op = ops; op < ops + num_ops && status == PKV_OK; op++)
    if (op->matrix)
      status = multiply(threads, num_workers, op, tokens->num_rows);
    else
      prepare_heads(num_workers, &op->heads, tokens);
  if (num_workers) pkv_threads_release(threads);
  return status;
}
