/* What is read next, prefetched: V while K is scored, and the next K (of the next head or run) while V is
 * summed.
 *
 * A few lines at each step of the computation: all at once, they would queue behind each other, and the
 * loads of now behind them.  Into the L2 cache, because L1 has few line fill buffers. */
typedef struct {
  const head_rows *rows;
  const char *row; /* NULL: nothing is left to prefetch */
  int32_t next;    /* row */
  int32_t offset;
  int32_t row_bytes;
  int32_t step_bytes;
} cursor;

/* A cursor over num_rows of `rows` (NULL: none) in num_steps steps. */
ALWAYS_INLINE cursor cursor_over(const head_rows *rows, int32_t num_rows, int32_t num_steps) {
  if (!rows || !rows->count || num_steps < 1) return (cursor){.row = NULL};
  int32_t row_bytes = stored_bytes(rows->dim, rows->dtype);
  cursor at = {.rows = rows, .next = 1, .row_bytes = row_bytes};
  at.row = row_bytes ? rows->rows[0] + rows->offset : NULL;
  at.step_bytes = (row_bytes * num_rows + num_steps - 1) / num_steps;
  return at;
}

/* All lines of row t, if there is one. */
ALWAYS_INLINE void prefetch_row(const head_rows *rows, int32_t t) {
  if (!rows || t >= rows->count) return;
  const char *row = rows->rows[t] + rows->offset;
  int32_t row_bytes = stored_bytes(rows->dim, rows->dtype);
  for (int32_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
}

ALWAYS_INLINE void prefetch_ahead(cursor *at) {
  if (!at->row) return;
  for (int32_t end = at->offset + at->step_bytes; at->offset < end; at->offset += 64)
    __builtin_prefetch(at->row + at->offset, 0, 2);
  if (at->offset < at->row_bytes) return;
  at->offset = 0;
  at->row = at->next < at->rows->count ? at->rows->rows[at->next] + at->rows->offset : NULL;
  at->next++;
}
