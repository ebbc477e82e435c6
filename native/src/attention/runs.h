/* Runs and spans of a work item (runs.c), and the states that they are folded into. */
#ifndef PKV_RUNS_H
#define PKV_RUNS_H
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "kernels/kernel.h"
#include "paged_kv.h"
#include "work.h"

/* What the runs of one call of attention share. */
typedef struct {
  const pkv_kernel *kernel;
  const pkv_pages *pages;
  const pkv_batch *batch;
  pkv_layer layer;
  /* Of packed pages, as many formats as there are; q is prepared once for each dtype of keys: where that of a
   * format begins, in floats of a head. */
  pkv_layer packed[PKV_MAX_FORMATS - 1];
  int32_t num_packed;
  int32_t packed_q[PKV_MAX_FORMATS - 1];
  int32_t num_q_heads;
  bool is_cached;        /* the pages that the call reads */
  int32_t run_tokens;    /* of whole pages, or PKV_RUN_TOKENS of a larger one */
  int32_t span_tokens;   /* of whole runs */
  int32_t span_runs;     /* in a span */
  int32_t top_pages;     /* of sequences with one row, those that it reads; 0: all */
  const uint8_t *chosen; /* [num_pages * num_kv_heads], at pkv_chosen_at: 1 for those; NULL: not chosen yet */
} pkv_call;

/* What folds note besides, and what they may skip; zeros: nothing. */
typedef struct {
  pkv_masses masses; /* from the span's first run on */
  pkv_skipping skipping;
} pkv_notes;

/* Does a sequence's row read some of its pages only? */
static inline bool pkv_chooses(const pkv_call *call, int32_t seq) {
  const pkv_batch *batch = call->batch;
  return call->top_pages && batch->qo_indptr[seq + 1] - batch->qo_indptr[seq] == 1 &&
         batch->kv_indptr[seq + 1] - batch->kv_indptr[seq] > call->top_pages;
}
static inline int64_t pkv_chosen_at(const pkv_call *call, int32_t seq, int32_t head) {
  const int32_t *indptr = call->batch->kv_indptr;
  return (int64_t)indptr[seq] * call->pages->num_kv_heads + (int64_t)head * (indptr[seq + 1] - indptr[seq]);
}
/* Does an item's row read any page of the span that begins at `start`? */
bool pkv_reads_span(const pkv_call *call, const work_item *item, int32_t start);

/* Fold the run that begins at token `start` into the state of an item's one row. */
void pkv_fold_single_run(const pkv_call *call, const work_item *item, int32_t start, int32_t end,
                         const float *q, float *states);

/* Where the list of a sequence's pages has this one; -1: it is not listed. */
int32_t pkv_place_in_list(const pkv_call *call, int32_t seq, int32_t page);

/* The end of the run that begins at token `start`. */
int32_t pkv_end_of_run(const pkv_call *call, int32_t start, int32_t span_end);

static inline pkv_state state_at(const item_shape *shape, float *states, int64_t index) {
  float *floats = states + index * shape->state_floats;
  return (pkv_state){floats, floats + shape->num_q_heads, floats + shape->state_floats - shape->value_floats};
}

static inline pkv_state state_of_head(const pkv_call *call, pkv_state state, int32_t q_head) {
  return (pkv_state){state.maximum + q_head, state.sum + q_head,
                     state.accumulated + q_head * pkv_padded(call->pages->head_dim_v)};
}

static inline void clear(const item_shape *shape, pkv_state state) {
  for (int32_t h = 0; h < shape->num_q_heads; h++) state.maximum[h] = -INFINITY;
  memset(state.sum, 0, (size_t)shape->num_q_heads * sizeof(float));
  memset(state.accumulated, 0, (size_t)shape->value_floats * sizeof(float));
}

/* Fold the span that begins at token `start` into cleared states, for each row of the item as far as the row
 * sees it. q: [rows], prepared. */
void pkv_fold_span(const pkv_call *call, const work_item *item, int32_t start, const float *q, float *states,
                   const pkv_notes *notes);

/* Merge the states of the span that begins at `start` into those of the spans before; the first span that a
 * row sees starts its state. */
void pkv_merge_span(const pkv_call *call, const work_item *item, int32_t start, float *states, float *later);

#endif
