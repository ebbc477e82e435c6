/* Products with AVX-512 VNNI: four bytes times four bytes, or two shorts times two, summed in 32 bits in
 * one instruction.
 *
 * A group of weights is one vector, whose lanes are the 16 outputs: unpacking is a mask and a shift, and
 * no sum overflows. */
#ifdef PKV_EMULATED
#include "emulated.h"
#else
#include <immintrin.h>
#endif
#include <string.h>

#include "activations.h"

enum { PREFETCH_BYTES = 2048, ROWS = 8 };

/* A few rows' sums are split into several chains, or every addition would wait for the one before. */
#define CHAINS(num_rows) ((num_rows) == 1 ? 4 : (num_rows) <= 4 ? 2 : 1)

/* Broadcast four bytes of a row, or two shorts. */
ALWAYS_INLINE __m512i repeated(const void *x) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  return _mm512_set1_epi32(four);
}

ALWAYS_INLINE void add_chains(__m512i *totals, int num_rows, int32_t sums[][PKV_OUT_BLOCK]) {
  const int chains = CHAINS(num_rows);
  EACH (r, num_rows) {
    for (int c = 1; c < chains; c++)
      totals[r * chains] = _mm512_add_epi32(totals[r * chains], totals[r * chains + c]);
    _mm512_storeu_si512(sums[r], totals[r * chains]);
  }
}

ALWAYS_INLINE void ternary_rows(const uint8_t *weights, int64_t num_groups, const int8_t *rows,
                                int64_t row_stride, int num_rows, int32_t sums[][PKV_OUT_BLOCK]) {
  const __m512i three = _mm512_set1_epi8(3);
  const int chains = CHAINS(num_rows);
  __m512i totals[ROWS];
  EACH (r, num_rows * chains) totals[r] = _mm512_setzero_si512();
  for (int64_t group = 0; group < num_groups; group++, weights += PKV_GROUP_BYTES) {
    _mm_prefetch((const char *)weights + PREFETCH_BYTES, _MM_HINT_T0);
    __m512i packed = _mm512_loadu_si512(weights);
    EACH (i, 4) {
      __m512i codes = _mm512_and_si512(packed, three);
      EACH (r, num_rows)
        totals[r * chains + i % chains] =
            _mm512_dpbusd_epi32(totals[r * chains + i % chains], codes,
                                repeated(rows + r * row_stride + PKV_IN_GROUP * group + 4 * i));
      packed = _mm512_srli_epi16(packed, 2);
    }
  }
  add_chains(totals, num_rows, sums);
}

/* Sums of a group start from zero: the chains of several groups run at once. */
ALWAYS_INLINE void int8_rows(const uint8_t *weights, int64_t num_groups, const int16_t *rows,
                             int64_t row_stride, int num_rows, float sums[][PKV_OUT_BLOCK]) {
  __m512 totals[ROWS];
  EACH (r, num_rows) totals[r] = _mm512_setzero_ps();
  for (int64_t group = 0; group < num_groups; group++, weights += PKV_INT8_GROUP_BYTES) {
    const char *x = (const char *)(rows + PKV_INT8_GROUP * group);
    __m512i added[ROWS];
    EACH (r, num_rows) added[r] = _mm512_setzero_si512();
    EACH (i, PKV_INT8_GROUP / 2) {
      const uint8_t *two = weights + PKV_SCALE_BYTES + 2 * PKV_OUT_BLOCK * i;
      if (i % 2 == 0) _mm_prefetch((const char *)two + PREFETCH_BYTES, _MM_HINT_T0);
      __m512i widened = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)two));
      EACH (r, num_rows)
        added[r] = _mm512_dpwssd_epi32(added[r], widened, repeated(x + r * row_stride + 4 * i));
    }
    __m256i stored = _mm256_loadu_si256((const __m256i *)weights);
    __m512 scales = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(stored), 16));
    EACH (r, num_rows)
      totals[r] = _mm512_add_ps(totals[r], _mm512_mul_ps(_mm512_cvtepi32_ps(added[r]), scales));
  }
  EACH (r, num_rows) _mm512_storeu_ps(sums[r], totals[r]);
}

#include "lookups.h"

/* One function for each number of rows; emulated, one for all. */
#ifdef PKV_EMULATED
#define OF_ROWS(call) call(num_rows);
#else
#define OF_ROWS(call)           \
  switch (num_rows) {           \
    case 1: call(1); break;     \
    case 2: call(2); break;     \
    case 3: call(3); break;     \
    case 4: call(4); break;     \
    case 5: call(5); break;     \
    case 6: call(6); break;     \
    case 7: call(7); break;     \
    default: call(ROWS); break; \
  }
#endif

static void ternary(const uint8_t *weights, int64_t num_groups, const int8_t *rows, int64_t row_stride,
                    int32_t num_rows, int32_t sums[][PKV_OUT_BLOCK]) {
#define CALL(count) ternary_rows(weights, num_groups, rows, row_stride, count, sums)
  OF_ROWS(CALL)
#undef CALL
}

static void int8(const uint8_t *weights, int64_t num_groups, const int16_t *rows, int64_t row_stride,
                 int32_t num_rows, float sums[][PKV_OUT_BLOCK]) {
#define CALL(count) int8_rows(weights, num_groups, rows, row_stride, count, sums)
  OF_ROWS(CALL)
#undef CALL
}

/* ---- weights in bfloat16: twelve rows with two blocks keep their sums in 24 registers */

enum { FLOAT_ROWS = 12 };

ALWAYS_INLINE void bfloat16_rows(const uint16_t *weights, int64_t num_in, const int num_blocks,
                                 const float *rows, int64_t row_stride, const int num_rows,
                                 float sums[][PKV_OUT_BLOCK]) {
  const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
  const int64_t block_stride = num_in * PKV_OUT_BLOCK;
  __m512 totals[FLOAT_ROWS][2];
  EACH (r, num_rows) totals[r][0] = totals[r][1] = _mm512_setzero_ps();
  for (int64_t i = 0; i < num_in; i += 2, weights += 2 * PKV_OUT_BLOCK) {
    __m512i pairs[2];
    EACH (b, num_blocks) {
      _mm_prefetch((const char *)(weights + b * block_stride) + PREFETCH_BYTES, _MM_HINT_T0);
      pairs[b] = _mm512_loadu_si512(weights + b * block_stride);
    }
    EACH (half, 2) {
      __m512 widened[2];
      EACH (b, num_blocks)
        widened[b] =
            _mm512_castsi512_ps(half ? _mm512_and_si512(pairs[b], upper) : _mm512_slli_epi32(pairs[b], 16));
      EACH (r, num_rows) {
        __m512 x = _mm512_set1_ps(((const float *)((const char *)rows + r * row_stride))[i + half]);
        EACH (b, num_blocks) totals[r][b] = _mm512_fmadd_ps(widened[b], x, totals[r][b]);
      }
    }
  }
  EACH (r, num_rows)
    EACH (b, num_blocks) _mm512_storeu_ps(sums[b * num_rows + r], totals[r][b]);
}

#define CALL(count)                                                   \
  if (num_blocks == 2)                                                \
    bfloat16_rows(weights, num_in, 2, rows, row_stride, count, sums); \
  else                                                                \
    bfloat16_rows(weights, num_in, 1, rows, row_stride, count, sums)
static void bfloat16(const uint16_t *weights, int64_t num_in, int32_t num_blocks, const float *rows,
                     int64_t row_stride, int32_t num_rows, float sums[][PKV_OUT_BLOCK]) {
#ifdef PKV_EMULATED
  bfloat16_rows(weights, num_in, num_blocks, rows, row_stride, num_rows, sums);
#else
  switch (num_rows) {
    case 1: CALL(1); break;
    case 2: CALL(2); break;
    case 3: CALL(3); break;
    case 4: CALL(4); break;
    case 5: CALL(5); break;
    case 6: CALL(6); break;
    case 7: CALL(7); break;
    case 8: CALL(8); break;
    case 9: CALL(9); break;
    case 10: CALL(10); break;
    case 11: CALL(11); break;
    default: CALL(FLOAT_ROWS); break;
  }
#endif
}
#undef CALL

#define PRODUCT(its_name, many) \
  {.name = its_name,            \
   .row_tile = ROWS,            \
   .ternary = ternary,          \
   .int8 = int8,                \
   .float_tile = FLOAT_ROWS,    \
   .bfloat16 = bfloat16,        \
   .ternary_many = many,        \
   ACTIVATIONS}
const pkv_product pkv_product_vnni = PRODUCT("vnni", NULL);
const pkv_product pkv_product_vnni_lookups = PRODUCT("vnni with lookups", ternary_many);
