/* Attention over pages: one call, from its arguments to the rows of the output.
 *
 * A call is validated, what its sequences share is found (cascade.h), its work is split into items (work.h),
 * and its memory laid out.  Then threads write new rows, fold what is shared, and do the items (items.h). */
#include <stdlib.h>
#include <string.h>

#include "choose.h"
#include "items.h"
#include "mass.h"
#include "memory/append.h"
#include "memory/chores.h"
#include "memory/gate.h"

enum {
  BYTES_WORTH_A_THREAD = 64 << 10, /* in a call with fewer, waking a thread costs more than it saves */
  /* When sharing pays, as measured (benchmarks/cascade.py): */
  MOST_QUERIES_TO_SHARE = 12, /* of a key, by one sequence; with more, arithmetic is the limit */
  LEAST_SPANS_TO_SHARE = 2,
  LEAST_BYTES_TO_SAVE = 512 << 10,
};

/* The kernels' exponentials are powers of 2. */
static const float LOG2_E = 0x1.715476p+0f;

/* Keys and values of all heads. */
static int64_t bytes_of_token(const pkv_pages *pages) {
  int64_t bytes =
      pkv_stored_bytes(pages->head_dim, pages->k_dtype) + pkv_stored_bytes(pages->head_dim_v, pages->v_dtype);
  return pages->num_kv_heads * bytes;
}

static size_t aligned(size_t num_bytes) { return (num_bytes + 63) & ~(size_t)63; }

static bool is_dim(int32_t dim) { return dim >= 8 && dim <= PKV_MAX_HEAD_DIM && dim % 8 == 0; }

static bool is_valid(const pkv_pages *pages, int32_t num_q_heads) {
  return is_dim(pages->head_dim) && is_dim(pages->head_dim_v) && pages->page_size >= 1 &&
         pages->num_kv_heads >= 1 && num_q_heads >= 1 && num_q_heads % pages->num_kv_heads == 0;
}

/* Slopes and sinks in units of log2, for as long as the call runs. */
static void scale_options(pkv_job *job) {
  const float *slopes = job->attention->alibi_slopes, *sinks = job->attention->sinks;
  float *scaled_slopes = job->options, *scaled_sinks = job->options + job->call.num_q_heads;
  job->call.layer.alibi_slopes = slopes ? scaled_slopes : NULL;
  for (int32_t i = 0; i < job->call.num_packed; i++)
    job->call.packed[i].alibi_slopes = job->call.layer.alibi_slopes;
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
static bool find_shared(pkv_job *job) {
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
static int64_t most_scratch(const pkv_job *job) {
  int64_t most = pkv_scratch_floats(&job->work.all_heads), one_head = pkv_scratch_floats(&job->work.one_head);
  if (most < one_head) most = one_head;
  for (int32_t i = 0; i < job->cascade.num_nodes; i++)
    if (most < pkv_scratch_floats(&job->shapes[i])) most = pkv_scratch_floats(&job->shapes[i]);
  return most;
}

/* Shared items of the level that has most. */
static int64_t most_shared(const pkv_job *job) {
  int64_t most = 0;
  for (int32_t level = 0; level < job->cascade.num_levels; level++) {
    int64_t count = pkv_cut_shared(&job->work, level, job->shapes, NULL);
    if (most < count) most = count;
  }
  return most;
}

/* Place what the call needs in its memory.  Returns the bytes; with NULL it only counts them. */
static size_t lay_out(pkv_job *job, const work_size *size, int32_t num_workers, char *memory) {
  size_t used = 0, num_carried = (size_t)job->cascade.num_rows * (size_t)job->call.pages->num_kv_heads;
  job->worker_bytes = aligned((size_t)most_scratch(job) * sizeof(float));
  job->options = take(memory, &used, 2 * (size_t)job->call.num_q_heads * sizeof(float));
  job->items = take(memory, &used, (size_t)size->num_items * sizeof(work_item));
  job->num_ended = take(memory, &used, (size_t)size->num_items * sizeof(atomic_int));
  job->partials = take(memory, &used, (size_t)size->num_partials * sizeof(float));
  job->shared = take(memory, &used, (size_t)most_shared(job) * sizeof(work_item));
  job->carried = take(memory, &used, num_carried * (size_t)job->work.one_head.state_floats * sizeof(float));
  job->worker_scratch = take(memory, &used, (size_t)num_workers * job->worker_bytes);
  job->num_skipped = take(memory, &used, 2 * (size_t)num_workers * sizeof(int64_t));
  if (job->skip_values > 0) {
    size_t num_seqs = (size_t)job->call.batch->num_seqs;
    job->known = take(memory, &used, 2 * num_seqs * (size_t)job->call.num_q_heads * sizeof(float));
    job->was_skipped = take(memory, &used, (size_t)num_workers * (size_t)job->call.num_q_heads);
  }
  if (job->may_choose) job->chosen = take(memory, &used, pkv_choice_bytes(job, num_workers));
  if (!job->notes_mass) return used;
  const pkv_batch *batch = job->call.batch;
  size_t num_pages = (size_t)batch->kv_indptr[batch->num_seqs];
  job->mass = take(memory, &used, num_pages * (size_t)job->call.pages->num_kv_heads * sizeof(int64_t));
  job->recent = take(memory, &used, num_pages * sizeof(int64_t));
  job->carried_notes = take(memory, &used, pkv_carried_bytes(job));
  job->noted = take(memory, &used, (size_t)size->num_noted * sizeof(float));
  job->mass_scratch = take(memory, &used, (size_t)(num_workers * job->mass_floats) * sizeof(float));
  job->mass_totals = take(memory, &used, (size_t)num_workers * job->totals_bytes);
  return used;
}

/* Does each row decide for itself what it reads?  Then nothing is folded for several sequences. */
static bool is_by_row(const pkv_job *job) { return job->skip_values > 0 || job->may_choose; }

static void note_skipped(const pkv_job *job, int32_t num_workers, pkv_plan *plan) {
  for (int32_t i = 0; i < num_workers; i++) {
    plan->num_value_runs += job->num_skipped[2 * i];
    plan->num_value_runs_skipped += job->num_skipped[2 * i + 1];
  }
}

static void clear_mass(pkv_job *job) {
  size_t num_pages = (size_t)job->call.batch->kv_indptr[job->call.batch->num_seqs];
  memset(job->mass, 0, num_pages * (size_t)job->call.pages->num_kv_heads * sizeof(int64_t));
  memset(job->recent, 0, num_pages * sizeof(int64_t));
}

/* Split the work for up to num_workers, allocate its scratch, do it. */
static pkv_status attend_with(pkv_threads *threads, int32_t num_workers, pkv_job *job, pkv_plan *plan) {
  const pkv_batch *batch = job->call.batch;
  int64_t token_bytes =
      (int64_t)4 * job->call.pages->num_kv_heads * (job->call.pages->head_dim + job->call.pages->head_dim_v);
  if (pkv_cost_of_work(batch) <= (BYTES_WORTH_A_THREAD - 1) / token_bytes) num_workers = 1;
  job->work = pkv_work_of(job->call.pages, batch, job->call.num_q_heads, job->call.span_tokens, num_workers);
  if (job->notes_mass) {
    job->work.span_notes = pkv_span_notes(&job->call);
    pkv_size_masses(job);
  }
  if (batch->may_share && batch->num_seqs > 1 && !is_by_row(job) && !find_shared(job))
    return PKV_OUT_OF_MEMORY;
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
  memset(job->num_skipped, 0, 2 * (size_t)num_workers * sizeof(int64_t));
  if (job->skip_values > 0) memset(job->was_skipped, 0, (size_t)num_workers * (size_t)job->call.num_q_heads);
  if (job->notes_mass) clear_mass(job);

  pkv_write_new_rows(num_workers, size.num_before, job);
  if (job->may_choose) pkv_choose_pages(num_workers, job, (char *)job->chosen);
  if (job->skip_values > 0) pkv_know_weights(num_workers, job);
  pkv_fold_shared_spans(num_workers, job);
  pkv_attend_items(num_workers, job);
  if (job->notes_mass) pkv_sum_masses(job, plan);
  if (plan) note_skipped(job, num_workers, plan);
  if (!threads) free(memory);
  return PKV_OK;
}

/* Do the pages that the call reads fit the shared cache? */
static bool are_cached(const pkv_pages *pages, const pkv_batch *batch) {
  int64_t page_bytes = pages->page_size * bytes_of_token(pages);
  return pages->cached_bytes > 0 && batch->kv_indptr[batch->num_seqs] * page_bytes <= pages->cached_bytes;
}

static pkv_layer layer_of(const pkv_kernel *kernel, const pkv_pages *pages, const pkv_attention *attention) {
  pkv_layer layer = {
      .k = {pages->k_dtype, pages->head_dim, pages->k_head_stride, pages->k_scales.head_stride},
      .v = {pages->v_dtype, pages->head_dim_v, pages->v_head_stride, pages->v_scales.head_stride},
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

/* Where q is prepared for keys of this dtype, by the first `count` packed formats or the open one; -1: it is
 * not. */
static int32_t prepared_for(const pkv_call *call, int32_t count, int32_t k_dtype) {
  if (call->layer.k.dtype == k_dtype) return 0;
  for (int32_t i = 0; i < count; i++)
    if (call->packed[i].k.dtype == k_dtype) return call->packed_q[i];
  return -1;
}

static pkv_call call_of(const pkv_kernel *kernel, const pkv_pages *pages, const pkv_batch *batch,
                        const pkv_attention *attention) {
  pkv_call call = {
      .kernel = kernel,
      .pages = pages,
      .batch = batch,
      .layer = layer_of(kernel, pages, attention),
      .num_q_heads = attention->num_q_heads,
      .is_cached = are_cached(pages, batch),
      .run_tokens = pkv_run_tokens(pages->page_size),
      .span_tokens = pkv_span_tokens(pages->page_size),
      .span_runs = pkv_span_runs(pages->page_size),
      .top_pages = pages->means ? attention->top_pages : 0,
  };
  int32_t end = pkv_prepared_floats(pages->head_dim, pages->k_dtype);
  for (const pkv_pages *packed = pages->packed; packed; packed = packed->packed) {
    int32_t i = call.num_packed++;
    call.packed[i] = layer_of(kernel, packed, attention);
    call.packed_q[i] = prepared_for(&call, i, call.packed[i].k.dtype);
    if (call.packed_q[i] >= 0) continue;
    call.packed_q[i] = end;
    end += pkv_prepared_floats(pages->head_dim, packed->k_dtype);
  }
  return call;
}

/* plan: NULL for pages of no step.  Nothing is written before everything is validated. */
static pkv_status attend(pkv_threads *threads, const pkv_pages *pages, const pkv_batch *batch, pkv_plan *plan,
                         const pkv_attention *attention) {
  const pkv_kernel *kernel = pkv_active_kernel();
  int32_t num_q_heads = attention->num_q_heads;
  if (!kernel || !is_valid(pages, num_q_heads) || (batch->sees_all && batch->window)) return PKV_BAD_ARGUMENT;
  if (attention->byte_lengths && out_overlaps(attention)) return PKV_OUT_OVERLAPS;
  pkv_job job = {.call = call_of(kernel, pages, batch, attention),
                 .attention = attention,
                 .scale = attention->sm_scale * LOG2_E,
                 .skip_values = attention->skip_values_below,
                 .notes_mass = attention->mass || (plan && plan->mass)};
  job.may_choose = pkv_chooses_pages(&job);
  if (!pkv_gate_enter(pages->gate)) return PKV_CLOSED;
  if (plan && attention->has_rows) {
    pkv_prepare_pages(kernel, pages, plan);
    job.slots = plan->slot_mapping;
  }
  int32_t num_workers = pkv_threads_claim(threads);
  pkv_status status = attend_with(num_workers ? threads : NULL, num_workers ? num_workers : 1, &job, plan);
  free(job.cascade_memory);
  if (plan) plan->bytes_not_read += job.cascade.tokens_saved * bytes_of_token(pages);
  bool sees_prefixes = !batch->window; /* a call with a window says nothing about those without */
  if (plan && sees_prefixes && !is_by_row(&job) && !job.cascade.num_nodes)
    plan->batch.may_share = PKV_SHARE_NONE; /* in no other layer either */
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
  pkv_batch batch = plan->batch;
  if (attention->window) {
    if (batch.window) return PKV_BAD_ARGUMENT;
    batch.window = attention->window;
    batch.num_sink_tokens = attention->num_sink_tokens;
  }
  pkv_status status = attend(threads, pages, &batch, plan, attention);
  if (status == PKV_OK) *is_written = 1;
  return status;
}
