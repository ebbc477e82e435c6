/* Old pages exchanged for packed twins: pages that hold the same tokens in fewer bits.  With several formats
 * a page leaves one for the next as it ages, or leaves the last but one when others get more attention.
 *
 * Packing makes a second page and never touches the open one.  The first row whose tokens in a page are all
 * old enough makes the twin, at its own commit; other rows that hold the open page keep it until theirs, so
 * what a row reads changes by its own progress only. */
#include <string.h>

#include "cells.h"
#include "chores.h"
#include "rows.h"

/* A twin of an open page, without another owner; -1: there is no page for it. */
static int32_t make_twin(pkv_pool *pool, pkv_tables *tables, const pkv_pages *layers, int32_t open) {
  const pkv_kernel *kernel = pkv_active_kernel();
  int32_t twin;
  if (!kernel || pkv_pool_acquire_format(pool, pkv_pool_format(pool, open) + 1, 1, &twin) != PKV_OK)
    return -1;
  for (int32_t layer = 0; layer < tables->num_layers; layer++)
    pkv_copy_page(kernel, layers + layer, open, twin, tables->page_size);
  memcpy(tables->token_ids + (int64_t)twin * tables->page_size,
         tables->token_ids + (int64_t)open * tables->page_size,
         (size_t)tables->page_size * sizeof *tables->token_ids);
  tables->filled[twin] = tables->page_size;
  tables->page_salts[twin] = tables->page_salts[open];
  if (tables->page_stamps) tables->page_stamps[twin]++;
  pkv_pool_set_twins(pool, open, twin);
  return twin;
}

typedef struct {
  int64_t count;
  int64_t left; /* more that the row may make of the format */
  int32_t *from, *to;
} new_twins;

/* WAITS: there is no page for a twin, or the row has made all that it may. */
typedef enum { EXCHANGED, WAITS, BROKEN } outcome;

/* Exchange what a cell names. */
static outcome exchange(pkv_pool *pool, pkv_tables *tables, const pkv_pages *layers, int32_t *cell,
                        new_twins *made) {
  int32_t open = *cell, twin = pkv_pool_twin(pool, open);
  if (twin >= 0) {
    if (pkv_pool_share(pool, 1, &twin) != PKV_OK) return BROKEN;
  } else {
    if (made->left == 0 || (twin = make_twin(pool, tables, layers, open)) < 0) return WAITS;
    made->left--;
    made->from[made->count] = open;
    made->to[made->count++] = twin;
  }
  *cell = twin;
  return pkv_pool_release(pool, 1, &open) == PKV_OK ? EXCHANGED : BROKEN;
}

/* Exchange the pages of a row that are old enough to leave a format. */
static outcome pack_oldest(pkv_pool *pool, pkv_tables *tables, const pkv_pages *layers, int32_t row,
                           int32_t format, new_twins *made) {
  int32_t *end = tables->packed_ends + (int64_t)format * tables->rows->max_sequences + row;
  int64_t old = (int64_t)tables->rows->seq_lens[row] - tables->recent_tokens[format];
  for (int64_t page = pkv_first_to_pack(tables, row, format); page < old / tables->page_size; page++) {
    if (next_held(tables, row, page) != page) continue;
    int32_t *cell = cell_of(tables, row, page);
    int32_t own = pkv_pool_format(pool, *cell);
    if (own < format) return WAITS; /* it still waits for a page of the format before */
    if (own == format) {
      outcome outcome = exchange(pool, tables, layers, cell, made);
      if (outcome != EXCHANGED) return outcome;
    }
    *end = (int32_t)page + 1;
  }
  return EXCHANGED;
}

/* The mean mass of what a cell names. */
static double mean_mass(const pkv_tables *tables, int64_t row, int64_t cell) {
  int64_t at = row * tables->ring_pages + cell, num_rows = tables->mass_rows[at];
  return num_rows ? tables->mass[at] / (double)num_rows : 0;
}

/* Of the cells whose pages may leave a format, how many pages of it there are, and the one of least mean
 * mass, of equal ones the oldest.  has_to_come: pages of a format before it, which enter it later. */
static int64_t find_least(const pkv_pool *pool, const pkv_tables *tables, int32_t row, int32_t format,
                          int64_t end, int32_t **least, bool *has_to_come) {
  int64_t count = 0, num_cells = first_cell_from(tables, row, end);
  double least_mass = 0;
  for (int64_t cell = first_cell_from(tables, row, tables->first_packed); cell < num_cells; cell++) {
    int32_t *page = tables->page_ids + (int64_t)row * tables->ring_pages + cell;
    int32_t own = pkv_pool_format(pool, *page);
    if (own < format) *has_to_come = true;
    if (own != format) continue;
    double mass = mean_mass(tables, row, cell);
    if (count++ && mass >= least_mass) continue;
    least_mass = mass;
    *least = page;
  }
  return count;
}

/* Exchange the pages of a row that get least attention, until it has num_attended pages of a format. */
static outcome pack_least(pkv_pool *pool, pkv_tables *tables, const pkv_pages *layers, int32_t row,
                          int32_t format, new_twins *made) {
  int32_t *balanced = tables->packed_ends + (int64_t)format * tables->rows->max_sequences + row,
          *least = NULL;
  int64_t end = ((int64_t)tables->rows->seq_lens[row] - tables->recent_tokens[format]) / tables->page_size;
  if (end <= *balanced) return EXCHANGED;
  bool has_to_come = false;
  while (find_least(pool, tables, row, format, end, &least, &has_to_come) > tables->num_attended) {
    outcome outcome = exchange(pool, tables, layers, least, made);
    if (outcome != EXCHANGED) return outcome;
  }
  if (!has_to_come) *balanced = (int32_t)end;
  return EXCHANGED;
}

int64_t pkv_tables_pack(pkv_pool *pool, pkv_tables *tables, const pkv_pages *layers, int64_t num_rows,
                        const int32_t *rows, const int32_t *most, int32_t *from, int32_t *to) {
  new_twins made = {.from = from, .to = to};
  for (int64_t i = 0; i < num_rows; i++) {
    int32_t row = rows[i];
    if (tables->rows->seq_lens[row] != tables->rows->reserved_lens[row]) continue; /* in another open step */
    for (int32_t format = 0; format < tables->num_packings; format++) {
      bool is_last = format == tables->num_packings - 1;
      made.left = most[i];
      outcome outcome = tables->num_attended >= 0 && is_last
                            ? pack_least(pool, tables, layers, row, format, &made)
                            : pack_oldest(pool, tables, layers, row, format, &made);
      if (outcome == BROKEN) return -1;
    }
  }
  return made.count;
}

int64_t pkv_tables_pack_pages(pkv_pool *pool, pkv_tables *tables, const pkv_pages *layers, int32_t row,
                              int64_t count, const int32_t *numbers, int64_t *num_made, int32_t *from,
                              int32_t *to) {
  new_twins made = {.left = count, .from = from, .to = to};
  int64_t done = 0;
  for (; done < count; done++) {
    outcome outcome = exchange(pool, tables, layers, cell_of(tables, row, numbers[done]), &made);
    if (outcome == BROKEN) return -1;
    if (outcome == WAITS) break;
  }
  *num_made = made.count;
  return done;
}
