/* How rows are met that come from memory: in the order in which it is fastest, its own.
 *
 * What is computed with them is the body's; here is when they are read.  gcc lays these functions out anew
 * with each change to what is inlined beside them, by as much as a tenth of the time either way. */

/* Read a byte of each line of a row, which will be read in another order, or less evenly: memory is fastest
 * where it is read in its own order, because that is what a CPU's own prefetching goes by (on Zen 4, rows of
 * float32 four at a time are read at a third of the speed of the same rows one after the other).  So many
 * lines `at_once`, none at 0: the loop is to be short for many queries, and not hold up the loads of one. */
ALWAYS_INLINE void touch_row(const char *row, int32_t num_bytes, int at_once) {
  const volatile char *bytes = row;
  int32_t i = 0;
  for (; at_once > 1 && i + 64 * at_once <= num_bytes; i += 64 * at_once)
    EACH (j, at_once) bytes[i + 64 * j];
  for (; at_once && i < num_bytes; i += 64) bytes[i];
}

/* Asks for rows that come next, values while keys are met and the next keys, of the next head or run, while
 * values are: a few lines at each step of what is computed meanwhile.  Asked for all at once they would wait
 * for each other, and what is read now for them.  Into the second-level cache: the first waits for few lines
 * at a time. */
typedef struct {
  const head_rows *rows;
  const char *row; /* NULL: nothing is left to ask for */
  int32_t next;    /* row */
  int32_t offset;
  int32_t row_bytes;
  int32_t step_bytes;
} cursor;

/* Over `rows`, NULL for nothing, num_rows of them in num_steps steps. */
ALWAYS_INLINE cursor cursor_over(const head_rows *rows, int32_t num_rows, int32_t num_steps) {
  if (!rows || !rows->count || num_steps < 1) return (cursor){.row = NULL};
  int32_t row_bytes = stored_bytes(rows->dim, rows->dtype);
  cursor at = {.rows = rows, .next = 1, .row_bytes = row_bytes};
  at.row = row_bytes ? rows->rows[0] + rows->offset : NULL;
  at.step_bytes = (row_bytes * num_rows + num_steps - 1) / num_steps;
  return at;
}

ALWAYS_INLINE void ask_ahead(cursor *at) {
  if (!at->row) return;
  for (int32_t end = at->offset + at->step_bytes; at->offset < end; at->offset += 64)
    __builtin_prefetch(at->row + at->offset, 0, 2);
  if (at->offset < at->row_bytes) return;
  at->offset = 0;
  at->row = at->next < at->rows->count ? at->rows->rows[at->next] + at->rows->offset : NULL;
  at->next++;
}

/* Does memory alone decide how long rows of this dtype take?  Then a CPU's own prefetching does best. */
ALWAYS_INLINE bool is_bound_by_memory(int32_t dtype, int num_queries) {
  return dtype == PKV_FLOAT32 && num_queries == 1;
}

/* Are keys that come from memory met in its order, one row after the other?  For one query a tile holds so
 * many rows that their lines, touched at once, would wait for each other: 16 with AVX-512, and 8 of float32
 * are as large. */
ALWAYS_INLINE bool goes_row_by_row(int32_t dtype, int num_queries) {
  return num_queries == 1 && (TILE_SUMS > 8 || dtype == PKV_FLOAT32);
}

/* Several queries of 16 bits, which are widened, do not wait for memory where registers are few. */
ALWAYS_INLINE int touched_at_once(int32_t dtype, int num_queries) {
  if (is_bound_by_memory(dtype, num_queries)) return 4;
  return TILE_SUMS <= 8 && dtype != PKV_FLOAT32 && num_queries > 1 ? 0 : 1;
}

/* ---- scores */

/* Queries side by side, vector by vector: as many pointers are more than there are registers for. */
ALWAYS_INLINE void interleave(float *q, const float *const *from, int num_queries, int32_t dim) {
  for (int32_t d = 0; d < dim; d += WIDTH)
    for (int i = 0; i < num_queries; i++) vec_store(q + d * num_queries + i * WIDTH, vec_load(from[i] + d));
}

/* One query of float32 and all keys, in memory's order, and nothing else read between them, not even where
 * they lie: then a CPU's own prefetching keeps up (Zen 4: 28 GB/s; with addresses from an array 19). */
ALWAYS_INLINE void score_evenly(const head_rows *keys, int32_t dtype, const float *q, float *scores) {
  const char *key = keys->first;
  for (int32_t t = 0; t < keys->count; t++, key += keys->stride)
    scores[t] = vec_sum(score_row(q, key, keys->dim, dtype));
}

/* Scores of num_queries and num_tokens keys from `first` on. */
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
    ask_ahead(ahead);
  }
  if (is_by_row) d = keys->dim;
  for (; d + WIDTH <= keys->dim; d += WIDTH) {
    ask_ahead(ahead);
    for (int t = 0; t < num_tokens; t++) {
      vec key = vec_load_stored(k[t], d, WIDTH, dtype);
      for (int i = 0; i < num_queries; i++)
        sums[i * num_tokens + t] =
            met(vec_load(q + d * num_queries + i * WIDTH), key, sums[i * num_tokens + t], dtype);
    }
  }
  if (HAS_PART && d < keys->dim)
    for (int t = 0; t < num_tokens; t++) {
      vec key = vec_load_stored(k[t], d, PART, dtype);
      for (int i = 0; i < num_queries; i++)
        sums[i * num_tokens + t] =
            met(vec_load(q + d * num_queries + i * WIDTH), key, sums[i * num_tokens + t], dtype);
    }
  float added[TILE_SUMS];
  sum_tile(sums, num_queries * num_tokens, added);
  for (int i = 0; i < num_queries; i++)
    memcpy(scores[i] + first, added + i * num_tokens, (size_t)num_tokens * sizeof *added);
}

/* Scores of num_queries (1, 2 or 4) and all keys, a tile at a time.  Keys that come from memory are touched,
 * and the values that will be met with them asked for where there is time. */
ALWAYS_INLINE void score_keys(const head_rows *keys, int32_t dtype, const head_rows *ahead,
                              const float *const *queries, int num_queries, float scores[][PKV_RUN_TOKENS]) {
  float beside[4 * PKV_MAX_HEAD_DIM] __attribute__((aligned(64)));
  if (num_queries > 1) interleave(beside, queries, num_queries, keys->dim);
  const float *q = num_queries > 1 ? beside : queries[0];
  if (ahead && is_bound_by_memory(dtype, num_queries) && keys->stride) {
    score_evenly(keys, dtype, q, scores[0]);
    return;
  }
  bool is_by_row = ahead && goes_row_by_row(dtype, num_queries);
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

ALWAYS_INLINE void score_some(const head_rows *keys, const head_rows *ahead, const float *const *q,
                              int num_queries, float scores[][PKV_RUN_TOKENS]) {
  switch (keys->dtype) {
    case PKV_FLOAT32: score_keys(keys, PKV_FLOAT32, ahead, q, num_queries, scores); break;
    case PKV_FLOAT16: score_keys(keys, PKV_FLOAT16, ahead, q, num_queries, scores); break;
    case PKV_BFLOAT16: score_keys(keys, PKV_BFLOAT16, ahead, q, num_queries, scores); break;
#ifdef MULTIPLIES_PAIRS
    case PKV_BFLOAT16_PAIRS: score_keys(keys, PKV_BFLOAT16_PAIRS, ahead, q, num_queries, scores); break;
#endif
  }
}

/* ---- softmax */

/* What is to be subtracted from a query's `padded` scores, which are among others so far; updates their
 * maximum. `exponent`: by what their sum shrinks, as a power of 2. */
ALWAYS_INLINE float find_largest(const float *scores, int32_t padded, float *maximum, float *exponent) {
  vec most = (vec){} + *maximum;
  for (int32_t t = 0; t < padded; t += WIDTH) most = vec_larger(vec_load(scores + t), most);
  float largest = vec_largest(most);
  /* Scores of -inf alone have no maximum to subtract; their weights are 0. */
  float subtracted = largest == -__builtin_inff() ? 0.0f : largest;
  *exponent = *maximum - subtracted;
  *maximum = largest;
  return subtracted;
}

/* Turn scores into weights, which are 0 beyond the tokens that are seen; returns what is added to the sum. */
static float weigh_one(float scores[][PKV_RUN_TOKENS], int32_t num_seen, float *const *maximum,
                       float *exponent) {
  float added;
  int32_t padded = (num_seen + WIDTH - 1) / WIDTH * WIDTH;
  for (int32_t t = num_seen; t < padded; t++) scores[0][t] = -__builtin_inff();
  float subtracted = find_largest(scores[0], padded, *maximum, exponent);
  weigh_some(scores, padded, 1, &subtracted, &added);
  return added;
}

/* One query after the other, while what was asked for comes. */
NOINLINE void weigh(const pkv_run *run, const queries *queries, float scores[][PKV_RUN_TOKENS],
                    float *shrink) {
  float added[MOST_QUERIES];
  memset(shrink, 0, MOST_QUERIES * sizeof *shrink);
  for (int i = 0; i < queries->count; i++) {
    if (is_adjusted(run)) adjust(run, queries->head[i], queries->row[i], scores[i]);
    added[i] = weigh_one(scores + i, queries->num_seen[i], queries->maximum + i, shrink + i);
  }
  for (int i = 0; i < queries->count; i += WIDTH) vec_store(shrink + i, vec_exp2(vec_load(shrink + i)));
  for (int i = 0; i < queries->count; i++) *queries->sum[i] = *queries->sum[i] * shrink[i] + added[i];
}

/* ---- values */

/* Accumulate num_vectors vectors of dims from d on, for num_queries; `count` values are in each.  Rows that
 * come from memory are touched, and what comes next asked for. */
ALWAYS_INLINE void value_tile(const head_rows *values, int32_t dtype, int32_t touched_bytes, cursor *ahead,
                              float weights[][PKV_RUN_TOKENS], const float *shrink, int num_queries,
                              int32_t d, int num_vectors, int count, float *const *accumulated) {
  vec sums[TILE_SUMS];
  for (int i = 0; i < num_queries; i++)
    for (int j = 0; j < num_vectors; j++)
      sums[i * num_vectors + j] = vec_load(accumulated[i] + d + j * WIDTH) * shrink[i];
  bool is_even = is_bound_by_memory(dtype, num_queries) && values->stride;
  for (int32_t t = 0; t < values->count; t++) {
    const char *row = is_even ? values->first + t * values->stride : values->rows[t] + values->offset;
    touch_row(row, touched_bytes, touched_at_once(dtype, num_queries));
    ask_ahead(ahead);
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
                                     float weights[][PKV_RUN_TOKENS], const float *shrink, int num_queries,
                                     float *const *accumulated) {
  const int step = TILE_SUMS / num_queries > 8 ? 8 : TILE_SUMS / num_queries;
  int32_t d = 0;
  bool is_bound = is_bound_by_memory(dtype, num_queries);
  bool is_touched = ahead && !(is_bound && values->stride && values->dim <= step * WIDTH);
  int32_t touched_bytes = is_touched ? stored_bytes(values->dim, dtype) : 0; /* by the first tile */
  cursor at = cursor_over(is_bound ? NULL : ahead, 1, values->dim / (step * WIDTH));
  for (; d + step * WIDTH <= values->dim; d += step * WIDTH, touched_bytes = 0)
    value_tile(values, dtype, touched_bytes, &at, weights, shrink, num_queries, d, step, WIDTH, accumulated);
  for (; d + WIDTH <= values->dim; d += WIDTH)
    value_tile(values, dtype, 0, &at, weights, shrink, num_queries, d, 1, WIDTH, accumulated);
  if (HAS_PART && d < values->dim)
    value_tile(values, dtype, 0, &at, weights, shrink, num_queries, d, 1, PART, accumulated);
}

ALWAYS_INLINE void accumulate_some(const head_rows *values, const head_rows *ahead,
                                   float weights[][PKV_RUN_TOKENS], const float *shrink, int num_queries,
                                   float *const *accumulated) {
  switch (values->dtype) {
    case PKV_FLOAT32:
      accumulate_values(values, PKV_FLOAT32, ahead, weights, shrink, num_queries, accumulated);
      break;
    case PKV_FLOAT16:
      accumulate_values(values, PKV_FLOAT16, ahead, weights, shrink, num_queries, accumulated);
      break;
    case PKV_BFLOAT16:
      accumulate_values(values, PKV_BFLOAT16, ahead, weights, shrink, num_queries, accumulated);
      break;
  }
}
