/* The tree of shared pages, breadth first.
 *
 * A range of sequences that agree up to some page is extended as far as all of them agree; then it is sorted
 * by the page that follows, and each part of equal pages is a range of its own.  Each step of this either
 * ends a sequence's part in the tree or splits a range, so there are fewer ranges than sequences. */
#include "cascade.h"

#include <stdbool.h>
#include <stdlib.h>

#include "visibility.h"

typedef struct {
  int32_t begin, end; /* in order */
  int32_t num_pages;  /* that its sequences are known to have in common */
  int32_t first_span; /* that no node above has */
  int32_t level;
} range;

typedef struct {
  const pkv_batch *batch;
  const pkv_sharing *sharing;
  pkv_cascade *cascade;
  range *ranges; /* a queue */
  int32_t num_ranges;
  int64_t *keys; /* [num_seqs]: page id << 32 | sequence, to be sorted */
} search;

int64_t pkv_cascade_bytes(const pkv_batch *batch) {
  int64_t num_seqs = batch->num_seqs, num_rows = batch->qo_indptr[num_seqs];
  return num_seqs * (int64_t)(4 * sizeof(int32_t) + sizeof(pkv_node) + sizeof(range) + sizeof(int64_t)) +
         num_rows * (int64_t)sizeof(pkv_q_row) + (int64_t)sizeof(int64_t);
}

static const int32_t *pages_of(const pkv_batch *batch, int32_t seq) {
  return batch->kv_indices + batch->kv_indptr[seq];
}

/* First pages of which every row of a sequence sees every token: none behind a hole. */
static int32_t num_whole_pages(const search *search, int32_t seq) {
  const pkv_batch *batch = search->batch;
  int32_t num_pages = num_seen(batch, seq, batch->qo_indptr[seq]) / search->sharing->page_size;
  if (!batch->page_numbers) return num_pages;
  const int32_t *numbers = batch->page_numbers + batch->kv_indptr[seq];
  int32_t begin = 0, end = batch->kv_indptr[seq + 1] - batch->kv_indptr[seq];
  while (begin < end) { /* the pages before the first hole are at their own places */
    int32_t middle = (begin + end) / 2;
    if (numbers[middle] == middle)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin < num_pages ? begin : num_pages;
}

static int compare(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x > y) - (x < y);
}

/* Sort the sequences of a range by the page that follows num_pages, those without one first, and queue each
 * part of two and more with the same page. */
static void split(search *search, range parent, int32_t num_pages, int32_t first_span, int32_t level) {
  int32_t *order = search->cascade->order, count = parent.end - parent.begin;
  int64_t *keys = search->keys;
  bool is_sorted = true;
  for (int32_t i = 0; i < count; i++) {
    int32_t seq = order[parent.begin + i];
    int64_t page = num_pages < num_whole_pages(search, seq) ? pages_of(search->batch, seq)[num_pages] : -1;
    keys[i] = (int64_t)((uint64_t)page << 32) | seq;
    if (i && keys[i] < keys[i - 1]) is_sorted = false;
  }
  if (!is_sorted) qsort(keys, (size_t)count, sizeof *keys, compare);
  for (int32_t i = 0, end; i < count; i = end) {
    for (end = i; end < count && keys[end] >> 32 == keys[i] >> 32; end++)
      order[parent.begin + end] = (int32_t)keys[end];
    if (keys[i] >= 0 && end - i > 1)
      search->ranges[search->num_ranges++] =
          (range){parent.begin + i, parent.begin + end, num_pages + 1, first_span, level};
  }
}

/* How many first pages all sequences of a range have in common. */
static int32_t num_common_pages(const search *search, range range) {
  const int32_t *order = search->cascade->order, *first = pages_of(search->batch, order[range.begin]);
  int32_t common = num_whole_pages(search, order[range.begin]);
  for (int32_t i = range.begin + 1; i < range.end; i++) {
    const int32_t *pages = pages_of(search->batch, order[i]);
    int32_t most = num_whole_pages(search, order[i]), same = range.num_pages;
    if (most < common) common = most;
    while (same < common && pages[same] == first[same]) same++;
    common = same;
  }
  return common;
}

/* Extend a range as far as its sequences agree, make it a node if that pays, and split it. */
static void visit(search *search, range range) {
  pkv_cascade *cascade = search->cascade;
  int32_t num_pages = num_common_pages(search, range), level = range.level, first_span = range.first_span;
  const pkv_sharing *sharing = search->sharing;
  int32_t end_span = (int32_t)((int64_t)num_pages * sharing->page_size / sharing->span_tokens);
  int64_t saved = (int64_t)(range.end - range.begin - 1) * (end_span - first_span) * sharing->span_tokens;
  if (end_span - first_span >= sharing->least_spans && saved >= sharing->least_tokens) {
    cascade->nodes[cascade->num_nodes++] = (pkv_node){range.begin, range.end, first_span, end_span, level++};
    cascade->tokens_saved += saved;
    if (level > cascade->num_levels) cascade->num_levels = level;
    first_span = end_span;
  }
  split(search, range, num_pages, first_span, level);
}

static int compare_levels(const void *a, const void *b) {
  return ((const pkv_node *)a)->level - ((const pkv_node *)b)->level;
}

/* Now that `order` is final: where each sequence's rows are, and how many spans of it are a node's. */
static void list_rows(const pkv_batch *batch, pkv_cascade *cascade) {
  for (int32_t seq = 0; seq < batch->num_seqs; seq++) cascade->shared_spans[seq] = 0;
  for (int32_t i = 0; i < cascade->num_nodes; i++)
    for (int32_t place = cascade->nodes[i].begin; place < cascade->nodes[i].end; place++)
      cascade->shared_spans[cascade->order[place]] = cascade->nodes[i].end_span;
  for (int32_t place = 0; place < batch->num_seqs; place++) {
    int32_t seq = cascade->order[place];
    cascade->places[seq] = place;
    cascade->first_rows[place] = cascade->num_rows;
    if (!cascade->shared_spans[seq]) continue;
    for (int32_t row = batch->qo_indptr[seq]; row < batch->qo_indptr[seq + 1]; row++)
      cascade->rows[cascade->num_rows++] = (pkv_q_row){seq, row};
  }
  cascade->first_rows[batch->num_seqs] = cascade->num_rows;
}

pkv_cascade pkv_find_cascade(const pkv_batch *batch, const pkv_sharing *sharing, void *memory) {
  int32_t num_seqs = (int32_t)batch->num_seqs;
  pkv_cascade cascade = {0};
  search search = {.batch = batch, .sharing = sharing, .cascade = &cascade};
  search.keys = memory;
  cascade.nodes = (pkv_node *)(search.keys + num_seqs);
  search.ranges = (range *)(cascade.nodes + num_seqs);
  cascade.rows = (pkv_q_row *)(search.ranges + num_seqs);
  cascade.order = (int32_t *)(cascade.rows + batch->qo_indptr[num_seqs]);
  cascade.shared_spans = cascade.order + num_seqs;
  cascade.places = cascade.shared_spans + num_seqs;
  cascade.first_rows = cascade.places + num_seqs;
  if (batch->window) return cascade;
  /* Sequences that may share come first. */
  int32_t count = 0, last = num_seqs;
  for (int32_t seq = 0; seq < num_seqs; seq++) {
    int32_t num_rows = num_rows_of(batch, seq);
    bool may_share = num_rows >= 1 && num_rows <= sharing->most_rows;
    cascade.order[may_share ? count++ : --last] = seq;
  }
  split(&search, (range){0, count, 0, 0, 0}, 0, 0, 0);
  for (int32_t i = 0; i < search.num_ranges; i++) visit(&search, search.ranges[i]);
  if (!cascade.num_nodes) return cascade;
  qsort(cascade.nodes, (size_t)cascade.num_nodes, sizeof *cascade.nodes, compare_levels);
  list_rows(batch, &cascade);
  return cascade;
}
