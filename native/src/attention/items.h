/* What threads do in a call of attention: write new rows, fold what sequences share, do the items (items.c).
 */
#ifndef PKV_ITEMS_H
#define PKV_ITEMS_H
#include <stdatomic.h>

#include "cascade.h"
#include "runs.h"
#include "runtime/threads.h"
#include "work.h"

/* One call. */
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

  /* Attention mass (mass.h), in units, where it is wanted; else NULL. */
  int64_t *mass;        /* [num_pages, num_kv_heads] */
  int64_t *recent;      /* [num_pages]: of each sequence's last rows, where it has more; NULL: not wanted */
  float *noted;         /* of items in pieces */
  float *carried_notes; /* [rows of the cascade, num_q_heads]: of shared spans */
  float *mass_scratch;  /* [num_workers, mass_floats] */
  int64_t mass_floats;
  int64_t factor_floats; /* of these, at their end */
  char *mass_totals;     /* [num_workers] */
  size_t totals_bytes;
  bool notes_mass;

  bool may_choose; /* some rows read top_pages only */
  uint8_t *chosen; /* the memory of call.chosen, and of choosing (choose.h) */
  /* With skip_values_below, the share of a row's weight; 0: all values are read. */
  float skip_values;
  float *known;         /* [num_seqs, 2, num_q_heads]: maxima and sums over a row's first and last run */
  uint8_t *was_skipped; /* [num_workers, num_q_heads] */
  int64_t *num_skipped; /* [num_workers, 2]: runs of a kv head, and those whose values were not read */
} pkv_job;

/* Floats of scratch that an item of this shape needs. */
static inline int64_t pkv_scratch_floats(const item_shape *shape) {
  return shape->num_rows * (2 * shape->state_floats + shape->q_floats);
}

/* Write the rows that other items than their own read, num_before in all.  Then the others, in this order. */
void pkv_write_new_rows(int32_t num_workers, int64_t num_before, pkv_job *job);
/* With skip_values: what is known of the weights of single rows. */
void pkv_know_weights(int32_t num_workers, pkv_job *job);
void pkv_fold_shared_spans(int32_t num_workers, pkv_job *job);
void pkv_attend_items(int32_t num_workers, pkv_job *job);

#endif
