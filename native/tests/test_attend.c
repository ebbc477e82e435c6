/* Attention and threads alone: equal scores give means, whoever computes them and how often. */
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
  return (pkv_pages){(char *)k_rows, (char *)v_rows, page,        head,      token, page,
                     head,           token,          PKV_FLOAT32, PAGE_SIZE, HEADS, HEAD_DIM};
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
  assert(pkv_attend(threads, pages, &batch, NULL, NULL, NULL, HEADS * GROUP, 0.5f, q, out) == PKV_OK);
  const float means[] = {(TOKENS - 2) / 2.0f, (TOKENS - 1) / 2.0f, 7 * PAGE_SIZE};
  for (int row = 0; row < 3; row++)
    for (int i = 0; i < HEADS * GROUP * HEAD_DIM; i++)
      assert(fabsf(out[row * HEADS * GROUP * HEAD_DIM + i] - means[row]) < 1e-3f * means[row]);
}

static void new_rows_are_written_first(const pkv_pages *pages, pkv_threads *threads) {
  int32_t qo_indptr[] = {0, 1}, kv_indptr[] = {0, 1}, seq_lens[] = {1}, indices[] = {3};
  int64_t slots[] = {3 * PAGE_SIZE};
  float k[HEADS * HEAD_DIM], v[HEADS * HEAD_DIM];
  for (int i = 0; i < HEADS * HEAD_DIM; i++) k[i] = v[i] = (float)i;
  pkv_batch batch = {.num_seqs = 1,
                     .qo_indptr = qo_indptr,
                     .kv_indptr = kv_indptr,
                     .kv_indices = indices,
                     .seq_lens = seq_lens};
  assert(pkv_attend(threads, pages, &batch, slots, k, v, HEADS * GROUP, 1, q, out) == PKV_OK);
  for (int h = 0; h < HEADS * GROUP; h++) assert(out[h * HEAD_DIM + 1] == v[h / GROUP * HEAD_DIM + 1]);
}

static void shapes_that_cannot_be_are_refused(pkv_pages pages) {
  int32_t zero[] = {0};
  pkv_batch batch = {.num_seqs = 0, .qo_indptr = zero, .kv_indptr = zero};
  assert(pkv_attend(NULL, &pages, &batch, NULL, NULL, NULL, HEADS, 1, q, out) == PKV_OK);
  assert(pkv_attend(NULL, &pages, &batch, NULL, NULL, NULL, HEADS + 1, 1, q, out) == PKV_BAD_ARGUMENT);
  pages.head_dim = 12;
  assert(pkv_attend(NULL, &pages, &batch, NULL, NULL, NULL, HEADS, 1, q, out) == PKV_BAD_ARGUMENT);
  pages.head_dim = 264;
  assert(pkv_attend(NULL, &pages, &batch, NULL, NULL, NULL, HEADS, 1, q, out) == PKV_BAD_ARGUMENT);
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
  new_rows_are_written_first(&pages, NULL);
  shapes_that_cannot_be_are_refused(pages);
  return 0;
}
