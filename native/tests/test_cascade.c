/* The tree of shared pages: whatever the lists of pages, each span that sequences have in common is in one
 * node, and nothing else is. */
#undef NDEBUG
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cascade.h"
#include "attention/visibility.h"

enum { PAGE_SIZE = 64, SPAN_TOKENS = 128, MOST_SEQS = 40, MOST_PAGES = 12 };

static uint32_t state = 7;
static int32_t below(int32_t n) {
  state = state * 1664525u + 1013904223u;
  return (int32_t)((state >> 8) % (uint32_t)n);
}

static int32_t qo_indptr[MOST_SEQS + 1], kv_indptr[MOST_SEQS + 1], seq_lens[MOST_SEQS];
static int32_t pages[MOST_SEQS * MOST_PAGES];

/* Lists that often begin as an earlier one does. */
static pkv_batch draw(void) {
  pkv_batch batch = {.num_seqs = 1 + below(MOST_SEQS),
                     .qo_indptr = qo_indptr,
                     .kv_indptr = kv_indptr,
                     .kv_indices = pages,
                     .seq_lens = seq_lens};
  for (int32_t seq = 0; seq < batch.num_seqs; seq++) {
    int32_t num_pages = 1 + below(MOST_PAGES), *own = pages + kv_indptr[seq];
    for (int32_t i = 0; i < num_pages; i++) own[i] = below(3);
    if (seq && below(4)) {
      int32_t other = below(seq), length = kv_indptr[other + 1] - kv_indptr[other];
      int32_t same = below(1 + (length < num_pages ? length : num_pages));
      memcpy(own, pages + kv_indptr[other], (size_t)same * sizeof *own);
    }
    kv_indptr[seq + 1] = kv_indptr[seq] + num_pages;
    seq_lens[seq] = (num_pages - 1) * PAGE_SIZE + 1 + below(PAGE_SIZE);
    int32_t num_rows = below(3) ? 1 : below(6);
    qo_indptr[seq + 1] = qo_indptr[seq] + (num_rows < seq_lens[seq] ? num_rows : seq_lens[seq]);
  }
  return batch;
}

/* Whole spans of a sequence that all of its rows see. */
static int32_t num_spans(const pkv_batch *batch, int32_t seq, int32_t most_rows) {
  int32_t num_rows = num_rows_of(batch, seq);
  if (num_rows < 1 || num_rows > most_rows) return 0;
  return num_seen(batch, seq, qo_indptr[seq]) / PAGE_SIZE * PAGE_SIZE / SPAN_TOKENS;
}

static int32_t agree(int32_t a, int32_t b, int32_t span) {
  return !memcmp(pages + kv_indptr[a], pages + kv_indptr[b],
                 (size_t)((span + 1) * SPAN_TOKENS / PAGE_SIZE) * sizeof *pages);
}

/* Spans that have to be read when each is read once for all sequences that agree up to its end. */
static int64_t least_reads(const pkv_batch *batch, int32_t most_rows) {
  int64_t reads = 0;
  for (int32_t seq = 0; seq < batch->num_seqs; seq++)
    for (int32_t span = 0; span < num_spans(batch, seq, most_rows); span++) {
      int32_t is_first = 1;
      for (int32_t other = 0; other < seq && is_first; other++)
        if (span < num_spans(batch, other, most_rows) && agree(seq, other, span)) is_first = 0;
      reads += is_first;
    }
  return reads;
}

static void nodes_are_what_sequences_share(const pkv_batch *batch, const pkv_cascade *cascade,
                                           const pkv_sharing *sharing) {
  int32_t covered[MOST_SEQS] = {0}, level_of[MOST_SEQS] = {0};
  int64_t saved = 0;
  for (int32_t i = 0; i < cascade->num_nodes; i++) {
    const pkv_node *node = &cascade->nodes[i];
    assert(i == 0 || node->level >= cascade->nodes[i - 1].level);
    assert(node->level < cascade->num_levels && node->end - node->begin > 1);
    assert(node->end_span - node->first_span >= sharing->least_spans);
    for (int32_t place = node->begin; place < node->end; place++) {
      int32_t seq = cascade->order[place];
      assert(covered[seq] == node->first_span && level_of[seq] == node->level); /* no gap, no level skipped */
      assert(agree(seq, cascade->order[node->begin], node->end_span - 1));
      assert(node->end_span <= num_spans(batch, seq, sharing->most_rows));
      covered[seq] = node->end_span;
      level_of[seq]++;
    }
    int64_t tokens =
        (int64_t)(node->end - node->begin - 1) * (node->end_span - node->first_span) * SPAN_TOKENS;
    assert(tokens >= sharing->least_tokens);
    saved += tokens;
  }
  assert(saved == cascade->tokens_saved);
  if (!cascade->num_nodes) return;
  int32_t num_rows = 0;
  for (int32_t place = 0; place < batch->num_seqs; place++) {
    int32_t seq = cascade->order[place];
    assert(cascade->places[seq] == place && cascade->shared_spans[seq] == covered[seq]);
    assert(cascade->first_rows[place] == num_rows);
    for (int32_t row = qo_indptr[seq]; covered[seq] && row < qo_indptr[seq + 1]; row++, num_rows++)
      assert(cascade->rows[num_rows].seq == seq && cascade->rows[num_rows].q_row == row);
  }
  assert(num_rows == cascade->num_rows && cascade->first_rows[batch->num_seqs] == num_rows);
}

/* ---- attention over shared pages, by several threads: the same bits as without sharing */

enum { HEADS = 4, GROUP = 2, DIM = 16, NUM_PAGES = 12, SEQS = 9, TOKENS = NUM_PAGES * PAGE_SIZE };

static float keys[TOKENS * HEADS * DIM], values[TOKENS * HEADS * DIM], q[SEQS * HEADS * GROUP * DIM];
static float shared_out[SEQS * HEADS * GROUP * DIM], plain_out[SEQS * HEADS * GROUP * DIM];

static void fill(float *floats, int32_t count) {
  for (int32_t i = 0; i < count; i++) floats[i] = (float)(below(2001) - 1000) / 500;
}

static pkv_tensor dense(float *floats) {
  return (pkv_tensor){.data = (char *)floats,
                      .token_stride = HEADS * GROUP * DIM * (int64_t)sizeof(float),
                      .head_stride = DIM * (int64_t)sizeof(float),
                      .dtype = PKV_FLOAT32};
}

static pkv_status attend(pkv_threads *threads, pkv_batch *batch, pkv_may_share may_share, float *out) {
  const int64_t head_bytes = DIM * (int64_t)sizeof(float);
  pkv_pages of_heads = {.k = (char *)keys,
                        .v = (char *)values,
                        .k_page_stride = PAGE_SIZE * HEADS * head_bytes,
                        .k_head_stride = head_bytes,
                        .k_token_stride = HEADS * head_bytes,
                        .v_page_stride = PAGE_SIZE * HEADS * head_bytes,
                        .v_head_stride = head_bytes,
                        .v_token_stride = HEADS * head_bytes,
                        .page_size = PAGE_SIZE,
                        .num_kv_heads = HEADS,
                        .head_dim = DIM,
                        .head_dim_v = DIM};
  pkv_attention attention = {
      .num_q_heads = HEADS * GROUP, .sm_scale = 0.25f, .q = dense(q), .out = dense(out)};
  batch->may_share = may_share;
  return pkv_attend(threads, &of_heads, batch, &attention);
}

static void threads_give_the_same_bits(void) {
  pkv_threads *threads = NULL;
  assert(pkv_threads_create(4, &threads) == PKV_OK);
  fill(keys, TOKENS * HEADS * DIM);
  fill(values, TOKENS * HEADS * DIM);
  for (int round = 0; round < 60; round++) {
    fill(q, SEQS * HEADS * GROUP * DIM);
    pkv_batch batch = {.num_seqs = SEQS,
                       .qo_indptr = qo_indptr,
                       .kv_indptr = kv_indptr,
                       .kv_indices = pages,
                       .seq_lens = seq_lens};
    for (int32_t seq = 0; seq < SEQS; seq++) { /* one row each, and pages as others begin */
      int32_t same = 4 + 4 * (seq % 3 > 0), *own = pages + seq * NUM_PAGES;
      for (int32_t i = 0; i < NUM_PAGES; i++) own[i] = i < same ? i : below(NUM_PAGES);
      qo_indptr[seq + 1] = seq + 1;
      kv_indptr[seq + 1] = (seq + 1) * NUM_PAGES;
      seq_lens[seq] = TOKENS - below(PAGE_SIZE);
    }
    memset(shared_out, 0x7f, sizeof shared_out);
    assert(attend(NULL, &batch, PKV_SHARE_NONE, plain_out) == PKV_OK);
    assert(attend(threads, &batch, PKV_SHARE_ALL, shared_out) == PKV_OK);
    assert(!memcmp(shared_out, plain_out, sizeof plain_out));
  }
  pkv_threads_destroy(threads);
}

int main(void) {
  threads_give_the_same_bits();
  int64_t num_nodes = 0;
  for (int round = 0; round < 20000; round++) {
    pkv_batch batch = draw();
    pkv_sharing sharing = {PAGE_SIZE, SPAN_TOKENS, 1 + below(6), 1 + below(2) * below(3), 1};
    if (below(4) == 0) sharing.least_tokens = below(2000);
    size_t num_bytes = (size_t)pkv_cascade_bytes(&batch);
    char *memory = malloc(num_bytes);
    assert(memory);
    memset(memory, 0x7f, num_bytes);
    pkv_cascade cascade = pkv_find_cascade(&batch, &sharing, memory);
    nodes_are_what_sequences_share(&batch, &cascade, &sharing);
    num_nodes += cascade.num_nodes;
    if (sharing.least_spans == 1 && sharing.least_tokens <= 1) {
      int64_t spans = 0;
      for (int32_t seq = 0; seq < batch.num_seqs; seq++) spans += num_spans(&batch, seq, sharing.most_rows);
      assert(spans * SPAN_TOKENS - cascade.tokens_saved ==
             least_reads(&batch, sharing.most_rows) * SPAN_TOKENS);
    }
    batch.window = 100;
    assert(pkv_find_cascade(&batch, &sharing, memory).num_nodes == 0);
    free(memory);
  }
  assert(num_nodes > 20000);
  return 0;
}
