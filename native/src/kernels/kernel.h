/* Kernels: what an instruction set provides for attention.
 *
 * A kernel knows neither pages nor sequences.  It gets a run, up to PKV_RUN_TOKENS token addresses of
 * which each q row sees all or the first few, and folds it into each row's state: per q head the maximum
 * of its scores, the sum of their exponentials and the accumulated values.  Scores are in units of log2,
 * so that exponentials are powers of 2; so are soft_cap, alibi_slopes and sinks.
 *
 * Prepared q and accumulated values of a head are padded to whole vectors of the widest kernel:
 * pkv_padded(dim). */
#ifndef PKV_KERNEL_H
#define PKV_KERNEL_H
#include <stdint.h>

#include "paged_kv.h"

enum { PKV_RUN_TOKENS = 64, PKV_SPAN_TOKENS = 256, PKV_MAX_HEAD_DIM = 256 };

/* Tokens of a run, and of a span: whole pages, or pieces of one (attention/runs.c). */
static inline int32_t pkv_run_tokens(int32_t page_size) {
  return page_size > PKV_RUN_TOKENS ? PKV_RUN_TOKENS : PKV_RUN_TOKENS / page_size * page_size;
}
static inline int32_t pkv_span_tokens(int32_t page_size) {
  return page_size > PKV_SPAN_TOKENS ? page_size : PKV_SPAN_TOKENS / page_size * page_size;
}

/* Runs of a span; those of a large page begin with the page. */
static inline int32_t pkv_span_runs(int32_t page_size) {
  int32_t span_tokens = pkv_span_tokens(page_size),
          page_runs = (page_size + PKV_RUN_TOKENS - 1) / PKV_RUN_TOKENS;
  if (page_size > PKV_RUN_TOKENS) return span_tokens / page_size * page_runs;
  return (span_tokens + pkv_run_tokens(page_size) - 1) / pkv_run_tokens(page_size);
}

static inline int32_t pkv_padded(int32_t dim) { return (dim + 15) & ~15; }

/* A dtype that kernels with `multiplies_pairs` read besides the pkv_dtypes: keys and queries of bfloat16,
 * multiplied two dims at a time.  A pair is one element then, and q is not scaled. */
enum { PKV_BFLOAT16_PAIRS = 16 };

/* Bytes of a head of this dtype, and of the scales of a token. */
static inline int32_t pkv_stored_bytes(int32_t dim, int32_t dtype) {
  switch (dtype) {
    case PKV_INT4:
    case PKV_INT4_BY_CHANNEL: return dim / 2;
    case PKV_INT8: return dim;
    case PKV_FLOAT32:
    case PKV_BFLOAT16_PAIRS: return 4 * dim;
    default: return 2 * dim;
  }
}
static inline int32_t pkv_scale_bytes(int32_t dtype) {
  return dtype == PKV_INT4 ? 4 : dtype == PKV_INT8 ? 2 : 0;
}
static inline int32_t pkv_has_scales(int32_t dtype) {
  return dtype == PKV_INT8 || dtype == PKV_INT4 || dtype == PKV_INT4_BY_CHANNEL;
}

/* Of PKV_INT4_BY_CHANNEL: tokens that share scales, from the first one of a page on, and the bytes of these.
 */
enum { PKV_CHANNEL_TOKENS = 64 };
static inline int64_t pkv_channel_bytes(int32_t dim) { return 4 * (int64_t)dim; }

/* A prepared head of q that reads keys of PKV_INT8: q = scale * words.  The words lie behind, padded with
 * zeros to whole cache lines. */
typedef struct {
  float scale; /* NaN when q has NaN or infinity */
  int32_t sum; /* of the words */
  int32_t unused[14];
} pkv_q8;

/* Floats of a prepared head of q. */
static inline int32_t pkv_prepared_floats(int32_t dim, int32_t k_dtype) {
  return k_dtype == PKV_INT8 ? (int32_t)(sizeof(pkv_q8) / 4) + (dim + 31) / 32 * 16 : pkv_padded(dim);
}

/* How the heads of a token's K or V are stored. */
typedef struct {
  int32_t dtype;             /* pkv_dtype, or PKV_BFLOAT16_PAIRS */
  int32_t dim;               /* elements of a head, a multiple of 8 */
  int64_t head_stride;       /* bytes between kv heads */
  int64_t scale_head_stride; /* and between their scales */
} pkv_format;

/* What all runs of a call share. */
typedef struct {
  pkv_format k, v;
  int32_t group;             /* q heads that share a kv head */
  float scale;               /* of scores, where q is not scaled; else 1 */
  float soft_cap;            /* 0: none */
  const float *alibi_slopes; /* [num_q_heads], NULL: none */
} pkv_layer;

/* Where a run notes how much weight each of its pages gets, for each row and q head of a work item.
 *
 * Weights are relative to the maximum so far, which is noted beside their sums. */
typedef struct {
  float *maxima; /* [rows, num_heads, num_runs], from this run on; NULL: nothing is noted */
  float *sums;   /* [rows, num_heads, num_runs, num_parts], from this run on */
  int64_t num_runs;
  int32_t num_heads;
  int32_t first_head;  /* q head */
  int32_t num_parts;   /* pages of a run, or 1 of a larger page; at most PKV_MAX_PARTS */
  const int32_t *ends; /* [num_parts]: where they end, in tokens of the run */
} pkv_masses;
enum { PKV_MAX_PARTS = 4, PKV_MASS_UNITS = 1 << 30 /* of a probability of 1 */ };

/* When a run's values are not read: if each query of a kv head gives the run at most `share` of the larger
 * one of its weight so far and of a weight known before, `sums` at `maxima`. */
typedef struct {
  float share;          /* 0: values are always read */
  const float *maxima;  /* [num_q_heads] */
  const float *sums;    /* [num_q_heads] */
  int64_t *num_skipped; /* [2]: counts of runs of a kv head, and of those whose values were not read */
  uint8_t *was_skipped; /* [num_q_heads], at the first one of a fold: were its last run's values not read? */
} pkv_skipping;

/* Up to PKV_RUN_TOKENS tokens, some kv heads of them, and the q rows that read them. */
typedef struct {
  int32_t num_tokens;
  const char *const *k; /* [num_tokens]: address of the token's row */
  const char *const *v;
  int64_t k_stride; /* bytes between tokens; 0: tokens are not evenly spaced */
  int64_t v_stride;
  const char *const *k_scales; /* [num_tokens]: address of the token's scales, where there are some */
  const char *const *v_scales;
  int64_t k_scale_stride; /* bytes between these; 0: not evenly spaced */
  int64_t v_scale_stride;
  int32_t first_head; /* kv heads first_head .. first_head + num_kv_heads - 1 */
  int32_t num_kv_heads;
  int32_t is_resident;       /* other rows have just read these tokens: prefetch nothing */
  int32_t num_next;          /* what is read after the last head, to be prefetched: */
  const char *const *k_next; /* [num_next] rows */
  int32_t next_head;         /* of this kv head */
  int32_t num_rows;          /* q rows, of consecutive positions, that see these tokens */
  const int32_t *num_seen;   /* [num_rows]: how many of them, from the first on, at least 1; NULL: all */
  int64_t q_stride;          /* floats between rows */
  int64_t state_stride;      /* floats between the states of rows */
  const float *distances;    /* [num_tokens]: position minus the first q row's; read with slopes */
  pkv_masses masses;
  pkv_skipping skipping; /* of one row only */
} pkv_run;

/* The softmax of some q heads of one row, over the runs folded so far. */
typedef struct {
  float *maximum;     /* [heads], -inf before the first run */
  float *sum;         /* [heads], of 2^(score - maximum) */
  float *accumulated; /* [heads, padded head_dim_v], of 2^(score - maximum) * v */
} pkv_state;

/* Fold a run into the states of its heads' groups, of each row. */
typedef void pkv_fold(const pkv_layer *layer, const pkv_run *run, const float *q, pkv_state state);

/* All folds of a kernel give the same bits; pkv_choose_fold picks the fastest. */
typedef enum { PKV_STREAM, PKV_COMPUTE, PKV_NUM_FOLDS } pkv_fold_kind;

typedef struct {
  const char *name;
  pkv_fold *folds[PKV_NUM_FOLDS]; /* PKV_STREAM may be NULL */
  int32_t multiplies_pairs;       /* runs may hold keys in pairs, a multiple of 16 of them */
  /* One head of q, times scale, padded with zeros. */
  void (*prepare_q)(float *prepared, const char *q, int32_t dtype, float scale, int32_t head_dim);
  /* The same for keys of PKV_INT8. */
  void (*prepare_q8)(pkv_q8 *prepared, const char *q, int32_t dtype, float scale, int32_t head_dim);
  /* Merge `later`, the state over tokens that come after, into `state`. */
  void (*merge)(pkv_state state, pkv_state later, int32_t num_heads, int32_t head_dim_v);
  /* One head: out = accumulated / (sum + the sink's weight), as dtype; 0 where the sum is 0.  `sink` may
   * be NULL, and so may `lse`, which takes the natural logarithm of the sum. */
  void (*finish)(char *out, int32_t dtype, pkv_state state, const float *sink, int32_t head_dim_v,
                 float *lse);
  /* The product of a prepared head of q and a row of PKV_BFLOAT16. */
  float (*dot_bfloat16)(const float *q, const uint16_t *row, int32_t dim);
  /* Add the probabilities sums[run][part] * factors[run] to totals[run][part], in units; NaN counts as 0. */
  void (*tally)(int64_t *totals, const float *sums, const float *factors, int64_t num_runs,
                int32_t num_parts);
  /* factors[i] = 2^(maxima[i] - maximum) / sum; count is a multiple of 16. */
  void (*normalise)(float *factors, const float *maxima, int64_t count, float maximum, float sum);
  /* float32 to a dtype with scales, and back; count is a multiple of 8. */
  void (*quantise)(uint8_t *bytes, uint16_t *scales, const float *values, int64_t count, int32_t dtype);
  void (*dequantise)(float *values, const uint8_t *bytes, const uint16_t *scales, int64_t count,
                     int32_t dtype);
  /* PKV_CHANNEL_TOKENS rows of floats to PKV_INT4_BY_CHANNEL: rows of bytes, stride apart. */
  void (*quantise_channels)(uint8_t *bytes, int64_t stride, uint16_t *scales, const float *values,
                            int32_t dim);
  /* float32 to another stored dtype and back; count is a multiple of 8. */
  void (*narrow)(char *stored, const float *values, int64_t count, int32_t dtype);
  void (*widen)(float *values, const char *stored, int64_t count, int32_t dtype);
  /* Copy whole cache lines to an aligned address with streaming stores, where the CPU has them. */
  void (*copy_past_caches)(char *to, const char *from, int64_t num_bytes);
} pkv_kernel;

extern const pkv_kernel pkv_kernel_portable;
#ifdef __aarch64__
extern const pkv_kernel pkv_kernel_neon;
#endif
#ifdef PKV_HAVE_AVX2
extern const pkv_kernel pkv_kernel_avx2;
pkv_fold pkv_compute_avx2;
#endif
#ifdef PKV_HAVE_AVX512
extern const pkv_kernel pkv_kernel_avx512;
pkv_fold pkv_compute_avx512;
#endif
#ifdef PKV_HAVE_AVX512BF16
extern const pkv_kernel pkv_kernel_avx512bf16;
pkv_fold pkv_compute_avx512bf16;
#endif
/* Of both AVX-512 kernels, for keys or values with scales. */
#ifdef PKV_HAVE_VNNI
pkv_fold pkv_fold_int8_vnni;
#endif
#ifdef PKV_HAVE_VBMI
pkv_fold pkv_fold_int8_vbmi;
#endif

/* The kernel in use, NULL when PAGED_KV_KERNEL names none that is available. */
const pkv_kernel *pkv_active_kernel(void);

/* The fastest fold for a layer whose keys are each read by num_queries (rows times heads of a group), from
 * pages in cache or in memory. */
pkv_fold *pkv_choose_fold(const pkv_kernel *kernel, const pkv_layer *layer, int32_t num_queries,
                          int32_t is_cached);

#endif
