/* Scores and weighted sums when bandwidth is the limit: few queries over pages in memory.
 *
 * K and V are read in address order, which is what the hardware prefetcher follows.  A query then
 * multiplies rows that are in cache already.
 *
 * gcc lays these functions out anew with each change to what is inlined near them: up to a tenth of the
 * time, in either direction. */

enum { FOLDS_SINGLE_ROWS = 0 };

/* Load one byte of each cache line of a row, before the row is read in another order or in parts.
 * Memory is fastest in address order, which is what the hardware prefetcher follows: on Zen 4, four rows
 * of float32 read side by side take three times as long as the same rows one after the other.
 *
 * at_once : lines per iteration, none at 0.  The loop has to be short for many queries, and must not
 * delay the loads of a single one. */
ALWAYS_INLINE void touch_row(const char *row, int32_t num_bytes, int at_once) {
  const volatile char *bytes = row;
  int32_t i = 0;
  for (; at_once > 1 && i + 64 * at_once <= num_bytes; i += 64 * at_once)
    EACH (j, at_once) bytes[i + 64 * j];
  for (; at_once && i < num_bytes; i += 64) bytes[i];
}

/* Does bandwidth alone decide how long rows of this dtype take?  Then the hardware prefetcher does best. */
ALWAYS_INLINE bool is_bound_by_memory(int32_t dtype, int num_queries) {
  return dtype == PKV_FLOAT32 && num_queries == 1;
}

/* Are keys in memory scored one row after the other?  A tile for one query has many rows (16 with
 * AVX-512; 8 rows of float32 are as large), and their lines, touched at once, would queue behind each
 * other. */
ALWAYS_INLINE bool scores_row_by_row(int32_t dtype, int num_queries) {
  return num_queries == 1 && (TILE_SUMS > 8 || dtype == PKV_FLOAT32);
}

/* Several queries of 16 bits are bound by widening, not by memory, where registers are few. */
ALWAYS_INLINE int touched_at_once(int32_t dtype, int num_queries) {
  if (is_bound_by_memory(dtype, num_queries)) return 4;
  return TILE_SUMS <= 8 && dtype != PKV_FLOAT32 && num_queries > 1 ? 0 : 1;
}

/* ---- scores */

/* Copy queries side by side, vector by vector: one pointer for each would take more registers than there
 * are. */
ALWAYS_INLINE void interleave(float *q, const float *const *from, int num_queries, int32_t dim) {
  for (int32_t d = 0; d < dim; d += WIDTH)
    for (int i = 0; i < num_queries; i++) vec_store(q + d * num_queries + i * WIDTH, vec_load(from[i] + d));
}

/* One query of float32 and evenly spaced keys, in address order, with no other load between them, not
 * even of an address: then the hardware prefetcher keeps up (Zen 4: 28 GB/s; with addresses from an
 * array 19). */
ALWAYS_INLINE void score_strided(const head_rows *keys, int32_t dtype, const float *q, float *scores) {
  const char *key = keys->first;
  for (int32_t t = 0; t < keys->count; t++, key += keys->stride)
    scores[t] = vec_sum(score_row(q, key, keys->dim, dtype));
}

/* Score num_tokens keys, from `first` on, for num_queries. */
ALWAYS_INLINE void score_tile(const head_rows *keys, int32_t dtype, bool is_by_row, cursor *ahead,
                              const float *q, int num_queries, int first, int num_tokens,
                              float scores[][PKV_RUN_TOKENS]) {
  int32_t d = 0;
  vec sums[TILE_SUMS] = {};
  const char *k[TILE_SUMS];
  for (int t = 0; t < num_tokens; t++) k[t] = keys->rows[first + t] + keys->offset;
  for (int t = 0; is_by_row && t < num_tokens; t++) {
    touch_row(k[t], stored_bytes(keys->dim, dtype), touched_at_once(dtype, num_queries));
    sums[t] = score_row(q, k[t], keys->dim, dtype);
    prefetch_ahead(ahead);
  }
  if (is_by_row) d = keys->dim;
  for (; d + WIDTH <= keys->dim; d += WIDTH) {
    prefetch_ahead(ahead);
    for (int t = 0; t < num_tokens; t++) {
      vec key = vec_load_stored(k[t], d, WIDTH, dtype);
      for (int i = 0; i < num_queries; i++)
        sums[i * num_tokens + t] =
            dot_step(vec_load(q + d * num_queries + i * WIDTH), key, sums[i * num_tokens + t], dtype);
    }
  }
  if (HAS_PART && d < keys->dim)
    for (int t = 0; t < num_tokens; t++) {
      vec key = vec_load_stored(k[t], d, PART, dtype);
      for (int i = 0; i < num_queries; i++)
        sums[i * num_tokens + t] =
            dot_step(vec_load(q + d * num_queries + i * WIDTH), key, sums[i * num_tokens + t], dtype);
    }
  float added[TILE_SUMS];
  sum_tile(sums, num_queries * num_tokens, added);
  for (int i = 0; i < num_queries; i++)
    memcpy(scores[i] + first, added + i * num_tokens, (size_t)num_tokens * sizeof *added);
}

/* Score all keys for num_queries (1, 2 or 4), a tile at a time.  With `ahead`, K is in memory: touch it,
 * and prefetch the rows of `ahead`. */
ALWAYS_INLINE void score_keys(const head_rows *keys, int32_t dtype, const head_rows *ahead,
                              const float *const *queries, int num_queries, float scores[][PKV_RUN_TOKENS]) {
  float interleaved[4 * PKV_MAX_HEAD_DIM] __attribute__((aligned(64)));
  if (num_queries > 1) interleave(interleaved, queries, num_queries, keys->dim);
  const float *q = num_queries > 1 ? interleaved : queries[0];
  if (ahead && is_bound_by_memory(dtype, num_queries) && keys->stride) {
    score_strided(keys, dtype, q, scores[0]);
    return;
  }
  bool is_by_row = ahead && scores_row_by_row(dtype, num_queries);
  if (is_bound_by_memory(dtype, num_queries)) ahead = NULL;
  int32_t key_bytes = ahead && !is_by_row ? stored_bytes(keys->dim, dtype) : 0;
  const int step = TILE_SUMS / num_queries;
  cursor at = is_by_row ? cursor_over(ahead, 1, 1) : cursor_over(ahead, step, keys->dim / WIDTH);
  int t = 0;
  for (; t + step <= keys->count; t += step) {
    for (int i = 0; key_bytes && i < step; i++)
      touch_row(keys->rows[t + i] + keys->offset, key_bytes, touched_at_once(dtype, num_queries));
    score_tile(keys, dtype, is_by_row, &at, q, num_queries, t, step, scores);
  }
  for (; t < keys->count; t++) score_tile(keys, dtype, is_by_row, &at, q, num_queries, t, 1, scores);
}

ALWAYS_INLINE void score(const head_rows *keys, const head_rows *ahead, const float *const *q,
                         int num_queries, float scores[][PKV_RUN_TOKENS]) {
  switch (keys->dtype) {
    case PKV_FLOAT32: score_keys(keys, PKV_FLOAT32, ahead, q, num_queries, scores); break;
    case PKV_INT8: OF_INT8(score_bytes, num_queries)(keys, ahead, q, scores); break;
    case PKV_INT4_BY_CHANNEL: OF_INT8(score_nibbles, num_queries)(keys, ahead, q, scores); break;
    case PKV_FLOAT16: score_keys(keys, PKV_FLOAT16, ahead, q, num_queries, scores); break;
    case PKV_BFLOAT16: score_keys(keys, PKV_BFLOAT16, ahead, q, num_queries, scores); break;
#ifdef HAS_PAIRS
    case PKV_BFLOAT16_PAIRS: score_keys(keys, PKV_BFLOAT16_PAIRS, ahead, q, num_queries, scores); break;
#endif
  }
}

/* ---- values */

/* Accumulate num_vectors vectors, from dim d on, for num_queries; each holds `count` values.  Touches
 * rows in memory, and prefetches through `ahead`. */
ALWAYS_INLINE void value_tile(const head_rows *values, int32_t dtype, int32_t touched_bytes, cursor *ahead,
                              float weights[][PKV_RUN_TOKENS], const float *rescale, int num_queries,
                              int32_t d, int num_vectors, int count, float *const *accumulated) {
  vec sums[TILE_SUMS];
  for (int i = 0; i < num_queries; i++)
    for (int j = 0; j < num_vectors; j++)
      sums[i * num_vectors + j] = vec_load(accumulated[i] + d + j * WIDTH) * rescale[i];
  bool is_even = is_bound_by_memory(dtype, num_queries) && values->stride;
  for (int32_t t = 0; t < values->count; t++) {
    const char *row = is_even ? values->first + t * values->stride : values->rows[t] + values->offset;
    touch_row(row, touched_bytes, touched_at_once(dtype, num_queries));
    prefetch_ahead(ahead);
    for (int j = 0; j < num_vectors; j++) {
      vec value = vec_load_stored(row, d + j * WIDTH, count, dtype);
      for (int i = 0; i < num_queries; i++)
        sums[i * num_vectors + j] = vec_fma(vec_all(&weights[i][t]), value, sums[i * num_vectors + j]);
    }
  }
  for (int i = 0; i < num_queries; i++)
    for (int j = 0; j < num_vectors; j++)
      vec_store(accumulated[i] + d + j * WIDTH, sums[i * num_vectors + j]);
}

ALWAYS_INLINE void accumulate_values(const head_rows *values, int32_t dtype, const head_rows *ahead,
                                     float weights[][PKV_RUN_TOKENS], const float *rescale, int num_queries,
                                     float *const *accumulated) {
  const int step = TILE_SUMS / num_queries > 8 ? 8 : TILE_SUMS / num_queries;
  int32_t d = 0;
  bool is_bound = is_bound_by_memory(dtype, num_queries);
  bool is_touched = ahead && !(is_bound && values->stride && values->dim <= step * WIDTH);
  int32_t touched_bytes = is_touched ? stored_bytes(values->dim, dtype) : 0; /* in the first tile */
  int32_t num_sweeps = values->dim / (step * WIDTH);
  cursor at = cursor_over(is_bound ? NULL : ahead, 1, num_sweeps ? num_sweeps : 1);
  for (; d + step * WIDTH <= values->dim; d += step * WIDTH, touched_bytes = 0)
    value_tile(values, dtype, touched_bytes, &at, weights, rescale, num_queries, d, step, WIDTH, accumulated);
  /* Heads of 64 and 96 are no multiple of eight vectors. */
  if (step > 4 && d + 4 * WIDTH <= values->dim) {
    value_tile(values, dtype, touched_bytes, &at, weights, rescale, num_queries, d, 4, WIDTH, accumulated);
    d += 4 * WIDTH;
    touched_bytes = 0;
  }
  for (; d + WIDTH <= values->dim; d += WIDTH, touched_bytes = 0)
    value_tile(values, dtype, touched_bytes, &at, weights, rescale, num_queries, d, 1, WIDTH, accumulated);
  if (HAS_PART && d < values->dim)
    value_tile(values, dtype, 0, &at, weights, rescale, num_queries, d, 1, PART, accumulated);
}

ALWAYS_INLINE void accumulate(const head_rows *values, const head_rows *ahead, const int32_t *num_seen,
                              float weights[][PKV_RUN_TOKENS], const float *rescale, int num_queries,
                              float *const *accumulated) {
  switch (values->dtype) {
    case PKV_INT8:
      OF_INT8(accumulate_bytes, num_queries)(values, ahead, num_seen, weights, rescale, accumulated);
      break;
    case PKV_INT4:
      OF_INT8(accumulate_nibbles, num_queries)(values, ahead, num_seen, weights, rescale, accumulated);
      break;
    case PKV_FLOAT32:
      accumulate_values(values, PKV_FLOAT32, ahead, weights, rescale, num_queries, accumulated);
      break;
    case PKV_FLOAT16:
      accumulate_values(values, PKV_FLOAT16, ahead, weights, rescale, num_queries, accumulated);
      break;
    case PKV_BFLOAT16:
      accumulate_values(values, PKV_BFLOAT16, ahead, weights, rescale, num_queries, accumulated);
      break;
  }
}
