/* The kernel, written once in verbs; each instruction set defines WIDTH, TILE_SUMS, vec and the verbs, and
 * includes this.
 *
 * One q row meets one run of tokens that it sees (kernel.h).  For each group of q heads:
 *
 *   scores    s = q . k                      one vector accumulator over ascending dims, summed as a tree
 *   softmax   m' = max(m, s), p = 2^(s - m') online: what was summed before is scaled by 2^(m - m')
 *   values    a = a * 2^(m - m') + p v       one chain of multiply-adds over ascending tokens
 *
 * so how many heads and tokens a tile takes at once changes no bit: as many as its TILE_SUMS accumulators
 * hold, of which there are enough to hide a multiply-add's latency.  Between scores and softmax, scores are
 * capped and biased where a call asks for that.  Everything is static: a copy of a function that is compiled
 * for a newer machine must not be the one that the linker keeps for all.
 *
 * Dims come in eights.  Where a vector is wider, the last one of a row may be half full (PART), with zeros
 * behind: q and accumulated values have room for it.
 *
 * Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018, algorithm 3.
 */
#include <stdbool.h>

#include "loops.h"

enum {
  MOST_QUERIES = 32, /* that meet a run together, up to four at once with TILE_SUMS / 4 tokens or vectors */
  HAS_PART = WIDTH > 8,
  PART = WIDTH > 8 ? 8 : WIDTH, /* values in the last vector of a row of 8, 24, 40, ... */
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

#ifndef LOADS_PARTS /* a verb of those that are wider than eight; the others have whole vectors only */
ALWAYS_INLINE vec vec_load_part(const float *from) { return vec_load(from); }
ALWAYS_INLINE halves halves_load_part(const char *from) {
  halves x;
  memcpy(&x, from, sizeof x);
  return x;
}
#endif

#ifndef TAKES_LARGER
/* The larger of each lane; b where one is NaN. */
ALWAYS_INLINE vec vec_larger(vec a, vec b) { return vec_select((ivec)(a > b), a, b); }
#endif

#ifndef TAKES_HIGH_HALVES
ALWAYS_INLINE halves vec_high_halves(ivec bits) { return vec_low_halves((bits >> 16) & 0xffff); }
#endif

/* `count` values, WIDTH or PART; zeros behind. */
ALWAYS_INLINE vec vec_load_some(const float *from, int count) {
  return count == WIDTH ? vec_load(from) : vec_load_part(from);
}

/* `count` stored values from element i of a row on; of pairs, so many, as they are. */
ALWAYS_INLINE vec vec_load_stored(const char *row, int32_t i, int count, int32_t dtype) {
  if (dtype == PKV_FLOAT32 || dtype == PKV_BFLOAT16_PAIRS)
    return vec_load_some((const float *)row + i, count);
  halves x;
  if (count == WIDTH)
    memcpy(&x, row + 2 * i, sizeof x);
  else
    x = halves_load_part(row + 2 * i);
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
  return (vec)((ivec)(p * power) & ~(ivec)(x < -125.0f));
}

static float exp2_of(float x) { return vec_exp2((vec){} + x)[0]; }

/* tanh, times `factor`, of x / factor: x bent so that it stays within +-factor.
 * Below 0.625 an odd polynomial (interpolated at Chebyshev's points, relative error 6e-10) is added to x
 * itself, so that nothing is lost where the factor is large; above, (1 - t) / (1 + t) with t = e^(-2 |y|). */
ALWAYS_INLINE vec vec_soft_cap(vec x, float factor) {
  vec y = x / factor, z = y * y;
  ivec sign = (ivec)y & ~0x7fffffff;
  vec magnitude = (vec)((ivec)y & 0x7fffffff);
  vec p = vec_fma(z, (vec){} + 0x1.2c83c0p-9f, (vec){} - 0x1.116a16p-7f);
  p = vec_fma(p, z, (vec){} + 0x1.64a976p-6f);
  p = vec_fma(p, z, (vec){} - 0x1.ba08c4p-5f);
  p = vec_fma(p, z, (vec){} + 0x1.1110eap-3f);
  p = vec_fma(p, z, (vec){} - 0x1.555556p-2f);
  vec small = vec_fma(x, p * z, x);
  vec t = vec_exp2(magnitude * -0x1.715476p+1f);
  vec large = (1.0f - t) / (1.0f + t) * factor;
  return vec_select((ivec)(magnitude < 0.625f), small, (vec)((ivec)large | sign));
}

ALWAYS_INLINE int32_t stored_bytes(int32_t head_dim, int32_t dtype) {
  return head_dim * (dtype == PKV_FLOAT32 || dtype == PKV_BFLOAT16_PAIRS ? 4 : 2);
}

/* Rows of one head that several queries meet: where they lie, as what. */
typedef struct {
  const char *const *rows; /* [count] */
  int64_t offset;          /* from there */
  const char *first;       /* row of them */
  int64_t stride;          /* from it to the next; 0: they are not evenly spaced */
  int32_t count;
  int32_t dim;
  int32_t dtype;
} head_rows;

static head_rows head_rows_of(const char *const *rows, int64_t offset, int64_t stride, int32_t count,
                              int32_t dim, int32_t dtype) {
  return (head_rows){rows, offset, count ? rows[0] + offset : NULL, stride, count, dim, dtype};
}

/* Those from `begin` up to `end`. */
static head_rows part_of(const head_rows *all, int32_t begin, int32_t end) {
  return head_rows_of(all->rows + begin, all->offset, all->stride, end - begin, all->dim, all->dtype);
}

/* ---- scores */

/* sum + q * key, of dims or, where a kernel knows them, of pairs of dims: one after the other. */
ALWAYS_INLINE vec met(vec q, vec key, vec sum, int32_t dtype) {
#ifdef MULTIPLIES_PAIRS
  if (dtype == PKV_BFLOAT16_PAIRS) return vec_fma_pairs(q, key, sum);
#endif
  (void)dtype;
  return vec_fma(q, key, sum);
}

/* One query and one key: to be summed. */
ALWAYS_INLINE vec score_row(const float *q, const char *key, int32_t dim, int32_t dtype) {
  vec sum = {};
  int32_t d = 0;
  for (; d + 8 * WIDTH <= dim; d += 8 * WIDTH)
    EACH (j, 8)
      sum = met(vec_load(q + d + j * WIDTH), vec_load_stored(key, d + j * WIDTH, WIDTH, dtype), sum, dtype);
  for (; d + WIDTH <= dim; d += WIDTH)
    sum = met(vec_load(q + d), vec_load_stored(key, d, WIDTH, dtype), sum, dtype);
  if (HAS_PART && d < dim) sum = met(vec_load(q + d), vec_load_stored(key, d, PART, dtype), sum, dtype);
  return sum;
}

/* The sums of each vector. */
ALWAYS_INLINE void sum_tile(vec *sums, int count, float *to) {
#ifdef SUMS_TILES
  if (count == TILE_SUMS) {
    vec_sums(sums, to);
    return;
  }
#endif
  for (int i = 0; i < count; i++) to[i] = vec_sum(sums[i]);
}

/* ---- softmax */

/* Turn the `padded` scores of num_queries into weights; `added`: to each one's sum. */
ALWAYS_INLINE void weigh_some(float scores[][PKV_RUN_TOKENS], int32_t padded, int num_queries,
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

/* Queries that meet the run: the q heads of a group, of each row. */
typedef struct {
  int count;
  const float *q[MOST_QUERIES];
  float *maximum[MOST_QUERIES];
  float *sum[MOST_QUERIES];
  float *accumulated[MOST_QUERIES];
  int32_t head[MOST_QUERIES]; /* of the run */
  int32_t row[MOST_QUERIES];
  int32_t num_seen[MOST_QUERIES];
} queries;

/* So many queries are met at once where so many are left. */
ALWAYS_INLINE int tile_of(int left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

/* What a call asks of scores beyond what q was multiplied by: scale them, bend them, let them fall with
 * distance. */
static void adjust(const pkv_run *run, int32_t head, int32_t row, float *scores) {
  const float *slope = run->alibi_slopes ? run->alibi_slopes + head : NULL;
  for (int32_t t = 0; t < run->num_tokens; t += WIDTH) {
    vec s = vec_load(scores + t) * run->scale;
    if (run->soft_cap > 0) s = vec_soft_cap(s, run->soft_cap);
    if (slope) s = vec_fma((vec){} + *slope, vec_load(run->distances + t) - (float)row, s);
    vec_store(scores + t, s);
  }
}

ALWAYS_INLINE bool is_adjusted(const pkv_run *run) {
  return run->scale != 1 || run->soft_cap > 0 || run->alibi_slopes;
}

#ifdef FROM_CACHE
#include "from_cache.h"
#else
#include "from_memory.h"
#endif

/* ---- the four steps */

static void prepare_q(float *prepared, const char *q, int32_t dtype, float scale, int32_t head_dim) {
  int32_t d = 0;
  for (; d + WIDTH <= head_dim; d += WIDTH)
    vec_store(prepared + d, vec_load_stored(q, d, WIDTH, dtype) * scale);
  if (HAS_PART && d < head_dim) vec_store(prepared + d, vec_load_stored(q, d, PART, dtype) * scale);
}

static void score(const head_rows *keys, const head_rows *ahead, const queries *queries,
                  float scores[][PKV_RUN_TOKENS]) {
  for (int i = 0; i < queries->count; ahead = NULL) {
    int tile = tile_of(queries->count - i);
    int32_t most = 0; /* seen by any of the tile */
    for (int j = i; j < i + tile; j++)
      if (queries->num_seen[j] > most) most = queries->num_seen[j];
    head_rows seen = part_of(keys, 0, most);
    switch (tile) {
      case 4: score_some(&seen, ahead, queries->q + i, 4, scores + i); break;
      case 2: score_some(&seen, ahead, queries->q + i, 2, scores + i); break;
      case 1: score_some(&seen, ahead, queries->q + i, 1, scores + i); break;
    }
    i += tile;
  }
}

/* The values from token `begin` on that one query sees and the others of its tile do not. */
static void accumulate_rest(const head_rows *values, int32_t begin, int32_t end, float *weights,
                            float *accumulated) {
  const float as_it_is = 1.0f;
  head_rows rest = part_of(values, begin, end);
  accumulate_some(&rest, NULL, (float (*)[PKV_RUN_TOKENS])(weights + begin), &as_it_is, 1, &accumulated);
}

static void accumulate(const head_rows *values, const head_rows *ahead, const queries *queries,
                       float weights[][PKV_RUN_TOKENS], const float *shrink) {
  for (int i = 0; i < queries->count; ahead = NULL) {
    int tile = tile_of(queries->count - i);
    int32_t least = values->count; /* seen by all of the tile */
    for (int j = i; j < i + tile; j++)
      if (queries->num_seen[j] < least) least = queries->num_seen[j];
    head_rows common = part_of(values, 0, least);
    switch (tile) {
      case 4: accumulate_some(&common, ahead, weights + i, shrink + i, 4, queries->accumulated + i); break;
      case 2: accumulate_some(&common, ahead, weights + i, shrink + i, 2, queries->accumulated + i); break;
      case 1: accumulate_some(&common, ahead, weights + i, shrink + i, 1, queries->accumulated + i); break;
    }
    for (int j = i; j < i + tile; j++)
      if (queries->num_seen[j] > common.count)
        accumulate_rest(values, common.count, queries->num_seen[j], weights[j], queries->accumulated[j]);
    i += tile;
  }
}

static void fold_queries(const pkv_run *run, const head_rows *keys, const head_rows *values,
                         const head_rows *next_keys, const queries *queries) {
  float scores[MOST_QUERIES][PKV_RUN_TOKENS] __attribute__((aligned(64)));
  float shrink[MOST_QUERIES]; /* by this much, what was accumulated so far */
  score(keys, run->is_near ? NULL : values, queries, scores);
  weigh(run, queries, scores, shrink);
  accumulate(values, run->is_near ? NULL : next_keys, queries, scores, shrink);
}

/* Fold one head's tokens into the states of its group, of each row. */
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
      if (++count < MOST_QUERIES && (row + 1 < run->num_rows || head + 1 < run->group)) continue;
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
#ifdef FROM_CACHE
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

/* By how much each of two sums shrinks when they are brought to their common maximum. */
typedef struct {
  float maximum, ours, theirs;
} common;

static common in_common(float a, float b) {
  float largest = a > b ? a : b;
  float subtracted = largest == -__builtin_inff() ? 0.0f : largest;
  return (common){largest, exp2_of(a - subtracted), exp2_of(b - subtracted)};
}

/* The first `count` of them; zeros behind. */
ALWAYS_INLINE vec vec_load_first(const float *from, int count) {
  float floats[WIDTH] = {0};
  if (count == WIDTH) return vec_load(from);
  memcpy(floats, from, (size_t)count * sizeof *from);
  return vec_load(floats);
}

ALWAYS_INLINE void vec_store_first(float *to, vec x, int count) {
  memcpy(to, &x, (size_t)(count < WIDTH ? count : WIDTH) * sizeof *to);
}

static void merge(pkv_state state, pkv_state later, int32_t num_heads, int32_t head_dim_v) {
  for (int32_t first = 0; first < num_heads; first += WIDTH) {
    int count = num_heads - first < WIDTH ? num_heads - first : WIDTH;
    vec a = vec_load_first(state.maximum + first, count), b = vec_load_first(later.maximum + first, count);
    vec largest = vec_larger(a, b);
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

/* ---- conversions */

/* Finite values beyond `largest` become it; inf and NaN pass.  Rounding cannot carry what is left to inf. */
ALWAYS_INLINE vec saturate(vec x, float largest) {
  ivec magnitude = (ivec)x & 0x7fffffff, sign = (ivec)x & ~0x7fffffff;
  ivec limit = (ivec)((vec){} + largest);
  ivec is_beyond = (magnitude > limit) & (magnitude < 0x7f800000);
  return vec_select(is_beyond, (vec)(limit | sign), x);
}

ALWAYS_INLINE ivec rounded_to_bfloat16(ivec bits) { return bits + 0x7fff + ((bits >> 16) & 1); }

static halves vec_to_bfloat16(vec x) {
  ivec bits = (ivec)x;
  ivec quiet = bits | 0x400000;
  ivec is_nan = (bits & 0x7fffffff) > 0x7f800000;
  ivec result = (is_nan & quiet) | (~is_nan & rounded_to_bfloat16(bits));
  return vec_high_halves(result);
}

/* To 16 bits; with `is_tame`, no value is beyond the stored range, inf or NaN. */
ALWAYS_INLINE void narrow_some(char *stored, vec x, int count, int32_t dtype, bool is_tame) {
  halves h;
  if (dtype == PKV_FLOAT16)
    h = vec_to_float16(is_tame ? x : saturate(x, 65504.0f));
  else if (is_tame)
    h = vec_high_halves(rounded_to_bfloat16((ivec)x));
  else
    h = vec_to_bfloat16(saturate(x, 0x1.fep127f));
  memcpy(stored, &h, (size_t)count * 2);
}

/* Returns how far the magnitudes are from the largest that is stored: below 0 where one is beyond it. */
ALWAYS_INLINE ivec narrow_all(char *stored, const float *values, int64_t count, int32_t dtype, bool is_tame) {
  const ivec largest = (ivec)((vec){} + (dtype == PKV_BFLOAT16 ? 0x1.fep127f : 65504.0f));
  ivec room = {};
  for (int64_t i = 0; i < count; i += WIDTH) {
    int some = HAS_PART && count - i < WIDTH ? PART : WIDTH;
    vec x = vec_kept(some == WIDTH ? vec_load(values + i) : vec_load_part(values + i));
    room |= largest - ((ivec)x & 0x7fffffff);
    if (some == WIDTH)
      narrow_some(stored + 2 * i, x, WIDTH, dtype, is_tame);
    else
      narrow_some(stored + 2 * i, x, PART, dtype, is_tame);
  }
  return room;
}

/* What is not tame is rare, and takes twice as long: all are taken for tame, and again when one was not. */
ALWAYS_INLINE void narrow_as(char *stored, const float *values, int64_t count, int32_t dtype) {
  if (vec_any(narrow_all(stored, values, count, dtype, true) < 0))
    narrow_all(stored, values, count, dtype, false);
}

static void narrow(char *stored, const float *values, int64_t count, int32_t dtype) {
  switch (dtype) {
    case PKV_FLOAT32: memcpy(stored, values, (size_t)count * sizeof *values); break;
    case PKV_FLOAT16: narrow_as(stored, values, count, PKV_FLOAT16); break;
    case PKV_BFLOAT16: narrow_as(stored, values, count, PKV_BFLOAT16); break;
  }
}

static void widen(float *values, const char *stored, int64_t count, int32_t dtype) {
  int32_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) vec_store(values + i, vec_load_stored(stored, i, WIDTH, dtype));
  if (HAS_PART && i < count) {
    vec x = vec_load_stored(stored, i, PART, dtype);
    memcpy(values + i, &x, PART * sizeof *values);
  }
}

/* Line by line, so that none is written in parts. */
static void copy_past_caches(char *to, const char *from, int64_t num_bytes) {
#ifdef WRITES_PAST_CACHES /* whoever includes this has AVX */
  for (int64_t i = 0; i < num_bytes; i += 64) {
    __m256i low = _mm256_loadu_si256((const __m256i *)(from + i));
    __m256i high = _mm256_loadu_si256((const __m256i *)(from + i + 32));
    _mm256_stream_si256((__m256i *)(to + i), low);
    _mm256_stream_si256((__m256i *)(to + i + 32), high);
  }
#else
  memcpy(to, from, (size_t)num_bytes);
#endif
}

/* ---- the result */

static void finish(char *out, int32_t dtype, pkv_state state, const float *sink, int32_t head_dim_v,
                   float *lse) {
  float values[PKV_MAX_HEAD_DIM] = {0}, sum = *state.sum, maximum = *state.maximum, shrink = 1.0f;
  if (sink) {
    common scale = in_common(maximum, *sink);
    shrink = scale.ours;
    sum = sum * scale.ours + scale.theirs;
    maximum = scale.maximum;
  }
  if (sum != 0.0f) /* else nothing was seen, or only scores of -inf */
    for (int32_t d = 0; d < head_dim_v; d += WIDTH)
      vec_store(values + d, vec_load(state.accumulated + d) * shrink / sum);
  narrow(out, values, head_dim_v, dtype);
  if (lse) *lse = sum == 0.0f ? -__builtin_inff() : (float)((maximum + log2((double)sum)) * M_LN2);
}

#ifdef MULTIPLIES_PAIRS
enum { KNOWS_PAIRS = 1 };
#else
enum { KNOWS_PAIRS = 0 };
#endif
const pkv_kernel KERNEL = {KERNEL_NAME, KNOWS_PAIRS, prepare_q, fold_run,        merge,
                           finish,      narrow,      widen,     copy_past_caches};
