/* Rows within the tables (rows.c). */
#ifndef PKV_ROWS_H
#define PKV_ROWS_H
#include <stdbool.h>

#include "paged_kv.h"

/* The row in a seq_id's low bits, which the caller knows to be valid. */
static inline int64_t pkv_row_in(int64_t seq_id) { return seq_id & ((1 << PKV_ROW_BITS) - 1); }

static inline bool pkv_is_row(const pkv_rows *rows, int32_t row) { return row >= 0 && row < rows->num_rows; }

/* Do these seq_ids name the next free rows, in order? */
bool pkv_rows_are_next(const pkv_rows *rows, int64_t count, const int64_t *seq_ids);
/* Take the row of a seq_id, the next free one, which is empty.  Returns: the row. */
int32_t pkv_rows_take(pkv_rows *rows, int64_t seq_id, int64_t salt);
/* Give back the row of a sequence that is empty. */
void pkv_rows_give_back(pkv_rows *rows, int32_t row);

/* ---- of tables, for twins.c */

/* The first page of a row that may have to be packed from this format into the next one. */
int64_t pkv_first_to_pack(const pkv_tables *tables, int64_t row, int32_t format);
/* A page and one of the next format hold the same tokens. */
void pkv_pool_set_twins(pkv_pool *pool, int32_t open, int32_t packed);
/* A page holds the same tokens as no other one. */
void pkv_pool_forget_twins(pkv_pool *pool, int32_t page);

#endif
