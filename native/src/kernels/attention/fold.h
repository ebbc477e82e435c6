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
  accumulate(&rest, NULL, (float (*)[PKV_RUN_TOKENS])(weights + begin), &as_it_is, 1, &accumulated);
}

static void accumulate_queries(const head_rows *values, const head_rows *ahead, const queries *queries,
                               float weights[][PKV_RUN_TOKENS], const float *rescale) {
  for (int i = 0; i < queries->count; ahead = NULL) {
    int tile = tile_size(queries->count - i);
    int32_t least = values->count; /* visible to all queries of the tile */
    for (int j = i; j < i + tile; j++)
      if (queries->num_seen[j] < least) least = queries->num_seen[j];
    head_rows shared = part_of(values, 0, least);
    switch (tile) {
      case 4: accumulate(&shared, ahead, weights + i, rescale + i, 4, queries->accumulated + i); break;
      case 2: accumulate(&shared, ahead, weights + i, rescale + i, 2, queries->accumulated + i); break;
      case 1: accumulate(&shared, ahead, weights + i, rescale + i, 1, queries->accumulated + i); break;
    }
    for (int j = i; j < i + tile; j++)
      if (queries->num_seen[j] > shared.count)
        accumulate_rest(values, shared.count, queries->num_seen[j], weights[j], queries->accumulated[j]);
    i += tile;
  }
}

static void fold_queries(const pkv_run *run, const head_rows *keys, const head_rows *values,
                         const head_rows *next_keys, const queries *queries) {
  float scores[MAX_QUERIES][PKV_RUN_TOKENS] __attribute__((aligned(64)));
  float rescale[MAX_QUERIES]; /* factors of what was accumulated before */
  score_queries(keys, run->is_resident ? NULL : values, queries, scores);
  softmax(run, queries, scores, rescale);
  accumulate_queries(values, run->is_resident ? NULL : next_keys, queries, scores, rescale);
}

/* Fold one kv head's tokens into the states of its group, of each row. */
static void fold_head(const pkv_run *run, int32_t kv_head, const head_rows *keys, const head_rows *values,
                      const head_rows *next_keys, const float *q, pkv_state state) {
  int64_t q_step = pkv_padded(run->head_dim), value_step = pkv_padded(run->head_dim_v);
  queries queries;
  int count = 0;
  for (int32_t row = 0; row < run->num_rows; row++, q += run->q_stride) {
    int32_t num_seen = run->num_seen ? run->num_seen[row] : run->num_tokens;
    for (int32_t head = 0; head < run->group; head++) {
      queries.q[count] = q + head * q_step;
      queries.maximum[count] = state.maximum + head;
      queries.sum[count] = state.sum + head;
      queries.accumulated[count] = state.accumulated + head * value_step;
      queries.head[count] = kv_head * run->group + head;
      queries.row[count] = row;
      queries.num_seen[count] = num_seen;
      if (++count < MAX_QUERIES && (row + 1 < run->num_rows || head + 1 < run->group)) continue;
      queries.count = count;
      fold_queries(run, keys, values, next_keys, &queries);
      count = 0;
    }
    state.maximum += run->state_stride;
    state.sum += run->state_stride;
    state.accumulated += run->state_stride;
  }
}

static void fold_run(const pkv_run *run, const float *q, pkv_state state) {
  int32_t num_tokens = run->num_tokens, dim = run->head_dim, dim_v = run->head_dim_v;
  int64_t k_offset = run->k_offset, v_offset = run->v_offset;
  for (int32_t head = 0; head < run->num_kv_heads; head++) {
    head_rows keys = head_rows_of(run->k, k_offset, run->k_stride, num_tokens, dim, run->k_dtype);
    head_rows values = head_rows_of(run->v, v_offset, run->v_stride, num_tokens, dim_v, run->v_dtype);
    k_offset += run->k_head_stride;
    v_offset += run->v_head_stride;
    head_rows next_keys =
        head + 1 < run->num_kv_heads
            ? head_rows_of(run->k, k_offset, 0, num_tokens, dim, run->k_dtype)
            : head_rows_of(run->k_next, run->next_offset, 0, run->num_next, dim, run->k_dtype);
#ifdef COMPUTE
    if (run->num_rows == 1)
      fold_row(run, head, &keys, &values, &next_keys, q, state);
    else
#endif
      fold_head(run, head, &keys, &values, &next_keys, q, state);
    q += run->group * pkv_padded(dim);
    state.maximum += run->group;
    state.sum += run->group;
    state.accumulated += run->group * pkv_padded(dim_v);
  }
}
