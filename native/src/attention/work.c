/* How a call's rows are split among threads, and how an item too long for that is split further. */
#include "work.h"

#include <math.h>
#include <stdbool.h>
#include <stddef.h>

#include "visibility.h"
#include "kernels/kernel.h"

enum {
  ROW_BYTES_PER_ITEM = 128 << 10, /* an item's accumulators: a share of the L2 cache */
  ITEMS_PER_WORKER = 4,           /* enough to balance the load */
  PIECES_PER_WORKER = 16,         /* of split items: at the end, threads wait for one piece at most */
  SPANS_WORTH_A_PIECE = 4,        /* of a group of heads, when there is a group for each worker */
};

/* Items of so many heads, and of as many rows as have ROW_BYTES_PER_ITEM of accumulated values. */
static item_shape shape_of(const pkv_pages *pages, int32_t num_q_heads, int32_t num_kv_heads) {
  item_shape shape = {.num_kv_heads = num_kv_heads, .num_q_heads = num_q_heads};
  shape.q_floats = (int64_t)num_q_heads * pkv_prepared_floats(pages->head_dim, pages->k_dtype);
  for (const pkv_pages *packed = pages->packed; packed; packed = packed->packed)
    shape.q_floats += (int64_t)num_q_heads * pkv_prepared_floats(pages->head_dim, packed->k_dtype);
  shape.value_floats = (int64_t)num_q_heads * pkv_padded(pages->head_dim_v);
  /* Maxima and sums, padded so that accumulators are aligned. */
  shape.state_floats = (2 * (int64_t)num_q_heads + 15) / 16 * 16 + shape.value_floats;
  int64_t rows = ROW_BYTES_PER_ITEM / (shape.value_floats * (int64_t)sizeof(float));
  shape.num_rows = rows < 1 ? 1 : rows > MAX_ROWS_PER_ITEM ? MAX_ROWS_PER_ITEM : (int32_t)rows;
  return shape;
}

/* The largest number of equal groups of heads that is at most `most`. */
static int32_t num_groups_of(int32_t num_heads, int32_t most) {
  int32_t num_groups = most < num_heads ? most : num_heads;
  while (num_heads % num_groups) num_groups--;
  return num_groups;
}

work pkv_work_of(const pkv_pages *pages, const pkv_batch *batch, int32_t num_q_heads, int32_t span_tokens,
                 int32_t num_workers) {
  int32_t num_heads = pages->num_kv_heads, num_groups = num_groups_of(num_heads, num_workers);
  work work = {
      .batch = batch, .num_workers = num_workers, .num_kv_heads = num_heads, .span_tokens = span_tokens};
  work.all_heads = shape_of(pages, num_q_heads, num_heads);
  work.some_heads = shape_of(pages, num_q_heads / num_groups, num_heads / num_groups);
  work.some_heads.num_rows = work.all_heads.num_rows;
  work.one_head = shape_of(pages, num_q_heads / num_heads, 1);
  return work;
}

/* The cost of some rows: the tokens that they read. */
static int64_t cost_of(const pkv_batch *batch, int32_t seq, int32_t first_row, int32_t num_rows) {
  int64_t visible_tokens = num_seen(batch, seq, first_row + num_rows - 1);
  if (batch->page_numbers) visible_tokens -= batch->num_lacking[seq];
  if (batch->window && visible_tokens > (int64_t)batch->window + batch->num_sink_tokens)
    visible_tokens = (int64_t)batch->window + batch->num_sink_tokens;
  return num_rows * visible_tokens;
}

int64_t pkv_cost_of_work(const pkv_batch *batch) {
  int64_t total = 0;
  for (int32_t seq = 0; seq < batch->num_seqs; seq++)
    total += cost_of(batch, seq, batch->qo_indptr[seq], num_rows_of(batch, seq));
  return total;
}

/* Is a prompt split by kv heads too?  Yes when that makes enough items for all workers: each key is then
 * read for more rows at a time. */
static bool splits_by_head(const work *work, int32_t num_rows) {
  int32_t most = work->one_head.num_rows;
  int64_t num_items = ((int64_t)num_rows + most - 1) / most * work->num_kv_heads;
  return most > work->all_heads.num_rows && num_rows > work->all_heads.num_rows &&
         num_items >= ITEMS_PER_WORKER * work->num_workers;
}

/* The cost of a piece, at most. */
static int64_t cost_of_piece(const work *work, int64_t total) {
  return total / (PIECES_PER_WORKER * work->num_workers) + 1;
}

/* Is an item split?  `left` is the cost of what follows when the item begins: split it when it would end
 * after the others are idle, or when it is more than a fair share of `total`. */
static bool is_cut(const work *work, int64_t total, int64_t left, int64_t cost, int32_t num_spans) {
  int64_t num_workers = work->num_workers;
  bool is_short = cost <= left / (2 * num_workers) && cost <= total / (ITEMS_PER_WORKER * num_workers);
  bool has_parts = num_spans > 1 || work->some_heads.num_kv_heads < work->num_kv_heads;
  return num_workers > 1 && has_parts && !is_short && cost > cost_of_piece(work, total);
}

/* Pieces per group of heads of a split item.  When there is a group for each worker, pieces are long:
 * their states are merged at the end, when the other workers have nothing left to do. */
static int32_t num_pieces_of(const work *work, int64_t total, int64_t cost, int32_t num_spans) {
  int32_t num_groups = work->num_kv_heads / work->some_heads.num_kv_heads;
  int32_t shortest = num_groups < work->num_workers ? 1 : SPANS_WORTH_A_PIECE;
  int64_t most = ((int64_t)num_spans + shortest - 1) / shortest,
          piece = num_groups * cost_of_piece(work, total);
  int64_t num_pieces = (cost + piece - 1) / piece;
  return (int32_t)(num_pieces < most ? num_pieces : most);
}

/* First spans of a sequence that shared items have folded. */
static int32_t num_carried_of(const work *work, int32_t seq) {
  return work->cascade ? work->cascade->shared_spans[seq] : 0;
}

/* What the rows of an item read by themselves. */
static int64_t own_cost_of(const work *work, int32_t seq, int32_t first_row, int32_t num_rows) {
  int64_t carried = (int64_t)num_carried_of(work, seq) * work->span_tokens * num_rows;
  return cost_of(work->batch, seq, first_row, num_rows) - carried;
}

static int64_t own_cost_of_all(const work *work) {
  int64_t total = pkv_cost_of_work(work->batch);
  for (int32_t seq = 0; work->cascade && seq < work->batch->num_seqs; seq++)
    total -= (int64_t)num_carried_of(work, seq) * work->span_tokens * num_rows_of(work->batch, seq);
  return total;
}

/* Floats of an item's notes, in whole vectors of each row's head. */
static int64_t notes_of(const item_shape *shape, int32_t num_rows, int32_t num_spans, int32_t span_notes) {
  return (int64_t)num_rows * shape->num_q_heads * (((int64_t)num_spans + 15) / 16 * 16) * span_notes;
}

/* Add an item of these rows for all kv heads: one per group of heads and piece. */
static void add_items(work_size *size, work_item *items, work_item next, int32_t num_kv_heads,
                      int32_t num_spans, bool is_by_itself, int32_t span_notes) {
  for (; next.first_head < num_kv_heads; next.first_head += next.shape->num_kv_heads) {
    next.first_piece = size->num_items;
    next.first_partial = size->num_partials;
    next.first_noted = size->num_noted;
    for (int32_t i = 0; i < next.num_pieces; i++, size->num_items++) {
      next.first_span = next.num_carried + (int32_t)((int64_t)num_spans * i / next.num_pieces);
      next.end_span = next.num_carried + (int32_t)((int64_t)num_spans * (i + 1) / next.num_pieces);
      bool is_first = next.first_head == 0 && i == 0, is_last = i == next.num_pieces - 1;
      next.new_rows = WRITTEN_BY_OTHERS;
      if (!is_by_itself && is_first) next.new_rows = WRITTEN_BEFORE_ALL;
      if (is_by_itself && is_last) next.new_rows = WRITTEN_BY_ITSELF; /* the newest token's */
      if (items) items[size->num_items] = next;
    }
    if (next.num_pieces > 1) size->num_noted += notes_of(next.shape, next.num_rows, num_spans, span_notes);
    if (next.num_pieces > 1)
      size->num_partials += (int64_t)num_spans * next.num_rows * next.shape->state_floats;
  }
}

work_size pkv_cut_work(const work *work, work_item *items) {
  const pkv_batch *batch = work->batch;
  work_size size = {0};
  int64_t total = own_cost_of_all(work), left = 0;
  for (int32_t seq = 0; seq < batch->num_seqs; seq++) {
    bool is_by_head = splits_by_head(work, num_rows_of(batch, seq));
    const item_shape *shape = is_by_head ? &work->one_head : &work->all_heads;
    int32_t num_rows = 0;
    for (int32_t row = batch->qo_indptr[seq]; row < batch->qo_indptr[seq + 1]; row += num_rows) {
      num_rows = batch->qo_indptr[seq + 1] - row;
      if (num_rows > shape->num_rows) num_rows = shape->num_rows;
      int32_t num_carried = num_carried_of(work, seq);
      int32_t num_spans = spans_of(batch, work->span_tokens, seq, row, num_rows).count - num_carried;
      int64_t cost = own_cost_of(work, seq, row, num_rows);
      work_item next = {.shape = shape, .seq = seq, .first_row = row, .num_rows = num_rows, .num_pieces = 1};
      if (num_carried) {
        next.num_carried = num_carried;
        next.first_carried =
            work->cascade->first_rows[work->cascade->places[seq]] + row - batch->qo_indptr[seq];
      }
      left += cost;
      if (!is_by_head && is_cut(work, total, left, cost, num_spans)) {
        next.shape = &work->some_heads;
        next.num_pieces = num_pieces_of(work, total, cost, num_spans);
      }
      bool is_alone = !is_by_head && num_rows == num_rows_of(batch, seq);
      bool is_by_itself = is_alone && (next.num_pieces == 1 || num_rows == 1);
      if (!is_by_itself) size.num_before += num_rows;
      add_items(&size, items, next, work->num_kv_heads, num_spans, is_by_itself, work->span_notes);
    }
  }
  return size;
}

static int32_t rows_of_node(const pkv_cascade *cascade, const pkv_node *node) {
  return cascade->first_rows[node->end] - cascade->first_rows[node->begin];
}

/* How long a node's items take, when each has `rows` rows and one of num_groups groups of heads: they read
 * the same keys and values for each part of the rows, and compute for each query.  As measured, eight queries
 * take as long as reading what they need. */
static double time_of_node(const work *work, int32_t num_rows, int32_t rows, int32_t num_groups) {
  int32_t group = work->all_heads.num_q_heads / work->num_kv_heads;
  int64_t num_items = (int64_t)num_groups * ((num_rows + rows - 1) / rows);
  int64_t num_rounds = (num_items + work->num_workers - 1) / work->num_workers;
  return (double)num_rounds * (1 + rows * group / 8.0) / num_groups;
}

static item_shape shape_of_node(const pkv_pages *pages, const work *work, int32_t num_rows) {
  item_shape best = work->one_head;
  double least = INFINITY;
  for (int32_t num_groups = 1; num_groups <= work->num_kv_heads; num_groups++) {
    if (work->num_kv_heads % num_groups) continue;
    item_shape shape =
        shape_of(pages, work->all_heads.num_q_heads / num_groups, work->num_kv_heads / num_groups);
    for (int32_t parts = 1; parts <= work->num_workers; parts++) {
      int32_t rows = (num_rows + parts - 1) / parts;
      if (rows > shape.num_rows) rows = shape.num_rows;
      double time = time_of_node(work, num_rows, rows, num_groups);
      if (time >= least) continue; /* larger groups of heads come first: they are read in memory order */
      least = time;
      best = shape;
      best.num_rows = rows;
    }
  }
  return best;
}

void pkv_shape_nodes(const pkv_pages *pages, const work *work, item_shape *shapes) {
  for (int32_t i = 0; i < work->cascade->num_nodes; i++)
    shapes[i] = shape_of_node(pages, work, rows_of_node(work->cascade, &work->cascade->nodes[i]));
}

int64_t pkv_cut_shared(const work *work, int32_t level, const item_shape *shapes, work_item *items) {
  const pkv_cascade *cascade = work->cascade;
  int64_t count = 0;
  for (int32_t i = 0; i < cascade->num_nodes; i++) {
    const pkv_node *node = &cascade->nodes[i];
    if (node->level != level) continue;
    int32_t end = cascade->first_rows[node->end], most = shapes[i].num_rows;
    for (int32_t row = cascade->first_rows[node->begin]; row < end; row += most)
      for (int32_t head = 0; head < work->num_kv_heads; head += shapes[i].num_kv_heads, count++)
        if (items)
          items[count] = (work_item){.shape = &shapes[i],
                                     .seq = cascade->rows[row].seq,
                                     .first_head = head,
                                     .first_row = row,
                                     .rows = cascade->rows + row,
                                     .num_rows = end - row < most ? end - row : most,
                                     .first_span = node->first_span,
                                     .end_span = node->end_span,
                                     .num_carried = node->first_span,
                                     .first_carried = row,
                                     .num_pieces = 1};
  }
  return count;
}
