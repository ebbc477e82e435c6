/* One run of tokens folded into the states of its q rows: scores, softmax, values, for each kv head. */
static void score_queries(const head_rows *keys, const head_rows *ahead, const queries *queries,
                          float scores[][PKV_RUN_TOKENS]) {
  for (int i = 0; i < queries->count; ahead = NULL) {
    int tile = tile_size(queries->count - i);
    int32_t most = 0; /* visible to any query of the tile */
    for (int j = i; j < i + tile; j++)
      if (queries->num_seen[j] > most) most = queries->num_seen[j];
    head_rows seen = part_of(keys, 0, most);
    switch (tile) {
      case 4: score(&seen, ahead, queries->q + i, 4, scores + i); break;
      case 2: score(&seen, ahead, queries->q + i, 2, scores + i); break;
      case 1: score(&seen, ahead, queries->q + i, 1, scores + i); break;
    }
    i += tile;
  }
}

/* Values from token `begin` on, visible to one query and not to all of its tile. */
static void accumulate_rest(const head_rows *values, int32_t begin, int32_t end, float *weights,
                            float *accumulated) {
  const float as_it_is = 1.0f;
  head_rows rest = part_of(values, begin, end);
  int32_t count = end - begin;
  accumulate(&rest, NULL, &count, (float (*)[PKV_RUN_TOKENS])(weights + begin), &as_it_is, 1, &accumulated);
}

static void accumulate_queries(const head_rows *values, const head_rows *ahead, const queries *queries,
                               float weights[][PKV_RUN_TOKENS], const float *rescale) {
  for (int i = 0; i < queries->count; ahead = NULL) {
    int tile = tile_size(queries->count - i);
    int32_t least = values->count, most = 0; /* visible to all queries of the tile, and to any */
    for (int j = i; j < i + tile; j++) {
      if (queries->num_seen[j] < least) least = queries->num_seen[j];
      if (queries->num_seen[j] > most) most = queries->num_seen[j];
    }
    /* Integer weights of tokens that a query does not see are 0, whatever the value. */
    head_rows shared = part_of(values, 0, pkv_scale_bytes(values->dtype) ? most : least);
    const int32_t *seen = queries->num_seen + i;
    float *const *accumulated = queries->accumulated + i;
    switch (tile) {
      case 4: accumulate(&shared, ahead, seen, weights + i, rescale + i, 4, accumulated); break;
      case 2: accumulate(&shared, ahead, seen, weights + i, rescale + i, 2, accumulated); break;
      case 1: accumulate(&shared, ahead, seen, weights + i, rescale + i, 1, accumulated); break;
    }
    for (int j = i; j < i + tile; j++)
      if (queries->num_seen[j] > shared.count)
        accumulate_rest(values, shared.count, queries->num_seen[j], weights[j], queries->accumulated[j]);
    i += tile;
  }
}

static void softmax_of_queries(const pkv_layer *layer, const pkv_run *run, const queries *queries,
                               float scores[][PKV_RUN_TOKENS], float *rescale, float *added) {
  for (int i = 0, tile; i < queries->count; i += tile) {
    tile = tile_size(queries->count - i);
    softmax(layer, run, queries->head + i, queries->row + i, queries->num_seen + i, tile, scores + i,
            queries->maximum + i, queries->sum + i, rescale + i, added + i);
  }
}

/* Do all queries of a row give the run so little of their weight that its values are left out? */
static bool gives_little(const pkv_run *run, int count, const int32_t *heads, const float *added,
                         float *const *maximum, float *const *sum) {
  const pkv_skipping *skipping = &run->skipping;
  skipping->num_skipped[0]++;
  skipping->was_skipped[heads[0]] = 0;
  for (int i = 0; i < count; i++) {
    float before = skipping->maxima[heads[i]] - *maximum[i];
    float known = skipping->sums[heads[i]] * vec_exp2((vec){} + before)[0];
    float total = *sum[i] > known ? *sum[i] : known;
    if (!(added[i] <= skipping->share * total)) return false;
  }
  skipping->num_skipped[1]++;
  skipping->was_skipped[heads[0]] = 1;
  return true;
}

static void rescale_values(int32_t dim, int count, const float *rescale, float *const *accumulated) {
  for (int i = 0; i < count; i++)
    for (int32_t d = 0; d < dim; d += WIDTH)
      vec_store(accumulated[i] + d, vec_load(accumulated[i] + d) * rescale[i]);
}

static void fold_queries(const pkv_layer *layer, const pkv_run *run, const head_rows *keys,
                         const head_rows *values, const head_rows *next_keys, queries *queries) {
  spare_state spare;
  int num_own = queries->count;
  bool may_skip = run->skipping.share > 0;
  /* Values are prefetched, unless those of the run before were not read: then the next keys are. */
  bool will_skip = may_skip && run->skipping.was_skipped[queries->head[0]];
  if (queries->count % 4 == 3) add_spare(queries, &spare, values->dim);
  float scores[MAX_QUERIES][PKV_RUN_TOKENS] __attribute__((aligned(64)));
  float rescale[MAX_QUERIES]; /* factors of what was accumulated before */
  float added[MAX_QUERIES];   /* sums of weights */
  score_queries(keys, run->is_resident ? NULL : will_skip ? next_keys : values, queries, scores);
  softmax_of_queries(layer, run, queries, scores, rescale, added);
  note_weights(run, num_own, queries->head, queries->row, queries->num_seen, scores, queries->maximum, added);
  if (may_skip && gives_little(run, num_own, queries->head, added, queries->maximum, queries->sum))
    rescale_values(values->dim, num_own, rescale, queries->accumulated);
  else
    accumulate_queries(values, run->is_resident || will_skip ? NULL : next_keys, queries, scores, rescale);
}

/* Fold one kv head's tokens into the states of its group, of each row. */
static void fold_head(const pkv_layer *layer, const pkv_run *run, int32_t kv_head, const head_rows *keys,
                      const head_rows *values, const head_rows *next_keys, const float *q, pkv_state state) {
  int64_t q_step = pkv_prepared_floats(layer->k.dim, layer->k.dtype), value_step = pkv_padded(layer->v.dim);
  queries queries;
  int count = 0;
  for (int32_t row = 0; row < run->num_rows; row++, q += run->q_stride) {
    int32_t num_seen = run->num_seen ? run->num_seen[row] : run->num_tokens;
    for (int32_t head = 0; head < layer->group; head++) {
      queries.q[count] = q + head * q_step;
      queries.maximum[count] = state.maximum + head;
      queries.sum[count] = state.sum + head;
      queries.accumulated[count] = state.accumulated + head * value_step;
      queries.head[count] = kv_head * layer->group + head; /* of all */
      queries.row[count] = row;
      queries.num_seen[count] = num_seen;
      if (++count < MAX_QUERIES && (row + 1 < run->num_rows || head + 1 < layer->group)) continue;
      queries.count = count;
      fold_queries(layer, run, keys, values, next_keys, &queries);
      count = 0;
    }
    state.maximum += run->state_stride;
    state.sum += run->state_stride;
    state.accumulated += run->state_stride;
  }
}

/* ---- one row that sees all tokens of the run: decode */

/* num_own heads of a group, from `head` of the run on, as a tile of num_heads.  Prefetches `now`, the values,
 * and `next`, keys. */
ALWAYS_INLINE void fold_heads(const pkv_layer *layer, const pkv_run *run, int32_t head, int num_heads,
                              int32_t num_own, const head_rows *keys, const head_rows *values,
                              const head_rows *now, const head_rows *next, const float *q, pkv_state state) {
  float scores[4][PKV_RUN_TOKENS] __attribute__((aligned(64)));
  const float *queries[4];
  float *maximum[4], *sum[4], *accumulated[4], rescale[4], added[4];
  int32_t heads[4], rows[4], num_seen[4];
  spare_state spare;
  if (num_own < num_heads) spare_begin(&spare, values->dim);
  EACH (i, num_heads) {
    bool is_own = i < num_own;
    queries[i] = q + (is_own ? i : i - 1) * pkv_prepared_floats(keys->dim, keys->dtype);
    maximum[i] = is_own ? state.maximum + i : &spare.maximum;
    sum[i] = is_own ? state.sum + i : &spare.sum;
    accumulated[i] = is_own ? state.accumulated + i * pkv_padded(values->dim) : spare.accumulated;
    heads[i] = head + (is_own ? i : i - 1);
    rows[i] = 0;
    num_seen[i] = keys->count;
  }
  bool may_skip = run->skipping.share > 0, will_skip = may_skip && run->skipping.was_skipped[head];
  score(keys, will_skip ? next : now, queries, num_heads, scores);
  softmax(layer, run, heads, rows, num_seen, num_heads, scores, maximum, sum, rescale, added);
  note_weights(run, num_own, heads, rows, num_seen, scores, maximum, added);
  if (may_skip && gives_little(run, num_own, heads, added, maximum, sum))
    rescale_values(values->dim, num_own, rescale, accumulated);
  else
    accumulate(values, will_skip ? NULL : next, num_seen, scores, rescale, num_heads, accumulated);
}

/* A kv head's group of q heads, without looking at what each row sees. */
static void fold_row(const pkv_layer *layer, const pkv_run *run, int32_t kv_head, const head_rows *keys,
                     const head_rows *values, const head_rows *next_keys, const float *q, pkv_state state) {
  for (int32_t i = 0, tile; i < layer->group; i += tile) {
    int32_t head = kv_head * layer->group + i;
    pkv_state own = {state.maximum + i, state.sum + i, state.accumulated + i * pkv_padded(values->dim)};
    const float *own_q = q + i * pkv_prepared_floats(keys->dim, keys->dtype);
    bool is_resident = i || run->is_resident;
    const head_rows *now = is_resident ? NULL : values, *next = is_resident ? NULL : next_keys;
    tile = tile_size(layer->group - i);
    switch (tile) {
      case 4:
        fold_heads(layer, run, head, 4, layer->group - i < 4 ? 3 : 4, keys, values, now, next, own_q, own);
        break;
      case 2: fold_heads(layer, run, head, 2, 2, keys, values, now, next, own_q, own); break;
      case 1: fold_heads(layer, run, head, 1, 1, keys, values, now, next, own_q, own); break;
    }
  }
}

static void fold_run(const pkv_layer *layer, const pkv_run *run, const float *q, pkv_state state) {
  const pkv_format *k = &layer->k, *v = &layer->v;
  int32_t num_tokens = run->num_tokens, end_head = run->first_head + run->num_kv_heads;
  for (int32_t head = run->first_head; head < end_head; head++) {
    head_rows keys =
        head_rows_of(run->k, run->k_scales, k, head, run->k_stride, run->k_scale_stride, num_tokens);
    head_rows values =
        head_rows_of(run->v, run->v_scales, v, head, run->v_stride, run->v_scale_stride, num_tokens);
    head_rows next_keys = head + 1 < end_head
                              ? head_rows_of(run->k, NULL, k, head + 1, 0, 0, num_tokens)
                              : head_rows_of(run->k_next, NULL, k, run->next_head, 0, 0, run->num_next);
    prefetch_scales(&keys);
    prefetch_scales(&values);
    if (FOLDS_SINGLE_ROWS && run->num_rows == 1)
      fold_row(layer, run, head, &keys, &values, &next_keys, q, state);
    else
      fold_head(layer, run, head, &keys, &values, &next_keys, q, state);
    q += layer->group * pkv_prepared_floats(k->dim, k->dtype);
    state.maximum += layer->group;
    state.sum += layer->group;
    state.accumulated += layer->group * pkv_padded(v->dim);
  }
}
