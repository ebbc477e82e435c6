/* Block tables and steps: which pages hold a sequence's tokens, and how a whole batch grows at once.
 *
 * Token t of row r lies in page page_ids[r][t / page_size] at offset t % page_size.  A step first measures
 * (everything that can be refused is refused here, and nothing has changed), then reserves; commit copies
 * reserved_lens to seq_lens, rollback goes the other way and gives the pages between them back.
 *
 * The caller holds the cache's lock: nothing here is thread-safe.
 */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "paged_kv.h"

static int64_t pages_for(const pkv_tables *tables, int64_t num_tokens) {
  return (num_tokens + tables->page_size - 1) / tables->page_size;
}

static int32_t *cells_of(const pkv_tables *tables, int64_t row) {
  return tables->page_ids + row * tables->ring_pages;
}

/* The row that a key names, or -1. */
static int64_t row_of(const pkv_tables *tables, int64_t key) {
  int64_t row = key & UINT32_MAX;
  return key >= 0 && key >> 32 == tables->cache_id && row < tables->max_sequences ? row : -1;
}

static pkv_status refuse(pkv_refusal *refusal, pkv_status status, int64_t index, int64_t asked,
                         int64_t available) {
  *refusal = (pkv_refusal){index, asked, available};
  return status;
}

static bool stands_earlier(const int64_t *keys, int64_t index) {
  for (int64_t i = 0; i < index; i++)
    if (keys[i] == keys[index]) return true;
  return false;
}

/* Measure sequence i, and mark its row as reserved, by which a second entry of it is seen. */
static pkv_status measure_sequence(const pkv_tables *tables, const int64_t *keys, const int32_t *counts,
                                   int64_t i, pkv_step_size *size, pkv_refusal *refusal) {
  int64_t row = row_of(tables, keys[i]);
  if (row < 0) return refuse(refusal, PKV_STALE_SEQUENCE, i, keys[i], 0);
  if (counts[i] < 1) return refuse(refusal, PKV_BAD_ARGUMENT, i, counts[i], 1);
  int64_t old_len = tables->seq_lens[row], new_len = old_len + counts[i];
  if (tables->reserved_lens[row] != old_len) {
    pkv_status status = stands_earlier(keys, i) ? PKV_SEQUENCE_TWICE : PKV_SEQUENCE_BUSY;
    return refuse(refusal, status, i, 0, 0);
  }
  if (new_len > tables->max_seq_len)
    return refuse(refusal, PKV_SEQUENCE_TOO_LONG, i, new_len, tables->max_seq_len);
  tables->reserved_lens[row] = (int32_t)new_len;
  size->num_tokens += counts[i];
  size->num_pages += pages_for(tables, new_len);
  size->num_new_pages += pages_for(tables, new_len) - pages_for(tables, old_len);
  return PKV_OK;
}

pkv_status pkv_step_measure(const pkv_pool *pool, const pkv_tables *tables, int64_t num_seqs,
                            const int64_t *keys, const int32_t *counts, pkv_step_size *size,
                            pkv_refusal *refusal) {
  pkv_status status = PKV_OK;
  int64_t num_marked = 0;
  *size = (pkv_step_size){0, 0, 0};
  while (num_marked < num_seqs && status == PKV_OK) {
    status = measure_sequence(tables, keys, counts, num_marked, size, refusal);
    num_marked += status == PKV_OK;
  }
  for (int64_t i = 0; i < num_marked; i++) {
    int64_t row = row_of(tables, keys[i]);
    tables->reserved_lens[row] = tables->seq_lens[row];
  }
  if (status != PKV_OK) return status;
  /* positions, and whatever else counts tokens, are int32 */
  if (size->num_tokens > INT32_MAX || size->num_pages > INT32_MAX)
    return refuse(refusal, PKV_BAD_ARGUMENT, -1, size->num_tokens, INT32_MAX);
  int64_t num_free = pkv_pool_num_free(pool);
  if (size->num_new_pages > num_free)
    return refuse(refusal, PKV_OUT_OF_PAGES, -1, size->num_new_pages, num_free);
  return PKV_OK;
}

/* Slots and positions of a sequence's new tokens. */
static void place_tokens(const pkv_tables *tables, const int32_t *cells, int32_t old_len, int32_t new_len,
                         int64_t *slots, int32_t *positions) {
  for (int32_t position = old_len; position < new_len; position++) {
    int32_t page_id = cells[position / tables->page_size];
    *slots++ = (int64_t)page_id * tables->page_size + position % tables->page_size;
    *positions++ = position;
  }
}

pkv_status pkv_step_plan(pkv_pool *pool, const pkv_tables *tables, int64_t num_seqs, const int64_t *keys,
                         const int32_t *counts, int32_t *plan) {
  int64_t num_tokens = 0;
  for (int64_t i = 0; i < num_seqs; i++) num_tokens += counts[i];
  int64_t *slots = (int64_t *)plan;
  int32_t *positions = plan + 2 * num_tokens;
  int32_t *qo_indptr = positions + num_tokens;
  int32_t *kv_indptr = qo_indptr + num_seqs + 1;
  int32_t *seq_lens = kv_indptr + num_seqs + 1;
  int32_t *rows = seq_lens + num_seqs;
  int32_t *kv_indices = rows + num_seqs;
  qo_indptr[0] = kv_indptr[0] = 0;
  for (int64_t i = 0; i < num_seqs; i++) {
    int64_t row = row_of(tables, keys[i]);
    int32_t *cells = cells_of(tables, row);
    int32_t old_len = tables->seq_lens[row], new_len = old_len + counts[i];
    int64_t num_held = pages_for(tables, old_len), num_pages = pages_for(tables, new_len);
    pkv_status status = pkv_pool_acquire(pool, num_pages - num_held, cells + num_held);
    if (status != PKV_OK) { /* not measured, or the lock was let go in between */
      pkv_step_rollback(pool, tables, i, rows);
      return status;
    }
    tables->reserved_lens[row] = new_len;
    place_tokens(tables, cells, old_len, new_len, slots + qo_indptr[i], positions + qo_indptr[i]);
    memcpy(kv_indices + kv_indptr[i], cells, (size_t)num_pages * sizeof *cells);
    qo_indptr[i + 1] = qo_indptr[i] + counts[i];
    kv_indptr[i + 1] = kv_indptr[i] + (int32_t)num_pages;
    seq_lens[i] = new_len;
    rows[i] = (int32_t)row;
  }
  return PKV_OK;
}

pkv_status pkv_step_commit(const pkv_tables *tables, int64_t num_seqs, const int32_t *rows) {
  for (int64_t i = 0; i < num_seqs; i++) tables->seq_lens[rows[i]] = tables->reserved_lens[rows[i]];
  return PKV_OK;
}

pkv_status pkv_step_rollback(pkv_pool *pool, const pkv_tables *tables, int64_t num_seqs,
                             const int32_t *rows) {
  /* Backwards, and each row's pages in reverse, so that the free list is as it was before the step. */
  for (int64_t i = num_seqs - 1; i >= 0; i--) {
    int32_t row = rows[i], *cells = cells_of(tables, row);
    int64_t num_held = pages_for(tables, tables->seq_lens[row]);
    for (int64_t j = pages_for(tables, tables->reserved_lens[row]) - 1; j >= num_held; j--) {
      pkv_status status = pkv_pool_release(pool, 1, cells + j);
      if (status != PKV_OK) return PKV_INVARIANT;
    }
    tables->reserved_lens[row] = tables->seq_lens[row];
  }
  return PKV_OK;
}

pkv_status pkv_tables_reset(pkv_pool *pool, const pkv_tables *tables, int32_t row) {
  if (row < 0 || row >= tables->max_sequences) return PKV_BAD_ARGUMENT;
  if (tables->reserved_lens[row] != tables->seq_lens[row]) return PKV_SEQUENCE_BUSY;
  pkv_status status = pkv_pool_release(pool, pages_for(tables, tables->seq_lens[row]), cells_of(tables, row));
  if (status != PKV_OK) return PKV_INVARIANT;
  tables->seq_lens[row] = tables->reserved_lens[row] = 0;
  return PKV_OK;
}

/* Count the references that the tables explain, by page. */
static pkv_status count_references(const pkv_tables *tables, int64_t num_pages, int32_t *references) {
  for (int64_t row = 0; row < tables->max_sequences; row++) {
    int64_t seq_len = tables->seq_lens[row], reserved_len = tables->reserved_lens[row];
    if (seq_len < 0 || seq_len > reserved_len || reserved_len > tables->max_seq_len) return PKV_INVARIANT;
    const int32_t *cells = cells_of(tables, row);
    for (int64_t j = 0; j < pages_for(tables, reserved_len); j++) {
      if (cells[j] < 0 || cells[j] >= num_pages) return PKV_INVARIANT;
      references[cells[j]]++;
    }
  }
  return PKV_OK;
}

pkv_status pkv_tables_check(const pkv_pool *pool, const pkv_tables *tables, int64_t num_pages) {
  pkv_status status = pkv_pool_check(pool);
  if (status != PKV_OK) return status;
  int32_t *references = calloc((size_t)num_pages, sizeof *references);
  if (!references) return PKV_OUT_OF_MEMORY;
  status = count_references(tables, num_pages, references);
  for (int32_t page = 0; page < num_pages && status == PKV_OK; page++)
    if (references[page] != pkv_pool_ref_count(pool, page)) status = PKV_INVARIANT;
  free(references);
  return status;
}
