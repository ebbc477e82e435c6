/* Tables, steps and append alone: a step measures, reserves, commits or leaves no trace. */
#undef NDEBUG
#include <assert.h>
#include <string.h>

#include "paged_kv.h"

enum {
  PAGE_SIZE = 16,
  NUM_PAGES = 5,
  ROWS = 3,
  RING = 4,
  HEAD_DIM = 8,
  BLOCK = 2 * PAGE_SIZE * HEAD_DIM * 4
};

static int64_t row_ids[ROWS], row_salts[ROWS], page_salts[NUM_PAGES];
static int32_t next_free[ROWS];
static int32_t page_ids[ROWS * RING], seq_lens[ROWS], reserved_lens[ROWS], page_marks[NUM_PAGES],
    filled[NUM_PAGES], num_known[ROWS], token_ids[NUM_PAGES * PAGE_SIZE];
static int32_t tail_copies[ROWS] = {-1, -1, -1}, first_held[ROWS];
static pkv_rows rows = {.seq_ids = row_ids,
                        .next_free = next_free,
                        .free_row = -1,
                        .seq_lens = seq_lens,
                        .reserved_lens = reserved_lens,
                        .num_known = num_known,
                        .salts = row_salts,
                        .max_sequences = ROWS,
                        .max_seq_len = RING * PAGE_SIZE};
static pkv_tables tables = {.rows = &rows,
                            .page_salts = page_salts,
                            .page_ids = page_ids,
                            .first_held = first_held,
                            .tail_copies = tail_copies,
                            .filled = filled,
                            .token_ids = token_ids,
                            .page_marks = page_marks,
                            .ring_pages = RING,
                            .max_step_tokens = INT32_MAX,
                            .page_size = PAGE_SIZE};

static union {
  pkv_plan plan;
  char bytes[4096];
} memory;
static pkv_plan *const plan = &memory.plan;
static pkv_step_size size;
static pkv_refusal refusal;

static int64_t seq_id(int64_t row) { return (7 + row) << PKV_ROW_BITS | row; }

static pkv_status measure(pkv_pool *pool, int64_t num_seqs, const int64_t *seq_ids, const int64_t *counts) {
  return pkv_step_measure(pool, &tables, num_seqs, seq_ids, counts, &size, &refusal);
}

static pkv_status open_step(pkv_pool *pool, int64_t num_seqs, const int64_t *seq_ids, const int64_t *counts) {
  return pkv_step_open(pool, &tables, num_seqs, seq_ids, counts, NULL, NULL, plan, (int64_t)sizeof memory,
                       &size, &refusal);
}

static void rows_are_given_and_taken_back(pkv_pool *pool) {
  int32_t next[ROWS + 1];
  int64_t seq_ids[ROWS] = {seq_id(0), seq_id(1), seq_id(2)};
  assert(pkv_rows_next(&rows, ROWS + 1, next) == ROWS && next[0] == 0 && next[2] == 2);
  assert(pkv_tables_add(pool, &tables, 1, seq_ids + 1, 1, -1, 0) == PKV_BAD_ARGUMENT); /* row 0 comes first */
  assert(pkv_tables_add(pool, &tables, 2, seq_ids, 1, 2, 0) == PKV_STALE_SEQUENCE);
  assert(pkv_tables_add(pool, &tables, ROWS, seq_ids, 1, -1, 0) == PKV_OK && rows.num_sequences == ROWS);
  assert(pkv_rows_next(&rows, 1, next) == 0);
  assert(pkv_tables_remove(pool, &tables, seq_ids[1]) == PKV_OK);
  assert(pkv_tables_remove(pool, &tables, seq_ids[1]) == PKV_STALE_SEQUENCE);
  assert(pkv_tables_remove(pool, &tables, seq_ids[0]) == PKV_OK);
  assert(pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_OK);
  assert(pkv_rows_next(&rows, ROWS, next) == 2 && next[0] == 0 && next[1] == 1);
  assert(pkv_rows_find(&rows, seq_ids[0]) == -1 && pkv_rows_find(&rows, seq_ids[2]) == 2);
  next_free[1] = 0; /* a circle */
  assert(pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_INVARIANT);
  next_free[1] = -1;
  assert(pkv_tables_add(pool, &tables, 2, seq_ids, 1, -1, 0) == PKV_OK);
}

static void a_step_commits_or_leaves_no_trace(pkv_pool *pool) {
  int64_t seq_ids[2] = {seq_id(2), seq_id(0)};
  int64_t counts[2] = {17, 3};
  assert(measure(pool, 2, seq_ids, counts) == PKV_OK);
  assert(size.num_tokens == 20 && size.num_pages == 3 && size.num_new_pages == 3);
  assert(reserved_lens[2] == 0);
  assert(size.plan_bytes == (int64_t)sizeof(pkv_plan) + 20 * 8 + (20 + 3 + 3 + 2 + 2 + 2 + 2 + 3 + 6) * 4);
  assert(open_step(pool, 2, seq_ids, counts) == PKV_OK);
  assert(pkv_pool_num_free(pool) == 2 && pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_OK);
  assert(plan->slot_mapping[16] == (int64_t)page_ids[2 * RING + 1] * PAGE_SIZE);
  assert(plan->rows[0] == 2 && plan->rows[1] == 0 && plan->positions[19] == 2);
  assert(measure(pool, 1, seq_ids, counts) == PKV_SEQUENCE_BUSY);
  assert(pkv_tables_reset(pool, &tables, 2) == PKV_SEQUENCE_BUSY);
  assert(pkv_step_rollback(pool, &tables, plan) == PKV_OK);
  assert(pkv_pool_num_free(pool) == NUM_PAGES && pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_OK);

  assert(pkv_step_open(pool, &tables, 2, seq_ids, counts, NULL, NULL, plan, size.plan_bytes - 1, &size,
                       &refusal) == PKV_PLAN_TOO_SMALL);
  assert(pkv_pool_num_free(pool) == NUM_PAGES && reserved_lens[2] == 0);
  assert(open_step(pool, 2, seq_ids, counts) == PKV_OK);
  assert(pkv_step_commit(pool, &tables, plan, NULL) == PKV_OK);
  assert(pkv_step_commit(pool, &tables, plan, NULL) == PKV_STEP_CLOSED);
  assert(pkv_step_rollback(pool, &tables, plan) == PKV_OK); /* which does nothing by now */
  assert(seq_lens[2] == 17 && seq_lens[0] == 3);
  pkv_pages pages = {.k = pkv_pool_data(pool),
                     .v = pkv_pool_data(pool) + BLOCK / 2,
                     .k_page_stride = BLOCK,
                     .k_head_stride = BLOCK,
                     .k_token_stride = HEAD_DIM * 4,
                     .v_page_stride = BLOCK,
                     .v_head_stride = BLOCK,
                     .v_token_stride = HEAD_DIM * 4,
                     .page_size = PAGE_SIZE,
                     .num_kv_heads = 1,
                     .head_dim = HEAD_DIM,
                     .head_dim_v = HEAD_DIM};
  float k[20 * HEAD_DIM], v[20 * HEAD_DIM], k_back[21 * HEAD_DIM], v_back[21 * HEAD_DIM];
  for (int i = 0; i < 20 * HEAD_DIM; i++) k[i] = (float)i, v[i] = (float)-i;
  pkv_tensor k_rows = {{(char *)k}, HEAD_DIM * 4, HEAD_DIM * 4, PKV_FLOAT32};
  pkv_tensor v_rows = {{(char *)v}, HEAD_DIM * 4, HEAD_DIM * 4, PKV_FLOAT32};
  assert(pkv_append(&pages, 20, plan->slot_mapping, &k_rows, &v_rows) == PKV_OK);
  pkv_tensor k_rows_back = {{(char *)k_back}, HEAD_DIM * 4, HEAD_DIM * 4, PKV_FLOAT32};
  pkv_tensor v_rows_back = {{(char *)v_back}, HEAD_DIM * 4, HEAD_DIM * 4, PKV_FLOAT32};
  int64_t slots[21];
  memcpy(slots, plan->slot_mapping, 20 * sizeof slots[0]);
  slots[20] = -1;
  memset(k_back, 0xff, sizeof k_back);
  assert(pkv_gather(&pages, 21, slots, &k_rows_back, &v_rows_back) == PKV_OK);
  for (int i = 0; i < HEAD_DIM; i++) assert(k_back[20 * HEAD_DIM + i] == 0);
  assert(memcmp(k, k_back, sizeof k) == 0 && memcmp(v, v_back, sizeof v) == 0);
}

static void a_count_of_zero_is_skipped_and_a_commit_may_keep_less(pkv_pool *pool) {
  int64_t seq_ids[3] = {seq_id(1), seq_id(2), seq_id(0)}, counts[3] = {0, 17, 2};
  int64_t num_free = pkv_pool_num_free(pool);
  assert(open_step(pool, 3, seq_ids, counts) == PKV_OK);
  assert(plan->batch.qo_indptr[1] == 0 && plan->batch.qo_indptr[2] == 17 && plan->batch.kv_indptr[1] == 0);
  assert(plan->batch.seq_lens[0] == 0 && plan->batch.seq_lens[1] == 34 && plan->batch.seq_lens[2] == 5);
  assert(measure(pool, 1, seq_ids, counts) == PKV_OK); /* it is not busy */
  assert(measure(pool, 1, seq_ids + 1, counts) == PKV_SEQUENCE_BUSY);
  int32_t too_many[3] = {0, 18, 0}, fewer[3] = {0, 14, 0};
  assert(pkv_step_commit(pool, &tables, plan, too_many) == PKV_BAD_ARGUMENT && plan->is_open);
  assert(pkv_step_commit(pool, &tables, plan, fewer) == PKV_OK);
  assert(seq_lens[2] == 31 && reserved_lens[2] == 31 && seq_lens[0] == 3 && reserved_lens[0] == 3);
  assert(filled[page_ids[2 * RING + 1]] == 15 && filled[page_ids[0]] == 3);
  assert(pkv_pool_num_free(pool) == num_free && pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_OK);
  assert(pkv_tables_truncate(pool, &tables, 2, 17) == PKV_OK);
  counts[1] = 1; /* it holds its last page alone, and appends behind its own tokens */
  assert(open_step(pool, 1, seq_ids + 1, counts + 1) == PKV_OK && filled[page_ids[2 * RING + 1]] == 2);
  assert(pkv_step_rollback(pool, &tables, plan) == PKV_OK && filled[page_ids[2 * RING + 1]] == 1);
  seq_ids[1] = seq_ids[0];
  counts[1] = 1;
  assert(measure(pool, 2, seq_ids, counts) == PKV_SEQUENCE_TWICE && tail_copies[1] == -1);
}

static void what_cannot_be_is_refused_by_name(pkv_pool *pool) {
  int64_t seq_ids[3] = {seq_id(1), seq_id(0), seq_id(1)};
  int64_t counts[3] = {1, 1, 1};
  assert(measure(pool, 3, seq_ids, counts) == PKV_SEQUENCE_TWICE);
  assert(refusal.index == 2 && reserved_lens[1] == 0 && reserved_lens[0] == 3);
  seq_ids[2] = -1;
  assert(measure(pool, 3, seq_ids, counts) == PKV_STALE_SEQUENCE);
  seq_ids[2] = seq_id(ROWS);
  assert(measure(pool, 3, seq_ids, counts) == PKV_STALE_SEQUENCE);
  seq_ids[2] = (int64_t)99 << PKV_ROW_BITS; /* row 0 under another serial */
  assert(measure(pool, 3, seq_ids, counts) == PKV_STALE_SEQUENCE);
  counts[0] = RING * PAGE_SIZE + 1;
  assert(measure(pool, 2, seq_ids, counts) == PKV_SEQUENCE_TOO_LONG);
  assert(refusal.index == 0 && refusal.requested == 65 && refusal.available == 64);
  counts[0] = 2 * PAGE_SIZE + 1;
  assert(measure(pool, 2, seq_ids, counts) == PKV_OUT_OF_PAGES);
  assert(refusal.requested == 3 && refusal.available == 2);
  counts[0] = (int64_t)INT32_MAX + 1;
  assert(measure(pool, 2, seq_ids, counts) == PKV_BAD_ARGUMENT);
  assert(pkv_tables_reset(pool, &tables, -1) == PKV_BAD_ARGUMENT);
}

static void a_stray_write_into_the_tables_is_found(pkv_pool *pool) {
  int32_t kept = page_ids[2 * RING];
  page_ids[2 * RING] = page_ids[0];
  assert(pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_INVARIANT);
  page_ids[2 * RING] = NUM_PAGES;
  assert(pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_INVARIANT);
  page_ids[2 * RING] = kept;
  seq_lens[1] = 1;
  assert(pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_INVARIANT);
  seq_lens[1] = 0;
  assert(pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_OK);
}

/* Row 2 has 17 tokens in two pages, row 0 has 3 in one, two pages are free. */
static void who_appends_to_a_shared_page_gets_a_copy(pkv_pool *pool) {
  int64_t fork = seq_id(1);
  assert(pkv_tables_add(pool, &tables, 1, &fork, 1, 2, seq_lens[2]) == PKV_OUT_OF_SEQUENCES);
  assert(pkv_tables_remove(pool, &tables, fork) == PKV_OK);
  assert(pkv_tables_add(pool, &tables, 1, &fork, 1, 2, seq_lens[2]) == PKV_OK &&
         pkv_pool_num_free(pool) == 2);
  assert(pkv_tables_num_tokens(&tables, NUM_PAGES) == 20);
  int64_t seq_ids[2] = {seq_id(1), seq_id(2)}, counts[2] = {1, 1};
  /* Both who hold the page append: they are equally long, so the first one writes in place. */
  assert(measure(pool, 2, seq_ids, counts) == PKV_OK && size.num_copies == 1);
  assert(open_step(pool, 2, seq_ids, counts) == PKV_OK);
  assert(plan->num_copies == 1 && plan->copied_from[0] == page_ids[2 * RING + 1]);
  assert(tail_copies[1] == -1 && tail_copies[2] == plan->copied_to[0]);
  assert(plan->batch.kv_indices[1] == page_ids[RING + 1] && plan->batch.kv_indices[3] == plan->copied_to[0]);
  assert(pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_OK && pkv_pool_num_free(pool) == 1);
  assert(pkv_step_rollback(pool, &tables, plan) == PKV_OK && tail_copies[2] == -1);
  assert(pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_OK && pkv_pool_num_free(pool) == 2);
  /* One of the two: it writes in place, and the other gets a copy of what it sees. */
  assert(measure(pool, 1, seq_ids + 1, counts) == PKV_OK && size.num_copies == 0);
  assert(open_step(pool, 1, seq_ids + 1, counts) == PKV_OK && filled[page_ids[RING + 1]] == 2);
  assert(pkv_step_rollback(pool, &tables, plan) == PKV_OK && filled[page_ids[RING + 1]] == 1);
  assert(open_step(pool, 1, seq_ids + 1, counts) == PKV_OK);
  assert(pkv_step_commit(pool, &tables, plan, NULL) == PKV_OK &&
         page_ids[RING + 1] == page_ids[2 * RING + 1]);
  assert(measure(pool, 1, seq_ids, counts) == PKV_OK && size.num_copies == 1);
  assert(open_step(pool, 1, seq_ids, counts) == PKV_OK && plan->copied_tokens[0] == 1);
  assert(pkv_step_commit(pool, &tables, plan, NULL) == PKV_OK);
  assert(page_ids[RING] == page_ids[2 * RING] && page_ids[RING + 1] != page_ids[2 * RING + 1]);
  assert(pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_OK && pkv_pool_num_free(pool) == 1);
  assert(pkv_tables_num_tokens(&tables, NUM_PAGES) == 16 + 2 + 2 + 3);
  assert(pkv_tables_truncate(pool, &tables, 1, 18 + 1) == PKV_BAD_ARGUMENT);
  assert(pkv_tables_truncate(pool, &tables, 1, -1) == PKV_BAD_ARGUMENT);
  assert(pkv_tables_truncate(pool, &tables, 1, 16) == PKV_OK && pkv_pool_num_free(pool) == 2);
  assert(pkv_tables_reset(pool, &tables, 1) == PKV_OK && pkv_pool_num_free(pool) == 2);
}

/* No row has a page; all pages but one held salt 1. */
static void a_page_changes_salt_after_scrubbing(pkv_pool *pool) {
  int64_t both[2] = {seq_id(0), seq_id(1)}, counts[1] = {17};
  for (int i = 0; i < NUM_PAGES; i++) page_salts[i] = i < NUM_PAGES - 1;
  for (int i = 0; i < 2; i++) assert(pkv_tables_remove(pool, &tables, seq_id(i)) == PKV_OK);
  assert(pkv_tables_add(pool, &tables, 1, both + 1, 0, -1, 0) == PKV_BAD_ARGUMENT);
  assert(pkv_tables_add(pool, &tables, 1, both + 1, 2, -1, 0) == PKV_OK);
  assert(open_step(pool, 1, both + 1, counts) == PKV_OK);
  int32_t first = page_ids[RING], second = page_ids[RING + 1];
  assert(plan->num_scrubs == (first != NUM_PAGES - 1) + (second != NUM_PAGES - 1));
  int32_t scrubbed = plan->scrubbed[0];
  assert(plan->scrubbed_for[0] == 1 && page_salts[scrubbed] == -1);
  assert(pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_OK);
  assert(pkv_step_rollback(pool, &tables, plan) == PKV_OK && page_salts[scrubbed] == -1);
  assert(open_step(pool, 1, both + 1, counts) == PKV_OK && plan->num_scrubs >= 1);
  assert(pkv_step_commit(pool, &tables, plan, NULL) == PKV_OK && page_salts[first] == 2 &&
         page_salts[second] == 2);
  assert(pkv_tables_add_pages(pool, &tables, both[0], 1, &first, 5) == PKV_BAD_ARGUMENT);
  assert(pkv_tables_add_pages(pool, &tables, both[0], 2, &first, 5) == PKV_OK && row_salts[0] == 2);
  assert(pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_OK);
  page_salts[first] = 1; /* a page of another salt in a row */
  assert(pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_INVARIANT);
  page_salts[first] = 2;
  assert(pkv_tables_reset(pool, &tables, 1) == PKV_OK && pkv_tables_reset(pool, &tables, 0) == PKV_OK);
}

static void a_row_drops_pages_in_between(pkv_pool *pool) {
  static int32_t cell_pages[ROWS * RING], num_dropped[ROWS];
  static double mass[ROWS * RING];
  static int64_t mass_rows[ROWS * RING];
  tables.cell_pages = cell_pages;
  tables.num_dropped = num_dropped;
  tables.mass = mass;
  tables.mass_rows = mass_rows;
  int64_t id = seq_id(0), counts[] = {60};
  assert(open_step(pool, 1, &id, counts) == PKV_OK && plan->batch.page_numbers[3] == 3);
  assert(plan->batch.span_indptr[1] == 1 && plan->batch.num_lacking[0] == 0);
  plan->mass[1] = plan->mass[2] = 1 << 29;
  assert(pkv_step_commit(pool, &tables, plan, NULL) == PKV_OK && mass[2] == 0.5 && mass_rows[0] == 60);
  assert(mass_rows[3] == 12);
  int32_t pages[RING], wrong[] = {3}, twice[] = {1, 1}, gone[] = {1}, page = page_ids[1];
  memcpy(pages, page_ids, sizeof pages);
  assert(pkv_tables_drop(pool, &tables, 0, 1, wrong) == PKV_BAD_ARGUMENT); /* not full */
  assert(pkv_tables_drop(pool, &tables, 0, 2, twice) == PKV_BAD_ARGUMENT && num_dropped[0] == 0);
  num_known[0] = 60;
  assert(pkv_tables_drop(pool, &tables, 0, 1, gone) == PKV_OK && pkv_pool_ref_count(pool, page) == 0);
  assert(pkv_tables_drop(pool, &tables, 0, 1, gone) == PKV_BAD_ARGUMENT && num_known[0] == PAGE_SIZE);
  assert(cell_pages[0] == 0 && cell_pages[1] == 2 && cell_pages[2] == 3 && page_ids[1] == pages[2]);
  assert(mass[1] == 0.5 && num_dropped[0] == 1);
  assert(pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_OK);
  assert(pkv_tables_truncate(pool, &tables, 0, 20) == PKV_TOKENS_GONE); /* inside page 1 */
  counts[0] = 4;
  assert(open_step(pool, 1, &id, counts) == PKV_OK && plan->batch.num_lacking[0] == PAGE_SIZE);
  assert(plan->batch.kv_indptr[1] == 3 && plan->batch.page_numbers[1] == 2);
  assert(plan->slot_mapping[0] == (int64_t)pages[3] * PAGE_SIZE + 12);
  assert(pkv_tables_drop(pool, &tables, 0, 1, gone) == PKV_SEQUENCE_BUSY);
  assert(pkv_step_commit(pool, &tables, plan, NULL) == PKV_OK);
  assert(open_step(pool, 1, &id, counts) == PKV_OK && cell_pages[3] == 4); /* as many as there are cells */
  assert(pkv_step_rollback(pool, &tables, plan) == PKV_OK && num_dropped[0] == 1);
  assert(pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_OK);
  cell_pages[1] = 0; /* not ascending */
  assert(pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_INVARIANT);
  cell_pages[1] = 2;
  assert(pkv_tables_truncate(pool, &tables, 0, 32) == PKV_OK && num_dropped[0] == 1);
  assert(pkv_tables_truncate(pool, &tables, 0, 16) == PKV_OK && num_dropped[0] == 0);
  assert(pkv_tables_reset(pool, &tables, 0) == PKV_OK);
}

int main(void) {
  pkv_pool *pool = NULL;
  assert(pkv_pool_create(NUM_PAGES, BLOCK, &pool) == PKV_OK);
  rows_are_given_and_taken_back(pool);
  a_step_commits_or_leaves_no_trace(pool);
  a_count_of_zero_is_skipped_and_a_commit_may_keep_less(pool);
  who_appends_to_a_shared_page_gets_a_copy(pool);
  what_cannot_be_is_refused_by_name(pool);
  a_stray_write_into_the_tables_is_found(pool);
  assert(pkv_tables_reset(pool, &tables, 2) == PKV_OK && pkv_tables_reset(pool, &tables, 0) == PKV_OK);
  a_page_changes_salt_after_scrubbing(pool);
  rows.max_seq_len = 1000;
  a_row_drops_pages_in_between(pool);
  assert(pkv_pool_num_free(pool) == NUM_PAGES && pkv_tables_check(pool, &tables, NUM_PAGES) == PKV_OK);
  pkv_pool_destroy(&pool);
  return 0;
}
