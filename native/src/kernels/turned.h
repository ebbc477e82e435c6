/* Scores of many queries with a run's keys: the keys are turned first, so that a vector holds the same dim of
 * many tokens, and no sum has to be added up across a vector.
 *
 * Bits are those of score_tile.  There a vector's lane l sums the dims l, l + WIDTH, ..., and lanes are added
 * as a tree, halves onto each other; here lane after lane is summed for many tokens, and the lanes come in
 * the order in which the tree meets them: 0, 8, 4, 12, 2, ... of sixteen.
 *
 *   turned    [tile of TURNED_TOKENS tokens][lane, in that order][dim / WIDTH][token]
 *
 * So a tile of four queries reads it from front to back.  Turning costs what the scores of a few queries
 * cost, so that it pays for many (WORTH_TURNING).
 *
 * Included by body.h.
 */
enum { TURNED_TOKENS = 2 * WIDTH, LEVELS = WIDTH == 16 ? 5 : WIDTH == 8 ? 4 : 3 };

/* The lane that comes i-th in the tree: i with its bits the other way round.  Where lane i comes, too. */
ALWAYS_INLINE int in_tree(int i) {
  int lane = 0;
  for (int bit = 1; bit < WIDTH; bit *= 2) lane = 2 * lane + (i & bit ? 1 : 0);
  return lane;
}

/* Lane j of vector i becomes lane i of vector j. */
ALWAYS_INLINE void turn(vec x[WIDTH]) {
  for (int step = 1; step < WIDTH; step *= 2) {
    vec zipped[WIDTH];
    EACH (i, WIDTH / 2) {
      zipped[2 * i] = vec_zip_low(x[i], x[WIDTH / 2 + i]);
      zipped[2 * i + 1] = vec_zip_high(x[i], x[WIDTH / 2 + i]);
    }
    memcpy(x, zipped, sizeof zipped);
  }
}

ALWAYS_INLINE int32_t num_vectors_of(int32_t dim) { return (dim + WIDTH - 1) / WIDTH; }

/* Zeros where there is no token, and no dim. */
ALWAYS_INLINE void turn_keys_of(const head_rows *keys, int32_t dtype, const head_rows *ahead, float *turned) {
  int32_t num_vectors = num_vectors_of(keys->dim);
  if (ahead) bring(keys, dtype, ahead);
  for (int32_t t = 0; t < keys->count; t += TURNED_TOKENS)
    for (int32_t half = 0; half < TURNED_TOKENS; half += WIDTH)
      for (int32_t i = 0; i < num_vectors; i++) {
        vec x[WIDTH];
        int32_t first = t + half, d = i * WIDTH, left = keys->count - first;
        if (left >= WIDTH && d + WIDTH <= keys->dim)
          EACH (j, WIDTH) x[j] = vec_load_stored(keys->rows[first + j] + keys->offset, d, WIDTH, dtype);
        else
          EACH (j, WIDTH) {
            const char *row = j < left ? keys->rows[first + j] + keys->offset : NULL;
            x[j] = !row                     ? (vec){}
                   : d + WIDTH <= keys->dim ? vec_load_stored(row, d, WIDTH, dtype)
                                            : vec_load_stored(row, d, PART, dtype);
          }
        turn(x);
        float *to = turned + (int64_t)t * num_vectors * WIDTH + i * TURNED_TOKENS + half;
        EACH (j, WIDTH) vec_store(to + in_tree(j) * num_vectors * TURNED_TOKENS, x[j]);
      }
}

static void turn_keys(const head_rows *keys, const head_rows *ahead, float *turned) {
  switch (keys->dtype) {
    case PKV_FLOAT32: turn_keys_of(keys, PKV_FLOAT32, ahead, turned); break;
    case PKV_FLOAT16: turn_keys_of(keys, PKV_FLOAT16, ahead, turned); break;
    case PKV_BFLOAT16: turn_keys_of(keys, PKV_BFLOAT16, ahead, turned); break;
#ifdef MULTIPLIES_PAIRS
    case PKV_BFLOAT16_PAIRS: turn_keys_of(keys, PKV_BFLOAT16_PAIRS, ahead, turned); break;
#endif
  }
}

/* Scores of num_queries with a tile of tokens, whose turned keys these are. */
ALWAYS_INLINE void score_turned_tile(const float *turned, int32_t num_vectors, int32_t dtype,
                                     const float *const *q, int num_queries, float scores[][PKV_RUN_TOKENS]) {
  vec levels[LEVELS][8]; /* sums of 1, 2, 4, ... lanes that wait for their like */
  for (int i = 0; i < WIDTH; i++) {
    vec sums[8] = {};
    for (int32_t v = 0; v < num_vectors; v++, turned += TURNED_TOKENS) {
      vec low = vec_kept(vec_load(turned)), high = vec_kept(vec_load(turned + WIDTH));
      EACH (n, num_queries) {
        vec all = vec_all(q[n] + v * WIDTH + in_tree(i));
        sums[2 * n] = met(all, low, sums[2 * n], dtype);
        sums[2 * n + 1] = met(all, high, sums[2 * n + 1], dtype);
      }
    }
    int level = 0;
    for (int bits = i; bits & 1; bits >>= 1, level++)
      EACH (j, 2 * num_queries) sums[j] += levels[level][j];
    EACH (j, 2 * num_queries) levels[level][j] = sums[j];
  }
  for (int n = 0; n < num_queries; n++)
    for (int half = 0; half < 2; half++)
      vec_store(scores[n] + half * WIDTH, levels[LEVELS - 1][2 * n + half]);
}

ALWAYS_INLINE void score_turned_as(const float *turned, int32_t dim, int32_t dtype, int32_t num_tokens,
                                   const float *const *q, int num_queries, float scores[][PKV_RUN_TOKENS]) {
  int32_t num_vectors = num_vectors_of(dim);
  for (int32_t t = 0; t < num_tokens; t += TURNED_TOKENS, turned += TURNED_TOKENS * num_vectors * WIDTH)
    score_turned_tile(turned, num_vectors, dtype, q, num_queries, (float (*)[PKV_RUN_TOKENS])(scores[0] + t));
}

/* Keys are floats once they are turned, or pairs. */
ALWAYS_INLINE void score_turned(const float *turned, int32_t dim, int32_t dtype, int32_t num_tokens,
                                const float *const *q, int num_queries, float scores[][PKV_RUN_TOKENS]) {
#ifdef MULTIPLIES_PAIRS
  if (dtype == PKV_BFLOAT16_PAIRS) {
    score_turned_as(turned, dim, PKV_BFLOAT16_PAIRS, num_tokens, q, num_queries, scores);
    return;
  }
#endif
  (void)dtype;
  score_turned_as(turned, dim, PKV_FLOAT32, num_tokens, q, num_queries, scores);
}
