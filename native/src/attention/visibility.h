/* Which tokens a q row sees: a 64-bit mask per run, and the spans that hold any of them.
 *
 *   row     index among all q rows; those of a sequence are its newest tokens
 *   sees    all tokens up to its own; with a window, the newest of these and the sinks
 *   span    span_tokens tokens, counted from the sequence's first
 *   holes   pages that a sequence lacks (page_numbers): runs.c takes their tokens out of the masks
 *
 * Attention visits exactly the tokens that these masks allow. */
#ifndef PKV_VISIBILITY_H
#define PKV_VISIBILITY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "paged_kv.h"

static inline int32_t num_rows_of(const pkv_batch *batch, int32_t seq) {
  return batch->qo_indptr[seq + 1] - batch->qo_indptr[seq];
}

/* How many tokens a row sees without a window: all up to its own. */
static inline int32_t num_seen(const pkv_batch *batch, int32_t seq, int32_t row) {
  if (batch->sees_all) return batch->seq_lens[seq];
  return batch->seq_lens[seq] - (batch->qo_indptr[seq + 1] - 1 - row);
}

/* The first token behind the sinks that a row sees. */
static inline int32_t window_start(const pkv_batch *batch, int32_t seq, int32_t row) {
  int32_t seen = num_seen(batch, seq, row);
  return batch->window && seen > batch->window ? seen - batch->window : 0;
}

/* Bits `begin` to `end` - 1, of 64. */
static inline uint64_t bits_between(int64_t begin, int64_t end) {
  if (begin < 0) begin = 0;
  if (end > 64) end = 64;
  if (begin >= end) return 0;
  return (end == 64 ? ~UINT64_C(0) : (UINT64_C(1) << end) - 1) & ~((UINT64_C(1) << begin) - 1);
}

/* The tokens `start` to `end` - 1 (at most 64) that a row sees; bit 0 is `start`. */
static inline uint64_t visible(const pkv_batch *batch, int32_t seq, int32_t row, int32_t start, int32_t end) {
  int32_t seen = num_seen(batch, seq, row);
  uint64_t before_own = bits_between(0, (seen < end ? seen : end) - start);
  uint64_t in_window = bits_between(window_start(batch, seq, row) - start, 64);
  return before_own & (in_window | bits_between(0, (int64_t)batch->num_sink_tokens - start));
}

/* The spans that some rows see tokens of: the sinks' spans, then those from the window of the first row
 * on; with holes, those that have a listed page, up to the last row. */
typedef struct {
  const int32_t *starts; /* with holes: [count] */
  int32_t span_tokens;
  int32_t num_sink_spans;
  int32_t first_window_span;
  int32_t count;
} span_list;

static inline span_list spans_of(const pkv_batch *batch, int32_t span_tokens, int32_t seq, int32_t first_row,
                                 int32_t num_rows) {
  int32_t start = window_start(batch, seq, first_row), sinks = batch->num_sink_tokens;
  int32_t end = num_seen(batch, seq, first_row + num_rows - 1);
  if (batch->page_numbers) {
    const int32_t *starts = batch->span_starts + batch->span_indptr[seq];
    int32_t count = batch->span_indptr[seq + 1] - batch->span_indptr[seq];
    while (count && starts[count - 1] >= end) count--;
    return (span_list){.starts = starts, .span_tokens = span_tokens, .count = count};
  }
  if (sinks > start) sinks = start;
  span_list spans = {NULL, span_tokens, (int32_t)(((int64_t)sinks + span_tokens - 1) / span_tokens),
                     start / span_tokens, 0};
  if (spans.num_sink_spans > spans.first_window_span) spans.num_sink_spans = spans.first_window_span;
  int32_t end_span = (int32_t)(((int64_t)end + span_tokens - 1) / span_tokens);
  spans.count = spans.num_sink_spans + end_span - spans.first_window_span;
  return spans;
}

/* The first token of span i of the list. */
static inline int32_t start_of_span(span_list spans, int32_t i) {
  if (spans.starts) return spans.starts[i];
  int32_t span = i < spans.num_sink_spans ? i : spans.first_window_span + i - spans.num_sink_spans;
  return span * spans.span_tokens;
}

/* May a row see a token of the span that begins at `start`?  And is it the first such span?  With holes, no
 * span counts as the first: merged into a state of no tokens, it is copied to the bit. */
static inline bool sees_span(const pkv_batch *batch, int32_t span_tokens, int32_t seq, int32_t row,
                             int32_t start) {
  return start < num_seen(batch, seq, row) && (batch->page_numbers || start < batch->num_sink_tokens ||
                                               (int64_t)start + span_tokens > window_start(batch, seq, row));
}

static inline bool is_first_span(const pkv_batch *batch, int32_t span_tokens, int32_t seq, int32_t row,
                                 int32_t start) {
  if (batch->page_numbers) return false;
  int32_t first = batch->num_sink_tokens ? 0 : window_start(batch, seq, row);
  return start == first / span_tokens * span_tokens;
}

#endif
