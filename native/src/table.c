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
static pkv_status measure_sequence(const pkv_tables *tables, const int64_t *keys, const int64_t *counts,
                                   int64_t i, pkv_step_size *size, pkv_refusal *refusal) {
  int64_t row = row_of(tables, keys[i]);
  if (row < 0) return refuse(refusal, PKV_STALE_SEQUENCE, i, keys[i], 0);
  if (counts[i] < 1 || counts[i] > INT32_MAX)
    return refuse(refusal, PKV_BAD_ARGUMENT, i, counts[i], INT32_MAX);
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
                            const int64_t *keys, const int64_t *counts, pkv_step_size *size,
                            pkv_refusal *refusal) {
  pkv_status status = PKV_OK;
  int64_t num_marked = 0;
  *size = (pkv_step_size){0, 0, 0, 0};
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
  int64_t num_int32 = size->num_tokens + 2 * (num_seqs + 1) + 2 * num_seqs + size->num_pages;
  size->plan_bytes = size->num_tokens * (int64_t)sizeof(int64_t) + num_int32 * (int64_t)sizeof(int32_t);
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

/* One array after the other, the widest first. */
static pkv_plan lay_out(char *memory, int64_t num_seqs, const pkv_step_size *size) {
  pkv_plan plan = {.slot_mapping = (int64_t *)memory, .batch.num_seqs = num_seqs};
  plan.positions = (int32_t *)(plan.slot_mapping + size->num_tokens);
  plan.batch.qo_indptr = plan.positions + size->num_tokens;
  plan.batch.kv_indptr = plan.batch.qo_indptr + num_seqs + 1;
  plan.batch.seq_lens = plan.batch.kv_indptr + num_seqs + 1;
  plan.rows = plan.batch.seq_lens + num_seqs;
  plan.batch.kv_indices = plan.rows + num_seqs;
  return plan;
}

pkv_status pkv_step_plan(pkv_pool *pool, const pkv_tables *tables, int64_t num_seqs, const int64_t *keys,
                         const int64_t *counts, const pkv_step_size *size, char *memory, pkv_plan *plan) {
  *plan = lay_out(memory, num_seqs, size);
  pkv_batch batch = plan->batch;
  batch.qo_indptr[0] = batch.kv_indptr[0] = 0;
  for (int64_t i = 0; i < num_seqs; i++) {
    int64_t row = row_of(tables, keys[i]);
    int32_t *cells = cells_of(tables, row);
    int32_t old_len = tables->seq_lens[row], new_len = old_len + (int32_t)counts[i];
    int64_t num_held = pages_for(tables, old_len), num_pages = pages_for(tables, new_len);
    pkv_status status = pkv_pool_acquire(pool, num_pages - num_held, cells + num_held);
    if (status != PKV_OK) { /* not measured, or the lock was let go in between */
      plan->batch.num_seqs = i;
      pkv_step_rollback(pool, tables, plan);
      return status;
    }
    tables->reserved_lens[row] = new_len;
    int32_t first = batch.qo_indptr[i], first_page = batch.kv_indptr[i];
    place_tokens(tables, cells, old_len, new_len, plan->slot_mapping + first, plan->positions + first);
    memcpy(batch.kv_indices + first_page, cells, (size_t)num_pages * sizeof *cells);
    batch.qo_indptr[i + 1] = first + (int32_t)counts[i];
    batch.kv_indptr[i + 1] = first_page + (int32_t)num_pages;
    batch.seq_lens[i] = new_len;
    plan->rows[i] = (int32_t)row;
  }
  return PKV_OK;
}

pkv_status pkv_step_commit(const pkv_tables *tables, const pkv_plan *plan) {
  for (int64_t i = 0; i < plan->batch.num_seqs; i++)
    tables->seq_lens[plan->rows[i]] = tables->reserved_lens[plan->rows[i]];
  return PKV_OK;
}

pkv_status pkv_step_rollback(pkv_pool *pool, const pkv_tables *tables, const pkv_plan *plan) {
  /* Backwards, and each row's pages in reverse, so that the free list is as it was before the step. */
  for (int64_t i = plan->batch.num_seqs - 1; i >= 0; i--) {
    int32_t row = plan->rows[i], *cells = cells_of(tables, row);
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
