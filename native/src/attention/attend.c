/* Attention over pages: one call, from its arguments to the rows of the output.
 *
 * A call is validated, and its work split into items (work.h).  Threads take items, or pieces of a long one,
 * one at a time: write the new rows, prepare q, fold and merge spans (runs.h), finish.  The thread that ends
 * an item's last piece merges its spans, in the same order.  Before that, spans that several sequences share
 * are folded, level by level (cascade.h). */
#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "paged_kv.h"
#include "memory/append.h"
#include "memory/gate.h"
#include "kernels/kernel.h"
#include "runs.h"
#include "runtime/threads.h"
#include "visibility.h"
#include "work.h"

enum {
  ROWS_WORTH_A_THREAD = 32,        /* new rows to write */
  BYTES_WORTH_A_THREAD = 64 << 10, /* in a call with fewer, waking a thread costs more than it saves */
  /* When sharing pays, as measured (benchmarks/cascade.py): */
  MOST_QUERIES_TO_SHARE = 12, /* of a key, by one sequence; with more, arithmetic is the limit */
  LEAST_SPANS_TO_SHARE = 2,
  LEAST_BYTES_TO_SAVE = 512 << 10,
};

/* The kernels' exponentials are powers of 2. */
static const float LOG2_E = 0x1.715476p+0f;

typedef struct {
  pkv_call call;
  const pkv_attention *attention;
  const int64_t *slots; /* [num_tokens], where k and v are written first; NULL: they are written */
  float scale;          /* of scores, in units of log2 */
  float *sinks;         /* [num_q_heads], in units of log2; NULL: none */
  work work;
  float *options; /* [2, num_q_heads]: slopes and sinks, in units of log2 */
  pkv_cascade cascade;
  char *cascade_memory;
  float *carried; /* [num_kv_heads, rows of the cascade]: states over shared spans */

  item_shape *shapes; /* of the cascade's nodes */
  work_item *shared;  /* of the level that runs */
  int64_t num_shared;
  work_item *items;
  int64_t num_items;
  atomic_llong next_item;
  atomic_int *num_ended; /* [item]: pieces that have ended, counted at the item's first one */
  float *partials;       /* states of [span, row] of items in pieces */
  char *worker_scratch;  /* [num_workers] */
  size_t worker_bytes;
} job;

/* Keys and values of all heads. */
static int64_t bytes_of_token(const pkv_pages *pages) {
  int64_t k_bytes = (int64_t)pages->head_dim * (pages->k_dtype == PKV_FLOAT32 ? 4 : 2);
  int64_t v_bytes = (int64_t)pages->head_dim_v * (pages->v_dtype == PKV_FLOAT32 ? 4 : 2);
  return pages->num_kv_heads * (k_bytes + v_bytes);
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

static int32_t first_q_head(const job *job, const work_item *item) {
  return item->first_head * (job->call.num_q_heads / job->call.pages->num_kv_heads);
}

static void finish_rows(const job *job, const work_item *item, float *states) {
  const pkv_tensor *out = &job->attention->out;
  for (int64_t row = 0; row < item->num_rows; row++)
    for (int32_t i = 0; i < item->shape->num_q_heads; i++) {
      int64_t q_row = q_row_of(item, (int32_t)row), head = first_q_head(job, item) + i;
      pkv_state state = state_of_head(&job->call, state_at(item->shape, states, row), i);
      float *lse = job->attention->lse ? job->attention->lse + q_row * job->call.num_q_heads + head : NULL;
      job->call.kernel->finish(out->data + q_row * out->token_stride + head * out->head_stride, out->dtype,
                               state, job->sinks ? job->sinks + head : NULL, job->call.pages->head_dim_v,
                               lse);
    }
}

static float *partial_states(const job *job, const work_item *item, int32_t span) {
  int64_t index = span - item->num_carried;
  return job->partials + item->first_partial + index * item->num_rows * item->shape->state_floats;
}

static void prepare_rows(const job *job, const work_item *item, float *prepared) {
  const pkv_tensor *q = &job->attention->q;
  int32_t head_dim = job->call.pages->head_dim;
  for (int64_t row = 0; row < item->num_rows; row++)
    for (int32_t i = 0; i < item->shape->num_q_heads; i++) {
      const char *from = q->data + q_row_of(item, (int32_t)row) * q->token_stride +
                         (first_q_head(job, item) + i) * q->head_stride;
      float *to = prepared + row * item->shape->q_floats + i * pkv_padded(job->call.layer.k.dim);
      if (job->call.layer.k.dtype == PKV_BFLOAT16_PAIRS)
        memcpy(to, from, (size_t)head_dim * sizeof(uint16_t));
      else
        job->call.kernel->prepare_q(to, from, q->dtype, job->scale, head_dim);
    }
}

/* ---- new keys and values */

static void write_rows_of(const job *job, const work_item *item, int32_t first_head, int32_t num_kv_heads) {
  pkv_tensor k = job->attention->k, v = job->attention->v;
  pkv_pages pages = *job->call.pages;
  k.data += item->first_row * k.token_stride + first_head * k.head_stride;
  v.data += item->first_row * v.token_stride + first_head * v.head_stride;
  pages.k += first_head * pages.k_head_stride;
  pages.v += first_head * pages.v_head_stride;
  pages.num_kv_heads = num_kv_heads;
  pkv_write_rows(job->call.kernel, &pages, item->num_rows, job->slots + item->first_row, &k, &v, false);
}

static void write_before_all(void *context, int32_t worker) {
  (void)worker;
  job *job = context;
  long long i;
  while ((i = atomic_fetch_add(&job->next_item, 1)) < job->num_items)
    if (job->items[i].new_rows == WRITTEN_BEFORE_ALL)
      write_rows_of(job, &job->items[i], 0, job->call.pages->num_kv_heads);
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

/* The states over shared spans of a kv head, for the cascade's rows from `row` on. */
static float *carried_states(const job *job, int32_t head, int32_t row) {
  return job->carried + ((int64_t)head * job->cascade.num_rows + row) * job->work.one_head.state_floats;
}

/* Begin an item's states with those that it carries on, or leave them to be carried on. */
static void copy_carried(const job *job, const work_item *item, float *states, bool is_left) {
  const item_shape *one_head = &job->work.one_head;
  int32_t group = one_head->num_q_heads;
  for (int32_t row = 0; row < item->num_rows; row++)
    for (int32_t i = 0; i < item->shape->num_kv_heads; i++) {
      float *floats = carried_states(job, item->first_head + i, item->first_carried + row);
      pkv_state carried = state_at(one_head, floats, 0);
      pkv_state own = state_of_head(&job->call, state_at(item->shape, states, row), i * group);
      pkv_state from = is_left ? own : carried, to = is_left ? carried : own;
      memcpy(to.maximum, from.maximum, (size_t)group * sizeof(float));
      memcpy(to.sum, from.sum, (size_t)group * sizeof(float));
      memcpy(to.accumulated, from.accumulated, (size_t)one_head->value_floats * sizeof(float));
    }
}

/* For an item whose pieces have all ended; its first piece has merged its own spans. */
static void merge_pieces(const job *job, const work_item *first) {
  const work_item *last = first + first->num_pieces - 1;
  float *states = partial_states(job, first, first->num_carried);
  span_list spans =
      spans_of(job->call.batch, job->call.span_tokens, first->seq, first->first_row, first->num_rows);
  for (int32_t i = first->end_span; i < last->end_span; i++)
    pkv_merge_span(&job->call, first, start_of_span(spans, i), states, partial_states(job, first, i));
  finish_rows(job, first, states);
}

/* Merge spans as they come; a piece that is not the item's first leaves the states of its spans. */
static void attend_item(const job *job, const work_item *item, int32_t worker) {
  scratch scratch = scratch_of(job, item->shape, worker);
  span_list spans =
      spans_of(job->call.batch, job->call.span_tokens, item->seq, item->first_row, item->num_rows);
  if (job->slots && item->new_rows == WRITTEN_BY_ITSELF)
    write_rows_of(job, item, item->first_head, item->shape->num_kv_heads);
  prepare_rows(job, item, scratch.q);
  for (int32_t row = 0; spans.count == 0 && row < item->num_rows; row++)
    clear(item->shape, state_at(item->shape, scratch.states, row));
  bool is_cut = item->num_pieces > 1, is_first = item->first_span == item->num_carried;
  float *merged = is_cut ? partial_states(job, item, item->num_carried) : scratch.states;
  if (is_first && item->num_carried) copy_carried(job, item, merged, false);
  for (int32_t i = item->first_span; i < item->end_span; i++) {
    int32_t start = start_of_span(spans, i);
    float *states = i == 0 ? merged : is_first ? scratch.span : partial_states(job, item, i);
    pkv_fold_span(&job->call, item, start, scratch.q, states);
    if (i > 0 && is_first) pkv_merge_span(&job->call, item, start, merged, scratch.span);
  }
  if (!is_cut)
    finish_rows(job, item, merged);
  else if (atomic_fetch_add(&job->num_ended[item->first_piece], 1) == item->num_pieces - 1)
    merge_pieces(job, &job->items[item->first_piece]);
}

/* ---- shared spans, before all items */

static void fold_shared_item(const job *job, const work_item *item, int32_t worker) {
  scratch scratch = scratch_of(job, item->shape, worker);
  prepare_rows(job, item, scratch.q);
  if (item->num_carried) copy_carried(job, item, scratch.states, false);
  for (int32_t i = item->first_span; i < item->end_span; i++) {
    int32_t start = i * job->call.span_tokens; /* without a window, spans are consecutive */
    pkv_fold_span(&job->call, item, start, scratch.q, i == 0 ? scratch.states : scratch.span);
    if (i > 0) pkv_merge_span(&job->call, item, start, scratch.states, scratch.span);
  }
  copy_carried(job, item, scratch.states, true);
}

static void fold_shared_items(void *context, int32_t worker) {
  job *job = context;
  long long i;
  while ((i = atomic_fetch_add(&job->next_item, 1)) < job->num_shared)
    fold_shared_item(job, &job->shared[i], worker);
}

/* Level by level: each one carries on what the one above has left. */
static void fold_shared_spans(int32_t num_workers, job *job) {
  for (int32_t level = 0; level < job->cascade.num_levels; level++) {
    job->num_shared = pkv_cut_shared(&job->work, level, job->shapes, job->shared);
    pkv_threads_run(num_workers, fold_shared_items, job);
    atomic_store(&job->next_item, 0);
  }
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
static void scale_options(job *job) {
  const float *slopes = job->attention->alibi_slopes, *sinks = job->attention->sinks;
  float *scaled_slopes = job->options, *scaled_sinks = job->options + job->call.num_q_heads;
  job->call.layer.alibi_slopes = slopes ? scaled_slopes : NULL;
  job->sinks = sinks ? scaled_sinks : NULL;
  for (int32_t h = 0; h < job->call.num_q_heads; h++) {
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

/* Find what sequences share, and note it for the call.  False: there is no memory. */
static bool find_shared(job *job) {
  const pkv_batch *batch = job->call.batch;
  size_t shapes_bytes = aligned((size_t)batch->num_seqs * sizeof(item_shape));
  job->cascade_memory = malloc(shapes_bytes + (size_t)pkv_cascade_bytes(batch));
  if (!job->cascade_memory) return false;
  job->shapes = (item_shape *)job->cascade_memory;
  const pkv_pages *pages = job->call.pages;
  pkv_sharing sharing = {.page_size = pages->page_size,
                         .span_tokens = job->call.span_tokens,
                         .most_rows = MOST_QUERIES_TO_SHARE / job->call.layer.group,
                         .least_spans = LEAST_SPANS_TO_SHARE,
                         .least_tokens = LEAST_BYTES_TO_SAVE / bytes_of_token(pages)};
  if (batch->may_share == PKV_SHARE_ALL) {
    sharing.most_rows = INT32_MAX;
    sharing.least_spans = 1;
    sharing.least_tokens = 1;
  }
  job->cascade = pkv_find_cascade(batch, &sharing, job->cascade_memory + shapes_bytes);
  if (!job->cascade.num_nodes) return true;
  job->work.cascade = &job->cascade;
  pkv_shape_nodes(job->call.pages, &job->work, job->shapes);
  return true;
}

/* The next num_bytes of memory, which begins at a cache line; NULL while they are only counted. */
static void *take(char *memory, size_t *used, size_t num_bytes) {
  char *taken = memory ? memory + *used : NULL;
  *used += aligned(num_bytes);
  return taken;
}

/* Floats of scratch that the largest item needs. */
static int64_t most_scratch(const job *job) {
  int64_t most = scratch_floats(&job->work.all_heads), one_head = scratch_floats(&job->work.one_head);
  if (most < one_head) most = one_head;
  for (int32_t i = 0; i < job->cascade.num_nodes; i++)
    if (most < scratch_floats(&job->shapes[i])) most = scratch_floats(&job->shapes[i]);
  return most;
}

/* Shared items of the level that has most. */
static int64_t most_shared(const job *job) {
  int64_t most = 0;
  for (int32_t level = 0; level < job->cascade.num_levels; level++) {
    int64_t count = pkv_cut_shared(&job->work, level, job->shapes, NULL);
    if (most < count) most = count;
  }
  return most;
}

/* Place what the call needs in its memory.  Returns the bytes; with NULL it only counts them. */
static size_t lay_out(job *job, const work_size *size, int32_t num_workers, char *memory) {
  size_t used = 0, num_carried = (size_t)job->cascade.num_rows * (size_t)job->call.pages->num_kv_heads;
  job->worker_bytes = aligned((size_t)most_scratch(job) * sizeof(float));
  job->options = take(memory, &used, 2 * (size_t)job->call.num_q_heads * sizeof(float));
  job->items = take(memory, &used, (size_t)size->num_items * sizeof(work_item));
  job->num_ended = take(memory, &used, (size_t)size->num_items * sizeof(atomic_int));
  job->partials = take(memory, &used, (size_t)size->num_partials * sizeof(float));
  job->shared = take(memory, &used, (size_t)most_shared(job) * sizeof(work_item));
  job->carried = take(memory, &used, num_carried * (size_t)job->work.one_head.state_floats * sizeof(float));
  job->worker_scratch = take(memory, &used, (size_t)num_workers * job->worker_bytes);
  return used;
}

/* Split the work for up to num_workers, allocate its scratch, do it. */
static pkv_status attend_with(pkv_threads *threads, int32_t num_workers, job *job) {
  const pkv_batch *batch = job->call.batch;
  int64_t token_bytes =
      (int64_t)4 * job->call.pages->num_kv_heads * (job->call.pages->head_dim + job->call.pages->head_dim_v);
  if (pkv_cost_of_work(batch) <= (BYTES_WORTH_A_THREAD - 1) / token_bytes) num_workers = 1;
  job->work = pkv_work_of(job->call.pages, batch, job->call.num_q_heads, job->call.span_tokens, num_workers);
  if (batch->may_share && batch->num_seqs > 1 && !find_shared(job)) return PKV_OUT_OF_MEMORY;
  work_size size = pkv_cut_work(&job->work, NULL);
  if (size.num_items < num_workers) num_workers = size.num_items ? (int32_t)size.num_items : 1;
  size_t num_bytes = lay_out(job, &size, num_workers, NULL);
  char *memory = threads ? pkv_threads_scratch(threads, num_bytes) : aligned_alloc(64, num_bytes);
  if (!memory) return PKV_OUT_OF_MEMORY;
  lay_out(job, &size, num_workers, memory);
  scale_options(job);
  job->num_items = size.num_items;
  pkv_cut_work(&job->work, job->items);
  memset(job->num_ended, 0, (size_t)size.num_items * sizeof(atomic_int));

  write_new_rows(num_workers, size.num_before, job);
  fold_shared_spans(num_workers, job);
  pkv_threads_run(num_workers, attend_items, job);
  if (!threads) free(memory);
  return PKV_OK;
}

/* Do the pages that the call reads fit the shared cache? */
static bool are_cached(const pkv_pages *pages, const pkv_batch *batch) {
  int64_t page_bytes = pages->page_size * bytes_of_token(pages);
  return pages->cached_bytes > 0 && batch->kv_indptr[batch->num_seqs] * page_bytes <= pages->cached_bytes;
}

static pkv_layer layer_of(const pkv_kernel *kernel, const pkv_pages *pages, const pkv_attention *attention) {
  pkv_layer layer = {.k = {pages->k_dtype, pages->head_dim, pages->k_head_stride},
                     .v = {pages->v_dtype, pages->head_dim_v, pages->v_head_stride},
                     .group = attention->num_q_heads / pages->num_kv_heads,
                     .scale = 1.0f,
                     .soft_cap = attention->logits_soft_cap * LOG2_E};
  if (kernel->multiplies_pairs && attention->q.dtype == PKV_BFLOAT16 && pages->k_dtype == PKV_BFLOAT16 &&
      pages->head_dim % 32 == 0) {
    layer.k.dtype = PKV_BFLOAT16_PAIRS;
    layer.k.dim /= 2;
    layer.scale = attention->sm_scale * LOG2_E;
  }
  return layer;
}

static pkv_call call_of(const pkv_kernel *kernel, const pkv_pages *pages, const pkv_batch *batch,
                        const pkv_attention *attention) {
  int32_t page_size = pages->page_size;
  return (pkv_call){
      .kernel = kernel,
      .pages = pages,
      .batch = batch,
      .layer = layer_of(kernel, pages, attention),
      .num_q_heads = attention->num_q_heads,
      .is_cached = are_cached(pages, batch),
      .run_tokens = page_size > PKV_RUN_TOKENS ? PKV_RUN_TOKENS : PKV_RUN_TOKENS / page_size * page_size,
      .span_tokens = page_size > PKV_SPAN_TOKENS ? page_size : PKV_SPAN_TOKENS / page_size * page_size,
  };
}

/* plan: NULL for pages of no step.  Nothing is written before everything is validated. */
static pkv_status attend(pkv_threads *threads, const pkv_pages *pages, const pkv_batch *batch, pkv_plan *plan,
                         const pkv_attention *attention) {
  const pkv_kernel *kernel = pkv_active_kernel();
  int32_t num_q_heads = attention->num_q_heads;
  if (!kernel || !is_valid(pages, num_q_heads) || (batch->sees_all && batch->window)) return PKV_BAD_ARGUMENT;
  if (attention->byte_lengths && out_overlaps(attention)) return PKV_OUT_OVERLAPS;
  job job = {.call = call_of(kernel, pages, batch, attention),
             .attention = attention,
             .scale = attention->sm_scale * LOG2_E};
  if (!pkv_gate_enter(pages->gate)) return PKV_CLOSED;
  if (plan && attention->has_rows) {
    pkv_prepare_pages(pages, plan);
    job.slots = plan->slot_mapping;
  }
  int32_t num_workers = pkv_threads_claim(threads);
  pkv_status status = attend_with(num_workers ? threads : NULL, num_workers ? num_workers : 1, &job);
  free(job.cascade_memory);
  if (plan) plan->bytes_not_read += job.cascade.tokens_saved * bytes_of_token(pages);
  if (plan && !job.cascade.num_nodes) plan->batch.may_share = PKV_SHARE_NONE; /* in no other layer either */
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
