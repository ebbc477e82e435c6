/* Holes: full pages that a row drops, while it keeps those before and after. */
#include "cells.h"
#include "rows.h"

pkv_status pkv_tables_drop(pkv_pool *pool, const pkv_tables *tables, int32_t row, int64_t count,
                           const int32_t *numbers) {
  if (!is_compact(tables) || !pkv_is_row(tables->rows, row)) return PKV_BAD_ARGUMENT;
  if (is_busy(tables, row)) return PKV_SEQUENCE_BUSY;
  int64_t num_full = tables->rows->seq_lens[row] / tables->page_size;
  for (int64_t i = 0; i < count; i++)
    if (numbers[i] < 0 || numbers[i] >= num_full || (i && numbers[i] <= numbers[i - 1]) ||
        next_held(tables, row, numbers[i]) != numbers[i])
      return PKV_BAD_ARGUMENT;
  int32_t *held = numbers_of(tables, row), *cells = tables->page_ids + row * tables->ring_pages;
  int64_t num_cells = pages_for(tables, tables->rows->seq_lens[row]) - num_dropped_of(tables, row), left = 0;
  for (int64_t cell = 0, i = 0; cell < num_cells; cell++) {
    if (i < count && held[cell] == numbers[i]) {
      if (pkv_pool_release(pool, 1, &cells[cell]) != PKV_OK) return PKV_INVARIANT;
      i++;
      continue;
    }
    held[left] = held[cell];
    copy_mass(tables, row, cell, row, left);
    cells[left++] = cells[cell];
  }
  tables->num_dropped[row] += (int32_t)count;
  if (count && tables->rows->num_known[row] > numbers[0] * tables->page_size)
    tables->rows->num_known[row] = numbers[0] * tables->page_size; /* later tokens depend on what is gone */
  return PKV_OK;
}
