/* Which tokens are folded into which state, in which order.
 *
 *   run     64 tokens, or the whole pages that fit in them: one call of a fold
 *   span    256 tokens, or the whole pages that fit: its runs are folded into a state of its own, and the
 *           spans of a row are merged left to right
 *
 * Runs and spans are counted from a sequence's first page, whatever the batch and the threads, so a row's
 * bits do not depend on them.
 *
 * A fold walks the kv heads of a run in memory order, K before V, and uses each row of K and V for all its
 * queries.  Tokens, runs and spans that no row of an item sees (visibility.h) are skipped, so a step costs
 * what its window costs, however long the sequence is. */
#include "runs.h"

#include "memory/place.h"
#include "visibility.h"

int32_t pkv_end_of_run(const pkv_call *call, int32_t start, int32_t span_end) {
  int64_t end = (int64_t)start + call->run_tokens; /* may exceed int32 at the end of the longest sequence */
  int32_t page_size = call->pages->page_size;
  if (page_size > PKV_RUN_TOKENS) { /* a piece of a page does not reach into the next page */
    int64_t page_end = ((int64_t)start / page_size + 1) * page_size;
    if (end > page_end) end = page_end;
  }
  return end < span_end ? (int32_t)end : span_end;
}

static bool are_in_page(const pkv_call *call, int32_t start, int32_t end) {
  return start / call->pages->page_size == (end - 1) / call->pages->page_size;
}

/* The number of ones from bit 0 up to the first zero. */
static int num_low_ones(uint64_t bits) { return ~bits ? __builtin_ctzll(~bits) : 64; }

/* Addresses of a run's tokens, a token per bit of a mask; of scales only where there are some. */
typedef struct {
  const pkv_pages *pages; /* of their format: a run has one, since packed pages have whole runs */
  const char *k[PKV_RUN_TOKENS], *v[PKV_RUN_TOKENS];
  const char *k_scales[PKV_RUN_TOKENS], *v_scales[PKV_RUN_TOKENS];
} token_addresses;

/* Addresses from bit `begin` to `end` - 1, stride bytes apart; the first one is `address`. */
static void locate(const char *address, int64_t stride, int begin, int end, const char **addresses) {
  for (int t = begin; t < end; t++, address += stride) addresses[t] = address;
}

/* Where a sequence's list has its first page that is `page` or a later one. */
static int32_t place_in_list(const pkv_batch *batch, int32_t seq, int32_t page) {
  const int32_t *numbers = batch->page_numbers + batch->kv_indptr[seq];
  int32_t begin = 0, end = batch->kv_indptr[seq + 1] - batch->kv_indptr[seq];
  while (begin < end) {
    int32_t middle = (begin + end) / 2;
    if (numbers[middle] < page)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

int32_t pkv_place_in_list(const pkv_call *call, int32_t seq, int32_t page) {
  const pkv_batch *batch = call->batch;
  int32_t count = batch->kv_indptr[seq + 1] - batch->kv_indptr[seq], place;
  if (batch->page_numbers) {
    place = place_in_list(batch, seq, page);
    return place < count && batch->page_numbers[batch->kv_indptr[seq] + place] == page ? place : -1;
  }
  int32_t first_page = batch->first_pages ? batch->first_pages[seq] : 0;
  place = page < batch->sink_pages ? page : batch->sink_pages + page - first_page;
  return place < count && (page < batch->sink_pages || page >= first_page) ? place : -1;
}

/* The tokens `start` to `end` - 1 (at most 64) whose pages are listed; bit 0 is `start`. */
static uint64_t listed(const pkv_call *call, int32_t seq, int32_t start, int32_t end) {
  const pkv_batch *batch = call->batch;
  if (!batch->page_numbers) return ~UINT64_C(0);
  int32_t page_size = call->pages->page_size;
  uint64_t mask = 0;
  for (int32_t i = batch->kv_indptr[seq] + place_in_list(batch, seq, start / page_size);
       i < batch->kv_indptr[seq + 1]; i++) {
    int64_t page_start = (int64_t)batch->page_numbers[i] * page_size - start;
    if (page_start >= end - start) break;
    mask |= bits_between(page_start, page_start + page_size);
  }
  return mask;
}

/* The addresses of the tokens of `mask`, whose pages are listed; bit 0 is token `start`. */
static void locate_tokens(const pkv_call *call, int32_t seq, int32_t start, uint64_t mask,
                          token_addresses *to) {
  const pkv_pages *pages = call->pages;
  const pkv_batch *batch = call->batch;
  const int32_t *page_ids = batch->kv_indices + batch->kv_indptr[seq];
  int32_t first_page = batch->first_pages ? batch->first_pages[seq] : 0;
  bool has_holes = batch->page_numbers != NULL;
  int32_t page = start / pages->page_size;
  int64_t page_start = (int64_t)page * pages->page_size - start; /* as a bit */
  for (; mask; page++, page_start += pages->page_size) {
    uint64_t in_page = mask & bits_between(0, page_start + pages->page_size);
    mask &= ~in_page;
    if (!in_page) continue;
    int64_t page_id = page_ids[has_holes                  ? place_in_list(batch, seq, page)
                               : page < batch->sink_pages ? page
                                                          : batch->sink_pages + page - first_page];
    pkv_place place = pkv_place_of(pages, page_id);
    const pkv_pages *own = to->pages = place.pages;
    while (in_page) { /* consecutive tokens, up to a gap */
      int t = __builtin_ctzll(in_page), end = t + num_low_ones(in_page >> t);
      int64_t offset = t - page_start;
      in_page &= ~bits_between(t, end);
      if (place.k_scales)
        locate(pkv_scales_at(place.k_scales, own->k_scales.token_stride, offset, own->k_dtype, own->head_dim),
               own->k_scales.token_stride, t, end, to->k_scales);
      if (place.v_scales)
        locate(place.v_scales + offset * own->v_scales.token_stride, own->v_scales.token_stride, t, end,
               to->v_scales);
      const char *k_row = place.k + offset * own->k_token_stride;
      const char *v_row = place.v + offset * own->v_token_stride;
      for (; t < end; t++, k_row += own->k_token_stride, v_row += own->v_token_stride) {
        to->k[t] = k_row;
        to->v[t] = v_row;
      }
    }
  }
}

/* Arrays that only some runs need: compacted addresses, and distances. */
typedef struct {
  token_addresses addresses;
  float distances[PKV_RUN_TOKENS];
  int32_t ends[PKV_MAX_PARTS];
} own_tokens;

static void set_addresses(pkv_run *run, const token_addresses *all, int first, bool is_evenly_spaced) {
  const pkv_pages *pages = all->pages;
  run->k = all->k + first;
  run->v = all->v + first;
  run->k_scales = all->k_scales + first;
  run->v_scales = all->v_scales + first;
  run->k_stride = is_evenly_spaced ? pages->k_token_stride : 0;
  run->v_stride = is_evenly_spaced ? pages->v_token_stride : 0;
  run->k_scale_stride = is_evenly_spaced ? pages->k_scales.token_stride : 0;
  run->v_scale_stride = is_evenly_spaced ? pages->v_scales.token_stride : 0;
}

/* Set the run's tokens to those of `mask`, all in one page or not.  The first row's own token is at bit
 * to_own. */
static void set_tokens(const pkv_call *call, pkv_run *run, uint64_t mask, const token_addresses *all,
                       bool is_in_page, int32_t to_own, own_tokens *own) {
  const pkv_pages *pages = all->pages;
  int first = __builtin_ctzll(mask);
  uint64_t shifted = mask >> first;
  run->num_tokens = __builtin_popcountll(mask);
  bool has_gap = (shifted & (shifted + 1)) != 0; /* between sinks and window: compact */
  if (has_gap) {
    token_addresses *to = &own->addresses;
    to->pages = pages;
    for (int32_t i = 0; mask; mask &= mask - 1, i++) {
      int t = __builtin_ctzll(mask);
      to->k[i] = all->k[t];
      to->v[i] = all->v[t];
      if (pkv_has_scales(pages->k_dtype)) to->k_scales[i] = all->k_scales[t];
      if (pkv_scale_bytes(pages->v_dtype)) to->v_scales[i] = all->v_scales[t];
    }
  }
  set_addresses(run, has_gap ? &own->addresses : all, has_gap ? 0 : first, is_in_page && !has_gap);
  if (!call->layer.alibi_slopes) return;
  memset(own->distances, 0, sizeof own->distances);
  int32_t i = 0;
  for (uint64_t left = shifted; left; left &= left - 1)
    own->distances[i++] = (float)(first + __builtin_ctzll(left) - to_own);
  run->distances = own->distances;
}

/* Fold the run, of pages of this format, into the states of its rows, from kv head `head` on. */
static void fold_heads(const pkv_call *call, const pkv_pages *pages, const work_item *item, pkv_run *run,
                       int32_t head, const float *q, pkv_state state) {
  const pkv_layer *layer = &call->layer;
  int32_t format = 0;
  for (const pkv_pages *one = call->pages; one != pages; one = one->packed) layer = &call->packed[format++];
  if (format) q += (int64_t)item->shape->num_q_heads * call->packed_q[format - 1];
  int32_t own_head = (head - item->first_head) * layer->group; /* within the item's q and state */
  run->first_head = head;
  pkv_fold *fold = pkv_choose_fold(call->kernel, layer, item->num_rows * layer->group, call->is_cached);
  fold(layer, run, q + (int64_t)own_head * pkv_prepared_floats(layer->k.dim, layer->k.dtype),
       state_of_head(call, state, own_head));
}

/* True when `mask` is `before` plus later tokens only, so that both rows can share one fold, in which
 * each sees a prefix of the tokens. */
static bool extends(uint64_t before, uint64_t mask) {
  uint64_t more = mask & ~before;
  if (before & ~mask) return false;
  return !more || (before && __builtin_ctzll(more) > 63 - __builtin_clzll(before));
}

/* Is a row the next token of the row before it? */
static bool follows(const work_item *item, int32_t row) {
  return seq_of_row(item, row) == seq_of_row(item, row - 1) &&
         q_row_of(item, row) == q_row_of(item, row - 1) + 1;
}

/* The keys of the run that begins at `start`, up to the first gap, to be prefetched.  Returns their
 * number. */
static int32_t locate_next_keys(const pkv_call *call, const work_item *item, int32_t start,
                                token_addresses *to) {
  int32_t last = item->num_rows - 1, row = q_row_of(item, last), seq = seq_of_row(item, last);
  int32_t end = num_seen(call->batch, seq, row);
  if (start >= end) return 0;
  int32_t run_end = pkv_end_of_run(call, start, end);
  uint64_t mask = visible(call->batch, seq, row, start, run_end) & listed(call, seq, start, run_end);
  if (mask & (mask + 1)) return 0; /* a gap between sinks and window: not prefetched */
  locate_tokens(call, seq, start, mask, to);
  return __builtin_popcountll(mask);
}

/* Where the pages of a run end, in tokens of `mask`. */
static void set_ends(const pkv_call *call, uint64_t mask, int32_t num_parts, int32_t *ends) {
  for (int32_t part = 0; part < num_parts; part++)
    ends[part] = part == num_parts - 1
                     ? __builtin_popcountll(mask)
                     : __builtin_popcountll(mask & bits_between(0, (part + 1) * call->pages->page_size));
}

/* ---- chosen pages */

/* The tokens `start` to `end` - 1 whose pages a sequence's row reads for a kv head. */
static uint64_t chosen_tokens(const pkv_call *call, int32_t seq, int32_t head, int32_t start, int32_t end) {
  const uint8_t *chosen = call->chosen + pkv_chosen_at(call, seq, head);
  int32_t page_size = call->pages->page_size;
  uint64_t mask = 0;
  for (int64_t page = start / page_size; page * page_size < end; page++) {
    int32_t place = pkv_place_in_list(call, seq, (int32_t)page);
    if (place >= 0 && chosen[place])
      mask |= bits_between(page * page_size - start, (page + 1) * page_size - start);
  }
  return mask;
}

bool pkv_reads_span(const pkv_call *call, const work_item *item, int32_t start) {
  if (!call->chosen || item->rows || !pkv_chooses(call, item->seq)) return true;
  int32_t page_size = call->pages->page_size;
  for (int32_t i = 0; i < item->shape->num_kv_heads; i++) {
    const uint8_t *chosen = call->chosen + pkv_chosen_at(call, item->seq, item->first_head + i);
    for (int64_t page = start / page_size; page * page_size < (int64_t)start + call->span_tokens; page++) {
      int32_t place = pkv_place_in_list(call, item->seq, (int32_t)page);
      if (place >= 0 && chosen[place]) return true;
    }
  }
  return false;
}

/* A run of which some kv heads that follow each other read the same tokens. */
typedef struct {
  int32_t start, end;
  int32_t head, num_heads;
  uint64_t mask;
} chosen_run;

/* What follows `run` in a span that ends at `end`: other heads of the run, or those of a later one.  False:
 * nothing. */
static bool next_chosen(const pkv_call *call, const work_item *item, int32_t end, chosen_run *run) {
  int32_t end_head = item->first_head + item->shape->num_kv_heads, head = run->head + run->num_heads;
  for (int32_t start = run->start; start < end; start = run->end, head = item->first_head) {
    run->start = start;
    run->end = pkv_end_of_run(call, start, end);
    uint64_t seen = visible(call->batch, item->seq, item->first_row, start, run->end);
    for (; seen && head < end_head; head++) {
      run->mask = seen & chosen_tokens(call, item->seq, head, start, run->end);
      if (!run->mask) continue;
      run->head = head++;
      while (head < end_head && run->mask == (seen & chosen_tokens(call, item->seq, head, start, run->end)))
        head++;
      run->num_heads = head - run->head;
      return true;
    }
  }
  return false;
}

/* Fold the span from `start` to `end` into one row, of each kv head the tokens that it chose. */
static void fold_chosen(const pkv_call *call, const work_item *item, int32_t start, int32_t end,
                        const float *q, float *states, const pkv_notes *notes) {
  token_addresses addresses[2], *here = addresses, *ahead = addresses + 1;
  own_tokens own;
  int32_t to_own = num_seen(call->batch, item->seq, item->first_row) - 1, run_index = 0;
  chosen_run next = {.start = start, .end = start, .head = item->first_head};
  bool is_there = next_chosen(call, item, end, &next);
  if (is_there) locate_tokens(call, item->seq, next.start, next.mask, here);
  for (int32_t run_start = start; is_there;) {
    chosen_run now = next;
    for (; run_start != now.start; run_start = pkv_end_of_run(call, run_start, end)) run_index++;
    is_there = next_chosen(call, item, end, &next);
    bool is_same = is_there && next.start == now.start && next.mask == now.mask;
    if (is_there && !is_same) locate_tokens(call, item->seq, next.start, next.mask, ahead);
    const token_addresses *of_next = is_same ? here : ahead;
    pkv_run run = {.q_stride = item->shape->q_floats,
                   .state_stride = item->shape->state_floats,
                   .num_rows = 1,
                   .num_kv_heads = now.num_heads,
                   .masses = notes->masses,
                   .skipping = notes->skipping};
    set_tokens(call, &run, now.mask, here, are_in_page(call, now.start, now.end), to_own - now.start, &own);
    if (run.masses.maxima) {
      run.masses.maxima += run_index;
      run.masses.sums += (int64_t)run_index * run.masses.num_parts;
      run.masses.ends = own.ends;
      set_ends(call, now.mask, run.masses.num_parts, own.ends);
    }
    /* The next keys are prefetched where they are without a gap, and of the same format. */
    int first = is_there ? __builtin_ctzll(next.mask) : 0;
    uint64_t shifted = is_there ? next.mask >> first : 0;
    bool is_near = shifted && !(shifted & (shifted + 1)) && of_next->pages == here->pages;
    run.k_next = is_near ? of_next->k + first : run.k;
    run.num_next = is_near ? __builtin_popcountll(shifted) : 0;
    run.next_head = next.head;
    fold_heads(call, here->pages, item, &run, now.head, q, state_at(item->shape, states, 0));
    if (is_same) continue;
    token_addresses *other = here;
    here = ahead;
    ahead = other;
  }
}

/* ---- folding */

static void fold_run_into_rows(const pkv_call *call, const work_item *item, int32_t start, int32_t end,
                               const float *q, float *states, const pkv_notes *notes) {
  token_addresses tokens, next;
  uint64_t masks[MAX_ROWS_PER_ITEM], all = 0, has_page = listed(call, item->seq, start, end);
  int32_t num_seen_of[MAX_ROWS_PER_ITEM];
  for (int32_t row = 0; row < item->num_rows; row++) {
    masks[row] = visible(call->batch, seq_of_row(item, row), q_row_of(item, row), start, end) & has_page;
    num_seen_of[row] = __builtin_popcountll(masks[row]);
    all |= masks[row];
  }
  if (!all) return;
  const pkv_masses *masses = &notes->masses;
  locate_tokens(call, item->seq, start, all, &tokens);
  int32_t num_next = locate_next_keys(call, item, end, &next);
  if (num_next && next.pages != tokens.pages) num_next = 0; /* heads of another size: not prefetched */
  bool is_in_page = are_in_page(call, start, end);
  pkv_run run = {.q_stride = item->shape->q_floats, .state_stride = item->shape->state_floats};
  own_tokens own;
  int32_t end_head = item->first_head + item->shape->num_kv_heads;
  for (int32_t head = item->first_head; head < end_head; head += run.num_kv_heads) {
    run.is_resident = false;
    for (int32_t row = 0; row < item->num_rows; row += run.num_rows) {
      run.num_rows = 1;
      while (row + run.num_rows < item->num_rows &&
             extends(masks[row + run.num_rows - 1], masks[row + run.num_rows]) &&
             (!call->layer.alibi_slopes || follows(item, row + run.num_rows)))
        run.num_rows++;
      /* All heads in one fold, unless other rows read the same tokens before the next head's. */
      run.num_kv_heads = run.num_rows == item->num_rows ? end_head - head : 1;
      if (!masks[row]) continue;
      uint64_t mask = masks[row + run.num_rows - 1];
      run.num_seen = mask == masks[row] ? NULL : num_seen_of + row;
      int32_t to_own = num_seen(call->batch, seq_of_row(item, row), q_row_of(item, row)) - 1 - start;
      set_tokens(call, &run, mask, &tokens, is_in_page, to_own, &own);
      run.skipping = notes->skipping;
      if (masses->maxima) {
        int64_t before = (int64_t)row * masses->num_heads * masses->num_runs;
        run.masses = *masses;
        run.masses.maxima += before;
        run.masses.sums += before * masses->num_parts;
        run.masses.ends = own.ends;
        set_ends(call, mask, masses->num_parts, own.ends);
      }
      bool is_last = head + run.num_kv_heads == end_head;
      run.k_next = is_last ? next.k : run.k; /* the same tokens of the next head */
      run.num_next = is_last ? num_next : run.num_tokens;
      run.next_head = is_last ? item->first_head : head + 1;
      fold_heads(call, tokens.pages, item, &run, head, q + row * run.q_stride,
                 state_at(item->shape, states, row));
      run.is_resident = true;
    }
  }
}

void pkv_fold_single_run(const pkv_call *call, const work_item *item, int32_t start, int32_t end,
                         const float *q, float *states) {
  pkv_notes none = {0};
  if (call->chosen && pkv_chooses(call, item->seq))
    fold_chosen(call, item, start, end, q, states, &none);
  else
    fold_run_into_rows(call, item, start, end, q, states, &none);
}

void pkv_fold_span(const pkv_call *call, const work_item *item, int32_t start, const float *q, float *states,
                   const pkv_notes *notes) {
  for (int32_t row = 0; row < item->num_rows; row++) clear(item->shape, state_at(item->shape, states, row));
  int32_t last = item->num_rows - 1;
  int32_t end = num_seen(call->batch, seq_of_row(item, last), q_row_of(item, last));
  if (end > (int64_t)start + call->span_tokens) end = start + call->span_tokens;
  if (call->chosen && !item->rows && pkv_chooses(call, item->seq)) {
    fold_chosen(call, item, start, end, q, states, notes);
    return;
  }
  pkv_notes of_run = *notes;
  while (start < end) {
    int32_t run_end = pkv_end_of_run(call, start, end);
    fold_run_into_rows(call, item, start, run_end, q, states, &of_run);
    start = run_end;
    if (!of_run.masses.maxima) continue;
    of_run.masses.maxima++;
    of_run.masses.sums += of_run.masses.num_parts;
  }
}

void pkv_merge_span(const pkv_call *call, const work_item *item, int32_t start, float *states, float *later) {
  for (int32_t row = 0; row < item->num_rows; row++) {
    int32_t seq = seq_of_row(item, row), q_row = q_row_of(item, row);
    pkv_state state = state_at(item->shape, states, row), of_span = state_at(item->shape, later, row);
    if (!sees_span(call->batch, call->span_tokens, seq, q_row, start)) continue;
    if (is_first_span(call->batch, call->span_tokens, seq, q_row, start))
      memcpy(state.maximum, of_span.maximum, (size_t)item->shape->state_floats * sizeof(float));
    else
      call->kernel->merge(state, of_span, item->shape->num_q_heads, call->pages->head_dim_v);
  }
}
