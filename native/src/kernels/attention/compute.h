/* Scores and weighted sums when arithmetic is the limit: pages are in cache, or many queries reuse them.
 *
 * Cached rows can be read in any order, so nothing is touched first.  What comes next is prefetched all
 * the same: it may be in a farther cache, or evicted by a neighbour.  For each cache line it reads, a
 * loop prefetches the same line of the row that comes next: V while it scores K, the next head's K while
 * it sums V.  That takes no bookkeeping, so the loops are little but multiply-adds.
 *
 * Each loop is a function of its own, so that the compiler gives it all registers: inlined into each
 * other, they keep addresses in memory or, worse, in vectors. */

enum { LINE_BYTES = 64, FOLDS_SINGLE_ROWS = 1 };

ALWAYS_INLINE int64_t bytes_of(int64_t count, int32_t dtype) { return count * stored_bytes(1, dtype); }

ALWAYS_INLINE int values_per_line(int32_t dtype) { return LINE_BYTES / stored_bytes(1, dtype); }

ALWAYS_INLINE void prefetch_line(const char *line) { __builtin_prefetch(line, 0, 2); }

/* Keeps an address in a register: gcc would recompute it for each of the sums that are made of it. */
ALWAYS_INLINE const char *in_register(const char *address) {
  __asm__("" : "+r"(address));
  return address;
}

/* The row to prefetch while token t is read: the last one again where `ahead` has fewer rows. */
ALWAYS_INLINE const char *prefetched_row(const head_rows *ahead, int64_t t) {
  int64_t last = ahead->count - 1;
  return ahead->rows[t < last ? t : last] + ahead->offset;
}

/* ---- scores */

/* sums += q * keys, over `count` dims from d on. */
ALWAYS_INLINE void dot_keys(const char *const *k, int32_t dtype, const float *const *q, int num_queries,
                            int num_tokens, int64_t d, int count, vec *sums) {
  vec some[4];
  EACH (i, num_queries) some[i] = vec_load(q[i] + d);
  EACH (t, num_tokens) {
    vec key = vec_load_stored(k[t] + bytes_of(d, dtype), 0, count, dtype);
    EACH (i, num_queries) sums[i * num_tokens + t] = dot_step(some[i], key, sums[i * num_tokens + t], dtype);
  }
}

/* Score num_tokens keys for num_queries.  Rows begin `offset` bytes behind the addresses; the row to
 * prefetch with each begins prefetch_offset bytes behind it. */
ALWAYS_INLINE void score_tile(const char *const *rows, int64_t offset, int64_t dim, int32_t dtype,
                              bool prefetches, int64_t prefetch_offset, const float *const *q,
                              int num_queries, int num_tokens, float *scores) {
  const int line = values_per_line(dtype);
  int64_t d = 0;
  vec sums[TILE_SUMS] = {};
  const char *k[TILE_SUMS];
  EACH (t, num_tokens) k[t] = rows[t] + offset;
  if (num_queries == 1)
    EACH (t, num_tokens) {
      sums[t] = score_row(*q, k[t], (int32_t)dim, dtype);
      for (int64_t i = 0; prefetches && i < dim; i += line)
        prefetch_line(k[t] + prefetch_offset + bytes_of(i, dtype));
    }
  else {
    for (; d + line <= dim; d += line) {
      EACH (t, num_tokens)
        if (prefetches) prefetch_line(k[t] + (prefetch_offset + bytes_of(d, dtype)));
      EACH (i, line / WIDTH) dot_keys(k, dtype, q, num_queries, num_tokens, d + i * WIDTH, WIDTH, sums);
    }
    for (; d + WIDTH <= dim; d += WIDTH) dot_keys(k, dtype, q, num_queries, num_tokens, d, WIDTH, sums);
    if (HAS_PART && d < dim) dot_keys(k, dtype, q, num_queries, num_tokens, d, PART, sums);
  }
  float added[TILE_SUMS];
  sum_tile(sums, num_queries * num_tokens, added);
  EACH (i, num_queries)
    memcpy(scores + i * PKV_RUN_TOKENS, added + i * num_tokens, (size_t)num_tokens * sizeof *added);
}

/* Score all keys for num_queries (1, 2 or 4), a tile at a time.  The rows to prefetch are the values of
 * the same tokens: as far from each key as the first is. */
ALWAYS_INLINE void score_keys(const head_rows *keys, int32_t dtype, const head_rows *ahead,
                              const float *const *queries, int num_queries, float scores[][PKV_RUN_TOKENS]) {
  const int step = TILE_SUMS / num_queries;
  const float *q[4];
  EACH (i, num_queries) q[i] = queries[i];
  const char *const *rows = keys->rows;
  int64_t offset = keys->offset, dim = keys->dim, count = keys->count, t = 0;
  int64_t prefetch_offset = ahead ? ahead->rows[0] + ahead->offset - (rows[0] + offset) : 0;
  for (; t + step <= count; t += step)
    score_tile(rows + t, offset, dim, dtype, ahead, prefetch_offset, q, num_queries, step, scores[0] + t);
  for (; t < count; t++)
    score_tile(rows + t, offset, dim, dtype, ahead, prefetch_offset, q, num_queries, 1, scores[0] + t);
}

/* Two functions per number of queries: one that prefetches the rows of `ahead`, one that does not. */
#define SCORE_FUNCTIONS(name, dtype, num_queries)                                                        \
  NOINLINE void name(const head_rows *keys, const float *const *q, float scores[][PKV_RUN_TOKENS]) {     \
    score_keys(keys, dtype, NULL, q, num_queries, scores);                                               \
  }                                                                                                      \
  NOINLINE void name##_prefetching(const head_rows *keys, const head_rows *ahead, const float *const *q, \
                                   float scores[][PKV_RUN_TOKENS]) {                                     \
    if (!ahead) __builtin_unreachable();                                                                 \
    score_keys(keys, dtype, ahead, q, num_queries, scores);                                              \
  }
#define SCORE_FUNCTIONS_OF(name, dtype)  \
  SCORE_FUNCTIONS(name##_of_1, dtype, 1) \
  SCORE_FUNCTIONS(name##_of_2, dtype, 2) SCORE_FUNCTIONS(name##_of_4, dtype, 4)
SCORE_FUNCTIONS_OF(score_float32, PKV_FLOAT32)
SCORE_FUNCTIONS_OF(score_float16, PKV_FLOAT16)
SCORE_FUNCTIONS_OF(score_bfloat16, PKV_BFLOAT16)
#ifdef HAS_PAIRS
SCORE_FUNCTIONS_OF(score_pairs, PKV_BFLOAT16_PAIRS)
#endif

#define OF(name, num_queries) \
  ((num_queries) == 4 ? name##_of_4 : (num_queries) == 2 ? name##_of_2 : name##_of_1)
#define OF_PREFETCHING(name, num_queries)         \
  ((num_queries) == 4   ? name##_of_4_prefetching \
   : (num_queries) == 2 ? name##_of_2_prefetching \
                        : name##_of_1_prefetching)
#define CALL_SCORE(name) \
  ahead ? OF_PREFETCHING(name, num_queries)(keys, ahead, q, scores) : OF(name, num_queries)(keys, q, scores)

ALWAYS_INLINE void score(const head_rows *keys, const head_rows *ahead, const float *const *q,
                         int num_queries, float scores[][PKV_RUN_TOKENS]) {
  if (ahead && !ahead->count) ahead = NULL;
  switch (keys->dtype) {
    case PKV_FLOAT32: CALL_SCORE(score_float32); break;
    case PKV_INT8: OF_INT8(score_bytes, num_queries)(keys, ahead, q, scores); break;
    case PKV_INT4_BY_CHANNEL: OF_INT8(score_nibbles, num_queries)(keys, ahead, q, scores); break;
    case PKV_FLOAT16: CALL_SCORE(score_float16); break;
    case PKV_BFLOAT16: CALL_SCORE(score_bfloat16); break;
#ifdef HAS_PAIRS
    case PKV_BFLOAT16_PAIRS: CALL_SCORE(score_pairs); break;
#endif
  }
}

/* ---- values */

/* Accumulate num_vectors vectors, from dim d on, for num_queries; each holds `count` values. */
ALWAYS_INLINE void value_tile(const head_rows *values, int32_t dtype, const head_rows *ahead,
                              float weights[][PKV_RUN_TOKENS], const float *rescale, int num_queries,
                              int64_t d, int num_vectors, int count, float *const *accumulated) {
  const int line = values_per_line(dtype);
  const char *const *rows = values->rows;
  int64_t offset = values->offset + bytes_of(d, dtype), num_tokens = values->count;
  vec sums[TILE_SUMS];
  EACH (i, num_queries)
    EACH (j, num_vectors) sums[i * num_vectors + j] = vec_load(accumulated[i] + d + j * WIDTH) * rescale[i];
  for (int64_t t = 0; t < num_tokens; t++) {
    const char *row = in_register(rows[t] + offset);
    const char *next = ahead ? in_register(prefetched_row(ahead, t) + bytes_of(d, dtype)) : NULL;
    for (int i = 0; ahead && i < num_vectors * WIDTH; i += line) prefetch_line(next + bytes_of(i, dtype));
    EACH (j, num_vectors) {
      vec value = vec_load_stored(row, j * WIDTH, count, dtype);
      EACH (i, num_queries)
        sums[i * num_vectors + j] = vec_fma(vec_all(&weights[i][t]), value, sums[i * num_vectors + j]);
    }
  }
  EACH (i, num_queries)
    EACH (j, num_vectors) vec_store(accumulated[i] + d + j * WIDTH, sums[i * num_vectors + j]);
}

ALWAYS_INLINE void accumulate_values(const head_rows *values, int32_t dtype, const head_rows *ahead,
                                     float weights[][PKV_RUN_TOKENS], const float *rescale, int num_queries,
                                     float *const *accumulated) {
  const int step = TILE_SUMS / num_queries > 8 ? 8 : TILE_SUMS / num_queries;
  int64_t d = 0, dim = values->dim;
  for (; d + step * WIDTH <= dim; d += step * WIDTH)
    value_tile(values, dtype, ahead, weights, rescale, num_queries, d, step, WIDTH, accumulated);
  /* Heads of 64 and 96 are no multiple of eight vectors. */
  if (step > 4 && d + 4 * WIDTH <= dim) {
    value_tile(values, dtype, ahead, weights, rescale, num_queries, d, 4, WIDTH, accumulated);
    d += 4 * WIDTH;
  }
  for (; d + WIDTH <= dim; d += WIDTH)
    value_tile(values, dtype, ahead, weights, rescale, num_queries, d, 1, WIDTH, accumulated);
  if (HAS_PART && d < dim)
    value_tile(values, dtype, NULL, weights, rescale, num_queries, d, 1, PART, accumulated);
}

#define ACCUMULATE_FUNCTIONS(name, dtype, num_queries)                                               \
  NOINLINE void name(const head_rows *values, float weights[][PKV_RUN_TOKENS], const float *rescale, \
                     float *const *accumulated) {                                                    \
    accumulate_values(values, dtype, NULL, weights, rescale, num_queries, accumulated);              \
  }                                                                                                  \
  NOINLINE void name##_prefetching(const head_rows *values, const head_rows *ahead,                  \
                                   float weights[][PKV_RUN_TOKENS], const float *rescale,            \
                                   float *const *accumulated) {                                      \
    if (!ahead) __builtin_unreachable();                                                             \
    accumulate_values(values, dtype, ahead, weights, rescale, num_queries, accumulated);             \
  }
#define ACCUMULATE_FUNCTIONS_OF(name, dtype)  \
  ACCUMULATE_FUNCTIONS(name##_of_1, dtype, 1) \
  ACCUMULATE_FUNCTIONS(name##_of_2, dtype, 2) ACCUMULATE_FUNCTIONS(name##_of_4, dtype, 4)
ACCUMULATE_FUNCTIONS_OF(accumulate_float32, PKV_FLOAT32)
ACCUMULATE_FUNCTIONS_OF(accumulate_float16, PKV_FLOAT16)
ACCUMULATE_FUNCTIONS_OF(accumulate_bfloat16, PKV_BFLOAT16)

#define CALL_ACCUMULATE(name)                                                             \
  ahead ? OF_PREFETCHING(name, num_queries)(values, ahead, weights, rescale, accumulated) \
        : OF(name, num_queries)(values, weights, rescale, accumulated)

ALWAYS_INLINE void accumulate(const head_rows *values, const head_rows *ahead, const int32_t *num_seen,
                              float weights[][PKV_RUN_TOKENS], const float *rescale, int num_queries,
                              float *const *accumulated) {
  if (ahead && !ahead->count) ahead = NULL;
  switch (values->dtype) {
    case PKV_INT8:
      OF_INT8(accumulate_bytes, num_queries)(values, ahead, num_seen, weights, rescale, accumulated);
      break;
    case PKV_INT4:
      OF_INT8(accumulate_nibbles, num_queries)(values, ahead, num_seen, weights, rescale, accumulated);
      break;
    case PKV_FLOAT32: CALL_ACCUMULATE(accumulate_float32); break;
    case PKV_FLOAT16: CALL_ACCUMULATE(accumulate_float16); break;
    case PKV_BFLOAT16: CALL_ACCUMULATE(accumulate_bfloat16); break;
  }
}
