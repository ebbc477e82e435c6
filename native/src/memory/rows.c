/* Rows: which are in use, by which sequence.
 *
 * Rows that were never used follow each other; those that were given back are a list, the last one first.
 *
 * The caller holds the cache's lock: nothing here is thread-safe. */
#include "rows.h"

int64_t pkv_rows_find(const pkv_rows *rows, int64_t seq_id) {
  int64_t row = pkv_row_in(seq_id);
  return seq_id > 0 && row < rows->num_rows && rows->seq_ids[row] == seq_id ? row : -1;
}

static int32_t first_free(const pkv_rows *rows) {
  return rows->free_row >= 0 ? rows->free_row : rows->num_rows;
}

/* The free row after `row`: the next of the list, then those that were never used. */
static int32_t next_free(const pkv_rows *rows, int32_t row) {
  if (row >= rows->num_rows) return row + 1;
  int32_t next = rows->next_free[row];
  return next >= 0 ? next : rows->num_rows;
}

int64_t pkv_rows_next(const pkv_rows *rows, int64_t count, int32_t *next) {
  int64_t found = 0;
  for (int32_t row = first_free(rows); found < count && row < rows->max_sequences; row = next_free(rows, row))
    next[found++] = row;
  return found;
}

bool pkv_rows_are_next(const pkv_rows *rows, int64_t count, const int64_t *seq_ids) {
  int32_t row = first_free(rows);
  for (int64_t i = 0; i < count; i++, row = next_free(rows, row))
    if (row >= rows->max_sequences || seq_ids[i] < 0 || seq_ids[i] >> PKV_ROW_BITS == 0 ||
        pkv_row_in(seq_ids[i]) != row)
      return false;
  return true;
}

int32_t pkv_rows_take(pkv_rows *rows, int64_t seq_id, int64_t salt) {
  int32_t row = (int32_t)pkv_row_in(seq_id);
  if (row == rows->num_rows)
    rows->num_rows++;
  else
    rows->free_row = rows->next_free[row];
  rows->seq_ids[row] = seq_id;
  rows->salts[row] = salt;
  rows->num_sequences++;
  return row;
}

void pkv_rows_give_back(pkv_rows *rows, int32_t row) {
  rows->seq_ids[row] = 0;
  rows->next_free[row] = rows->free_row;
  rows->free_row = row;
  rows->num_sequences--;
}

pkv_status pkv_rows_check(const pkv_rows *rows) {
  int32_t num_used = 0, num_listed = 0;
  for (int32_t row = 0; row < rows->num_rows; row++) {
    int64_t seq_id = rows->seq_ids[row];
    if (seq_id < 0 || (seq_id > 0 && pkv_row_in(seq_id) != row)) return PKV_INVARIANT;
    if (seq_id == 0 && rows->reserved_lens[row]) return PKV_INVARIANT;
    num_used += seq_id > 0;
  }
  for (int32_t row = rows->free_row; row >= 0; row = rows->next_free[row])
    if (row >= rows->num_rows || rows->seq_ids[row] || ++num_listed > rows->num_rows) return PKV_INVARIANT;
  bool is_whole = num_used == rows->num_sequences && num_used + num_listed == rows->num_rows;
  return is_whole && rows->num_rows <= rows->max_sequences ? PKV_OK : PKV_INVARIANT;
}
