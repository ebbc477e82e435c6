/* Two states of the same heads, over earlier and later tokens, merged into one. */
static float exp2_of(float x) { return vec_exp2((vec){} + x)[0]; }

/* Two maxima brought to the larger one: the factors that rescale the sums of each. */
typedef struct {
  float maximum, ours, theirs;
} rescaling;

static rescaling to_common_maximum(float a, float b) {
  float largest = a > b ? a : b;
  float subtracted = largest == -__builtin_inff() ? 0.0f : largest;
  return (rescaling){largest, exp2_of(a - subtracted), exp2_of(b - subtracted)};
}

/* The first `count` lanes; zeros behind. */
ALWAYS_INLINE vec vec_load_first(const float *from, int count) {
  float floats[WIDTH] = {0};
  if (count == WIDTH) return vec_load(from);
  memcpy(floats, from, (size_t)count * sizeof *from);
  return vec_load(floats);
}

ALWAYS_INLINE void vec_store_first(float *to, vec x, int count) {
  memcpy(to, &x, (size_t)(count < WIDTH ? count : WIDTH) * sizeof *to);
}

static float dot_bfloat16(const float *q, const uint16_t *row, int32_t dim) {
  return vec_sum(score_row(q, (const char *)row, dim, PKV_BFLOAT16));
}

static void normalise(float *factors, const float *maxima, int64_t count, float maximum, float sum) {
  for (int64_t i = 0; i < count; i += WIDTH)
    vec_store(factors + i, vec_exp2(vec_load(maxima + i) - maximum) / sum);
}

/* A probability in units; it fits an int32. */
ALWAYS_INLINE int32_t units_of(float probability) {
  float valid = probability > 0 ? probability : 0; /* nor NaN */
  return (int32_t)((valid < 1 ? valid : 1) * (float)PKV_MASS_UNITS + 0.5f);
}

static void tally(int64_t *totals, const float *sums, const float *factors, int64_t num_runs,
                  int32_t num_parts) {
  if (num_parts == 1) {
    for (int64_t run = 0; run < num_runs; run++) totals[run] += units_of(sums[run] * factors[run]);
    return;
  }
  for (int64_t run = 0; run < num_runs; run++)
    for (int32_t part = 0; part < num_parts; part++)
      totals[run * num_parts + part] += units_of(sums[run * num_parts + part] * factors[run]);
}

static void merge(pkv_state state, pkv_state later, int32_t num_heads, int32_t head_dim_v) {
  for (int32_t first = 0; first < num_heads; first += WIDTH) {
    int count = num_heads - first < WIDTH ? num_heads - first : WIDTH;
    vec a = vec_load_first(state.maximum + first, count), b = vec_load_first(later.maximum + first, count);
    vec largest = vec_max(a, b);
    vec subtracted = vec_select((ivec)(largest == -__builtin_inff()), (vec){}, largest);
    vec ours = vec_exp2(a - subtracted), theirs = vec_exp2(b - subtracted);
    vec_store_first(state.maximum + first, largest, count);
    vec_store_first(
        state.sum + first,
        vec_load_first(state.sum + first, count) * ours + vec_load_first(later.sum + first, count) * theirs,
        count);
    for (int i = 0; i < count; i++) {
      float *to = state.accumulated + (first + i) * pkv_padded(head_dim_v);
      const float *from = later.accumulated + (first + i) * pkv_padded(head_dim_v);
      for (int32_t d = 0; d < head_dim_v; d += WIDTH)
        vec_store(to + d, vec_load(to + d) * ours[i] + vec_load(from + d) * theirs[i]);
    }
  }
}
