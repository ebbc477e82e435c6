/* Block tables and steps: which pages hold a sequence's tokens, and how a whole batch grows at once.
 *
 * Token t of a row is in its logical page t / page_size at offset t % page_size (cell_of finds the
 * cell).  A step first measures: every refusal is here, and nothing has changed.  Then it reserves.
 * Commit copies reserved_lens to seq_lens; rollback does the reverse and releases the pages between
 * them.
 *
 * Copy-on-write: a row whose next slot is the page's first unreserved one (filled) appends in place, even
 * when other rows hold the page; so does a row that holds it alone, where no index names it.  Any other row
 * appends to a copy, which waits in tail_copies until commit.
 *
 * Holes: rows with cell_pages hold their pages in compact cells, so that pages in between can be dropped. The
 * newest pages are never dropped: page j of them is in cell j - num_dropped.
 *
 * A page that held another salt is scrubbed by the step that takes it.  Its salt is unknown until that step
 * commits, so the pages of a step that is rolled back are scrubbed again.
 *
 * The caller holds the cache's lock: nothing here is thread-safe. */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "cells.h"
#include "kernels/kernel.h"
#include "rows.h"

/* The first page behind the sinks that the next token of a row of this length sees, and with it all
 * later tokens. */
static int64_t first_page_seen(const pkv_tables *tables, int64_t seq_len) {
  return first_page_at(tables, tables->window ? seq_len + 1 : seq_len);
}

/* How many pages a row's step from old_len to new_len reads. */
static int64_t num_pages_seen(const pkv_tables *tables, int64_t row, int64_t old_len, int64_t new_len) {
  int64_t end = pages_for(tables, new_len), first = first_page_seen(tables, old_len);
  if (is_compact(tables)) return end - num_dropped_of(tables, row);
  return min64(tables->sink_pages, end) + (end > first ? end - first : 0);
}

/* ---- copy-on-write */

enum { TO_BE_COPIED = -2, SKIPPED = -3 }; /* in tail_copies, while a step is measured */
enum { SALT_UNKNOWN = -1 };               /* in page_salts */

/* The cell of the page that a row's next token goes into, when that page holds tokens of the row; else NULL.
 */
static int32_t *tail_of(const pkv_tables *tables, int64_t row) {
  int32_t seq_len = tables->rows->seq_lens[row];
  return seq_len % tables->page_size ? cell_of(tables, row, seq_len / tables->page_size) : NULL;
}

/* What a page holds is about to change: a mean of its keys, or a packed twin, is not of it any more. */
static void stamp(pkv_pool *pool, const pkv_tables *tables, int32_t page) {
  if (tables->page_stamps) tables->page_stamps[page]++;
  pkv_pool_forget_twins(pool, page);
}

/* Reserve `count` slots in the page that a row appends to, if it may append in place.  Returns: does it need
 * a copy instead? */
static bool needs_copy(const pkv_pool *pool, const pkv_tables *tables, int64_t row, int64_t count) {
  const int32_t *tail = tail_of(tables, row);
  if (!tail) return false;
  int32_t *filled = &tables->filled[*tail], offset = tables->rows->seq_lens[row] % tables->page_size;
  if (pkv_pool_format(pool, *tail) != 0) return true; /* a packed page takes no more tokens */
  bool is_own = pkv_pool_ref_count(pool, *tail) == 1 && !pkv_pool_is_indexed(pool, *tail);
  if (*filled != offset && !is_own) return true;
  *filled = (int32_t)min64(offset + count, tables->page_size);
  return false;
}

/* Undo needs_copy, of a row that needed none. */
static void unfill_tail(const pkv_pool *pool, const pkv_tables *tables, int64_t row) {
  const int32_t *tail = tail_of(tables, row);
  if (tail && pkv_pool_format(pool, *tail) == 0)
    tables->filled[*tail] = tables->rows->seq_lens[row] % tables->page_size;
}

/* ---- measuring a step */

static pkv_status refuse(pkv_refusal *refusal, pkv_status status, int64_t index, int64_t requested,
                         int64_t available) {
  *refusal = (pkv_refusal){index, requested, available};
  return status;
}

static bool stands_earlier(const int64_t *seq_ids, int64_t index) {
  for (int64_t i = 0; i < index; i++)
    if (seq_ids[i] == seq_ids[index]) return true;
  return false;
}

/* Measure sequence i, and mark its row as reserved, so that a second entry of it is noticed. */
static pkv_status measure_sequence(const pkv_pool *pool, const pkv_tables *tables, const int64_t *seq_ids,
                                   const int64_t *counts, int64_t i, pkv_step_size *size,
                                   pkv_refusal *refusal) {
  int64_t row = pkv_rows_find(tables->rows, seq_ids[i]);
  if (row < 0) return refuse(refusal, PKV_STALE_SEQUENCE, i, seq_ids[i], 0);
  if (counts[i] < 0 || counts[i] > INT32_MAX)
    return refuse(refusal, PKV_BAD_ARGUMENT, i, counts[i], INT32_MAX);
  int64_t old_len = tables->rows->seq_lens[row], new_len = old_len + counts[i];
  if (tables->rows->reserved_lens[row] != old_len || tables->tail_copies[row] == SKIPPED) {
    pkv_status status = stands_earlier(seq_ids, i) ? PKV_SEQUENCE_TWICE : PKV_SEQUENCE_BUSY;
    return refuse(refusal, status, i, 0, 0);
  }
  if (counts[i] == 0) {
    tables->tail_copies[row] = SKIPPED;
    return PKV_OK;
  }
  if (counts[i] > tables->max_step_tokens)
    return refuse(refusal, PKV_BAD_ARGUMENT, i, counts[i], tables->max_step_tokens);
  if (new_len > tables->rows->max_seq_len)
    return refuse(refusal, PKV_SEQUENCE_TOO_LONG, i, new_len, tables->rows->max_seq_len);
  int64_t num_seen = num_pages_seen(tables, row, old_len, new_len);
  if (is_compact(tables) && num_seen > tables->ring_pages) {
    int64_t most = (tables->ring_pages + num_dropped_of(tables, row)) * tables->page_size;
    return refuse(refusal, PKV_SEQUENCE_TOO_LONG, i, new_len, most);
  }
  tables->rows->reserved_lens[row] = (int32_t)new_len;
  if (needs_copy(pool, tables, row, counts[i])) {
    tables->tail_copies[row] = TO_BE_COPIED;
    size->num_copies++;
    size->num_new_pages++;
  }
  size->num_tokens += counts[i];
  size->num_pages += num_seen;
  size->num_new_pages += pages_for(tables, new_len) - pages_for(tables, old_len);
  return PKV_OK;
}

/* ---- steps */

pkv_status pkv_step_measure(const pkv_pool *pool, const pkv_tables *tables, int64_t num_seqs,
                            const int64_t *seq_ids, const int64_t *counts, pkv_step_size *size,
                            pkv_refusal *refusal) {
  pkv_status status = PKV_OK;
  int64_t num_marked = 0;
  *size = (pkv_step_size){0, 0, 0, 0, 0};
  while (num_marked < num_seqs && status == PKV_OK) {
    status = measure_sequence(pool, tables, seq_ids, counts, num_marked, size, refusal);
    num_marked += status == PKV_OK;
  }
  for (int64_t i = num_marked - 1; i >= 0; i--) { /* as it was before */
    int64_t row = pkv_row_in(seq_ids[i]);
    if (tables->tail_copies[row] == -1) unfill_tail(pool, tables, row);
    tables->tail_copies[row] = -1;
    tables->rows->reserved_lens[row] = tables->rows->seq_lens[row];
  }
  if (status != PKV_OK) return status;
  /* positions, and all counts of tokens, are int32 */
  if (size->num_tokens > INT32_MAX || size->num_pages > INT32_MAX)
    return refuse(refusal, PKV_BAD_ARGUMENT, -1, size->num_tokens, INT32_MAX);
  int64_t num_int32 = size->num_tokens + 2 * (num_seqs + 1) + 4 * num_seqs + size->num_pages;
  num_int32 += 3 * size->num_copies + 2 * size->num_new_pages;
  if (is_compact(tables)) num_int32 += 2 * size->num_pages + 2 * num_seqs + 1;
  size->plan_bytes = (int64_t)sizeof(pkv_plan) + size->num_tokens * (int64_t)sizeof(int64_t);
  size->plan_bytes += num_int32 * (int64_t)sizeof(int32_t) + tables->num_layers;
  if (tables->mass) size->plan_bytes += 2 * size->num_pages * (int64_t)sizeof(int64_t);
  int64_t num_free = pkv_pool_num_free(pool);
  if (size->num_new_pages > num_free)
    return refuse(refusal, PKV_OUT_OF_PAGES, -1, size->num_new_pages, num_free);
  return PKV_OK;
}

/* Slots and positions of a sequence's new tokens, and ids into their slots; page_ids begins with logical page
 * `first`. */
static void place_tokens(const pkv_tables *tables, const int32_t *page_ids, int64_t first, int32_t old_len,
                         int32_t new_len, const int32_t *ids, int64_t *slots, int32_t *positions) {
  for (int32_t position = old_len; position < new_len; position++) {
    int64_t page_id = page_ids[position / tables->page_size - first];
    int64_t slot = page_id * tables->page_size + position % tables->page_size;
    if (ids) tables->token_ids[slot] = *ids++;
    *slots++ = slot;
    *positions++ = position;
  }
}

/* The plan's arrays follow each other, the widest elements first. */
static pkv_plan lay_out(const pkv_tables *tables, char *memory, int64_t num_seqs, const pkv_step_size *size) {
  pkv_plan plan = {.slot_mapping = (int64_t *)memory,
                   .batch = {.num_seqs = num_seqs,
                             .sink_pages = tables->sink_pages,
                             .window = tables->window,
                             .num_sink_tokens = tables->num_sink_tokens}};
  int64_t *end_of_int64 = plan.slot_mapping + size->num_tokens;
  if (tables->mass) {
    plan.mass = end_of_int64;
    plan.recent_mass = plan.mass + size->num_pages;
    end_of_int64 = plan.recent_mass + size->num_pages;
    memset(plan.mass, 0, (size_t)(2 * size->num_pages) * sizeof(int64_t));
  }
  plan.positions = (int32_t *)end_of_int64;
  plan.batch.qo_indptr = plan.positions + size->num_tokens;
  plan.batch.kv_indptr = plan.batch.qo_indptr + num_seqs + 1;
  plan.batch.seq_lens = plan.batch.kv_indptr + num_seqs + 1;
  plan.batch.first_pages = plan.batch.seq_lens + num_seqs;
  plan.rows = plan.batch.first_pages + num_seqs;
  plan.new_known = plan.rows + num_seqs;
  plan.batch.kv_indices = plan.new_known + num_seqs;
  plan.copied_from = plan.batch.kv_indices + size->num_pages;
  plan.copied_to = plan.copied_from + size->num_copies;
  plan.copied_tokens = plan.copied_to + size->num_copies;
  plan.scrubbed = plan.copied_tokens + size->num_copies;
  plan.scrubbed_for = plan.scrubbed + size->num_new_pages;
  int32_t *end = plan.scrubbed_for + size->num_new_pages;
  if (is_compact(tables)) {
    plan.batch.page_numbers = end;
    plan.batch.span_indptr = plan.batch.page_numbers + size->num_pages;
    plan.batch.span_starts = plan.batch.span_indptr + num_seqs + 1;
    plan.batch.num_lacking = plan.batch.span_starts + size->num_pages;
    end = plan.batch.num_lacking + num_seqs;
  }
  plan.is_written = (uint8_t *)end;
  plan.num_layers = tables->num_layers;
  memset(plan.is_written, 0, (size_t)plan.num_layers);
  return plan;
}

/* Release the logical pages first .. end - 1 of a row, the last one first. */
static pkv_status release_pages(pkv_pool *pool, const pkv_tables *tables, int64_t row, int64_t first,
                                int64_t end) {
  if (is_compact(tables)) {
    int32_t *cells = tables->page_ids + row * tables->ring_pages;
    int64_t begin = first_cell_from(tables, row, first), cell = first_cell_from(tables, row, end);
    while (cell > begin)
      if (pkv_pool_release(pool, 1, &cells[--cell]) != PKV_OK) return PKV_INVARIANT;
    return PKV_OK;
  }
  while (end > first)
    if (pkv_pool_release(pool, 1, cell_of(tables, row, --end)) != PKV_OK) return PKV_INVARIANT;
  return PKV_OK;
}

/* Take a row's pages from logical page `first` on, up to new_len tokens: all of them, or none. */
static pkv_status acquire_pages(pkv_pool *pool, const pkv_tables *tables, int64_t row, int64_t first,
                                int64_t new_len) {
  for (int64_t page = first; page < pages_for(tables, new_len); page++) {
    if (is_compact(tables)) {
      numbers_of(tables, row)[page - num_dropped_of(tables, row)] = (int32_t)page;
      clear_mass(tables, row, page - num_dropped_of(tables, row));
    }
    int32_t *cell = cell_of(tables, row, page);
    pkv_status status = pkv_pool_acquire(pool, 1, cell);
    if (status != PKV_OK) {
      while (page > first) pkv_pool_release(pool, 1, cell_of(tables, row, --page));
      return status;
    }
    tables->filled[*cell] = (int32_t)min64(new_len - page * tables->page_size, tables->page_size);
    stamp(pool, tables, *cell);
  }
  return PKV_OK;
}

/* Release what a row's step reserved. */
static pkv_status unreserve_row(pkv_pool *pool, const pkv_tables *tables, int64_t row) {
  int32_t *copy = &tables->tail_copies[row];
  int64_t num_held = pages_for(tables, tables->rows->seq_lens[row]);
  pkv_status status =
      release_pages(pool, tables, row, num_held, pages_for(tables, tables->rows->reserved_lens[row]));
  if (status == PKV_OK && *copy >= 0) status = pkv_pool_release(pool, 1, copy);
  if (*copy < 0) unfill_tail(pool, tables, row);
  *copy = -1;
  tables->rows->reserved_lens[row] = tables->rows->seq_lens[row];
  return status;
}

/* Reserve what a row needs: slots in its tail, or a copy of it, and pages up to new_len. */
static pkv_status reserve_row(pkv_pool *pool, const pkv_tables *tables, int64_t row, int32_t new_len) {
  int32_t seq_len = tables->rows->seq_lens[row], *copy = &tables->tail_copies[row];
  pkv_status status = PKV_OK;
  if (needs_copy(pool, tables, row, new_len - seq_len)) {
    status = pkv_pool_acquire(pool, 1, copy);
    if (status != PKV_OK) return status;
    int32_t offset = seq_len % tables->page_size;
    tables->filled[*copy] = (int32_t)min64(offset + new_len - seq_len, tables->page_size);
    stamp(pool, tables, *copy);
  } else if (tail_of(tables, row)) {
    stamp(pool, tables, *tail_of(tables, row));
  }
  status = acquire_pages(pool, tables, row, pages_for(tables, seq_len), new_len);
  if (status == PKV_OK)
    tables->rows->reserved_lens[row] = new_len;
  else
    unreserve_row(pool, tables, row);
  return status;
}

/* Write the pages that a row's step reads, in logical order: the sinks', then those from `first` on. */
static int64_t list_pages(const pkv_tables *tables, int64_t row, int64_t first, int64_t end,
                          int32_t *page_ids) {
  if (first == 0) { /* the whole row is in order */
    memcpy(page_ids, cell_of(tables, row, 0), (size_t)end * sizeof *page_ids);
    return end;
  }
  int64_t num_sinks = min64(tables->sink_pages, end), count = 0;
  for (int64_t page = 0; page < num_sinks; page++) page_ids[count++] = *cell_of(tables, row, page);
  for (int64_t page = first; page < end; page++) page_ids[count++] = *cell_of(tables, row, page);
  return count;
}

/* The same of a compact row, for entry i of a batch, and the logical pages and spans of its pages. */
static int64_t list_held_pages(const pkv_tables *tables, int64_t row, int64_t end, int64_t i,
                               const pkv_batch *batch) {
  int64_t count = end - num_dropped_of(tables, row), first = batch->kv_indptr[i];
  int32_t *numbers = batch->page_numbers + first, *starts = batch->span_starts + batch->span_indptr[i];
  int32_t span_pages = pkv_span_tokens(tables->page_size) / tables->page_size, num_spans = 0;
  memcpy(batch->kv_indices + first, tables->page_ids + row * tables->ring_pages,
         (size_t)count * sizeof(int32_t));
  memcpy(numbers, numbers_of(tables, row), (size_t)count * sizeof(int32_t));
  for (int64_t j = 0; j < count; j++) {
    int32_t start = numbers[j] / span_pages * span_pages * tables->page_size;
    if (!num_spans || starts[num_spans - 1] != start) starts[num_spans++] = start;
  }
  batch->span_indptr[i + 1] = batch->span_indptr[i] + num_spans;
  batch->num_lacking[i] = (int32_t)num_dropped_of(tables, row) * tables->page_size;
  return count;
}

static pkv_status give_back(pkv_pool *pool, const pkv_tables *tables, const pkv_plan *plan);

/* Note that a row's step has taken a page, which is scrubbed if it held another salt. */
static void change_salt(const pkv_tables *tables, int64_t row, int32_t page, pkv_plan *plan) {
  int64_t *salt = &tables->page_salts[page];
  if (*salt == tables->rows->salts[row]) return;
  if (*salt == 0) {
    *salt = tables->rows->salts[row];
    return;
  }
  *salt = SALT_UNKNOWN;
  plan->scrubbed[plan->num_scrubs] = page;
  plan->scrubbed_for[plan->num_scrubs++] = (int32_t)row;
}

static void copy_ids(const pkv_tables *tables, int64_t from, int64_t to, int32_t count) {
  memcpy(tables->token_ids + to * tables->page_size, tables->token_ids + from * tables->page_size,
         (size_t)count * sizeof(int32_t));
}

/* Entry i of a plan, of a row whose count is 0: no q rows, no pages, not busy. */
static void skip_row(const pkv_tables *tables, int64_t row, int64_t i, pkv_plan *plan) {
  pkv_batch *batch = &plan->batch;
  plan->rows[i] = (int32_t)row;
  plan->new_known[i] = 0;
  batch->seq_lens[i] = tables->rows->seq_lens[row];
  batch->first_pages[i] = (int32_t)first_page_seen(tables, batch->seq_lens[i]);
  batch->qo_indptr[i + 1] = batch->qo_indptr[i];
  batch->kv_indptr[i + 1] = batch->kv_indptr[i];
  if (!is_compact(tables)) return;
  batch->span_indptr[i + 1] = batch->span_indptr[i];
  batch->num_lacking[i] = 0;
}

static bool is_skipped(const pkv_plan *plan, int64_t i) {
  return plan->batch.qo_indptr[i] == plan->batch.qo_indptr[i + 1];
}

static pkv_status plan_rows(pkv_pool *pool, const pkv_tables *tables, const int64_t *seq_ids,
                            const int64_t *counts, const int32_t *ids, const uint8_t *has_ids,
                            pkv_plan *plan) {
  pkv_batch batch = plan->batch;
  batch.qo_indptr[0] = batch.kv_indptr[0] = 0;
  if (is_compact(tables)) batch.span_indptr[0] = 0;
  for (int64_t i = 0; i < batch.num_seqs; i++) {
    int64_t row = pkv_row_in(seq_ids[i]);
    if (counts[i] == 0) {
      skip_row(tables, row, i, plan);
      continue;
    }
    int32_t old_len = tables->rows->seq_lens[row], new_len = old_len + (int32_t)counts[i];
    pkv_status status = reserve_row(pool, tables, row, new_len);
    if (status != PKV_OK) { /* the pool has fewer pages than it says */
      plan->batch.num_seqs = i;
      give_back(pool, tables, plan);
      return status;
    }
    int64_t first_page = first_page_seen(tables, old_len), end_page = pages_for(tables, new_len);
    int32_t first = batch.qo_indptr[i], *page_ids = batch.kv_indices + batch.kv_indptr[i];
    int64_t num_pages = is_compact(tables) ? list_held_pages(tables, row, end_page, i, &batch)
                                           : list_pages(tables, row, first_page, end_page, page_ids);
    if (pkv_pool_ref_count(pool, page_ids[0]) > 1) plan->batch.may_share = PKV_SHARE_WHAT_PAYS;
    /* New tokens from the sinks on see all pages; later ones skip the pages between sinks and window. */
    int64_t skipped = first_page > tables->sink_pages ? first_page - tables->sink_pages : 0;
    if (is_compact(tables)) skipped = num_dropped_of(tables, row);
    if (tables->tail_copies[row] >= 0) {
      int32_t *tail = page_ids + old_len / tables->page_size - skipped;
      plan->copied_from[plan->num_copies] = *tail;
      plan->copied_tokens[plan->num_copies] = old_len % tables->page_size;
      copy_ids(tables, *tail, tables->tail_copies[row], old_len % tables->page_size);
      plan->copied_to[plan->num_copies++] = *tail = tables->tail_copies[row];
      change_salt(tables, row, *tail, plan);
    }
    for (int64_t page = pages_for(tables, old_len); page < end_page; page++)
      change_salt(tables, row, *cell_of(tables, row, page), plan);
    const int32_t *own_ids = ids && has_ids[i] ? ids : NULL;
    if (own_ids) ids += counts[i];
    place_tokens(tables, page_ids, skipped, old_len, new_len, own_ids, plan->slot_mapping + first,
                 plan->positions + first);
    plan->new_known[i] = own_ids ? (int32_t)counts[i] : 0;
    bool is_known = own_ids && tables->rows->num_known[row] == old_len;
    if (is_known && new_len / tables->page_size > old_len / tables->page_size) plan->completes_page = 1;
    batch.first_pages[i] = (int32_t)first_page;
    batch.qo_indptr[i + 1] = first + (int32_t)counts[i];
    batch.kv_indptr[i + 1] = batch.kv_indptr[i] + (int32_t)num_pages;
    batch.seq_lens[i] = new_len;
    plan->rows[i] = (int32_t)row;
  }
  return PKV_OK;
}

static bool has_negative(const int32_t *ids, int64_t count) {
  int32_t all = 0; /* whose sign bit is that of any */
  for (int64_t i = 0; i < count; i++) all |= ids[i];
  return all < 0;
}

pkv_status pkv_step_open(pkv_pool *pool, const pkv_tables *tables, int64_t num_seqs, const int64_t *seq_ids,
                         const int64_t *counts, const int32_t *ids, const uint8_t *has_ids, pkv_plan *plan,
                         int64_t plan_bytes, pkv_step_size *size, pkv_refusal *refusal) {
  const int32_t *next_ids = ids;
  pkv_status status = pkv_step_measure(pool, tables, num_seqs, seq_ids, counts, size, refusal);
  if (status != PKV_OK) return status;
  if (size->plan_bytes > plan_bytes) return PKV_PLAN_TOO_SMALL;
  for (int64_t i = 0; ids && i < num_seqs; i++) {
    if (!has_ids[i]) continue;
    if (has_negative(next_ids, counts[i])) return refuse(refusal, PKV_NEGATIVE_ID, i, 0, 0);
    next_ids += counts[i];
  }
  *plan = lay_out(tables, (char *)(plan + 1), num_seqs, size);
  status = plan_rows(pool, tables, seq_ids, counts, ids, has_ids, plan);
  plan->is_open = status == PKV_OK;
  return status;
}

static int32_t *packed_end_of(const pkv_tables *tables, int64_t row, int32_t format) {
  return tables->packed_ends + (int64_t)format * tables->rows->max_sequences + row;
}

/* From this page on, a row's pages may be open. */
static void reopen_from(const pkv_tables *tables, int64_t row, int64_t page) {
  for (int32_t format = 0; format < tables->num_packings; format++)
    if (*packed_end_of(tables, row, format) > page) *packed_end_of(tables, row, format) = (int32_t)page;
}

int64_t pkv_first_to_pack(const pkv_tables *tables, int64_t row, int32_t format) {
  int64_t first = *packed_end_of(tables, row, format), first_held = tables->first_held[row];
  if (first < tables->first_packed) first = tables->first_packed;
  return tables->window && first < first_held ? first_held : first;
}

/* Add the attention mass of a step's entry to its row, which has the same pages in the same order. */
static void add_mass(const pkv_tables *tables, const pkv_plan *plan, int64_t i, int64_t old_len,
                     int64_t new_len) {
  int64_t first = plan->batch.kv_indptr[i], row = plan->rows[i] * (int64_t)tables->ring_pages;
  int64_t num_cells = pages_for(tables, new_len) - tables->num_dropped[plan->rows[i]];
  for (int64_t cell = 0; cell < num_cells; cell++) {
    int64_t page_start = (int64_t)plan->batch.page_numbers[first + cell] * tables->page_size;
    tables->mass[row + cell] += (double)plan->mass[first + cell] / (1 << 30);
    tables->mass_rows[row + cell] += min64(new_len - old_len, new_len - page_start);
  }
}

/* Keep a row's new tokens up to new_len, and release what the others had. */
static pkv_status commit_row(pkv_pool *pool, const pkv_tables *tables, const pkv_plan *plan, int64_t i,
                             int64_t new_len) {
  int32_t row = plan->rows[i], *copy = &tables->tail_copies[row];
  int64_t old_len = tables->rows->seq_lens[row], reserved_len = tables->rows->reserved_lens[row];
  if (new_len == old_len) return unreserve_row(pool, tables, row);
  if (*copy >= 0) {
    int32_t *cell = cell_of(tables, row, old_len / tables->page_size);
    if (pkv_pool_release(pool, 1, cell) != PKV_OK) return PKV_INVARIANT;
    *cell = *copy;
    *copy = -1;
    reopen_from(tables, row, old_len / tables->page_size);
  }
  if (tables->mass) add_mass(tables, plan, i, old_len, new_len);
  int64_t num_pages = pages_for(tables, new_len);
  pkv_status status = release_pages(pool, tables, row, num_pages, pages_for(tables, reserved_len));
  if (status != PKV_OK) return status;
  if (new_len < reserved_len) { /* no other row can have reserved the slots that follow */
    int64_t in_last_page = new_len - (num_pages - 1) * tables->page_size;
    tables->filled[*cell_of(tables, row, num_pages - 1)] = (int32_t)in_last_page;
  }
  if (tables->rows->num_known[row] == old_len)
    tables->rows->num_known[row] += (int32_t)min64(plan->new_known[i], new_len - old_len);
  tables->rows->seq_lens[row] = tables->rows->reserved_lens[row] = (int32_t)new_len;
  /* Pages that have left the window are released only now, so that the step could be rolled back. */
  int64_t first = tables->first_held[row], first_kept = first_page_kept(tables, new_len);
  if (first_kept <= first) return PKV_OK;
  tables->first_held[row] = (int32_t)first_kept;
  return release_pages(pool, tables, row, first, first_kept);
}

pkv_status pkv_step_commit(pkv_pool *pool, pkv_tables *tables, pkv_plan *plan, const int32_t *counts) {
  if (!plan->is_open) return PKV_STEP_CLOSED;
  const pkv_batch *batch = &plan->batch;
  bool has_tokens = batch->qo_indptr[batch->num_seqs] > 0;
  for (int64_t i = 0; counts && i < batch->num_seqs; i++)
    if (counts[i] < 0 || counts[i] > batch->qo_indptr[i + 1] - batch->qo_indptr[i]) return PKV_BAD_ARGUMENT;
  if (has_tokens && memchr(plan->is_written, 0, (size_t)plan->num_layers)) return PKV_LAYER_NOT_WRITTEN;
  plan->is_open = 0;
  tables->num_copies += plan->num_copies;
  tables->bytes_not_read += plan->bytes_not_read;
  for (int64_t i = 0; i < plan->num_scrubs; i++)
    tables->page_salts[plan->scrubbed[i]] = tables->rows->salts[plan->scrubbed_for[i]];
  for (int64_t i = 0; i < plan->batch.num_seqs; i++) {
    if (is_skipped(plan, i)) continue;
    int32_t row = plan->rows[i];
    int64_t old_len = tables->rows->seq_lens[row], new_len = tables->rows->reserved_lens[row];
    pkv_status status = commit_row(pool, tables, plan, i, counts ? old_len + counts[i] : new_len);
    if (status != PKV_OK) return status;
  }
  return PKV_OK;
}

static pkv_status give_back(pkv_pool *pool, const pkv_tables *tables, const pkv_plan *plan) {
  /* In reverse, so that the free list is as it was before the step. */
  for (int64_t i = plan->batch.num_seqs - 1; i >= 0; i--) {
    if (!is_skipped(plan, i) && unreserve_row(pool, tables, plan->rows[i]) != PKV_OK) return PKV_INVARIANT;
  }
  return PKV_OK;
}

pkv_status pkv_step_rollback(pkv_pool *pool, const pkv_tables *tables, pkv_plan *plan) {
  if (!plan->is_open) return PKV_OK;
  plan->is_open = 0;
  return give_back(pool, tables, plan);
}

/* ---- rows */

/* Does a row hold what it must hold at this length, at most its own? */
static bool can_end_at(const pkv_tables *tables, int32_t row, int64_t length) {
  int64_t last = length / tables->page_size;
  if (is_compact(tables)) return length % tables->page_size == 0 || next_held(tables, row, last) == last;
  return pages_for(tables, length) <= tables->sink_pages ||
         first_page_at(tables, length) >= tables->first_held[row];
}

/* The first page behind the sinks that is left of a row which ends at this length. */
static int32_t first_held_at(const pkv_tables *tables, int32_t row, int64_t length) {
  return pages_for(tables, length) <= tables->sink_pages ? tables->sink_pages : tables->first_held[row];
}

/* Share the pages of the first seq_len tokens of `from`. */
static pkv_status share_pages(pkv_pool *pool, const pkv_tables *tables, int32_t from, int32_t to,
                              int64_t seq_len) {
  int64_t end = pages_for(tables, seq_len), num_held = 0;
  for (int64_t page = next_held(tables, from, 0); page < end; page = next_held(tables, from, page + 1)) {
    int32_t *cell = cell_of(tables, from, page);
    if (pkv_pool_share(pool, 1, cell) != PKV_OK) return PKV_INVARIANT;
    if (is_compact(tables)) {
      numbers_of(tables, to)[num_held] = (int32_t)page;
      copy_mass(tables, from, first_cell_from(tables, from, page), to, num_held);
      tables->page_ids[to * tables->ring_pages + num_held++] = *cell;
    } else {
      *cell_of(tables, to, page) = *cell;
    }
  }
  tables->first_held[to] = first_held_at(tables, from, seq_len);
  if (is_compact(tables)) tables->num_dropped[to] = (int32_t)(end - num_held);
  for (int32_t format = 0; format < tables->num_packings; format++)
    *packed_end_of(tables, to, format) = *packed_end_of(tables, from, format);
  reopen_from(tables, to, pages_for(tables, seq_len));
  tables->rows->salts[to] = tables->rows->salts[from];
  tables->rows->seq_lens[to] = tables->rows->reserved_lens[to] = (int32_t)seq_len;
  tables->rows->num_known[to] = (int32_t)min64(tables->rows->num_known[from], seq_len);
  return PKV_OK;
}

pkv_status pkv_tables_add(pkv_pool *pool, pkv_tables *tables, int64_t count, const int64_t *seq_ids,
                          int64_t salt, int32_t from, int64_t length) {
  if (from < 0 && salt < 1) return PKV_BAD_ARGUMENT;
  if (from >= 0 && (!pkv_is_row(tables->rows, from) || tables->rows->seq_ids[from] == 0))
    return PKV_STALE_SEQUENCE;
  if (from >= 0 && (length < 0 || length > tables->rows->seq_lens[from])) return PKV_BAD_ARGUMENT;
  if (from >= 0 && !can_end_at(tables, from, length)) return PKV_TOKENS_GONE;
  if (count > tables->rows->max_sequences - tables->rows->num_sequences) return PKV_OUT_OF_SEQUENCES;
  if (!pkv_rows_are_next(tables->rows, count, seq_ids)) return PKV_BAD_ARGUMENT;
  for (int64_t i = 0; i < count; i++) {
    int32_t row = pkv_rows_take(tables->rows, seq_ids[i], salt);
    tables->tail_copies[row] = -1;
    tables->first_held[row] = tables->sink_pages;
    if (is_compact(tables)) tables->num_dropped[row] = 0;
    for (int32_t format = 0; format < tables->num_packings; format++) *packed_end_of(tables, row, format) = 0;
    if (from >= 0 && share_pages(pool, tables, from, row, length) != PKV_OK) return PKV_INVARIANT;
  }
  return PKV_OK;
}

pkv_status pkv_tables_add_pages(pkv_pool *pool, pkv_tables *tables, int64_t seq_id, int64_t salt,
                                const int32_t *page_ids, int64_t seq_len) {
  if (seq_len < 0 || seq_len > tables->rows->max_seq_len) return PKV_BAD_ARGUMENT;
  int64_t end = pages_for(tables, seq_len), first = first_page_at(tables, seq_len);
  if (is_compact(tables) && end > tables->ring_pages) return PKV_BAD_ARGUMENT;
  int64_t num_sinks = min64(tables->sink_pages, end), num_pages = num_sinks + (end > first ? end - first : 0);
  for (int64_t i = 0; i < num_pages; i++)
    if (tables->page_salts[page_ids[i]] != salt) return PKV_BAD_ARGUMENT;
  pkv_status status = pkv_pool_share(pool, num_pages, page_ids);
  if (status != PKV_OK) return status;
  status = pkv_tables_add(pool, tables, 1, &seq_id, salt, -1, 0);
  if (status != PKV_OK) {
    pkv_pool_release(pool, num_pages, page_ids);
    return status;
  }
  int32_t row = (int32_t)pkv_row_in(seq_id);
  for (int64_t page = 0; page < num_sinks; page++) *cell_of(tables, row, page) = *page_ids++;
  for (int64_t page = first; page < end; page++) {
    if (is_compact(tables)) numbers_of(tables, row)[page] = (int32_t)page;
    if (is_compact(tables)) clear_mass(tables, row, page);
    *cell_of(tables, row, page) = *page_ids++;
  }
  if (end > tables->sink_pages) tables->first_held[row] = (int32_t)first;
  tables->rows->seq_lens[row] = tables->rows->reserved_lens[row] = tables->rows->num_known[row] =
      (int32_t)seq_len;
  return PKV_OK;
}

pkv_status pkv_tables_remove(pkv_pool *pool, pkv_tables *tables, int64_t seq_id) {
  int32_t row = (int32_t)pkv_rows_find(tables->rows, seq_id);
  if (row < 0) return PKV_STALE_SEQUENCE;
  pkv_status status = pkv_tables_reset(pool, tables, row);
  if (status != PKV_OK) return status;
  pkv_rows_give_back(tables->rows, row);
  return PKV_OK;
}

pkv_status pkv_tables_truncate(pkv_pool *pool, const pkv_tables *tables, int32_t row, int64_t length) {
  if (!pkv_is_row(tables->rows, row) || length < 0 || length > tables->rows->seq_lens[row])
    return PKV_BAD_ARGUMENT;
  if (is_busy(tables, row)) return PKV_SEQUENCE_BUSY;
  int64_t first_held = tables->first_held[row];
  int64_t num_kept = pages_for(tables, length), end = pages_for(tables, tables->rows->seq_lens[row]);
  if (!can_end_at(tables, row, length)) return PKV_TOKENS_GONE;
  pkv_status status = release_pages(pool, tables, row, num_kept > first_held ? num_kept : first_held, end);
  if (status == PKV_OK) status = release_pages(pool, tables, row, num_kept, min64(tables->sink_pages, end));
  if (status != PKV_OK) return status;
  tables->first_held[row] = first_held_at(tables, row, length);
  if (is_compact(tables))
    tables->num_dropped[row] = (int32_t)(num_kept - first_cell_from(tables, row, num_kept));
  reopen_from(tables, row, num_kept);
  tables->rows->seq_lens[row] = tables->rows->reserved_lens[row] = (int32_t)length;
  tables->rows->num_known[row] = (int32_t)min64(tables->rows->num_known[row], length);
  return status;
}

pkv_status pkv_tables_reset(pkv_pool *pool, const pkv_tables *tables, int32_t row) {
  return pkv_tables_truncate(pool, tables, row, 0);
}
