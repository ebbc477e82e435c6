/* Where the logical pages of a row are: in a ring of cells, or, of rows that may have holes, in compact cells
 * with the logical page of each (paged_kv.h has the rules). */
#ifndef PKV_CELLS_H
#define PKV_CELLS_H
#include <stdbool.h>
#include <stddef.h>

#include "paged_kv.h"

static inline int64_t pages_for(const pkv_tables *tables, int64_t num_tokens) {
  return (num_tokens + tables->page_size - 1) / tables->page_size;
}

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- holes */

static inline bool is_compact(const pkv_tables *tables) { return tables->cell_pages != NULL; }

static inline int64_t num_dropped_of(const pkv_tables *tables, int64_t row) {
  return is_compact(tables) ? tables->num_dropped[row] : 0;
}

/* A cell begins with a page that no row has looked at. */
static inline void clear_mass(const pkv_tables *tables, int64_t row, int64_t cell) {
  if (!tables->mass) return;
  tables->mass[row * tables->ring_pages + cell] = 0;
  tables->mass_rows[row * tables->ring_pages + cell] = 0;
}

static inline void copy_mass(const pkv_tables *tables, int64_t from_row, int64_t from, int64_t to_row,
                             int64_t to) {
  if (!tables->mass) return;
  from += from_row * tables->ring_pages;
  to += to_row * tables->ring_pages;
  tables->mass[to] = tables->mass[from];
  tables->mass_rows[to] = tables->mass_rows[from];
}

static inline int32_t *numbers_of(const pkv_tables *tables, int64_t row) {
  return tables->cell_pages + row * tables->ring_pages;
}

/* The first cell of a compact row whose logical page is `page` or a later one. */
static inline int64_t first_cell_from(const pkv_tables *tables, int64_t row, int64_t page) {
  const int32_t *numbers = numbers_of(tables, row);
  int64_t begin = 0, end = pages_for(tables, tables->rows->reserved_lens[row]) - num_dropped_of(tables, row);
  while (begin < end) {
    int64_t middle = (begin + end) / 2;
    if (numbers[middle] < page)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

/* The first page from `page` on that a row holds; those from the end of its reserved tokens on count as held.
 */
static inline int64_t next_held(const pkv_tables *tables, int64_t row, int64_t page) {
  if (!is_compact(tables)) {
    int64_t first = tables->first_held[row];
    return page >= tables->sink_pages && page < first ? first : page;
  }
  int64_t end = pages_for(tables, tables->rows->reserved_lens[row]);
  int64_t cell = first_cell_from(tables, row, page);
  return cell < end - num_dropped_of(tables, row) ? numbers_of(tables, row)[cell] : page > end ? page : end;
}

/* The cell of a page that a row holds, or that follows those. */
static inline int32_t *cell_of(const pkv_tables *tables, int64_t row, int64_t page) {
  int64_t sinks = tables->sink_pages;
  if (is_compact(tables)) {
    int64_t newest = page - num_dropped_of(tables, row);
    bool is_newest = newest >= 0 && numbers_of(tables, row)[newest] == page;
    return tables->page_ids + row * tables->ring_pages +
           (is_newest ? newest : first_cell_from(tables, row, page));
  }
  int64_t cell = page < tables->ring_pages ? page : sinks + (page - sinks) % (tables->ring_pages - sinks);
  return tables->page_ids + row * tables->ring_pages + cell;
}

/* The first page behind the sinks that holds any of the last num_tokens tokens. */
static inline int64_t first_page_of(const pkv_tables *tables, int64_t seq_len, int64_t num_tokens) {
  if (tables->window == 0) return 0;
  int64_t page = seq_len > num_tokens ? (seq_len - num_tokens) / tables->page_size : 0;
  return page > tables->sink_pages ? page : tables->sink_pages;
}

/* The first page behind the sinks that a row of this length must hold. */
static inline int64_t first_page_at(const pkv_tables *tables, int64_t seq_len) {
  return first_page_of(tables, seq_len, tables->window);
}

/* Those before it are released by the commit of this length. */
static inline int64_t first_page_kept(const pkv_tables *tables, int64_t seq_len) {
  return first_page_of(tables, seq_len, (int64_t)tables->window + tables->window_slack);
}

/* Is a row in an open step? */
static inline bool is_busy(const pkv_tables *tables, int32_t row) {
  return tables->rows->reserved_lens[row] != tables->rows->seq_lens[row];
}

#endif
