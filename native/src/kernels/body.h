/* The kernel, written once in verbs; each instruction set defines WIDTH, vec and the verbs, and includes
 * this.
 *
 * One q row meets one run of tokens that it sees (kernel.h).  For each group of q heads:
 *
 *   scores    s = q . k                      one vector accumulator over ascending dims, summed as a tree
 *   softmax   m' = max(m, s), p = 2^(s - m') online: what was summed before is scaled by 2^(m - m')
 *   values    a = a * 2^(m - m') + p v       one chain of multiply-adds over ascending tokens
 *
 * so how many heads and tokens a tile takes at once changes no bit.  Everything is static: a copy of a
 * function that is compiled for a newer machine must not be the one that the linker keeps for all.
 *
 * Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018, algorithm 3.
 */
#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum {
  TILE_HEADS = 4,  /* q heads at once: with two tokens, eight sums, enough to hide a multiply-add's latency */
  TILE_VALUES = 8, /* vectors of accumulated values at once */
};

ALWAYS_INLINE vec vec_load(const float *from) {
  vec x;
  memcpy(&x, from, sizeof x);
  return x;
}

ALWAYS_INLINE void vec_store(float *to, vec x) { memcpy(to, &x, sizeof x); }

ALWAYS_INLINE vec vec_select(ivec mask, vec yes, vec no) {
  return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}

/* WIDTH stored values from element i of a row on. */
ALWAYS_INLINE vec vec_load_stored(const char *row, int32_t i, int32_t dtype) {
  if (dtype == PKV_FLOAT32) return vec_load((const float *)row + i);
  halves x;
  memcpy(&x, row + 2 * i, sizeof x);
  return dtype == PKV_BFLOAT16 ? vec_from_bfloat16(x) : vec_from_float16(x);
}

/* 2^x for x <= 0; 0 below 2^-125.  NaN stays NaN.
 * The polynomial interpolates 2^x on [-1/2, 1/2] at Chebyshev's points, relative error 3e-9. */
ALWAYS_INLINE vec vec_exp2(vec x) {
  const float to_integer = 0x1.8p23f; /* adding it leaves the nearest integer in the low bits */
  vec shifted = x + to_integer;
  vec f = x - (shifted - to_integer);
  vec p = vec_fma(f, (vec){} + 0x1.443ffep-13f, (vec){} + 0x1.5f48c0p-10f);
  p = vec_fma(p, f, (vec){} + 0x1.3b2a1cp-7f);
  p = vec_fma(p, f, (vec){} + 0x1.c6aeccp-5f);
  p = vec_fma(p, f, (vec){} + 0x1.ebfbe0p-3f);
  p = vec_fma(p, f, (vec){} + 0x1.62e430p-1f);
  p = vec_fma(p, f, (vec){} + 1.0f);
  /* Multiplied, not added to the exponent: garbage times NaN is NaN still. */
  vec power = vec_from_bits(((ivec)shifted << 23) + (127 << 23));
  return vec_select((ivec)(x < -125.0f), (vec){}, p * power);
}

static float exp2_of(float x) { return vec_exp2((vec){} + x)[0]; }

/* ---- scores */

/* Scores of num_heads q heads and num_tokens tokens from `first` on. */
ALWAYS_INLINE void score_tile(const pkv_run *run, int64_t k_offset, int32_t dtype, const float *q,
                              int num_heads, int first, int num_tokens, float scores[][PKV_RUN_TOKENS]) {
  int32_t head_dim = run->head_dim;
  vec sums[8] = {};
  const char *k[8];
  for (int t = 0; t < num_tokens; t++) k[t] = run->k[first + t] + k_offset;
  for (int32_t d = 0; d < head_dim; d += WIDTH)
    for (int t = 0; t < num_tokens; t++) {
      vec key = vec_load_stored(k[t], d, dtype);
      for (int h = 0; h < num_heads; h++)
        sums[h * num_tokens + t] = vec_fma(vec_load(q + h * head_dim + d), key, sums[h * num_tokens + t]);
    }
  for (int h = 0; h < num_heads; h++)
    for (int t = 0; t < num_tokens; t++) scores[h][first + t] = vec_sum(sums[h * num_tokens + t]);
}

/* Scores of num_heads q heads (1, 2, 3 or 4) and the whole run, eight sums at a time. */
ALWAYS_INLINE void score_heads(const pkv_run *run, int64_t k_offset, int32_t dtype, const float *q,
                               int num_heads, float scores[][PKV_RUN_TOKENS]) {
  const int step = num_heads == 1 ? 8 : num_heads == 2 ? 4 : 2;
  int t = 0;
  for (; t + step <= run->num_tokens; t += step)
    score_tile(run, k_offset, dtype, q, num_heads, t, step, scores);
  for (; t < run->num_tokens; t++) score_tile(run, k_offset, dtype, q, num_heads, t, 1, scores);
}

/* ---- softmax */

/* Turn a head's scores into weights, 0 beyond the run; update its maximum and sum.
 * Returns the factor by which what was accumulated before shrinks. */
static float weigh(const pkv_run *run, float *scores, float *maximum, float *sum) {
  int32_t padded = (run->num_tokens + WIDTH - 1) / WIDTH * WIDTH;
  for (int32_t t = run->num_tokens; t < padded; t++) scores[t] = -__builtin_inff();
  float largest = *maximum;
  for (int32_t t = 0; t < run->num_tokens; t++) largest = scores[t] > largest ? scores[t] : largest;
  /* Scores of -inf alone have no maximum to subtract; their weights are 0. */
  float subtracted = largest == -__builtin_inff() ? 0.0f : largest;
  vec sums = {};
  for (int32_t t = 0; t < padded; t += WIDTH) {
    vec weights = vec_exp2(vec_load(scores + t) - subtracted);
    vec_store(scores + t, weights);
    sums += weights;
  }
  float shrink = exp2_of(*maximum - subtracted);
  *maximum = largest;
  *sum = *sum * shrink + vec_sum(sums);
  return shrink;
}

/* ---- values */

/* Accumulate num_vectors vectors of dims from d on, for num_heads q heads. */
ALWAYS_INLINE void value_tile(const pkv_run *run, int64_t v_offset, int32_t dtype,
                              float weights[][PKV_RUN_TOKENS], const float *shrink, int num_heads, int32_t d,
                              int num_vectors, float *accumulated) {
  vec sums[TILE_VALUES];
  for (int h = 0; h < num_heads; h++)
    for (int i = 0; i < num_vectors; i++)
      sums[h * num_vectors + i] = vec_load(accumulated + h * run->head_dim + d + i * WIDTH) * shrink[h];
  for (int32_t t = 0; t < run->num_tokens; t++) {
    const char *row = run->v[t] + v_offset;
    for (int i = 0; i < num_vectors; i++) {
      vec value = vec_load_stored(row, d + i * WIDTH, dtype);
      for (int h = 0; h < num_heads; h++)
        sums[h * num_vectors + i] = vec_fma((vec){} + weights[h][t], value, sums[h * num_vectors + i]);
    }
  }
  for (int h = 0; h < num_heads; h++)
    for (int i = 0; i < num_vectors; i++)
      vec_store(accumulated + h * run->head_dim + d + i * WIDTH, sums[h * num_vectors + i]);
}

ALWAYS_INLINE void accumulate_heads(const pkv_run *run, int64_t v_offset, int32_t dtype,
                                    float weights[][PKV_RUN_TOKENS], const float *shrink, int num_heads,
                                    float *accumulated) {
  const int step = num_heads == 1 ? 4 : 2;
  int32_t d = 0;
  for (; d + step * WIDTH <= run->head_dim; d += step * WIDTH)
    value_tile(run, v_offset, dtype, weights, shrink, num_heads, d, step, accumulated);
  for (; d < run->head_dim; d += WIDTH)
    value_tile(run, v_offset, dtype, weights, shrink, num_heads, d, 1, accumulated);
}

/* ---- the four steps */

ALWAYS_INLINE void fold_heads(const pkv_run *run, int64_t k_offset, int64_t v_offset, int32_t dtype,
                              const float *q, int num_heads, pkv_state state) {
  float scores[TILE_HEADS][PKV_RUN_TOKENS], shrink[TILE_HEADS];
  score_heads(run, k_offset, dtype, q, num_heads, scores);
  for (int h = 0; h < num_heads; h++) shrink[h] = weigh(run, scores[h], &state.maximum[h], &state.sum[h]);
  accumulate_heads(run, v_offset, dtype, scores, shrink, num_heads, state.accumulated);
}

ALWAYS_INLINE void fold_group(const pkv_run *run, int64_t k_offset, int64_t v_offset, int32_t dtype,
                              const float *q, pkv_state state) {
  int32_t h = 0;
  while (h < run->group) {
    const float *q_heads = q + h * run->head_dim;
    pkv_state heads = {state.maximum + h, state.sum + h, state.accumulated + h * run->head_dim};
    int32_t left = run->group - h;
    if (left >= 4)
      fold_heads(run, k_offset, v_offset, dtype, q_heads, 4, heads), h += 4;
    else if (left >= 2)
      fold_heads(run, k_offset, v_offset, dtype, q_heads, 2, heads), h += 2;
    else
      fold_heads(run, k_offset, v_offset, dtype, q_heads, 1, heads), h += 1;
  }
}

static void fold_run(const pkv_run *run, int64_t k_offset, int64_t v_offset, const float *q,
                     pkv_state state) {
  switch (run->dtype) {
    case PKV_FLOAT32: fold_group(run, k_offset, v_offset, PKV_FLOAT32, q, state); break;
    case PKV_FLOAT16: fold_group(run, k_offset, v_offset, PKV_FLOAT16, q, state); break;
    case PKV_BFLOAT16: fold_group(run, k_offset, v_offset, PKV_BFLOAT16, q, state); break;
  }
}

static void merge(pkv_state state, pkv_state later, int32_t num_heads, int32_t head_dim) {
  for (int32_t h = 0; h < num_heads; h++) {
    float a = state.maximum[h], b = later.maximum[h];
    float largest = a > b ? a : b;
    float subtracted = largest == -__builtin_inff() ? 0.0f : largest;
    float shrink = exp2_of(a - subtracted), weight = exp2_of(b - subtracted);
    state.maximum[h] = largest;
    state.sum[h] = state.sum[h] * shrink + later.sum[h] * weight;
    float *ours = state.accumulated + h * head_dim;
    const float *theirs = later.accumulated + h * head_dim;
    for (int32_t d = 0; d < head_dim; d += WIDTH)
      vec_store(ours + d, vec_load(ours + d) * shrink + vec_load(theirs + d) * weight);
  }
}

static void finish(float *out, pkv_state state, int32_t num_heads, int32_t head_dim) {
  for (int32_t h = 0; h < num_heads; h++)
    for (int32_t d = 0; d < head_dim; d += WIDTH)
      vec_store(out + h * head_dim + d, vec_load(state.accumulated + h * head_dim + d) / state.sum[h]);
}

static void prepare_q(float *prepared, const float *q, float scale, int64_t count) {
  for (int64_t i = 0; i < count; i += WIDTH) vec_store(prepared + i, vec_load(q + i) * scale);
}

/* ---- conversions */

/* Finite values beyond `largest` become it; inf and NaN pass.  Rounding cannot carry what is left to inf. */
ALWAYS_INLINE vec saturate(vec x, float largest) {
  ivec magnitude = (ivec)x & 0x7fffffff, sign = (ivec)x & ~0x7fffffff;
  ivec limit = (ivec)((vec){} + largest);
  ivec is_beyond = (magnitude > limit) & (magnitude < 0x7f800000);
  return vec_select(is_beyond, (vec)(limit | sign), x);
}

ALWAYS_INLINE halves vec_to_bfloat16(vec x) {
  ivec bits = (ivec)x;
  ivec rounded = bits + 0x7fff + ((bits >> 16) & 1);
  ivec quiet = bits | 0x400000;
  ivec is_nan = (bits & 0x7fffffff) > 0x7f800000;
  ivec result = (is_nan & quiet) | (~is_nan & rounded);
  return vec_low_halves((result >> 16) & 0xffff);
}

ALWAYS_INLINE void narrow_as(char *stored, const float *values, int64_t count, int32_t dtype) {
  for (int64_t i = 0; i < count; i += WIDTH) {
    vec x = vec_load(values + i);
    halves h = dtype == PKV_BFLOAT16 ? vec_to_bfloat16(saturate(x, 0x1.fep127f))
                                     : vec_to_float16(saturate(x, 65504.0f));
    memcpy(stored + 2 * i, &h, sizeof h);
  }
}

static void narrow(char *stored, const float *values, int64_t count, int32_t dtype) {
  switch (dtype) {
    case PKV_FLOAT32: memcpy(stored, values, (size_t)count * sizeof *values); break;
    case PKV_FLOAT16: narrow_as(stored, values, count, PKV_FLOAT16); break;
    case PKV_BFLOAT16: narrow_as(stored, values, count, PKV_BFLOAT16); break;
  }
}

static void widen(float *values, const char *stored, int64_t count, int32_t dtype) {
  for (int64_t i = 0; i < count; i += WIDTH)
    vec_store(values + i, vec_load_stored(stored, (int32_t)i, dtype));
}

const pkv_kernel KERNEL = {KERNEL_NAME, prepare_q, fold_run, merge, finish, narrow, widen};
