/* What the tables hold, counted anew from their rows: tokens, and every reference of the pool. */
#include <stdlib.h>

#include "cells.h"
#include "rows.h"

int64_t pkv_tables_num_tokens(const pkv_tables *tables, int64_t num_pages) {
  for (int64_t row = 0; row < tables->rows->num_rows; row++) {
    int64_t seq_len = tables->rows->seq_lens[row];
    for (int64_t page = next_held(tables, row, 0); page < pages_for(tables, seq_len);
         page = next_held(tables, row, page + 1)) {
      int32_t filled = (int32_t)min64(seq_len - page * tables->page_size, tables->page_size);
      int32_t *mark = &tables->page_marks[*cell_of(tables, row, page)];
      if (*mark < filled) *mark = filled;
    }
  }
  int64_t num_tokens = 0;
  for (int32_t page_id = 0; page_id < num_pages; page_id++) {
    num_tokens += tables->page_marks[page_id];
    tables->page_marks[page_id] = 0;
  }
  return num_tokens;
}

/* Are a compact row's logical pages ascending, with all that are not full at their end? */
static bool are_cells_whole(const pkv_tables *tables, int64_t row) {
  if (!is_compact(tables)) return true;
  const int32_t *numbers = numbers_of(tables, row);
  int64_t num_dropped = num_dropped_of(tables, row),
          end = pages_for(tables, tables->rows->reserved_lens[row]);
  int64_t num_full = tables->rows->seq_lens[row] / tables->page_size, num_cells = end - num_dropped;
  if (num_dropped < 0 || num_cells < 0 || num_cells > tables->ring_pages) return false;
  for (int64_t page = num_full; page < end; page++)
    if (page < num_dropped || numbers[page - num_dropped] != page) return false;
  for (int64_t cell = 0; cell < num_cells; cell++)
    if (numbers[cell] < (cell ? numbers[cell - 1] + 1 : 0) || numbers[cell] >= end) return false;
  return true;
}

/* Count the references of the tables to each page, which has as many reserved slots as any row has tokens in
 * it. */
static pkv_status count_references(const pkv_tables *tables, int64_t num_pages, int32_t *references) {
  for (int64_t row = 0; row < tables->rows->num_rows; row++) {
    int64_t seq_len = tables->rows->seq_lens[row], reserved_len = tables->rows->reserved_lens[row];
    if (seq_len < 0 || seq_len > reserved_len || reserved_len > tables->rows->max_seq_len)
      return PKV_INVARIANT;
    if (tables->rows->num_known[row] < 0 || tables->rows->num_known[row] > seq_len) return PKV_INVARIANT;
    int64_t first = tables->first_held[row];
    bool is_short = pages_for(tables, seq_len) <= tables->sink_pages;
    if (first < tables->sink_pages ||
        first > (is_short ? tables->sink_pages : first_page_at(tables, seq_len)))
      return PKV_INVARIANT;
    if (first < first_page_kept(tables, seq_len)) return PKV_INVARIANT;
    if (!are_cells_whole(tables, row)) return PKV_INVARIANT;
    for (int64_t page = next_held(tables, row, 0); page < pages_for(tables, reserved_len);
         page = next_held(tables, row, page + 1)) {
      int32_t page_id = *cell_of(tables, row, page);
      if (page_id < 0 || page_id >= num_pages) return PKV_INVARIANT;
      references[page_id]++;
      bool is_held = page < pages_for(tables, seq_len); /* else its step may not have scrubbed it yet */
      if (is_held && tables->page_salts[page_id] != tables->rows->salts[row]) return PKV_INVARIANT;
      int64_t num_in_page = min64(seq_len - page * tables->page_size, tables->page_size);
      int32_t filled = tables->filled[page_id];
      if (filled < num_in_page || filled > tables->page_size) return PKV_INVARIANT;
    }
    int32_t copy = tables->tail_copies[row];
    if (copy < -1 || copy >= num_pages || (copy >= 0 && seq_len == reserved_len)) return PKV_INVARIANT;
    if (copy >= 0) references[copy]++;
  }
  return PKV_OK;
}

pkv_status pkv_tables_check(const pkv_pool *pool, const pkv_tables *tables, int64_t num_pages) {
  pkv_status status = pkv_pool_check(pool);
  if (status == PKV_OK) status = pkv_rows_check(tables->rows);
  if (status != PKV_OK) return status;
  int32_t *references = calloc((size_t)num_pages, sizeof *references);
  if (!references) return PKV_OUT_OF_MEMORY;
  status = count_references(tables, num_pages, references);
  for (int32_t page = 0; page < num_pages && status == PKV_OK; page++) {
    bool is_explained = references[page] == pkv_pool_ref_count(pool, page) && !tables->page_marks[page];
    if (!is_explained) status = PKV_INVARIANT;
  }
  free(references);
  return status;
}
