/* Rotary positions: element i of a head turns with element i + head_dim / 2, by an angle of its token's
 * position.  The tokens of a prompt are split among the threads.
 *
 * Source: Su et al., RoFormer, 2021. */
#include <stdatomic.h>
#include <stdbool.h>

#include "linear.h"
#include "linear/ops.h"
#include "runtime/threads.h"

enum {
  TOKENS_PER_CHUNK = 16,
  BYTES_WORTH_A_THREAD = 128 << 10,
};

typedef struct {
  const pkv_tensor *rows;
  int64_t num_tokens;
  int32_t num_heads;
  int32_t head_dim;
  const int32_t *positions;
  const float *cosines; /* [positions, head_dim / 2] */
  const float *sines;
  atomic_llong next_chunk;
} job;

static void rotate_token(const job *job, int64_t token) {
  int32_t half = job->head_dim / 2;
  const float *cosine = job->cosines + (int64_t)job->positions[token] * half;
  const float *sine = job->sines + (int64_t)job->positions[token] * half;
  char *row = job->rows->data + token * job->rows->token_stride;
  for (int32_t head = 0; head < job->num_heads; head++)
    pkv_rotate_head((float *)(row + head * job->rows->head_stride), half, cosine, sine);
}

static void rotate_chunks(void *context, int32_t worker) {
  (void)worker;
  job *job = context;
  int64_t begin;
  while ((begin = atomic_fetch_add(&job->next_chunk, 1) * TOKENS_PER_CHUNK) < job->num_tokens)
    for (int64_t token = begin; token < begin + TOKENS_PER_CHUNK && token < job->num_tokens; token++)
      rotate_token(job, token);
}

pkv_status pkv_rotate(pkv_threads *threads, const pkv_tensor *rows, int64_t num_tokens, int32_t num_heads,
                      int32_t head_dim, const int32_t *positions, int64_t num_positions, const float *cosines,
                      const float *sines) {
  for (int64_t token = 0; token < num_tokens; token++)
    if (positions[token] < 0 || positions[token] >= num_positions) return PKV_BAD_ARGUMENT;
  job job = {rows, num_tokens, num_heads, head_dim, positions, cosines, sines, 0};
  bool is_much = num_tokens * num_heads * head_dim * (int64_t)sizeof(float) >= BYTES_WORTH_A_THREAD;
  int32_t num_workers = is_much ? pkv_threads_claim(threads) : 0;
  pkv_threads_run(num_workers, rotate_chunks, &job);
  if (num_workers) pkv_threads_release(threads);
  return PKV_OK;
}
