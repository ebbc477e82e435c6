/* Who computes which rows of a call: its work, cut into blocks that threads take one at a time.
 *
 *   block   some q rows of one sequence, and all heads or those of some kv heads, at once
 *   piece   some spans of a block that is so long that threads would wait for it at the end
 *
 * Blocks are taken last to first: the rows of a prompt that see most come first. */
#ifndef PKV_WORK_H
#define PKV_WORK_H

#include <stdint.h>

#include "../include/paged_kv.h"

/* What a block takes of a sequence: how many rows, and for how many heads. */
typedef struct {
  int32_t num_kv_heads;
  int32_t num_q_heads;
  int32_t num_rows;     /* at most */
  int64_t q_floats;     /* of one row, prepared */
  int64_t state_floats; /* of one row's state: maxima, sums, accumulated values */
  int64_t value_floats; /* the latter of these */
} extent;

/* A call's new keys and values are there before anybody reads them: where no other block does, as when
 * decoding, a block writes those of its own rows, which are in a cache then. */
typedef enum { WRITTEN_BY_OTHERS, WRITTEN_BEFORE_ALL, WRITTEN_BY_ITSELF } new_rows;

typedef struct {
  const extent *extent;
  int32_t seq;
  int32_t first_head; /* of keys and values */
  int32_t first_row;  /* of all q rows */
  int32_t num_rows;
  int32_t first_span; /* of its list of spans */
  int32_t end_span;
  new_rows new_rows;
  /* Of a block that is cut: */
  int32_t num_pieces;    /* else 1 */
  int64_t first_piece;   /* of all blocks */
  int64_t first_partial; /* float, of span 0's states */
} block;

/* A call's. */
typedef struct {
  const pkv_batch *batch;
  int32_t num_workers;
  int32_t num_kv_heads;
  int32_t span_tokens;
  extent all_heads;
  extent some_heads; /* one of as many equal groups of heads as there are workers, or fewer */
  extent one_head;
} work;

typedef struct {
  int64_t num_blocks;
  int64_t num_partials; /* floats: states of rows, of blocks in pieces */
  int64_t num_before;   /* rows whose keys and values are written before all */
} work_size;

enum { MAX_ROWS_PER_BLOCK = 128 };

work pkv_work_of(const pkv_pages *pages, const pkv_batch *batch, int32_t num_q_heads, int32_t span_tokens,
                 int32_t num_workers);

/* Tokens that rows meet, all together. */
int64_t pkv_cost_of_work(const pkv_batch *batch);

/* Write the blocks (when there is room for them) and count them. */
work_size pkv_cut_work(const work *work, block *blocks);

#endif
