/* Who computes which rows of a call, and how a block too long for that is cut. */
#include "work.h"

#include <stdbool.h>
#include <stddef.h>

#include "sight.h"
#include "kernels/kernel.h"

enum {
  ROW_BYTES_PER_BLOCK = 128 << 10, /* a block's accumulators: a share of the second-level cache */
  BLOCKS_PER_WORKER = 4,           /* enough to share them out evenly */
  PIECES_PER_WORKER = 16,          /* of cut blocks: at the end nobody waits longer than for one */
};

/* Blocks of so many heads, and the rows whose accumulated values take about ROW_BYTES_PER_BLOCK. */
static extent extent_of(const pkv_pages *pages, int32_t num_q_heads, int32_t num_kv_heads) {
  extent extent = {.num_kv_heads = num_kv_heads, .num_q_heads = num_q_heads};
  extent.q_floats = (int64_t)num_q_heads * pkv_padded(pages->head_dim);
  extent.value_floats = (int64_t)num_q_heads * pkv_padded(pages->head_dim_v);
  /* Maxima and sums, padded so that accumulators are aligned. */
  extent.state_floats = (2 * (int64_t)num_q_heads + 15) / 16 * 16 + extent.value_floats;
  int64_t rows = ROW_BYTES_PER_BLOCK / (extent.value_floats * (int64_t)sizeof(float));
  extent.num_rows = rows < 1 ? 1 : rows > MAX_ROWS_PER_BLOCK ? MAX_ROWS_PER_BLOCK : (int32_t)rows;
  return extent;
}

work pkv_work_of(const pkv_pages *pages, const pkv_batch *batch, int32_t num_q_heads, int32_t span_tokens) {
  return (work){batch, pages->num_kv_heads, span_tokens, extent_of(pages, num_q_heads, pages->num_kv_heads),
                extent_of(pages, num_q_heads / pages->num_kv_heads, 1)};
}

/* What a row block costs is counted in the tokens that it meets. */
static int64_t cost_of(const pkv_batch *batch, int32_t seq, int32_t first_row, int32_t num_rows) {
  int64_t met = num_seen(batch, seq, first_row + num_rows - 1);
  if (batch->window && met > (int64_t)batch->window + batch->num_sink_tokens)
    met = (int64_t)batch->window + batch->num_sink_tokens;
  return num_rows * met;
}

int64_t pkv_cost_of_work(const work *work) {
  const pkv_batch *batch = work->batch;
  int64_t total = 0;
  for (int32_t seq = 0; seq < batch->num_seqs; seq++)
    total += cost_of(batch, seq, batch->qo_indptr[seq], num_rows_of(batch, seq));
  return total;
}

/* Are so many rows of a sequence cut by heads of keys and values too?  Where that makes enough blocks for
 * everybody: each key is read for more rows at a time then. */
static bool goes_by_head(const work *work, int32_t num_workers, int32_t num_rows) {
  int32_t most = work->one_head.num_rows;
  int64_t num_blocks = (num_rows + most - 1) / most * (int64_t)work->num_kv_heads;
  return most > work->all_heads.num_rows && num_rows > work->all_heads.num_rows &&
         num_blocks >= BLOCKS_PER_WORKER * num_workers;
}

/* Of a block of all heads.  `left` is what is still to be done of `total` when it begins: it is cut where
 * somebody would be idle before it ends, or for being more than a fair share of all. */
static int32_t num_pieces_of(int32_t num_workers, int64_t total, int64_t left, int64_t cost,
                             int32_t num_spans) {
  bool is_short = cost <= left / (2 * num_workers) && cost <= total / (BLOCKS_PER_WORKER * num_workers);
  if (num_workers == 1 || num_spans < 2 || is_short) return 1;
  int64_t piece = total / (PIECES_PER_WORKER * num_workers) + 1;
  int64_t num_pieces = (cost + piece - 1) / piece;
  return num_pieces < num_spans ? (int32_t)num_pieces : num_spans;
}

work_size pkv_cut_work(const work *work, int32_t num_workers, block *blocks) {
  const pkv_batch *batch = work->batch;
  work_size size = {0, 0, 0};
  int64_t total = pkv_cost_of_work(work), left = 0;
  for (int32_t seq = 0; seq < batch->num_seqs; seq++) {
    bool is_by_head = goes_by_head(work, num_workers, num_rows_of(batch, seq));
    const extent *extent = is_by_head ? &work->one_head : &work->all_heads;
    for (int32_t row = batch->qo_indptr[seq]; row < batch->qo_indptr[seq + 1]; row += extent->num_rows) {
      int32_t num_rows = batch->qo_indptr[seq + 1] - row;
      if (num_rows > extent->num_rows) num_rows = extent->num_rows;
      int32_t num_spans = spans_of(batch, work->span_tokens, seq, row, num_rows).count;
      int64_t cost = cost_of(batch, seq, row, num_rows);
      block next = {extent, seq, 0, row, num_rows, 0, num_spans, WRITTEN_BY_OTHERS, 1, 0, 0};
      left += cost;
      if (!is_by_head) next.num_pieces = num_pieces_of(num_workers, total, left, cost, num_spans);
      bool is_alone = !is_by_head && num_rows == num_rows_of(batch, seq);
      bool is_by_itself = is_alone && (next.num_pieces == 1 || num_rows == 1);
      if (!is_by_itself) size.num_before += num_rows;
      for (; is_by_head && next.first_head < work->num_kv_heads; next.first_head++, size.num_blocks++) {
        next.new_rows = next.first_head ? WRITTEN_BY_OTHERS : WRITTEN_BEFORE_ALL;
        if (blocks) blocks[size.num_blocks] = next;
      }
      if (is_by_head) continue;
      next.first_piece = size.num_blocks;
      next.first_partial = size.num_partials;
      for (int32_t i = 0; i < next.num_pieces; i++, size.num_blocks++) {
        next.first_span = (int32_t)((int64_t)num_spans * i / next.num_pieces);
        next.end_span = (int32_t)((int64_t)num_spans * (i + 1) / next.num_pieces);
        next.new_rows = WRITTEN_BY_OTHERS;
        if (!is_by_itself && i == 0) next.new_rows = WRITTEN_BEFORE_ALL;
        if (is_by_itself && i == next.num_pieces - 1)
          next.new_rows = WRITTEN_BY_ITSELF; /* the newest token's */
        if (blocks) blocks[size.num_blocks] = next;
      }
      if (next.num_pieces > 1) size.num_partials += (int64_t)num_spans * num_rows;
    }
  }
  return size;
}
