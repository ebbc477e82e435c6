/* The rows of one kv head, and the queries that read them: one dot product at a time.
 *
 *   scores    s = q . k                      one vector accumulator over ascending dims, summed as a tree
 *   softmax   m' = max(m, s), p = 2^(s - m') online: what was summed before is rescaled by 2^(m - m')
 *   values    a = a * 2^(m - m') + p v       one chain of multiply-adds over ascending tokens
 *
 * so the number of heads and tokens in a tile changes no bit.  A tile has TILE_SUMS accumulators, enough to
 * hide the latency of a multiply-add.
 *
 * Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018, algorithm 3.
 */
enum {
  MAX_QUERIES = 32
}; /* that share a run; a tile takes up to four of them, and TILE_SUMS / 4 tokens or vectors */

ALWAYS_INLINE int32_t stored_bytes(int32_t head_dim, int32_t dtype) {
  return pkv_stored_bytes(head_dim, dtype);
}

/* Keys or values of one kv head: their addresses and format. */
typedef struct {
  const char *const *rows; /* [count] */
  int64_t offset;          /* added to each address */
  const char *first;       /* address of the first row */
  int64_t stride;          /* bytes between rows; 0: rows are not evenly spaced */
  int32_t count;
  int32_t dim;
  int32_t dtype;
  const char *const *scales; /* [count], of dtypes that have some */
  int64_t scale_offset;      /* added to each of their addresses */
  int64_t scale_stride;      /* bytes between them; 0: not evenly spaced */
} head_rows;

/* Rows of kv head `head`. */
static head_rows head_rows_of(const char *const *rows, const char *const *scales, const pkv_format *format,
                              int32_t head, int64_t stride, int64_t scale_stride, int32_t count) {
  int64_t offset = head * format->head_stride;
  return (head_rows){.rows = rows,
                     .offset = offset,
                     .first = count ? rows[0] + offset : NULL,
                     .stride = stride,
                     .count = count,
                     .dim = format->dim,
                     .dtype = format->dtype,
                     .scales = scales,
                     .scale_offset = head * format->scale_head_stride,
                     .scale_stride = scale_stride};
}

/* Rows `begin` to `end` - 1. */
static head_rows part_of(const head_rows *all, int32_t begin, int32_t end) {
  head_rows part = *all;
  part.rows += begin;
  if (pkv_has_scales(all->dtype)) part.scales += begin;
  part.count = end - begin;
  part.first = part.count ? part.rows[0] + part.offset : NULL;
  return part;
}

/* sum + q * key, of one dim per lane or, in kernels with pairs, of two, one after the other. */
ALWAYS_INLINE vec dot_step(vec q, vec key, vec sum, int32_t dtype) {
#ifdef HAS_PAIRS
  if (dtype == PKV_BFLOAT16_PAIRS) return vec_fma_pairs(q, key, sum);
#endif
  (void)dtype;
  return vec_fma(q, key, sum);
}

/* q . key as a vector of partial sums. */
ALWAYS_INLINE vec score_row(const float *q, const char *key, int32_t dim, int32_t dtype) {
  vec sum = {};
  int32_t d = 0;
  for (; d + 8 * WIDTH <= dim; d += 8 * WIDTH)
    EACH (j, 8)
      sum = dot_step(vec_load(q + d + j * WIDTH), vec_load_stored(key, d + j * WIDTH, WIDTH, dtype), sum,
                     dtype);
  for (; d + WIDTH <= dim; d += WIDTH)
    sum = dot_step(vec_load(q + d), vec_load_stored(key, d, WIDTH, dtype), sum, dtype);
  if (HAS_PART && d < dim) sum = dot_step(vec_load(q + d), vec_load_stored(key, d, PART, dtype), sum, dtype);
  return sum;
}

/* Sum each vector. */
ALWAYS_INLINE void sum_tile(vec *sums, int count, float *to) {
#ifdef HAS_SUMS
  if (count == TILE_SUMS) {
    vec_sums(sums, to);
    return;
  }
#endif
  for (int i = 0; i < count; i++) to[i] = vec_sum(sums[i]);
}

/* The queries of a run: the q heads of a group, of each row. */
typedef struct {
  int count;
  const float *q[MAX_QUERIES];
  float *maximum[MAX_QUERIES];
  float *sum[MAX_QUERIES];
  float *accumulated[MAX_QUERIES];
  int32_t head[MAX_QUERIES]; /* q head within the run */
  int32_t row[MAX_QUERIES];
  int32_t num_seen[MAX_QUERIES];
} queries;

/* A state without a reader.  Three queries take less time as a tile of four, one of them twice, than as
 * tiles of two and of one. */
typedef struct {
  float maximum;
  float sum;
  float accumulated[PKV_MAX_HEAD_DIM] __attribute__((aligned(64)));
} spare_state;

static void spare_begin(spare_state *spare, int32_t dim) {
  spare->maximum = -__builtin_inff();
  spare->sum = 0;
  memset(spare->accumulated, 0, (size_t)pkv_padded(dim) * sizeof *spare->accumulated);
}

/* A fourth query beside the last three. */
static void add_spare(queries *queries, spare_state *spare, int32_t dim) {
  int last = queries->count - 1, i = queries->count++;
  spare_begin(spare, dim);
  queries->q[i] = queries->q[last];
  queries->maximum[i] = &spare->maximum;
  queries->sum[i] = &spare->sum;
  queries->accumulated[i] = spare->accumulated;
  queries->head[i] = queries->head[last];
  queries->row[i] = queries->row[last];
  queries->num_seen[i] = queries->num_seen[last];
}

/* How many of `left` queries the next tile takes, the spare one included. */
ALWAYS_INLINE int tile_size(int left) { return left >= 3 ? 4 : left; }
