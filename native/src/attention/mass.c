/* Attention mass: how much of its attention a row gives to each page, summed over rows, from the softmax that
 * the kernel computes anyway.
 *
 *   run     a fold notes the sum of its weights, page by page, and the maximum they are relative to
 *   item    once a row's maximum and sum are final, its notes become probabilities
 *   call    these are added up as integers, so that no sum depends on the order of threads
 *
 * Notes of an item are in its worker's scratch; of an item in pieces, in memory of its own; of spans that
 * several sequences share, in memory of the call, for each of their rows. */
#include "mass.h"

#include <math.h>

/* Of a sequence, the last rows that count once more by themselves. */
enum { RECENT_ROWS = PKV_RECENT_ROWS };
static const double UNIT = 1.0 / PKV_MASS_UNITS; /* of probability */

static int32_t parts_of(const pkv_call *call) {
  int32_t page_size = call->pages->page_size;
  return page_size >= PKV_RUN_TOKENS ? 1 : PKV_RUN_TOKENS / page_size;
}

int32_t pkv_span_notes(const pkv_call *call) { return call->span_runs * (1 + parts_of(call)); }

/* Runs of so many spans, of which there is a multiple of 16: whole vectors. */
static int64_t num_runs_of(const pkv_call *call, int64_t num_spans) {
  return (num_spans + 15) / 16 * 16 * call->span_runs;
}

/* Of any sequence. */
static int64_t most_spans(const pkv_job *job) {
  int32_t most = 0;
  const pkv_batch *batch = job->call.batch;
  for (int32_t seq = 0; seq < batch->num_seqs; seq++) {
    int32_t first = batch->qo_indptr[seq], num_rows = num_rows_of(batch, seq);
    if (!num_rows) continue;
    int32_t count = spans_of(batch, job->call.span_tokens, seq, first, num_rows).count;
    if (most < count) most = count;
  }
  return most;
}

/* Rows of any item that is not split, times heads. */
static int64_t most_queries(const pkv_job *job) {
  const pkv_batch *batch = job->call.batch;
  const item_shape *shapes[] = {&job->work.all_heads, &job->work.one_head};
  int64_t most = 0;
  for (int32_t seq = 0; seq < batch->num_seqs; seq++)
    for (int i = 0; i < 2; i++) {
      int64_t num_rows = num_rows_of(batch, seq);
      if (num_rows > shapes[i]->num_rows) num_rows = shapes[i]->num_rows;
      if (most < num_rows * shapes[i]->num_q_heads) most = num_rows * shapes[i]->num_q_heads;
    }
  return most;
}

void pkv_size_masses(pkv_job *job) {
  int32_t num_parts = parts_of(&job->call);
  int64_t num_runs = num_runs_of(&job->call, most_spans(job)), num_places = num_runs * num_parts;
  job->factor_floats = num_runs;
  job->mass_floats = most_queries(job) * num_runs * (1 + num_parts) + job->factor_floats; /* notes, factors */
  job->mass_floats = (job->mass_floats + 15) / 16 * 16;
  /* of each kv head, and of recent rows; places */
  int64_t num_totals = job->call.pages->num_kv_heads + 1;
  job->totals_bytes =
      (size_t)(num_places * (num_totals * (int64_t)sizeof(int64_t) + (int64_t)sizeof(int32_t)));
  job->totals_bytes = (job->totals_bytes + 63) / 64 * 64;
}

pkv_masses pkv_masses_of(const pkv_job *job, const work_item *item, span_list spans, int32_t worker) {
  const pkv_call *call = &job->call;
  float *floats = item->num_pieces > 1 ? job->noted + item->first_noted
                                       : job->mass_scratch + (int64_t)worker * job->mass_floats;
  pkv_masses masses = {.maxima = floats,
                       .num_runs = num_runs_of(call, spans.count),
                       .num_heads = item->shape->num_q_heads,
                       .first_head = item->first_head * call->layer.group,
                       .num_parts = parts_of(call)};
  masses.sums = floats + item->num_rows * masses.num_heads * masses.num_runs;
  return masses;
}

pkv_masses pkv_masses_from(const pkv_call *call, const pkv_masses *masses, int32_t span) {
  pkv_masses from = *masses;
  from.maxima += (int64_t)span * call->span_runs;
  from.sums += (int64_t)span * call->span_runs * masses->num_parts;
  return from;
}

/* Runs of the shared spans of any row, in whole vectors. */
static int64_t carried_runs_of(const pkv_job *job) {
  int32_t most = 0;
  for (int32_t i = 0; i < job->cascade.num_nodes; i++)
    if (most < job->cascade.nodes[i].end_span) most = job->cascade.nodes[i].end_span;
  return num_runs_of(&job->call, most);
}

size_t pkv_carried_bytes(const pkv_job *job) {
  int64_t num_heads = (int64_t)job->cascade.num_rows * job->call.num_q_heads;
  return (size_t)(num_heads * carried_runs_of(job) * (1 + parts_of(&job->call))) * sizeof(float);
}

pkv_masses pkv_carried_masses(const pkv_job *job, int32_t cascade_row) {
  int64_t num_heads = job->call.num_q_heads, num_runs = carried_runs_of(job);
  pkv_masses masses = {
      .num_runs = num_runs, .num_heads = (int32_t)num_heads, .num_parts = parts_of(&job->call)};
  masses.maxima = job->carried_notes + cascade_row * num_heads * num_runs;
  masses.sums = job->carried_notes +
                (job->cascade.num_rows + (int64_t)cascade_row * masses.num_parts) * num_heads * num_runs;
  return masses;
}

void pkv_clear_masses(const pkv_job *job, const work_item *item, const pkv_masses *masses, int32_t first_span,
                      int32_t end_span) {
  const pkv_call *call = &job->call;
  int64_t first = (int64_t)first_span * call->span_runs,
          count = (int64_t)(end_span - first_span) * call->span_runs;
  int64_t first_head = item->first_head * call->layer.group - masses->first_head;
  for (int64_t row = 0; row < item->num_rows; row++)
    for (int64_t head = first_head; head < first_head + item->shape->num_q_heads; head++) {
      int64_t at = (row * masses->num_heads + head) * masses->num_runs + first;
      for (int64_t run = 0; run < count; run++) masses->maxima[at + run] = -INFINITY;
      memset(masses->sums + at * masses->num_parts, 0, (size_t)(count * masses->num_parts) * sizeof(float));
    }
}

/* Which listed page each part of an item's runs is; -1: none. */
static void find_places(const pkv_job *job, const work_item *item, span_list spans, int32_t num_parts,
                        int32_t *places) {
  const pkv_call *call = &job->call;
  int32_t page_size = call->pages->page_size;
  int32_t end = num_seen(call->batch, item->seq, item->first_row + item->num_rows - 1);
  for (int32_t i = 0; i < spans.count; i++) {
    int32_t start = start_of_span(spans, i), *of_span = places + (int64_t)i * call->span_runs * num_parts;
    int64_t span_end = (int64_t)start + call->span_tokens;
    for (int32_t run = 0; run < call->span_runs; run++)
      for (int32_t part = 0; part < num_parts; part++) of_span[run * num_parts + part] = -1;
    for (int32_t run = 0; start < span_end && start < end; run++) {
      int32_t run_end = pkv_end_of_run(call, start, span_end < end ? (int32_t)span_end : end);
      for (int32_t part = 0, page = start / page_size; page <= (run_end - 1) / page_size; part++, page++)
        of_span[run * num_parts + part] = pkv_place_in_list(call, item->seq, page);
      start = run_end;
    }
  }
}

typedef struct {
  float maximum, sum;
} final_state;

/* Add the probabilities that the first num_runs runs of a row's head have. */
static void tally(const pkv_kernel *kernel, const pkv_masses *masses, int64_t row, int32_t head,
                  int64_t num_runs, final_state final, float *factors, int64_t *totals, int64_t *recent) {
  int64_t at = (row * masses->num_heads + head - masses->first_head) * masses->num_runs;
  const float *sums = masses->sums + at * masses->num_parts;
  kernel->normalise(factors, masses->maxima + at, (num_runs + 15) / 16 * 16, final.maximum, final.sum);
  kernel->tally(totals, sums, factors, num_runs, masses->num_parts);
  if (recent) kernel->tally(recent, sums, factors, num_runs, masses->num_parts);
}

void pkv_add_masses(const pkv_job *job, const work_item *item, span_list spans, float *states,
                    const pkv_masses *masses, int32_t worker) {
  const pkv_call *call = &job->call;
  int32_t group = call->layer.group, num_kv_heads = item->shape->num_kv_heads, num_parts = masses->num_parts;
  int64_t num_runs = (int64_t)spans.count * call->span_runs, num_places = num_runs * num_parts;
  float *factors = job->mass_scratch + (int64_t)(worker + 1) * job->mass_floats - job->factor_floats;
  int64_t *totals = (int64_t *)(job->mass_totals + worker * job->totals_bytes);
  int64_t *recent = totals + num_kv_heads * num_places;
  int32_t *places = (int32_t *)(recent + num_places);
  find_places(job, item, spans, num_parts, places);
  memset(totals, 0, (size_t)((num_kv_heads + 1) * num_places) * sizeof *totals);
  int32_t end_row = call->batch->qo_indptr[item->seq + 1];
  bool has_recent = job->recent != NULL && end_row - call->batch->qo_indptr[item->seq] > RECENT_ROWS;
  pkv_masses carried = {0};
  if (item->num_carried) carried = pkv_carried_masses(job, item->first_carried);
  for (int32_t row = 0; row < item->num_rows; row++)
    for (int32_t i = 0; i < item->shape->num_q_heads; i++) {
      pkv_state state = state_of_head(call, state_at(item->shape, states, row), i);
      int32_t head = item->first_head * group + i;
      float maximum = *state.maximum, sum = *state.sum;
      if (job->sinks) sum += exp2f(job->sinks[head] - maximum);
      if (!(sum > 0)) continue;
      final_state final = {maximum, sum};
      bool is_recent = has_recent && item->first_row + row >= end_row - RECENT_ROWS;
      int64_t *of_head = totals + i / group * num_places, *of_recent = is_recent ? recent : NULL;
      tally(call->kernel, masses, row, head, num_runs, final, factors, of_head, of_recent);
      if (item->num_carried)
        tally(call->kernel, &carried, row, head, (int64_t)item->num_carried * call->span_runs, final, factors,
              of_head, of_recent);
    }
  int64_t first_page = call->batch->kv_indptr[item->seq], num_heads = call->pages->num_kv_heads;
  for (int64_t i = 0; i < num_places; i++) {
    if (places[i] < 0) continue;
    int64_t *to = job->mass + (first_page + places[i]) * num_heads + item->first_head;
    for (int32_t head = 0; head < num_kv_heads; head++)
      __atomic_fetch_add(to + head, totals[head * num_places + i], __ATOMIC_RELAXED);
    if (has_recent) __atomic_fetch_add(job->recent + first_page + places[i], recent[i], __ATOMIC_RELAXED);
  }
}

void pkv_sum_masses(const pkv_job *job, pkv_plan *plan) {
  const pkv_batch *batch = job->call.batch;
  int64_t num_pages = batch->kv_indptr[batch->num_seqs], num_heads = job->call.pages->num_kv_heads;
  float *mass = job->attention->mass;
  for (int64_t i = 0; mass && i < num_pages * num_heads; i++)
    mass[i] = (float)((double)job->mass[i] * UNIT / job->call.layer.group);
  if (!plan || !plan->mass) return;
  for (int64_t page = 0; page < num_pages; page++) {
    for (int64_t head = 0; head < num_heads; head++) plan->mass[page] += job->mass[page * num_heads + head];
    plan->recent_mass[page] += job->recent[page];
  }
}
