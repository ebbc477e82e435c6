/* Attention and threads alone: equal scores give means, with any number of threads. */
#undef NDEBUG
#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "paged_kv.h"

enum { TOKENS = 3000, HEADS = 2, GROUP = 3, HEAD_DIM = 32, PAGE_SIZE = 64, PAGES = (TOKENS + 63) / 64 };

static float k_rows[TOKENS * HEADS * HEAD_DIM], v_rows[TOKENS * HEADS * HEAD_DIM];
static float q[3 * HEADS * GROUP * HEAD_DIM], out[3 * HEADS * GROUP * HEAD_DIM],
    first[sizeof out / sizeof *out];
static int32_t page_ids[PAGES];

/* Keys of ones and values that count tokens, as plain arrays seen as pages in order. */
static pkv_pages plain_pages(void) {
  for (int t = 0; t < TOKENS; t++)
    for (int i = 0; i < HEADS * HEAD_DIM; i++) {
      k_rows[t * HEADS * HEAD_DIM + i] = 1;
      v_rows[t * HEADS * HEAD_DIM + i] = (float)t;
    }
  for (int i = 0; i < PAGES; i++) page_ids[i] = i;
  int64_t head = HEAD_DIM * 4, token = HEADS * head, page = PAGE_SIZE * token;
  return (pkv_pages){.k = (char *)k_rows,
                     .v = (char *)v_rows,
                     .k_page_stride = page,
                     .k_head_stride = head,
                     .k_token_stride = token,
                     .v_page_stride = page,
                     .v_head_stride = head,
                     .v_token_stride = token,
                     .page_size = PAGE_SIZE,
                     .num_kv_heads = HEADS,
                     .head_dim = HEAD_DIM,
                     .head_dim_v = HEAD_DIM};
}

static pkv_tensor dense(float *rows, int num_heads) {
  return (pkv_tensor){{(char *)rows}, num_heads * HEAD_DIM * 4, HEAD_DIM * 4, PKV_FLOAT32};
}

static pkv_attention attention_of(int num_q_heads, float sm_scale) {
  return (pkv_attention){.num_q_heads = num_q_heads,
                         .sm_scale = sm_scale,
                         .q = dense(q, num_q_heads),
                         .out = dense(out, num_q_heads)};
}

static void a_row_sees_the_tokens_up_to_its_own(const pkv_pages *pages, pkv_threads *threads) {
  int32_t qo_indptr[] = {0, 2, 3}, kv_indptr[] = {0, PAGES, PAGES + 1}, seq_lens[] = {TOKENS, 1};
  int32_t indices[PAGES + 1];
  memcpy(indices, page_ids, sizeof page_ids);
  indices[PAGES] = 7;
  pkv_batch batch = {.num_seqs = 2,
                     .qo_indptr = qo_indptr,
                     .kv_indptr = kv_indptr,
                     .kv_indices = indices,
                     .seq_lens = seq_lens};
  for (size_t i = 0; i < sizeof q / sizeof *q; i++) q[i] = (float)(i % 7) - 3;
  memset(out, 0xff, sizeof out);
  pkv_attention attention = attention_of(HEADS * GROUP, 0.5f);
  float lse[3 * HEADS * GROUP];
  attention.lse = lse;
  assert(pkv_attend(threads, pages, &batch, &attention) == PKV_OK);
  for (int h = 0; h < HEADS * GROUP; h++) {
    float score = 0;
    for (int i = 0; i < HEAD_DIM; i++) score += 0.5f * q[h * HEAD_DIM + i];
    assert(fabsf(lse[h] - (score + logf(TOKENS - 1))) < 1e-3f);
  }
  const float means[] = {(TOKENS - 2) / 2.0f, (TOKENS - 1) / 2.0f, 7 * PAGE_SIZE};
  for (int row = 0; row < 3; row++)
    for (int i = 0; i < HEADS * GROUP * HEAD_DIM; i++)
      assert(fabsf(out[row * HEADS * GROUP * HEAD_DIM + i] - means[row]) < 1e-3f * means[row]);
}

/* An open plan of one sequence, whose first and only token goes into the first slot of page 3. */
typedef struct {
  int32_t qo_indptr[2], kv_indptr[2], seq_lens[1], indices[1];
  int64_t slots[1];
  uint8_t is_written[2];
} plan_arrays;

static pkv_plan open_plan(plan_arrays *arrays) {
  *arrays = (plan_arrays){{0, 1}, {0, 1}, {1}, {3}, {3 * PAGE_SIZE}, {0, 0}};
  return (pkv_plan){.batch = {.num_seqs = 1,
                              .qo_indptr = arrays->qo_indptr,
                              .kv_indptr = arrays->kv_indptr,
                              .kv_indices = arrays->indices,
                              .seq_lens = arrays->seq_lens},
                    .slot_mapping = arrays->slots,
                    .is_open = 1,
                    .num_layers = 2,
                    .is_written = arrays->is_written};
}

static void new_rows_are_written_first(pkv_pages pages, pkv_threads *threads) {
  plan_arrays arrays;
  pkv_plan plan = open_plan(&arrays);
  float k[HEADS * HEAD_DIM], v[HEADS * HEAD_DIM];
  for (int i = 0; i < HEADS * HEAD_DIM; i++) k[i] = v[i] = (float)i;
  pkv_attention attention = attention_of(HEADS * GROUP, 1);
  pages.layer = 1;
  assert(pkv_step_attend(threads, &pages, &plan, &attention) == PKV_LAYER_NOT_WRITTEN);
  attention.has_rows = 1;
  attention.k = dense(k, HEADS);
  attention.v = dense(v, HEADS);
  assert(pkv_step_attend(threads, &pages, &plan, &attention) == PKV_OK);
  for (int h = 0; h < HEADS * GROUP; h++) assert(out[h * HEAD_DIM + 1] == v[h / GROUP * HEAD_DIM + 1]);
  assert(!arrays.is_written[0] && arrays.is_written[1]);
  attention.has_rows = 0;
  assert(pkv_step_attend(threads, &pages, &plan, &attention) == PKV_OK);
  plan.is_open = 0;
  assert(pkv_step_attend(threads, &pages, &plan, &attention) == PKV_STEP_CLOSED);
  assert(pkv_step_write(&pages, &plan, &attention.k, &attention.v) == PKV_STEP_CLOSED);
}

/* Pages that other sequences hold too are copied before a layer's first write, and before no other. */
static void shared_pages_are_copied_once(pkv_pages pages) {
  plan_arrays arrays;
  pkv_plan plan = open_plan(&arrays);
  int32_t from[] = {2}, to[] = {3}, tokens[] = {PAGE_SIZE - 1};
  plan.num_copies = 1;
  plan.copied_tokens = tokens;
  plan.copied_from = from;
  plan.copied_to = to;
  float row[HEADS * HEAD_DIM] = {0};
  pkv_tensor rows = dense(row, HEADS);
  enum { TOKEN = HEADS * HEAD_DIM, LAST = PAGE_SIZE * TOKEN - 1 }; /* floats; of the page's last value */
  float *original = v_rows + 2 * PAGE_SIZE * TOKEN, *copy = v_rows + 3 * PAGE_SIZE * TOKEN;
  float before[2] = {original[LAST - TOKEN], original[LAST]};
  original[LAST - TOKEN] = original[LAST] = 5;
  copy[LAST - TOKEN] = copy[LAST] = 7;
  assert(pkv_step_write(&pages, &plan, &rows, &rows) == PKV_OK);
  assert(copy[LAST - TOKEN] == 5 && copy[LAST] == 7); /* a token that the row does not see */
  copy[LAST - TOKEN] = 7;
  assert(pkv_step_write(&pages, &plan, &rows, &rows) == PKV_OK && copy[LAST - TOKEN] == 7);
  original[LAST - TOKEN] = before[0];
  original[LAST] = before[1];
}

static void rows_without_tokens_give_zeros(const pkv_pages *pages) {
  int32_t qo_indptr[] = {0, 1}, kv_indptr[] = {0, 0}, seq_lens[] = {0};
  pkv_batch batch = {
      .num_seqs = 1, .qo_indptr = qo_indptr, .kv_indptr = kv_indptr, .seq_lens = seq_lens, .sees_all = 1};
  pkv_attention attention = attention_of(HEADS, 1);
  float lse[HEADS] = {0, 0};
  attention.lse = lse;
  memset(out, 0xff, sizeof out);
  assert(pkv_attend(NULL, pages, &batch, &attention) == PKV_OK);
  for (int i = 0; i < HEADS * HEAD_DIM; i++) assert(out[i] == 0);
  assert(isinf(lse[0]) && lse[0] < 0);
}

static pkv_status status_of(const pkv_pages *pages, const pkv_batch *batch, int num_q_heads) {
  pkv_attention attention = attention_of(num_q_heads, 1);
  return pkv_attend(NULL, pages, batch, &attention);
}

static void shapes_that_cannot_be_are_refused(pkv_pages pages) {
  int32_t zero[] = {0};
  pkv_batch batch = {.num_seqs = 0, .qo_indptr = zero, .kv_indptr = zero};
  assert(status_of(&pages, &batch, HEADS) == PKV_OK);
  assert(status_of(&pages, &batch, HEADS + 1) == PKV_BAD_ARGUMENT);
  batch.sees_all = batch.window = 1;
  assert(status_of(&pages, &batch, HEADS) == PKV_BAD_ARGUMENT);
  pages.head_dim = 12;
  assert(status_of(&pages, &batch, HEADS) == PKV_BAD_ARGUMENT);
  pages.head_dim = HEAD_DIM;
  pages.head_dim_v = 264;
  assert(status_of(&pages, &batch, HEADS) == PKV_BAD_ARGUMENT);
  pkv_threads *threads = NULL;
  assert(pkv_threads_create(0, &threads) == PKV_BAD_ARGUMENT);
}

int main(void) {
  pkv_pages pages = plain_pages();
  for (int32_t kernel = 0; pkv_kernel_name(kernel); kernel++) {
    if (pkv_kernel_select(kernel) != PKV_OK) continue;
    a_row_sees_the_tokens_up_to_its_own(&pages, NULL);
    memcpy(first, out, sizeof out);
    for (int32_t num_threads = 1; num_threads < 6; num_threads++) {
      pkv_threads *threads = NULL;
      assert(pkv_threads_create(num_threads, &threads) == PKV_OK);
      for (int i = 0; i < 50; i++) {
        a_row_sees_the_tokens_up_to_its_own(&pages, threads);
        assert(memcmp(first, out, sizeof out) == 0);
      }
      pkv_threads_destroy(threads);
    }
  }
  new_rows_are_written_first(pages, NULL);
  shared_pages_are_copied_once(pages);
  rows_without_tokens_give_zeros(&pages);
  shapes_that_cannot_be_are_refused(pages);
  return 0;
}
