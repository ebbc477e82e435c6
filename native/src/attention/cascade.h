/* Pages that several sequences of a call hold, found from the page ids themselves.
 *
 *   node    sequences whose first pages are the same, and the spans of these pages that no node above has
 *
 *      spans   0    1    2    3    4    5
 *      a       [ node 0     ][ node 1 ] a's own         node 0: a, b, c    node 1: a, b
 *      b       [            ][        ] b's own
 *      c       [            ] c's own
 *
 * A node's spans are read once for all of its rows, and folded into a state for each row that nodes below and
 * the row's own item go on from: so spans are merged left to right, as without nodes, and no bit differs. */
#ifndef PKV_CASCADE_H
#define PKV_CASCADE_H
#include <stdint.h>

#include "paged_kv.h"

/* A q row of any sequence. */
typedef struct {
  int32_t seq;
  int32_t q_row;
} pkv_q_row;

typedef struct {
  int32_t begin; /* its sequences: order[begin] .. order[end - 1] */
  int32_t end;
  int32_t first_span;
  int32_t end_span;
  int32_t level; /* 0 at the top; a node's states come from the level above */
} pkv_node;

typedef struct {
  int32_t num_nodes;
  int32_t num_levels;
  int32_t num_rows;      /* of the sequences that are in a node */
  int64_t tokens_saved;  /* that are not read again */
  int32_t *order;        /* [num_seqs]: sequences, those of a node side by side */
  int32_t *first_rows;   /* [num_seqs + 1]: the rows of order[i] begin at rows[first_rows[i]] */
  int32_t *shared_spans; /* [num_seqs], of each sequence: how many first spans are a node's */
  int32_t *places;       /* [num_seqs]: the place of a sequence in `order` */
  pkv_node *nodes;       /* [num_nodes], level by level */
  pkv_q_row *rows;       /* [num_rows] */
} pkv_cascade;

/* What counts as shared. */
typedef struct {
  int32_t page_size;
  int32_t span_tokens;
  int32_t most_rows;    /* of a sequence; one with more reads each key for many queries by itself */
  int32_t least_spans;  /* of a node; fewer do not pay for handing over states */
  int64_t least_tokens; /* that a node saves */
} pkv_sharing;

/* Bytes of memory for any cascade of a batch. */
int64_t pkv_cascade_bytes(const pkv_batch *batch);
/* Find the nodes of a batch that has no window; num_nodes is 0 when there is nothing to share.
 * O(num_seqs * log num_seqs + shared pages). */
pkv_cascade pkv_find_cascade(const pkv_batch *batch, const pkv_sharing *sharing, void *memory);

#endif
