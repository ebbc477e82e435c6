/* A call's work, split into items that threads take one at a time.
 *
 *   item    some q rows of one sequence, and all kv heads or a group of them
 *   piece   some spans of an item that is so long that threads would wait for it at the end
 *   shared  an item of rows of several sequences, one kv head and spans that they have in common (cascade.h);
 *           its states are carried on by shared items of the next level, and by the rows' own items
 *
 * Items are taken last to first: the rows of a prompt that see most tokens come first. */
#ifndef PKV_WORK_H
#define PKV_WORK_H

#include <stdint.h>

#include "cascade.h"
#include "paged_kv.h"

/* The shape of an item: rows and heads. */
typedef struct {
  int32_t num_kv_heads;
  int32_t num_q_heads;
  int32_t num_rows;     /* at most */
  int64_t q_floats;     /* of one prepared row */
  int64_t state_floats; /* of one row's state: maxima, sums, accumulated values */
  int64_t value_floats; /* accumulated values alone */
} item_shape;

/* Who writes a call's new K and V: the item itself when no other item reads them (decode), else a first
 * pass before any item starts. */
typedef enum { WRITTEN_BY_OTHERS, WRITTEN_BEFORE_ALL, WRITTEN_BY_ITSELF } new_rows;

typedef struct {
  const item_shape *shape;
  int32_t seq;
  int32_t first_head;    /* kv head */
  int32_t first_row;     /* of all q rows; of a shared item, of the cascade's rows */
  const pkv_q_row *rows; /* of a shared item; else NULL */
  int32_t num_rows;
  int32_t first_span; /* of the item's spans; of a shared item, or one that carries on, of the sequence's */
  int32_t end_span;
  new_rows new_rows;
  int32_t num_carried;   /* spans that the states which the item carries on have; 0: it begins */
  int32_t first_carried; /* of the cascade's rows */
  /* Of an item that is split: */
  int32_t num_pieces;    /* else 1 */
  int64_t first_piece;   /* index among all items */
  int64_t first_partial; /* float index of the states of span 0 */
  int64_t first_noted;   /* and of its notes of attention mass */
} work_item;

/* The work of one call. */
typedef struct {
  const pkv_batch *batch;
  int32_t num_workers;
  int32_t num_kv_heads;
  int32_t span_tokens;
  item_shape all_heads;
  item_shape some_heads; /* of one of as many equal groups of heads as there are workers, or fewer */
  item_shape one_head;
  const pkv_cascade *cascade; /* NULL: nothing is shared */
  int32_t span_notes;         /* floats that a row's head notes of a span; 0: none */
} work;

/* The sequence and the q row of an item's row. */
static inline int32_t seq_of_row(const work_item *item, int32_t row) {
  return item->rows ? item->rows[row].seq : item->seq;
}
static inline int32_t q_row_of(const work_item *item, int32_t row) {
  return item->rows ? item->rows[row].q_row : item->first_row + row;
}

typedef struct {
  int64_t num_items;
  int64_t num_partials; /* floats for states of rows, of items in pieces */
  int64_t num_noted;    /* floats for their notes of attention mass */
  int64_t num_before;   /* rows whose keys and values are written before any item starts */
} work_size;

enum { MAX_ROWS_PER_ITEM = 128 };

work pkv_work_of(const pkv_pages *pages, const pkv_batch *batch, int32_t num_q_heads, int32_t span_tokens,
                 int32_t num_workers);

/* Tokens that all rows read together. */
int64_t pkv_cost_of_work(const pkv_batch *batch);

/* Write the items (unless `items` is NULL) and count them. */
work_size pkv_cut_work(const work *work, work_item *items);
/* The shape of each node's items: as many heads as have room for all of its rows. */
void pkv_shape_nodes(const pkv_pages *pages, const work *work, item_shape *shapes);
/* Write the shared items of a level (unless `items` is NULL).  Returns their number. */
int64_t pkv_cut_shared(const work *work, int32_t level, const item_shape *shapes, work_item *items);

#endif
