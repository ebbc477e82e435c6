/* Scores to weights, online: what a query accumulated before is rescaled to its new maximum.
 *
 * The one place for all that a call does to scores: scale, soft cap, slopes, and tokens that a row does not
 * see.
 */

/* Scale, soft cap and slope: what a call does to scores after the dot product. */
static void transform_scores(const pkv_layer *layer, const pkv_run *run, int32_t head, int32_t row,
                             float *scores) {
  const float *slope = layer->alibi_slopes ? layer->alibi_slopes + head : NULL;
  for (int32_t t = 0; t < run->num_tokens; t += WIDTH) {
    vec s = vec_load(scores + t) * layer->scale;
    if (layer->soft_cap > 0) s = vec_soft_cap(s, layer->soft_cap);
    if (slope) s = vec_fma((vec){} + *slope, vec_load(run->distances + t) - (float)row, s);
    vec_store(scores + t, s);
  }
}

ALWAYS_INLINE bool transforms_scores(const pkv_layer *layer) {
  return layer->scale != 1 || layer->soft_cap > 0 || layer->alibi_slopes;
}

/* Turn the `padded` scores of num_queries into weights, 2^(score - subtracted), and sum them into
 * `added`. */
ALWAYS_INLINE void exponentiate(float scores[][PKV_RUN_TOKENS], int32_t padded, int num_queries,
                                const float *subtracted, float *added) {
  vec sums[4] = {};
  for (int32_t t = 0; t < padded; t += WIDTH)
    EACH (i, num_queries) {
      vec weights = vec_exp2(vec_load(scores[i] + t) - subtracted[i]);
      vec_store(scores[i] + t, weights);
      sums[i] += weights;
    }
  EACH (i, num_queries) added[i] = vec_sum(sums[i]);
}

/* Turn the `padded` scores of some queries into weights, side by side, since the steps for one query
 * depend on each other.  Maxima, sums and factors are lanes of one vector, a lane per query.  added: the sums
 * of the weights. */
ALWAYS_INLINE void softmax_tile(float scores[][PKV_RUN_TOKENS], int32_t padded, int num_queries,
                                float *const *maximum, float *const *sum, float *rescale, float *added) {
  vec most[4], largest = {}, before = {};
  EACH (i, num_queries) {
    most[i] = (vec){} + *maximum[i];
    before[i] = *maximum[i];
  }
  for (int32_t t = 0; t < padded; t += WIDTH)
    EACH (i, num_queries) most[i] = vec_max(vec_load(scores[i] + t), most[i]);
  EACH (i, num_queries) largest[i] = vec_maximum(most[i]);
  /* Scores of -inf alone have no maximum to subtract; their weights are 0. */
  vec subtracted = vec_select((ivec)(largest == -__builtin_inff()), (vec){}, largest);
  vec powers = vec_exp2(before - subtracted);
  float each[4];
  EACH (i, num_queries) each[i] = subtracted[i];
  exponentiate(scores, padded, num_queries, each, added);
  EACH (i, num_queries) {
    *maximum[i] = largest[i];
    rescale[i] = powers[i];
    *sum[i] = *sum[i] * powers[i] + added[i];
  }
}

#define SOFTMAX(name, num_queries)                                                          \
  NOINLINE void name(float scores[][PKV_RUN_TOKENS], int32_t padded, float *const *maximum, \
                     float *const *sum, float *rescale, float *added) {                     \
    softmax_tile(scores, padded, num_queries, maximum, sum, rescale, added);                \
  }
SOFTMAX(softmax_1, 1)
SOFTMAX(softmax_2, 2)
SOFTMAX(softmax_4, 4)

ALWAYS_INLINE void softmax_queries(float scores[][PKV_RUN_TOKENS], int32_t padded, int num_queries,
                                   float *const *maximum, float *const *sum, float *rescale, float *added) {
  switch (num_queries) {
    case 4: softmax_4(scores, padded, maximum, sum, rescale, added); break;
    case 2: softmax_2(scores, padded, maximum, sum, rescale, added); break;
    case 1: softmax_1(scores, padded, maximum, sum, rescale, added); break;
  }
}

/* The sum of the weights begin .. end - 1. */
static float sum_between(const float *weights, int32_t begin, int32_t end) {
  vec sum = {};
  float rest = 0;
  int32_t t = begin;
  for (; t < end && t % WIDTH; t++) rest += weights[t];
  for (; t + WIDTH <= end; t += WIDTH) sum += vec_load(weights + t);
  for (; t < end; t++) rest += weights[t];
  return vec_sum(sum) + rest;
}

/* Note the weights of a run for one query, which sees its first num_seen tokens; `added` is their sum. */
ALWAYS_INLINE void note_masses(const pkv_masses *masses, int32_t head, int32_t row, int32_t num_seen,
                               const float *weights, float maximum, float added) {
  int64_t at = ((int64_t)row * masses->num_heads + head - masses->first_head) * masses->num_runs;
  float *sums = masses->sums + at * masses->num_parts;
  masses->maxima[at] = maximum;
  if (masses->num_parts == 1) {
    *sums = added;
    return;
  }
  for (int32_t part = 0, begin = 0; part < masses->num_parts; part++) {
    int32_t end = masses->ends[part] < num_seen ? masses->ends[part] : num_seen;
    sums[part] = sum_between(weights, begin, end);
    begin = end;
  }
}

/* Softmax of the scores of `tile` queries; weights are 0 beyond the tokens that are visible.  *rescale: the
 * factors of what was accumulated before; added: the sums of the weights. */
ALWAYS_INLINE void softmax(const pkv_layer *layer, const pkv_run *run, const int32_t *heads,
                           const int32_t *rows, const int32_t *num_seen, int tile,
                           float scores[][PKV_RUN_TOKENS], float *const *maximum, float *const *sum,
                           float *rescale, float *added) {
  int32_t padded = 0;
  EACH (i, tile)
    if (num_seen[i] > padded) padded = num_seen[i];
  padded = (padded + WIDTH - 1) / WIDTH * WIDTH;
  EACH (i, tile) {
    if (transforms_scores(layer)) transform_scores(layer, run, heads[i], rows[i], scores[i]);
    for (int32_t t = num_seen[i]; t < padded; t++) scores[i][t] = -__builtin_inff();
  }
  softmax_queries(scores, padded, tile, maximum, sum, rescale, added);
}

/* Note the weights of `count` queries, without a spare one: its maximum is not a row's. */
ALWAYS_INLINE void note_weights(const pkv_run *run, int count, const int32_t *heads, const int32_t *rows,
                                const int32_t *num_seen, float weights[][PKV_RUN_TOKENS],
                                float *const *maximum, const float *added) {
  if (!run->masses.maxima) return;
  for (int i = 0; i < count; i++)
    note_masses(&run->masses, heads[i], rows[i], num_seen[i], weights[i], *maximum[i], added[i]);
}
