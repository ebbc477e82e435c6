/* Scores and weighted sums of keys and values of 8 bits (PKV_INT8), and of 4 bits (PKV_INT4), in integers.
 * Keys of 4 bits by channel have their scales folded into q, once a page.
 *
 *   scores   s = (sum of q words * (bytes - 128)) * q's scale * the key's scale
 *   values   a = a * rescale + (sum of w words * (bytes - 128)) * unit                    of 8 bits
 *            a = a * rescale + (sum of w words * codes) * unit + sum of w * minima        of 4 bits
 *
 * q has words of 16 bits (pkv_q8).  The weights of a run, times the scales of its values, are rounded to
 * words of a unit: the largest of a row's is 32,639.  Sums of products are exact, so neither the tile nor the
 * instruction set changes a bit of them.
 *
 * Nothing overflows 32 bits: a score is 256 dims * 32,512 * 255 at most, 2.12e9; a weighted sum 64 tokens *
 * 32,639 * 255.  Sums that begin below 0 may wrap and come back.
 *
 * A row that cannot be stored has the scale NaN, which makes its score NaN, or the unit. */

enum {
  ZERO_BYTE = 128,
  LARGEST_WEIGHT = 32639,
  LARGEST_Q_WORD = 32512, /* 127 * 256: both of its bytes are 8-bit integers */
};

static const int32_t lane_numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

ALWAYS_INLINE ivec ivec_load(const int32_t *from) {
  ivec x;
  memcpy(&x, from, sizeof x);
  return x;
}

ALWAYS_INLINE words words_load(const int16_t *from) {
  words x;
  memcpy(&x, from, sizeof x);
  return x;
}

/* The largest magnitude of `count` values; NaN where one is NaN or infinite. */
ALWAYS_INLINE float largest_magnitude(const float *values, int32_t count) {
  vec most = {}, flaws = {};
  for (int32_t i = 0; i < count; i += WIDTH) {
    vec x = vec_load_n(values + i, count - i < WIDTH ? PART : WIDTH);
    vec magnitude = (vec)((ivec)x & 0x7fffffff);
    most = vec_max(magnitude, most);
    flaws += magnitude * 0.0f;
  }
  float flaw = vec_sum(flaws);
  return flaw == 0 ? vec_maximum(most) : __builtin_nanf("");
}

/* Round q, padded with zeros to whole vectors, to words, padded with zeros to whole cache lines. */
ALWAYS_INLINE void round_q(const float *values, int32_t dim, pkv_q8 *to, int16_t *words) {
  const float least = 0x1p-100f; /* so that LARGEST_Q_WORD / least is finite */
  float largest = largest_magnitude(values, dim);
  if (largest < least) largest = least;
  vec inverse = (vec){} + LARGEST_Q_WORD / largest;
  ivec sums = {};
  for (int32_t i = dim / 16 * 16; i < (dim + 31) / 32 * 32; i++) words[i] = 0;
  for (int32_t i = 0; i < dim; i += WIDTH) {
    ivec word = (ivec)(vec_load(values + i) * inverse + 0x1.8p23f) - 0x4b400000;
    halves low = vec_high_halves(word << 16);
    memcpy(words + i, &low, sizeof low);
    sums += word;
  }
  uint32_t sum = 0;
  for (int i = 0; i < WIDTH; i++) sum += (uint32_t)sums[i];
  to->sum = (int32_t)sum;
  to->scale = largest / LARGEST_Q_WORD;
}

ALWAYS_INLINE float bfloat16_at(const char *address) {
  uint16_t half;
  memcpy(&half, address, sizeof half);
  uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* The scales of the tokens, as floats; zeros up to a whole vector. */
ALWAYS_INLINE void load_scales(const head_rows *rows, float scales[PKV_RUN_TOKENS]) {
  int32_t t = 0;
  for (; rows->scale_stride == 2 && t + WIDTH <= rows->count; t += WIDTH) {
    halves x;
    memcpy(&x, rows->scales[t] + rows->scale_offset, sizeof x);
    vec_store(scales + t, vec_from_bfloat16(x));
  }
  for (; t < rows->count; t++) scales[t] = bfloat16_at(rows->scales[t] + rows->scale_offset);
  for (; t % WIDTH; t++) scales[t] = 0;
}

/* The same of rows of 4 bits, with their minima. */
ALWAYS_INLINE void load_scales_and_minima(const head_rows *rows, float scales[PKV_RUN_TOKENS],
                                          float minima[PKV_RUN_TOKENS]) {
  int32_t t = 0;
  for (; rows->scale_stride == 4 && t + WIDTH <= rows->count; t += WIDTH) {
    ivec pair;
    memcpy(&pair, rows->scales[t] + rows->scale_offset, sizeof pair);
    vec_store(scales + t, vec_from_bits(pair << 16));
    vec_store(minima + t, vec_from_bits(pair & ~0xffff));
  }
  for (; t < rows->count; t++) {
    scales[t] = bfloat16_at(rows->scales[t] + rows->scale_offset);
    minima[t] = bfloat16_at(rows->scales[t] + rows->scale_offset + 2);
  }
  for (; t % WIDTH; t++) scales[t] = minima[t] = 0;
}

/* They lie apart from the rows: prefetch them while rows are read. */
ALWAYS_INLINE void prefetch_scales(const head_rows *rows) {
  if (!pkv_has_scales(rows->dtype) || !rows->count) return;
  if (rows->dtype == PKV_INT4_BY_CHANNEL) {
    for (int32_t i = 0; i < pkv_channel_bytes(rows->dim); i += 64)
      __builtin_prefetch(rows->scales[0] + rows->scale_offset + i, 0, 3);
    return;
  }
  for (int32_t t = 0; t < rows->count; t += 16)
    __builtin_prefetch(rows->scales[t] + rows->scale_offset, 0, 3);
}

/* ---- scores */

#ifdef HAS_VNNI
#include "int8_vnni.h"
#else
/* sums += q * keys, over `count` dims from d on. */
ALWAYS_INLINE void dot_words(const char *const *k, const int16_t *const *q, int num_queries, int num_tokens,
                             int32_t d, int count, ivec *sums) {
  words some[4];
  EACH (i, num_queries) some[i] = words_load(q[i] + d);
  EACH (t, num_tokens) {
    words key = words_from_bytes(k[t] + d, count);
    EACH (i, num_queries) sums[i * num_tokens + t] = words_dot(sums[i * num_tokens + t], key, some[i]);
  }
}

/* Sums of products of num_tokens keys with num_queries. */
ALWAYS_INLINE void sum_keys_tile(const char *const *rows, int64_t offset, int32_t dim,
                                 const int16_t *const *q, int num_queries, int num_tokens,
                                 int32_t sums_of[][PKV_RUN_TOKENS]) {
  ivec sums[TILE_SUMS] = {};
  const char *k[TILE_SUMS];
  EACH (t, num_tokens) k[t] = rows[t] + offset;
  int32_t d = 0;
  for (; d + 2 * WIDTH <= dim; d += 2 * WIDTH) dot_words(k, q, num_queries, num_tokens, d, 2 * WIDTH, sums);
  if (d < dim) dot_words(k, q, num_queries, num_tokens, d, dim - d, sums);
  int32_t added[TILE_SUMS];
  ivec_sums(sums, added);
  EACH (i, num_queries) memcpy(sums_of[i], added + i * num_tokens, (size_t)num_tokens * sizeof *added);
}

/* Sums of products of all keys with num_queries. */
ALWAYS_INLINE void sum_keys(const head_rows *keys, const head_rows *ahead, const int16_t *const *q,
                            int num_queries, int32_t sums[][PKV_RUN_TOKENS]) {
  const int step = TILE_SUMS / num_queries;
  int32_t t = 0;
  for (; t + step <= keys->count; t += step) {
    for (int i = 0; i < step; i++) prefetch_row(ahead, t + i);
    sum_keys_tile(keys->rows + t, keys->offset, keys->dim, q, num_queries, step,
                  (int32_t (*)[PKV_RUN_TOKENS])(sums[0] + t));
  }
  for (; t < keys->count; t++) {
    prefetch_row(ahead, t);
    sum_keys_tile(keys->rows + t, keys->offset, keys->dim, q, num_queries, 1,
                  (int32_t (*)[PKV_RUN_TOKENS])(sums[0] + t));
  }
}
#endif

/* Sums to scores. */
ALWAYS_INLINE void scale_scores(const pkv_q8 *q, const float *scales, int32_t num_tokens, const int32_t *sums,
                                float *scores) {
  int32_t zero = ZERO_BYTE * q->sum;
  for (int32_t t = 0; t < num_tokens; t += WIDTH) {
    vec sum = __builtin_convertvector(ivec_load(sums + t) - zero, vec);
    vec_store(scores + t, sum * q->scale * vec_load(scales + t));
  }
}

/* Score all keys for num_queries (1, 2 or 4), and prefetch the rows of `ahead`. */
ALWAYS_INLINE void score_bytes(const head_rows *keys, const head_rows *ahead, const float *const *queries,
                               int num_queries, float scores[][PKV_RUN_TOKENS]) {
  const pkv_q8 *q[4];
  const int16_t *q_words[4];
  float scales[PKV_RUN_TOKENS] __attribute__((aligned(64)));
  int32_t sums[4][PKV_RUN_TOKENS] __attribute__((aligned(64)));
  EACH (i, num_queries) {
    q[i] = (const pkv_q8 *)queries[i];
    q_words[i] = (const int16_t *)(q[i] + 1);
  }
  sum_keys(keys, ahead, q_words, num_queries, sums);
  load_scales(keys, scales);
  for (int32_t t = keys->count; t % WIDTH; t++)
    EACH (i, num_queries) sums[i][t] = 0;
  EACH (i, num_queries) scale_scores(q[i], scales, keys->count, sums[i], scores[i]);
}

/* ---- keys of 4 bits */

/* Two codes of each byte, to bytes: `half` apart.  May write up to a vector behind both. */
ALWAYS_INLINE void unpack_row(const char *from, int32_t half, uint8_t *to) {
  typedef uint8_t bytes __attribute__((vector_size(4 * WIDTH)));
  typedef uint8_t few_bytes __attribute__((vector_size(4)));
  bytes x;
  few_bytes y;
  int32_t i = 0;
  for (; i + (int32_t)sizeof x <= half; i += (int32_t)sizeof x) {
    memcpy(&x, from + i, sizeof x);
    bytes low = x & 15, high = x >> 4;
    memcpy(to + i, &low, sizeof low);
    memcpy(to + half + i, &high, sizeof high);
  }
  for (; i < half; i += 4) {
    memcpy(&y, from + i, sizeof y);
    few_bytes low = y & 15, high = y >> 4;
    memcpy(to + i, &low, sizeof low);
    memcpy(to + half + i, &high, sizeof high);
  }
}

/* All rows as bytes, dim apart. */
ALWAYS_INLINE head_rows unpack_rows(const head_rows *packed, uint8_t *bytes, const char **rows) {
  for (int32_t t = 0; t < packed->count; t++) {
    uint8_t *row = bytes + t * packed->dim;
    unpack_row(packed->rows[t] + packed->offset, packed->dim / 2, row);
    rows[t] = (const char *)row;
  }
  head_rows unpacked = *packed;
  unpacked.rows = rows;
  unpacked.offset = 0;
  return unpacked;
}

/* q times the scales of its dims, as words of a unit each, and the sums of q times their minima.  A scale
 * that is NaN has a minimum that is, so the sum says so. */
ALWAYS_INLINE void scale_queries(const float *const *queries, int num_queries, const char *scales,
                                 int32_t dim, int16_t (*words)[PKV_MAX_HEAD_DIM], float *units,
                                 float *minima) {
  float scaled[4][PKV_MAX_HEAD_DIM + 16] __attribute__((aligned(64)));
  const float least = 0x1p-100f; /* so that LARGEST_Q_WORD / least is finite */
  vec sums[4] = {}, most[4];
  EACH (i, num_queries) most[i] = (vec){} + least;
  for (int32_t d = 0; d < dim; d += WIDTH) {
    ivec pair = (ivec)vec_load_n((const float *)(scales + 4 * d), dim - d < WIDTH ? PART : WIDTH);
    vec minimum = vec_from_bits(pair & ~0xffff), scale = vec_from_bits(pair << 16);
    EACH (i, num_queries) {
      vec own = vec_load(queries[i] + d), product = own * scale;
      sums[i] = vec_fma(own, minimum, sums[i]);
      most[i] = vec_max((vec)((ivec)product & 0x7fffffff), most[i]);
      vec_store(scaled[i] + d, product);
    }
  }
  EACH (i, num_queries) {
    float largest = vec_maximum(most[i]);
    vec inverse = (vec){} + LARGEST_Q_WORD / largest;
    units[i] = largest / LARGEST_Q_WORD;
    minima[i] = vec_sum(sums[i]);
    for (int32_t d = dim / 16 * 16; d < (dim + 31) / 32 * 32; d++) words[i][d] = 0;
    for (int32_t d = 0; d < dim; d += WIDTH) { /* the word is in the low 16 bits */
      halves low = vec_high_halves((ivec)(vec_load(scaled[i] + d) * inverse + 0x1.8p23f) << 16);
      memcpy(words[i] + d, &low, sizeof low);
    }
  }
}

/* Score keys whose dims have scales of their own, which are folded into q, for num_queries. */
ALWAYS_INLINE void score_nibbles(const head_rows *keys, const head_rows *ahead, const float *const *queries,
                                 int num_queries, float scores[][PKV_RUN_TOKENS]) {
  uint8_t bytes[PKV_RUN_TOKENS * PKV_MAX_HEAD_DIM + 64] __attribute__((aligned(64)));
  int32_t sums[4][PKV_RUN_TOKENS] __attribute__((aligned(64)));
  int16_t words[4][PKV_MAX_HEAD_DIM] __attribute__((aligned(64)));
  float units[4], minima[4];
  const int16_t *q_words[4] = {words[0], words[1], words[2], words[3]};
  const char *rows[PKV_RUN_TOKENS];
  head_rows unpacked = unpack_rows(keys, bytes, rows);
  scale_queries(queries, num_queries, keys->scales[0] + keys->scale_offset, keys->dim, words, units, minima);
  sum_keys(&unpacked, ahead, q_words, num_queries, sums);
  EACH (i, num_queries) {
    for (int32_t t = keys->count; t % WIDTH; t++) sums[i][t] = 0;
    for (int32_t t = 0; t < keys->count; t += WIDTH) {
      vec sum = __builtin_convertvector(ivec_load(sums[i] + t), vec);
      vec_store(scores[i] + t, vec_fma(sum, (vec){} + units[i], (vec){} + minima[i]));
    }
  }
}

/* ---- values */

/* The weights of a row, as words of a unit. */
typedef struct {
  float unit;    /* NaN where a weight or its scale is */
  float minimum; /* the weighted sum of the rows' minima; of 4 bits */
  int32_t sum;   /* of the words */
  int16_t words[PKV_RUN_TOKENS];
} rounded_weights;

/* The products of num_seen weights and scales or minima, 0 up to a whole vector of `count`; returns their
 * sum. Those of tokens that the row does not see may be anything. */
ALWAYS_INLINE float weigh(const float *weights, const float *scales, int32_t num_seen, int32_t count,
                          float *products) {
  vec total = {};
  for (int32_t t = 0; t < count; t += WIDTH) {
    vec product = vec_load(weights + t) * vec_load(scales + t);
    if (t + WIDTH > num_seen) product = vec_select(ivec_load(lane_numbers) < num_seen - t, product, (vec){});
    total += product;
    vec_store(products + t, product);
  }
  return vec_sum(total);
}

/* Round num_seen weights times scales; those behind are 0. */
ALWAYS_INLINE void round_weights(const float *weights, const float *scales, int32_t num_seen, int32_t count,
                                 rounded_weights *to) {
  float products[PKV_RUN_TOKENS] __attribute__((aligned(64)));
  const float least = 0x1p-112f; /* so that LARGEST_WEIGHT / least is finite */
  const float to_integer = 0x1.8p23f;
  float added = weigh(weights, scales, num_seen, count, products);
  vec most = (vec){} + least;
  for (int32_t t = 0; t < count; t += WIDTH) most = vec_max(vec_load(products + t), most);
  float largest = vec_maximum(most);
  vec inverse = (vec){} + LARGEST_WEIGHT / largest;
  ivec sum = {};
  for (int32_t t = 0; t < count; t += WIDTH) {
    ivec word = (ivec)(vec_load(products + t) * inverse + to_integer) - 0x4b400000;
    halves low = vec_high_halves(word << 16);
    memcpy(to->words + t, &low, sizeof low);
    sum += word;
  }
  uint32_t sum_of_words = 0;
  for (int i = 0; i < WIDTH; i++) sum_of_words += (uint32_t)sum[i];
  to->sum = (int32_t)sum_of_words;
  to->unit = added == added ? largest / LARGEST_WEIGHT : added;
}

/* Accumulate VALUE_SUMS vectors, or what a row of num_dims left has of them, for num_queries; zero: the byte
 * of the value 0. */
ALWAYS_INLINE void value_bytes_tile(const head_rows *values, int zero, const rounded_weights *weights,
                                    const float *rescale, int num_queries, int32_t d, int num_dims,
                                    const head_rows *ahead, float *const *accumulated) {
  ivec sums[4 * VALUE_SUMS];
  EACH (i, num_queries)
    EACH (j, VALUE_SUMS)
      sums[i * VALUE_SUMS + j] = (ivec){} + (int32_t)(-(uint32_t)zero * (uint32_t)weights[i].sum);
  int64_t offset = values->offset + d;
  int32_t last = values->count - 1;
  /* Each tile prefetches its share of the rows of `ahead`. */
  const int step = VALUE_SUMS * WIDTH;
  int32_t num_tiles = (values->dim + step - 1) / step, next = d / step;
  for (int32_t begin = 0; begin <= last; begin += 8) {
    for (; next < begin + 8; next += num_tiles) prefetch_row(ahead, next);
    int32_t end = begin + 8 <= last ? begin + 8 : last + 1;
    for (int32_t t = begin; t < end; t += 2) {
      words pairs[VALUE_SUMS];
      /* The word behind the last of an odd number is 0. */
      pair_bytes(values->rows[t] + offset, values->rows[t < last ? t + 1 : t] + offset, num_dims, pairs);
      EACH (i, num_queries) {
        int32_t both;
        memcpy(&both, weights[i].words + t, sizeof both);
        words weight = (words)((ivec){} + both);
        EACH (j, VALUE_SUMS) sums[i * VALUE_SUMS + j] = words_dot(sums[i * VALUE_SUMS + j], pairs[j], weight);
      }
    }
  }
  EACH (i, num_queries) {
    ivec *own = sums + i * VALUE_SUMS;
#ifdef HAS_PAIR_ORDER
    pairs_in_order(own);
#endif
    EACH (j, VALUE_SUMS) {
      if (j * WIDTH >= num_dims) break;
      float *to = accumulated[i] + d + j * WIDTH;
      vec before = vec_load(to) * rescale[i];
      if (!zero) before += weights[i].minimum;
      vec_store(to, vec_fma(__builtin_convertvector(own[j], vec), (vec){} + weights[i].unit, before));
    }
  }
}

/* Accumulate rows of bytes for num_queries, and prefetch the rows of `ahead`. */
ALWAYS_INLINE void accumulate_tiles(const head_rows *values, int zero, const head_rows *ahead,
                                    const rounded_weights *weights, const float *rescale, int num_queries,
                                    float *const *accumulated) {
  const int step = VALUE_SUMS * WIDTH;
  const int32_t dim = values->dim;
  int32_t d = 0;
  for (; d + step <= dim; d += step)
    value_bytes_tile(values, zero, weights, rescale, num_queries, d, step, ahead, accumulated);
  if (d < dim) value_bytes_tile(values, zero, weights, rescale, num_queries, d, dim - d, ahead, accumulated);
}

/* Accumulate all values for num_queries (1, 2 or 4), each of which sees the first num_seen of them, and
 * prefetch the rows of `ahead`. */
ALWAYS_INLINE void accumulate_bytes(const head_rows *values, const head_rows *ahead, const int32_t *num_seen,
                                    float weights[][PKV_RUN_TOKENS], const float *rescale, int num_queries,
                                    float *const *accumulated) {
  float scales[PKV_RUN_TOKENS] __attribute__((aligned(64)));
  rounded_weights rounded[4] __attribute__((aligned(64)));
  load_scales(values, scales);
  EACH (i, num_queries) round_weights(weights[i], scales, num_seen[i], values->count, rounded + i);
  accumulate_tiles(values, ZERO_BYTE, ahead, rounded, rescale, num_queries, accumulated);
}

/* ---- values of 4 bits */

ALWAYS_INLINE void accumulate_nibbles(const head_rows *values, const head_rows *ahead,
                                      const int32_t *num_seen, float weights[][PKV_RUN_TOKENS],
                                      const float *rescale, int num_queries, float *const *accumulated) {
  float scales[PKV_RUN_TOKENS] __attribute__((aligned(64)));
  float minima[PKV_RUN_TOKENS] __attribute__((aligned(64)));
  float unused[PKV_RUN_TOKENS] __attribute__((aligned(64)));
  rounded_weights rounded[4] __attribute__((aligned(64)));
  uint8_t bytes[PKV_RUN_TOKENS * PKV_MAX_HEAD_DIM + 64] __attribute__((aligned(64)));
  const char *rows[PKV_RUN_TOKENS];
  head_rows unpacked = unpack_rows(values, bytes, rows);
  load_scales_and_minima(values, scales, minima);
  EACH (i, num_queries) {
    round_weights(weights[i], scales, num_seen[i], values->count, rounded + i);
    rounded[i].minimum = weigh(weights[i], minima, num_seen[i], values->count, unused);
  }
  accumulate_tiles(&unpacked, 0, ahead, rounded, rescale, num_queries, accumulated);
}

#define OF_INT8(name, num_queries) \
  ((num_queries) == 4 ? name##_of_4 : (num_queries) == 2 ? name##_of_2 : name##_of_1)
#define ACCUMULATE_INTEGERS(name, num_queries)                                                    \
  NOINLINE void name##_of_##num_queries(const head_rows *values, const head_rows *ahead,          \
                                        const int32_t *num_seen, float weights[][PKV_RUN_TOKENS], \
                                        const float *rescale, float *const *accumulated) {        \
    name(values, ahead, num_seen, weights, rescale, num_queries, accumulated);                    \
  }
#define SCORE_INTEGERS(name, num_queries)                                                        \
  NOINLINE void name##_of_##num_queries(const head_rows *keys, const head_rows *ahead,           \
                                        const float *const *q, float scores[][PKV_RUN_TOKENS]) { \
    name(keys, ahead, q, num_queries, scores);                                                   \
  }
#define INT8_FUNCTIONS(num_queries)                  \
  SCORE_INTEGERS(score_bytes, num_queries)           \
  SCORE_INTEGERS(score_nibbles, num_queries)         \
  ACCUMULATE_INTEGERS(accumulate_bytes, num_queries) \
  ACCUMULATE_INTEGERS(accumulate_nibbles, num_queries)
INT8_FUNCTIONS(1)
INT8_FUNCTIONS(2)
INT8_FUNCTIONS(4)
