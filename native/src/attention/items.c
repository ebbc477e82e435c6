/* Work items of a call of attention, done by threads that take them one at a time.
 *
 *   item     prepare q, fold and merge spans (runs.h), finish; write the new rows that it alone reads
 *   piece    some spans of a long item: the thread that ends the last one merges them, in the same order
 *   shared   spans that several sequences begin with, folded level by level before all items (cascade.h) */
#include "items.h"

#include <string.h>

#include "mass.h"
#include "memory/append.h"
#include "visibility.h"

enum { ROWS_WORTH_A_THREAD = 32 }; /* new rows to write */

typedef struct {
  float *q;      /* [rows], prepared */
  float *states; /* [rows], of the spans merged so far */
  float *span;   /* [rows], of the current span */
} scratch;

static scratch scratch_of(const pkv_job *job, const item_shape *shape, int32_t worker) {
  float *floats = (float *)(job->worker_scratch + (size_t)worker * job->worker_bytes);
  int64_t states = shape->num_rows * shape->state_floats;
  return (scratch){floats + 2 * states, floats, floats + states};
}

static int32_t first_q_head(const pkv_job *job, const work_item *item) {
  return item->first_head * (job->call.num_q_heads / job->call.pages->num_kv_heads);
}

static void finish_rows(const pkv_job *job, const work_item *item, float *states) {
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

static float *partial_states(const pkv_job *job, const work_item *item, int32_t span) {
  int64_t index = span - item->num_carried;
  return job->partials + item->first_partial + index * item->num_rows * item->shape->state_floats;
}

/* One head of q, for keys of this format. */
static void prepare_head(const pkv_job *job, const pkv_format *k, float *to, const char *from) {
  const pkv_tensor *q = &job->attention->q;
  int32_t head_dim = job->call.pages->head_dim;
  if (k->dtype == PKV_BFLOAT16_PAIRS)
    memcpy(to, from, (size_t)head_dim * sizeof(uint16_t));
  else if (k->dtype == PKV_INT8)
    job->call.kernel->prepare_q8((pkv_q8 *)to, from, q->dtype, job->scale, head_dim);
  else
    job->call.kernel->prepare_q(to, from, q->dtype, job->scale, head_dim);
}

static void prepare_rows(const pkv_job *job, const work_item *item, float *prepared) {
  const pkv_call *call = &job->call;
  const pkv_tensor *q = &job->attention->q;
  int64_t num_heads = item->shape->num_q_heads;
  for (int64_t row = 0; row < item->num_rows; row++)
    for (int32_t i = 0; i < num_heads; i++) {
      const char *from = q->data + q_row_of(item, (int32_t)row) * q->token_stride +
                         (first_q_head(job, item) + i) * q->head_stride;
      const pkv_format *k = &call->layer.k;
      float *to = prepared + row * item->shape->q_floats;
      prepare_head(job, k, to + i * pkv_prepared_floats(k->dim, k->dtype), from);
      int32_t end = 0; /* of what is prepared */
      for (int32_t packed = 0; packed < call->num_packed; packed++) {
        if (call->packed_q[packed] <= end) continue;
        k = &call->packed[packed].k;
        end = call->packed_q[packed];
        prepare_head(job, k, to + num_heads * end + i * pkv_prepared_floats(k->dim, k->dtype), from);
      }
    }
}

/* ---- new keys and values */

static void write_rows_of(const pkv_job *job, const work_item *item, int32_t first_head,
                          int32_t num_kv_heads) {
  pkv_tensor k = job->attention->k, v = job->attention->v;
  pkv_pages pages = *job->call.pages;
  k.data += item->first_row * k.token_stride + first_head * k.head_stride;
  v.data += item->first_row * v.token_stride + first_head * v.head_stride;
  pages.k += first_head * pages.k_head_stride;
  pages.v += first_head * pages.v_head_stride;
  if (pkv_scale_bytes(pages.k_dtype)) pages.k_scales.data += first_head * pages.k_scales.head_stride;
  if (pkv_scale_bytes(pages.v_dtype)) pages.v_scales.data += first_head * pages.v_scales.head_stride;
  pages.num_kv_heads = num_kv_heads;
  pkv_write_rows(job->call.kernel, &pages, item->num_rows, job->slots + item->first_row, &k, &v, false);
}

static void write_before_all(void *context, int32_t worker) {
  (void)worker;
  pkv_job *job = context;
  long long i;
  while ((i = atomic_fetch_add(&job->next_item, 1)) < job->num_items)
    if (job->items[i].new_rows == WRITTEN_BEFORE_ALL)
      write_rows_of(job, &job->items[i], 0, job->call.pages->num_kv_heads);
}

/* On all workers when there are many rows, as in a prompt. */
void pkv_write_new_rows(int32_t num_workers, int64_t num_before, pkv_job *job) {
  if (!job->slots || !num_before) return;
  if (num_workers > 1 && num_before >= (int64_t)ROWS_WORTH_A_THREAD * num_workers)
    pkv_threads_run(num_workers, write_before_all, job);
  else
    write_before_all(job, 0);
  atomic_store(&job->next_item, 0);
}

/* ---- item by item */

/* The states over shared spans of a kv head, for the cascade's rows from `row` on. */
static float *carried_states(const pkv_job *job, int32_t head, int32_t row) {
  return job->carried + ((int64_t)head * job->cascade.num_rows + row) * job->work.one_head.state_floats;
}

/* Begin an item's states with those that it carries on, or leave them to be carried on. */
static void copy_carried(const pkv_job *job, const work_item *item, float *states, bool is_left) {
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
static void merge_pieces(const pkv_job *job, const work_item *first, const pkv_masses *masses,
                         int32_t worker) {
  const work_item *last = first + first->num_pieces - 1;
  float *states = partial_states(job, first, first->num_carried);
  span_list spans =
      spans_of(job->call.batch, job->call.span_tokens, first->seq, first->first_row, first->num_rows);
  for (int32_t i = first->end_span; i < last->end_span; i++)
    if (pkv_reads_span(&job->call, first, start_of_span(spans, i)))
      pkv_merge_span(&job->call, first, start_of_span(spans, i), states, partial_states(job, first, i));
  finish_rows(job, first, states);
  if (masses) pkv_add_masses(job, first, spans, states, masses, worker);
}

/* ---- weights that are known before any item */

static bool skips_values(const pkv_job *job, int32_t seq) {
  return job->skip_values > 0 && num_rows_of(job->call.batch, seq) == 1;
}

/* Of a single row and a kv head, the weights of the first run, which has the sinks, and of the last one,
 * without the newest token, which may not be written yet.  So much is known of the row's total to all of its
 * items. */
static void know_weights(const pkv_job *job, int32_t seq, int32_t head, int32_t worker) {
  const pkv_call *call = &job->call;
  const item_shape *shape = &job->work.one_head;
  work_item item = {.shape = shape,
                    .seq = seq,
                    .first_head = head,
                    .first_row = call->batch->qo_indptr[seq],
                    .num_rows = 1};
  scratch scratch = scratch_of(job, shape, worker);
  span_list spans = spans_of(call->batch, call->span_tokens, seq, item.first_row, 1);
  int32_t end = num_seen(call->batch, seq, item.first_row) - 1, run_end;
  pkv_state state = state_at(shape, scratch.span, 0);
  clear(shape, state);
  prepare_rows(job, &item, scratch.q);
  int32_t start = spans.count ? start_of_span(spans, 0) : end, last = start;
  if (start < end) {
    pkv_fold_single_run(call, &item, start, pkv_end_of_run(call, start, end), scratch.q, scratch.span);
    for (int32_t i = spans.count - 1; i > 0 && last == start; i--)
      if (start_of_span(spans, i) < end) last = start_of_span(spans, i);
    while ((run_end = pkv_end_of_run(call, last, end)) < end) last = run_end;
    if (last != start) pkv_fold_single_run(call, &item, last, end, scratch.q, scratch.span);
  }
  int32_t num_q_heads = job->call.num_q_heads;
  float *known = job->known + 2 * (int64_t)seq * num_q_heads + head * shape->num_q_heads;
  memcpy(known, state.maximum, (size_t)shape->num_q_heads * sizeof(float));
  memcpy(known + num_q_heads, state.sum, (size_t)shape->num_q_heads * sizeof(float));
}

static void know_all_weights(void *context, int32_t worker) {
  pkv_job *job = context;
  int32_t num_heads = job->call.pages->num_kv_heads;
  long long i, count = job->call.batch->num_seqs * num_heads;
  while ((i = atomic_fetch_add(&job->next_item, 1)) < count)
    if (skips_values(job, (int32_t)(i / num_heads)))
      know_weights(job, (int32_t)(i / num_heads), (int32_t)(i % num_heads), worker);
}

void pkv_know_weights(int32_t num_workers, pkv_job *job) {
  pkv_threads_run(num_workers, know_all_weights, job);
  atomic_store(&job->next_item, 0);
}

static pkv_skipping skipping_of(const pkv_job *job, const work_item *item, span_list spans, int32_t worker) {
  const pkv_call *call = &job->call;
  const float *known = job->known + 2 * (int64_t)item->seq * call->num_q_heads;
  return (pkv_skipping){.share = job->skip_values / (float)((int64_t)spans.count * call->span_runs),
                        .maxima = known,
                        .sums = known + call->num_q_heads,
                        .num_skipped = job->num_skipped + 2 * worker,
                        .was_skipped = job->was_skipped + (int64_t)worker * call->num_q_heads};
}

/* Merge spans as they come; a piece that is not the item's first leaves the states of its spans. */
static void attend_item(const pkv_job *job, const work_item *item, int32_t worker) {
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
  pkv_notes notes = {0};
  const pkv_masses *masses = job->notes_mass ? &notes.masses : NULL;
  if (masses) {
    notes.masses = pkv_masses_of(job, item, spans, worker);
    pkv_clear_masses(job, item, masses, is_first ? 0 : item->first_span, item->end_span);
  }
  if (skips_values(job, item->seq)) notes.skipping = skipping_of(job, item, spans, worker);
  for (int32_t i = item->first_span; i < item->end_span; i++) {
    int32_t start = start_of_span(spans, i);
    float *states = i == 0 ? merged : is_first ? scratch.span : partial_states(job, item, i);
    if (i > 0 && !pkv_reads_span(&job->call, item, start)) continue;
    pkv_notes of_span = notes;
    if (masses) of_span.masses = pkv_masses_from(&job->call, masses, i);
    pkv_fold_span(&job->call, item, start, scratch.q, states, &of_span);
    if (i > 0 && is_first) pkv_merge_span(&job->call, item, start, merged, scratch.span);
  }
  if (!is_cut) {
    finish_rows(job, item, merged);
    if (masses) pkv_add_masses(job, item, spans, merged, masses, worker);
  } else if (atomic_fetch_add(&job->num_ended[item->first_piece], 1) == item->num_pieces - 1)
    merge_pieces(job, &job->items[item->first_piece], masses, worker);
}

/* ---- shared spans, before all items */

static void fold_shared_item(const pkv_job *job, const work_item *item, int32_t worker) {
  scratch scratch = scratch_of(job, item->shape, worker);
  pkv_notes notes = {0};
  if (job->notes_mass) {
    notes.masses = pkv_carried_masses(job, item->first_carried);
    pkv_clear_masses(job, item, &notes.masses, item->first_span, item->end_span);
  }
  prepare_rows(job, item, scratch.q);
  if (item->num_carried) copy_carried(job, item, scratch.states, false);
  for (int32_t i = item->first_span; i < item->end_span; i++) {
    int32_t start = i * job->call.span_tokens; /* without a window, spans are consecutive */
    pkv_notes of_span = notes;
    if (job->notes_mass) of_span.masses = pkv_masses_from(&job->call, &notes.masses, i);
    pkv_fold_span(&job->call, item, start, scratch.q, i == 0 ? scratch.states : scratch.span, &of_span);
    if (i > 0) pkv_merge_span(&job->call, item, start, scratch.states, scratch.span);
  }
  copy_carried(job, item, scratch.states, true);
}

static void fold_shared_items(void *context, int32_t worker) {
  pkv_job *job = context;
  long long i;
  while ((i = atomic_fetch_add(&job->next_item, 1)) < job->num_shared)
    fold_shared_item(job, &job->shared[i], worker);
}

/* Level by level: each one carries on what the one above has left. */
void pkv_fold_shared_spans(int32_t num_workers, pkv_job *job) {
  for (int32_t level = 0; level < job->cascade.num_levels; level++) {
    job->num_shared = pkv_cut_shared(&job->work, level, job->shapes, job->shared);
    pkv_threads_run(num_workers, fold_shared_items, job);
    atomic_store(&job->next_item, 0);
  }
}

static void attend_items(void *context, int32_t worker) {
  pkv_job *job = context;
  long long i;
  while ((i = atomic_fetch_add(&job->next_item, 1)) < job->num_items)
    attend_item(job, &job->items[job->num_items - 1 - i], worker); /* the longest first */
}

void pkv_attend_items(int32_t num_workers, pkv_job *job) { pkv_threads_run(num_workers, attend_items, job); }
