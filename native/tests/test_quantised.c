/* Pages of integers: what is appended is read back to within half a step, and attention over them is that
 * over the values read back, with the same bits for one row and for many. */
#undef NDEBUG
#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernel.h"
#include "paged_kv.h"

enum { TOKENS = 150, HEADS = 2, PAGE_SIZE = 64, PAGES = 3, MOST_HEADS = 10, DIM = 256, ROWS = 70 };

static char memory[2][PAGES * HEADS * PAGE_SIZE * DIM * 4] __attribute__((aligned(64)));
static float given[2][TOKENS * HEADS * DIM], plain[2][TOKENS * HEADS * DIM];
static float q[ROWS * MOST_HEADS * DIM], out[ROWS * MOST_HEADS * DIM], expected[ROWS * MOST_HEADS * DIM],
    one[MOST_HEADS * DIM];

static float next_random(void) {
  static uint32_t state = 12345;
  state = state * 1664525 + 1013904223;
  return (float)(int32_t)state * 0x1p-30f;
}

static pkv_tensor rows_of(float *rows, int num_heads, int dim) {
  return (pkv_tensor){{(char *)rows}, num_heads * dim * 4, dim * 4, PKV_FLOAT32};
}

static pkv_pages pages_of(int dim, int k_dtype, int v_dtype) {
  int dtypes[2] = {k_dtype, v_dtype};
  pkv_scales scales[2];
  int64_t head[2], row[2];
  for (int i = 0; i < 2; i++) {
    row[i] = pkv_stored_bytes(dim, dtypes[i]);
    head[i] = PAGE_SIZE * (row[i] + pkv_scale_bytes(dtypes[i]));
    scales[i] =
        (pkv_scales){memory[i] + PAGE_SIZE * row[i], HEADS * head[i], head[i], pkv_scale_bytes(dtypes[i])};
  }
  memset(memory, 0xff, sizeof memory); /* bytes of no token, and scales that are NaN */
  return (pkv_pages){.k = memory[0],
                     .v = memory[1],
                     .k_page_stride = HEADS * head[0],
                     .k_head_stride = head[0],
                     .k_token_stride = row[0],
                     .v_page_stride = HEADS * head[1],
                     .v_head_stride = head[1],
                     .v_token_stride = row[1],
                     .k_dtype = k_dtype,
                     .v_dtype = v_dtype,
                     .page_size = PAGE_SIZE,
                     .num_kv_heads = HEADS,
                     .head_dim = dim,
                     .head_dim_v = dim,
                     .k_scales = scales[0],
                     .v_scales = scales[1]};
}

/* Float32 rows, one after the other, as pages. */
static pkv_pages plain_pages(int dim) {
  int64_t head = dim * 4, token = HEADS * head, page = PAGE_SIZE * token;
  return (pkv_pages){.k = (char *)plain[0],
                     .v = (char *)plain[1],
                     .k_page_stride = page,
                     .k_head_stride = head,
                     .k_token_stride = token,
                     .v_page_stride = page,
                     .v_head_stride = head,
                     .v_token_stride = token,
                     .page_size = PAGE_SIZE,
                     .num_kv_heads = HEADS,
                     .head_dim = dim,
                     .head_dim_v = dim};
}

static void attend(const pkv_pages *pages, int num_rows, int group, float *rows, float *to) {
  int32_t qo_indptr[] = {0, num_rows}, kv_indptr[] = {0, PAGES}, seq_lens[] = {TOKENS}, indices[] = {0, 1, 2};
  pkv_batch batch = {.num_seqs = 1,
                     .qo_indptr = qo_indptr,
                     .kv_indptr = kv_indptr,
                     .kv_indices = indices,
                     .seq_lens = seq_lens};
  int num_q_heads = group * HEADS;
  pkv_attention attention = {.num_q_heads = num_q_heads,
                             .sm_scale = 1 / sqrtf((float)pages->head_dim),
                             .q = rows_of(rows, num_q_heads, pages->head_dim),
                             .out = rows_of(to, num_q_heads, pages->head_dim)};
  assert(pkv_attend(NULL, pages, &batch, &attention) == PKV_OK);
}

static void append_and_read_back(const pkv_pages *pages, int dim) {
  int64_t slots[TOKENS];
  for (int t = 0; t < TOKENS; t++) slots[t] = t;
  for (int side = 0; side < 2; side++)
    for (int i = 0; i < TOKENS * HEADS * dim; i++) given[side][i] = next_random();
  pkv_tensor k = rows_of(given[0], HEADS, dim), v = rows_of(given[1], HEADS, dim);
  assert(pkv_append(pages, TOKENS, slots, &k, &v) == PKV_OK);
  k = rows_of(plain[0], HEADS, dim);
  v = rows_of(plain[1], HEADS, dim);
  assert(pkv_gather(pages, TOKENS, slots, &k, &v) == PKV_OK);
  float steps[] = {[PKV_FLOAT32] = 0, [PKV_INT8] = 2.02f / 127, [PKV_INT4] = 4.06f / 15}; /* at most */
  int dtypes[2] = {pages->k_dtype, pages->v_dtype};
  for (int side = 0; side < 2; side++)
    for (int i = 0; i < TOKENS * HEADS * dim; i++)
      assert(fabsf(plain[side][i] - given[side][i]) <= 0.5001f * steps[dtypes[side]]);
}

static void attention_is_that_over_what_is_read_back(int dim, int group, int k_dtype, int v_dtype) {
  pkv_pages pages = pages_of(dim, k_dtype, v_dtype), floats = plain_pages(dim);
  append_and_read_back(&pages, dim);
  int row = group * HEADS * dim;
  for (int i = 0; i < ROWS * row; i++) q[i] = 2 * next_random();
  memset(out, 0xff, sizeof out);
  attend(&pages, ROWS, group, q, out);
  attend(&floats, ROWS, group, q, expected);
  for (int i = 0; i < ROWS * row; i++) assert(fabsf(out[i] - expected[i]) < 2e-3f);
  attend(&pages, 1, group, q + (ROWS - 1) * row, one);
  assert(memcmp(one, out + (ROWS - 1) * row, (size_t)row * sizeof *one) == 0);
}

int main(void) {
  const int dims[] = {8, 24, 64, 72, 128, 256}, dtypes[][2] = {{PKV_INT8, PKV_INT8},
                                                               {PKV_INT8, PKV_INT4},
                                                               {PKV_FLOAT32, PKV_INT8},
                                                               {PKV_FLOAT32, PKV_INT4},
                                                               {PKV_INT8, PKV_FLOAT32}};
  for (int32_t kernel = 0; pkv_kernel_name(kernel); kernel++) {
    if (pkv_kernel_select(kernel) != PKV_OK) continue;
    for (size_t d = 0; d < sizeof dims / sizeof *dims; d++)
      for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        for (int group = 1; group <= MOST_HEADS / HEADS; group++)
          attention_is_that_over_what_is_read_back(dims[d], group, dtypes[i][0], dtypes[i][1]);
  }
  return 0;
}
