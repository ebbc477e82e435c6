/* Attention over pages: which tokens are folded into which state, in which order.
 *
 *   run     64 tokens, or the whole pages that fit in them: one call of a fold
 *   span    256 tokens, or the whole pages that fit: its runs are folded into a state of its own, and the
 *           spans of a row are merged left to right
 *
 * Runs and spans are counted from a sequence's first page, whatever the batch and the threads, so a
 * row's bits do not depend on them.  Threads take work items, or pieces of a long one (work.h).  The
 * thread that ends an item's last piece merges its spans, in the same order.
 *
 * A fold walks the kv heads of a run in memory order, K before V, and uses each row of K and V for all
 * its queries.  Tokens, runs and spans that no row of an item sees (visibility.h) are skipped, so a step
 * costs what its window costs, however long the sequence is. */
#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "../include/paged_kv.h"
#include "append.h"
#include "gate.h"
#include "kernels/kernel.h"
#include "visibility.h"
#include "threads.h"
#include "work.h"

enum {
  ROWS_WORTH_A_THREAD = 32,        /* new rows to write */
  BYTES_WORTH_A_THREAD = 64 << 10, /* in a call with fewer, waking a thread costs more than it saves */
};

/* The kernels' exponentials are powers of 2. */
static const float LOG2_E = 0x1.715476p+0f;

typedef struct {
  const pkv_kernel *kernel;
  const pkv_pages *pages;
  const pkv_batch *batch;
  const pkv_attention *attention;
  const int64_t *slots; /* [num_tokens], where k and v are written first; NULL: they are written */
  pkv_layer layer;
  float scale;  /* of scores, in units of log2 */
  float *sinks; /* [num_q_heads], in units of log2; NULL: none */
  int32_t num_q_heads;
  bool is_cached;     /* the pages that the call reads */
  bool has_pairs;     /* keys and queries of bfloat16 are multiplied two dims at a time */
  int32_t run_tokens; /* of whole pages, or PKV_RUN_TOKENS of a larger one */
  work work;

  work_item *items;
  int64_t num_items;
  atomic_llong next_item;
  atomic_int *num_ended; /* [item]: pieces that have ended, counted at the item's first one */
  float *partials;       /* states of [span, row] of items in pieces */
  char *worker_scratch;  /* [num_workers] */
  size_t worker_bytes;
} job;

/* ---- addresses */

static pkv_state state_at(const item_shape *shape, float *states, int64_t index) {
  float *floats = states + index * shape->state_floats;
  return (pkv_state){floats, floats + shape->num_q_heads, floats + shape->state_floats - shape->value_floats};
}

static pkv_state state_of_head(const job *job, pkv_state state, int32_t q_head) {
  return (pkv_state){state.maximum + q_head, state.sum + q_head,
                     state.accumulated + q_head * pkv_padded(job->pages->head_dim_v)};
}

static void clear(const item_shape *shape, pkv_state state) {
  for (int32_t h = 0; h < shape->num_q_heads; h++) state.maximum[h] = -INFINITY;
  memset(state.sum, 0, (size_t)shape->num_q_heads * sizeof(float));
  memset(state.accumulated, 0, (size_t)shape->value_floats * sizeof(float));
}

/* The end of the run that begins at token `start`. */
static int32_t end_of_run(const job *job, int32_t start, int32_t span_end) {
  int64_t end = (int64_t)start + job->run_tokens; /* may exceed int32 at the end of the longest sequence */
  int32_t page_size = job->pages->page_size;
  if (page_size > PKV_RUN_TOKENS) { /* a piece of a page does not reach into the next page */
    int64_t page_end = ((int64_t)start / page_size + 1) * page_size;
    if (end > page_end) end = page_end;
  }
  return end < span_end ? (int32_t)end : span_end;
}

static bool are_in_page(const job *job, int32_t start, int32_t end) {
  return start / job->pages->page_size == (end - 1) / job->pages->page_size;
}

/* The number of ones from bit 0 up to the first zero. */
static int num_low_ones(uint64_t bits) { return ~bits ? __builtin_ctzll(~bits) : 64; }

/* The addresses of the tokens of `mask`; bit 0 is token `start`. */
static void locate_tokens(const job *job, int32_t seq, int32_t start, uint64_t mask, const char **k,
                          const char **v) {
  const pkv_pages *pages = job->pages;
  const pkv_batch *batch = job->batch;
  const int32_t *page_ids = batch->kv_indices + batch->kv_indptr[seq];
  int32_t first_page = batch->first_pages ? batch->first_pages[seq] : 0;
  int32_t page = start / pages->page_size;
  int64_t page_start = (int64_t)page * pages->page_size - start; /* as a bit */
  for (; mask; page++, page_start += pages->page_size) {
    uint64_t in_page = mask & bits_between(0, page_start + pages->page_size);
    mask &= ~in_page;
    if (!in_page) continue;
    int64_t page_id = page_ids[page < batch->sink_pages ? page : batch->sink_pages + page - first_page];
    const char *k_page = pages->k + page_id * pages->k_page_stride;
    const char *v_page = pages->v + page_id * pages->v_page_stride;
    while (in_page) { /* consecutive tokens, up to a gap */
      int t = __builtin_ctzll(in_page), end = t + num_low_ones(in_page >> t);
      in_page &= ~bits_between(t, end);
      const char *k_row = k_page + (t - page_start) * pages->k_token_stride;
      const char *v_row = v_page + (t - page_start) * pages->v_token_stride;
      for (; t < end; t++, k_row += pages->k_token_stride, v_row += pages->v_token_stride) {
        k[t] = k_row;
        if (v) v[t] = v_row;
      }
    }
  }
}

/* ---- one work item */

typedef struct {
  float *q;      /* [rows], prepared */
  float *states; /* [rows], of the spans merged so far */
  float *span;   /* [rows], of the current span */
} scratch;

static int64_t scratch_floats(const item_shape *shape) {
  return shape->num_rows * (2 * shape->state_floats + shape->q_floats);
}

static scratch scratch_of(const job *job, const item_shape *shape, int32_t worker) {
  float *floats = (float *)(job->worker_scratch + (size_t)worker * job->worker_bytes);
  int64_t states = shape->num_rows * shape->state_floats;
  return (scratch){floats + 2 * states, floats, floats + states};
}

/* Arrays that only some runs need: compacted addresses, and distances. */
typedef struct {
  const char *k[PKV_RUN_TOKENS], *v[PKV_RUN_TOKENS];
  float distances[PKV_RUN_TOKENS];
} own_tokens;

/* Set the run's tokens to those of `mask`; k and v hold the address of each bit, all in one page or not.
 * The first row's own token is at bit to_own. */
static void set_tokens(const job *job, pkv_run *run, uint64_t mask, const char *const *k,
                       const char *const *v, bool is_in_page, int32_t to_own, own_tokens *own) {
  int first = __builtin_ctzll(mask);
  uint64_t shifted = mask >> first;
  run->num_tokens = __builtin_popcountll(mask);
  run->k = k + first;
  run->v = v + first;
  run->k_stride = is_in_page ? job->pages->k_token_stride : 0;
  run->v_stride = is_in_page ? job->pages->v_token_stride : 0;
  if (shifted & (shifted + 1)) { /* a gap between sinks and window: compact */
    for (int32_t i = 0; mask; mask &= mask - 1, i++) {
      own->k[i] = k[__builtin_ctzll(mask)];
      own->v[i] = v[__builtin_ctzll(mask)];
    }
    run->k = own->k;
    run->v = own->v;
    run->k_stride = run->v_stride = 0;
  }
  if (!job->layer.alibi_slopes) return;
  memset(own->distances, 0, sizeof own->distances);
  int32_t i = 0;
  for (uint64_t left = shifted; left; left &= left - 1)
    own->distances[i++] = (float)(first + __builtin_ctzll(left) - to_own);
  run->distances = own->distances;
}

/* Fold the run into the states of its rows, from kv head `head` on. */
static void fold_heads(const job *job, const work_item *item, pkv_run *run, int32_t head, const float *q,
                       pkv_state state) {
  const pkv_layer *layer = &job->layer;
  int32_t own_head = (head - item->first_head) * layer->group; /* within the item's q and state */
  run->first_head = head;
  pkv_fold *fold = pkv_choose_fold(job->kernel, layer, item->num_rows * layer->group, job->is_cached);
  fold(layer, run, q + (int64_t)own_head * pkv_padded(layer->k.dim), state_of_head(job, state, own_head));
}

/* True when `mask` is `before` plus later tokens only, so that both rows can share one fold, in which
 * each sees a prefix of the tokens. */
static bool extends(uint64_t before, uint64_t mask) {
  uint64_t more = mask & ~before;
  if (before & ~mask) return false;
  return !more || (before && __builtin_ctzll(more) > 63 - __builtin_clzll(before));
}

/* The keys of the run that begins at `start`, up to the first gap, to be prefetched.  Returns their
 * number. */
static int32_t locate_next_keys(const job *job, const work_item *item, int32_t start, const char **k) {
  int32_t row = item->first_row + item->num_rows - 1, end = num_seen(job->batch, item->seq, row);
  if (start >= end) return 0;
  uint64_t mask = visible(job->batch, item->seq, row, start, end_of_run(job, start, end));
  if (mask & (mask + 1)) return 0; /* a gap between sinks and window: not prefetched */
  locate_tokens(job, item->seq, start, mask, k, NULL);
  return __builtin_popcountll(mask);
}

static void fold_run_into_rows(const job *job, const work_item *item, int32_t start, int32_t end,
                               const scratch *scratch, float *states) {
  const char *k[PKV_RUN_TOKENS], *v[PKV_RUN_TOKENS];
  uint64_t masks[MAX_ROWS_PER_ITEM], all = 0;
  int32_t num_seen_of[MAX_ROWS_PER_ITEM];
  for (int32_t row = 0; row < item->num_rows; row++) {
    masks[row] = visible(job->batch, item->seq, item->first_row + row, start, end);
    num_seen_of[row] = __builtin_popcountll(masks[row]);
    all |= masks[row];
  }
  if (!all) return;
  locate_tokens(job, item->seq, start, all, k, v);
  const char *next_k[PKV_RUN_TOKENS];
  int32_t num_next = locate_next_keys(job, item, end, next_k);
  bool is_in_page = are_in_page(job, start, end);
  pkv_run run = {.q_stride = item->shape->q_floats, .state_stride = item->shape->state_floats};
  own_tokens own;
  int32_t end_head = item->first_head + item->shape->num_kv_heads;
  for (int32_t head = item->first_head; head < end_head; head += run.num_kv_heads) {
    run.is_resident = false;
    for (int32_t row = 0; row < item->num_rows; row += run.num_rows) {
      run.num_rows = 1;
      while (row + run.num_rows < item->num_rows &&
             extends(masks[row + run.num_rows - 1], masks[row + run.num_rows]))
        run.num_rows++;
      /* All heads in one fold, unless other rows read the same tokens before the next head's. */
      run.num_kv_heads = run.num_rows == item->num_rows ? end_head - head : 1;
      if (!masks[row]) continue;
      uint64_t mask = masks[row + run.num_rows - 1];
      run.num_seen = mask == masks[row] ? NULL : num_seen_of + row;
      int32_t to_own = num_seen(job->batch, item->seq, item->first_row + row) - 1 - start;
      set_tokens(job, &run, mask, k, v, is_in_page, to_own, &own);
      bool is_last = head + run.num_kv_heads == end_head;
      run.k_next = is_last ? next_k : run.k; /* the same tokens of the next head */
      run.num_next = is_last ? num_next : run.num_tokens;
      run.next_head = is_last ? item->first_head : head + 1;
      fold_heads(job, item, &run, head, scratch->q + row * run.q_stride, state_at(item->shape, states, row));
      run.is_resident = true;
    }
  }
}

/* Fold one span, for each row of the item as far as the row sees it. */
static void fold_span(const job *job, const work_item *item, int32_t start, const scratch *scratch,
                      float *states) {
  for (int32_t row = 0; row < item->num_rows; row++) clear(item->shape, state_at(item->shape, states, row));
  int32_t end = num_seen(job->batch, item->seq, item->first_row + item->num_rows - 1);
  if (end > (int64_t)start + job->work.span_tokens) end = start + job->work.span_tokens;
  while (start < end) {
    int32_t run_end = end_of_run(job, start, end);
    fold_run_into_rows(job, item, start, run_end, scratch, states);
    start = run_end;
  }
}

/* Merge a span's states into those of the spans before; the first span that a row sees starts its state. */
static void merge_span(const job *job, const work_item *item, int32_t start, float *states, float *later) {
  for (int32_t row = 0; row < item->num_rows; row++) {
    int32_t q_row = item->first_row + row;
    pkv_state state = state_at(item->shape, states, row), of_span = state_at(item->shape, later, row);
    if (!sees_span(job->batch, job->work.span_tokens, item->seq, q_row, start)) continue;
    if (is_first_span(job->batch, job->work.span_tokens, item->seq, q_row, start))
      memcpy(state.maximum, of_span.maximum, (size_t)item->shape->state_floats * sizeof(float));
    else
      job->kernel->merge(state, of_span, item->shape->num_q_heads, job->pages->head_dim_v);
  }
}

static int32_t first_q_head(const job *job, const work_item *item) {
  return item->first_head * (job->num_q_heads / job->pages->num_kv_heads);
}

static void finish_rows(const job *job, const work_item *item, float *states) {
  const pkv_tensor *out = &job->attention->out;
  for (int64_t row = 0; row < item->num_rows; row++)
    for (int32_t i = 0; i < item->shape->num_q_heads; i++) {
      int64_t q_row = item->first_row + row, head = first_q_head(job, item) + i;
      pkv_state state = state_of_head(job, state_at(item->shape, states, row), i);
      float *lse = job->attention->lse ? job->attention->lse + q_row * job->num_q_heads + head : NULL;
      job->kernel->finish(out->data + q_row * out->token_stride + head * out->head_stride, out->dtype, state,
                          job->sinks ? job->sinks + head : NULL, job->pages->head_dim_v, lse);
    }
}

static float *partial_states(const job *job, const work_item *item, int32_t span) {
  return job->partials + item->first_partial + (int64_t)span * item->num_rows * item->shape->state_floats;
}

static void prepare_rows(const job *job, const work_item *item, float *prepared) {
  const pkv_tensor *q = &job->attention->q;
  int32_t head_dim = job->pages->head_dim;
  for (int64_t row = 0; row < item->num_rows; row++)
    for (int32_t i = 0; i < item->shape->num_q_heads; i++) {
      const char *from = q->data + (item->first_row + row) * q->token_stride +
                         (first_q_head(job, item) + i) * q->head_stride;
      float *to = prepared + row * item->shape->q_floats + i * pkv_padded(job->layer.k.dim);
      if (job->has_pairs)
        memcpy(to, from, (size_t)head_dim * sizeof(uint16_t));
      else
        job->kernel->prepare_q(to, from, q->dtype, job->scale, head_dim);
    }
}

/* ---- new keys and values */

static void write_rows_of(const job *job, const work_item *item, int32_t first_head, int32_t num_kv_heads) {
  pkv_tensor k = job->attention->k, v = job->attention->v;
  pkv_pages pages = *job->pages;
  k.data += item->first_row * k.token_stride + first_head * k.head_stride;
  v.data += item->first_row * v.token_stride + first_head * v.head_stride;
  pages.k += first_head * pages.k_head_stride;
  pages.v += first_head * pages.v_head_stride;
  pages.num_kv_heads = num_kv_heads;
  pkv_write_rows(job->kernel, &pages, item->num_rows, job->slots + item->first_row, &k, &v, false);
}

static void write_before_all(void *context, int32_t worker) {
  (void)worker;
  job *job = context;
  long long i;
  while ((i = atomic_fetch_add(&job->next_item, 1)) < job->num_items)
    if (job->items[i].new_rows == WRITTEN_BEFORE_ALL)
      write_rows_of(job, &job->items[i], 0, job->pages->num_kv_heads);
}

/* On all workers when there are many rows, as in a prompt. */
static void write_new_rows(int32_t num_workers, int64_t num_before, job *job) {
  if (!job->slots || !num_before) return;
  if (num_workers > 1 && num_before >= (int64_t)ROWS_WORTH_A_THREAD * num_workers)
    pkv_threads_run(num_workers, write_before_all, job);
  else
    write_before_all(job, 0);
  atomic_store(&job->next_item, 0);
}

/* ---- item by item */

/* For an item whose pieces have all ended; its first piece has merged its own spans. */
static void merge_pieces(const job *job, const work_item *first) {
  const work_item *last = first + first->num_pieces - 1;
  float *states = partial_states(job, first, 0);
  span_list spans =
      spans_of(job->batch, job->work.span_tokens, first->seq, first->first_row, first->num_rows);
  for (int32_t i = first->end_span; i < last->end_span; i++)
    merge_span(job, first, start_of_span(spans, i), states, partial_states(job, first, i));
  finish_rows(job, first, states);
}

/* Merge spans as they come; a piece that is not the item's first leaves the states of its spans. */
static void attend_item(const job *job, const work_item *item, int32_t worker) {
  scratch scratch = scratch_of(job, item->shape, worker);
  span_list spans = spans_of(job->batch, job->work.span_tokens, item->seq, item->first_row, item->num_rows);
  if (job->slots && item->new_rows == WRITTEN_BY_ITSELF)
    write_rows_of(job, item, item->first_head, item->shape->num_kv_heads);
  prepare_rows(job, item, scratch.q);
  for (int32_t row = 0; spans.count == 0 && row < item->num_rows; row++)
    clear(item->shape, state_at(item->shape, scratch.states, row));
  bool is_cut = item->num_pieces > 1;
  float *merged = is_cut ? partial_states(job, item, 0) : scratch.states;
  for (int32_t i = item->first_span; i < item->end_span; i++) {
    int32_t start = start_of_span(spans, i);
    float *states = i == 0 ? merged : item->first_span ? partial_states(job, item, i) : scratch.span;
    fold_span(job, item, start, &scratch, states);
    if (i > 0 && item->first_span == 0) merge_span(job, item, start, merged, scratch.span);
  }
  if (!is_cut)
    finish_rows(job, item, merged);
  else if (atomic_fetch_add(&job->num_ended[item->first_piece], 1) == item->num_pieces - 1)
    merge_pieces(job, &job->items[item->first_piece]);
}

static void attend_items(void *context, int32_t worker) {
  job *job = context;
  long long i;
  while ((i = atomic_fetch_add(&job->next_item, 1)) < job->num_items)
    attend_item(job, &job->items[job->num_items - 1 - i], worker); /* the longest first */
}

/* ---- one call */

static size_t aligned(size_t num_bytes) { return (num_bytes + 63) & ~(size_t)63; }

static bool is_dim(int32_t dim) { return dim >= 8 && dim <= PKV_MAX_HEAD_DIM && dim % 8 == 0; }

static bool is_valid(const pkv_pages *pages, int32_t num_q_heads) {
  return is_dim(pages->head_dim) && is_dim(pages->head_dim_v) && pages->page_size >= 1 &&
         pages->num_kv_heads >= 1 && num_q_heads >= 1 && num_q_heads % pages->num_kv_heads == 0;
}

/* Slopes and sinks in units of log2, for as long as the call runs. */
static void scale_options(job *job, float *memory) {
  const float *slopes = job->attention->alibi_slopes, *sinks = job->attention->sinks;
  float *scaled_slopes = memory, *scaled_sinks = memory + job->num_q_heads;
  job->layer.alibi_slopes = slopes ? scaled_slopes : NULL;
  job->sinks = sinks ? scaled_sinks : NULL;
  for (int32_t h = 0; h < job->num_q_heads; h++) {
    if (slopes) scaled_slopes[h] = slopes[h] * LOG2_E;
    if (sinks) scaled_sinks[h] = sinks[h] * LOG2_E;
  }
}

static bool overlaps(const pkv_tensor *a, int64_t a_bytes, const pkv_tensor *b, int64_t b_bytes) {
  return a->data < b->data + b_bytes && b->data < a->data + a_bytes;
}

static bool out_overlaps(const pkv_attention *attention) {
  const pkv_tensor *q = &attention->q, *out = &attention->out;
  const int64_t *bytes = attention->byte_lengths;
  bool is_q = out->data == q->data && out->token_stride == q->token_stride &&
              out->head_stride == q->head_stride && bytes[3] == bytes[0];
  return (!is_q && overlaps(out, bytes[3], q, bytes[0])) ||
         (attention->has_rows && (overlaps(out, bytes[3], &attention->k, bytes[1]) ||
                                  overlaps(out, bytes[3], &attention->v, bytes[2])));
}

static int32_t span_tokens_of(const pkv_pages *pages) {
  int32_t page_size = pages->page_size;
  return page_size > PKV_SPAN_TOKENS ? page_size : PKV_SPAN_TOKENS / page_size * page_size;
}

/* Split the work for up to num_workers, allocate its scratch, do it. */
static pkv_status attend_with(pkv_threads *threads, int32_t num_workers, job *job) {
  int64_t token_bytes =
      (int64_t)4 * job->pages->num_kv_heads * (job->pages->head_dim + job->pages->head_dim_v);
  if (pkv_cost_of_work(job->batch) <= (BYTES_WORTH_A_THREAD - 1) / token_bytes) num_workers = 1;
  job->work = pkv_work_of(job->pages, job->batch, job->num_q_heads, span_tokens_of(job->pages), num_workers);
  work_size size = pkv_cut_work(&job->work, NULL);
  if (size.num_items < num_workers) num_workers = size.num_items ? (int32_t)size.num_items : 1;

  int64_t all_heads = scratch_floats(&job->work.all_heads);
  int64_t one_head = scratch_floats(&job->work.one_head);
  job->worker_bytes = aligned((size_t)(all_heads > one_head ? all_heads : one_head) * sizeof(float));
  size_t items_bytes = aligned((size_t)size.num_items * sizeof(work_item));
  size_t counts_bytes = aligned((size_t)size.num_items * sizeof(atomic_int));
  size_t partial_bytes = aligned((size_t)size.num_partials * sizeof(float));
  size_t options_bytes = aligned(2 * (size_t)job->num_q_heads * sizeof(float));
  size_t worker_bytes = (size_t)num_workers * job->worker_bytes;
  size_t num_bytes = options_bytes + items_bytes + counts_bytes + partial_bytes + worker_bytes;
  char *memory = threads ? pkv_threads_scratch(threads, num_bytes) : aligned_alloc(64, num_bytes);
  if (!memory) return PKV_OUT_OF_MEMORY;
  scale_options(job, (float *)memory);
  job->items = (work_item *)(memory + options_bytes);
  job->num_ended = (atomic_int *)((char *)job->items + items_bytes);
  job->partials = (float *)((char *)job->num_ended + counts_bytes);
  job->worker_scratch = (char *)job->partials + partial_bytes;
  job->num_items = size.num_items;
  pkv_cut_work(&job->work, job->items);
  memset(job->num_ended, 0, counts_bytes);

  write_new_rows(num_workers, size.num_before, job);
  pkv_threads_run(num_workers, attend_items, job);
  if (!threads) free(memory);
  return PKV_OK;
}

/* Do the pages that the call reads fit the shared cache? */
static bool are_cached(const pkv_pages *pages, const pkv_batch *batch) {
  int64_t k_bytes = (int64_t)pages->head_dim * (pages->k_dtype == PKV_FLOAT32 ? 4 : 2);
  int64_t v_bytes = (int64_t)pages->head_dim_v * (pages->v_dtype == PKV_FLOAT32 ? 4 : 2);
  int64_t page_bytes = (int64_t)pages->page_size * pages->num_kv_heads * (k_bytes + v_bytes);
  return pages->cached_bytes > 0 && batch->kv_indptr[batch->num_seqs] * page_bytes <= pages->cached_bytes;
}

static pkv_layer layer_of(const job *job) {
  const pkv_pages *pages = job->pages;
  pkv_format k = {pages->k_dtype, pages->head_dim, pages->k_head_stride};
  pkv_format v = {pages->v_dtype, pages->head_dim_v, pages->v_head_stride};
  if (job->has_pairs) {
    k.dtype = PKV_BFLOAT16_PAIRS;
    k.dim /= 2;
  }
  return (pkv_layer){.k = k,
                     .v = v,
                     .group = job->num_q_heads / pages->num_kv_heads,
                     .scale = job->has_pairs ? job->scale : 1.0f,
                     .soft_cap = job->attention->logits_soft_cap * LOG2_E};
}

/* plan: NULL for pages of no step.  Nothing is written before everything is validated. */
static pkv_status attend(pkv_threads *threads, const pkv_pages *pages, const pkv_batch *batch,
                         const pkv_plan *plan, const pkv_attention *attention) {
  const pkv_kernel *kernel = pkv_active_kernel();
  int32_t num_q_heads = attention->num_q_heads;
  if (!kernel || !is_valid(pages, num_q_heads) || (batch->sees_all && batch->window)) return PKV_BAD_ARGUMENT;
  if (attention->byte_lengths && out_overlaps(attention)) return PKV_OUT_OVERLAPS;
  job job = {.kernel = kernel,
             .pages = pages,
             .batch = batch,
             .attention = attention,
             .is_cached = are_cached(pages, batch)};
  job.scale = attention->sm_scale * LOG2_E;
  job.num_q_heads = num_q_heads;
  job.has_pairs = kernel->multiplies_pairs && attention->q.dtype == PKV_BFLOAT16 &&
                  pages->k_dtype == PKV_BFLOAT16 && pages->head_dim % 32 == 0;
  job.layer = layer_of(&job);
  int32_t page_size = pages->page_size;
  job.run_tokens = page_size > PKV_RUN_TOKENS ? PKV_RUN_TOKENS : PKV_RUN_TOKENS / page_size * page_size;

  if (!pkv_gate_enter(pages->gate)) return PKV_CLOSED;
  if (plan && attention->has_rows) {
    pkv_copy_shared_pages(pages, plan);
    job.slots = plan->slot_mapping;
  }
  int32_t num_workers = pkv_threads_claim(threads);
  pkv_status status = attend_with(num_workers ? threads : NULL, num_workers ? num_workers : 1, &job);
  if (num_workers) pkv_threads_release(threads);
  pkv_gate_leave(pages->gate);
  return status;
}

pkv_status pkv_attend(pkv_threads *threads, const pkv_pages *pages, const pkv_batch *batch,
                      const pkv_attention *attention) {
  return attend(threads, pages, batch, NULL, attention);
}

pkv_status pkv_step_attend(pkv_threads *threads, const pkv_pages *pages, pkv_plan *plan,
                           const pkv_attention *attention) {
  if (!plan->is_open) return pkv_why_closed(pages->gate);
  uint8_t *is_written = plan->is_written + pages->layer;
  if (!attention->has_rows && !*is_written) return PKV_LAYER_NOT_WRITTEN;
  pkv_status status = attend(threads, pages, &plan->batch, plan, attention);
  if (status == PKV_OK) *is_written = 1;
  return status;
}
