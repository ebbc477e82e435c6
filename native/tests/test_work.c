/* Work split into items and pieces: every row visits each of its spans once for each head, however it is
 * split. */
#undef NDEBUG
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "attention/visibility.h"
#include "attention/work.h"

enum { MOST_SEQS = 6, MOST_ROWS = 4096, MAX_ITEMS = 1 << 16 };

static uint32_t state = 1;
static int32_t below(int32_t n) {
  state = state * 1664525u + 1013904223u;
  return (int32_t)((state >> 8) % (uint32_t)n);
}

typedef struct {
  pkv_batch batch;
  int32_t seq_lens[MOST_SEQS];
  int32_t qo_indptr[MOST_SEQS + 1];
} calls;

static void draw(calls *calls) {
  static const int32_t lengths[] = {1, 64, 2048, 40000};
  memset(calls, 0, sizeof *calls);
  pkv_batch *batch = &calls->batch;
  batch->num_seqs = 1 + below(MOST_SEQS);
  batch->seq_lens = calls->seq_lens;
  batch->qo_indptr = calls->qo_indptr;
  if (below(2)) {
    batch->window = 1 + below(2000);
    batch->num_sink_tokens = below(2) * below(600);
  }
  for (int32_t i = 0; i < batch->num_seqs; i++) {
    calls->seq_lens[i] = 1 + below(lengths[below(4)]);
    int32_t num_rows = below(3) ? 1 : below(600);
    if (num_rows > calls->seq_lens[i]) num_rows = calls->seq_lens[i];
    calls->qo_indptr[i + 1] = calls->qo_indptr[i] + num_rows;
  }
}

static int32_t spans_of_item(const work *work, const work_item *item) {
  return spans_of(work->batch, work->span_tokens, item->seq, item->first_row, item->num_rows).count;
}

/* The pieces of a block follow each other, and their spans too. */
static void pieces_make_an_item(const work *work, const work_item *items, int64_t first, int64_t *partials) {
  const work_item *item = &items[first];
  int32_t spans = spans_of_item(work, item), visited = 0;
  for (int32_t i = 0; i < item->num_pieces; i++) {
    assert(item[i].first_row == item->first_row && item[i].num_pieces == item->num_pieces);
    assert(item[i].first_span == visited && (spans == 0 || item[i].end_span > visited));
    visited = item[i].end_span;
    assert((item[i].new_rows == WRITTEN_BEFORE_ALL) <= (i == 0));
    /* Who writes new rows is the only one to read them. */
    if (item[i].new_rows == WRITTEN_BY_ITSELF)
      assert(i + 1 == item->num_pieces && (i == 0 || item->num_rows == 1) &&
             item->num_rows == num_rows_of(work->batch, item->seq));
    if (item->num_pieces > 1) assert(item[i].first_piece == first && item[i].first_partial == *partials);
  }
  assert(visited == spans);
  if (item->num_pieces > 1) *partials += (int64_t)spans * item->num_rows * item->shape->state_floats;
}

static void everything_is_done_once(void) {
  static work_item items[MAX_ITEMS];
  static int32_t heads_met[MOST_ROWS], heads_written[MOST_ROWS];
  for (int round = 0; round < 4000; round++) {
    calls calls;
    draw(&calls);
    int32_t num_kv_heads = 1 + below(8), group = 1 + below(4), num_workers = 1 + below(9);
    pkv_pages pages = {.num_kv_heads = num_kv_heads, .head_dim = 64, .head_dim_v = 64, .page_size = 64};
    work work = pkv_work_of(&pages, &calls.batch, num_kv_heads * group, 256, num_workers);
    work_size counted = pkv_cut_work(&work, NULL);
    assert(counted.num_items <= MAX_ITEMS);
    work_size size = pkv_cut_work(&work, items);
    assert(size.num_items == counted.num_items && size.num_partials == counted.num_partials);
    memset(heads_met, 0, sizeof heads_met);
    memset(heads_written, 0, sizeof heads_written);
    int64_t partials = 0, num_before = 0;
    for (int64_t i = 0; i < size.num_items; i++) {
      if (items[i].new_rows == WRITTEN_BY_OTHERS) continue;
      int32_t num_heads = items[i].shape->num_kv_heads;
      if (items[i].new_rows == WRITTEN_BEFORE_ALL) {
        num_before += items[i].num_rows;
        num_heads = num_kv_heads;
      }
      for (int32_t row = 0; row < items[i].num_rows; row++)
        heads_written[items[i].first_row + row] += num_heads;
    }
    assert(num_before == size.num_before);
    for (int64_t i = 0; i < size.num_items; i += items[i].num_pieces) {
      const work_item *item = &items[i];
      assert(item->num_rows >= 1 && item->num_rows <= item->shape->num_rows);
      assert(item->first_head + item->shape->num_kv_heads <= num_kv_heads);
      pieces_make_an_item(&work, items, i, &partials);
      assert(num_workers > 1 || item->num_pieces == 1);
      for (int32_t row = item->first_row; row < item->first_row + item->num_rows; row++) {
        assert(row >= calls.qo_indptr[item->seq] && row < calls.qo_indptr[item->seq + 1]);
        heads_met[row] += item->shape->num_kv_heads;
      }
    }
    assert(partials == size.num_partials);
    for (int32_t row = 0; row < calls.qo_indptr[calls.batch.num_seqs]; row++)
      assert(heads_met[row] == num_kv_heads && heads_written[row] == num_kv_heads);
  }
}

/* What is taken last is short, where blocks are long; and many short ones are left whole. */
static void nobody_waits_long(void) {
  static work_item items[MAX_ITEMS];
  static const int32_t batches[] = {1, 2, 3, 8, 16, 64};
  for (int i = 0; i < 6; i++)
    for (int32_t num_workers = 2; num_workers <= 4; num_workers++) {
      int32_t count = batches[i], lens[64], indptr[65];
      for (int32_t seq = 0; seq < count; seq++) lens[seq] = 8192;
      for (int32_t seq = 0; seq <= count; seq++) indptr[seq] = seq;
      pkv_batch batch = {.num_seqs = count, .seq_lens = lens, .qo_indptr = indptr};
      pkv_pages pages = {.num_kv_heads = 8, .head_dim = 128, .head_dim_v = 128, .page_size = 64};
      work work = pkv_work_of(&pages, &batch, 32, 256, num_workers);
      work_size size = pkv_cut_work(&work, items);
      int64_t spans_of_all = (int64_t)count * 32;
      for (int32_t last = 0; last < num_workers; last++)
        assert((items[last].end_span - items[last].first_span) * items[last].shape->num_kv_heads <=
               8 * (spans_of_all / (8 * num_workers) + 1));
      if (count == 64) assert(size.num_items == 64 && size.num_partials == 0);
    }
}

int main(void) {
  everything_is_done_once();
  nobody_waits_long();
  return 0;
}
