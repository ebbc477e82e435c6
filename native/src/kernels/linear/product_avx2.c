/* Products in AVX2: of ternary weights bytes times bytes, summed in 16 bits for 256 inputs, then in 32. */
#include <immintrin.h>
#include <string.h>

#include "activations.h"

enum { PREFETCH_BYTES = 2048, ROWS = 4 };

/* Keeps the order of additions: gcc would add products to each other first, in more registers than there
 * are, a quarter slower. */
#define IN_THIS_ORDER(a, b) __asm__("" : "+x"(a), "+x"(b))

/* Broadcast four inputs of a row. */
ALWAYS_INLINE __m256i four_inputs(const int8_t *x) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  return _mm256_set1_epi32(four);
}

ALWAYS_INLINE __m256i load(const uint8_t *bytes) { return _mm256_loadu_si256((const __m256i *)bytes); }

/* Add the products of up to PKV_GROUPS_ADDED groups to totals; outputs 0 to 7 and 8 to 15 are the two
 * halves. */
ALWAYS_INLINE void add_groups(const uint8_t *weights, int num_groups, const int8_t *rows, int64_t row_stride,
                              int num_rows, __m256i totals[][2]) {
  const __m256i three = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  __m256i added[ROWS][2];
  EACH (r, num_rows) added[r][0] = added[r][1] = _mm256_setzero_si256();
  for (int group = 0; group < num_groups; group++, weights += PKV_GROUP_BYTES) {
    _mm_prefetch((const char *)weights + PREFETCH_BYTES, _MM_HINT_T0);
    __m256i low = load(weights), high = load(weights + 32);
    for (int i = 0; i < 4; i++) {
      __m256i low_codes = _mm256_and_si256(low, three), high_codes = _mm256_and_si256(high, three);
      EACH (r, num_rows) {
        __m256i x = four_inputs(rows + r * row_stride + PKV_IN_GROUP * group + 4 * i);
        added[r][0] = _mm256_add_epi16(added[r][0], _mm256_maddubs_epi16(low_codes, x));
        added[r][1] = _mm256_add_epi16(added[r][1], _mm256_maddubs_epi16(high_codes, x));
        IN_THIS_ORDER(added[r][0], added[r][1]);
      }
      low = _mm256_srli_epi16(low, 2);
      high = _mm256_srli_epi16(high, 2);
    }
  }
  EACH (r, num_rows)
    EACH (half, 2)
      totals[r][half] = _mm256_add_epi32(totals[r][half], _mm256_madd_epi16(added[r][half], ones));
}

ALWAYS_INLINE void ternary_rows(const uint8_t *weights, int64_t num_groups, const int8_t *rows,
                                int64_t row_stride, int num_rows, int32_t sums[][PKV_OUT_BLOCK]) {
  __m256i totals[ROWS][2];
  EACH (r, num_rows) totals[r][0] = totals[r][1] = _mm256_setzero_si256();
  int64_t group = 0;
  for (; group + PKV_GROUPS_ADDED <= num_groups; group += PKV_GROUPS_ADDED)
    add_groups(weights + group * PKV_GROUP_BYTES, PKV_GROUPS_ADDED, rows + group * PKV_IN_GROUP, row_stride,
               num_rows, totals);
  if (group < num_groups)
    add_groups(weights + group * PKV_GROUP_BYTES, (int)(num_groups - group), rows + group * PKV_IN_GROUP,
               row_stride, num_rows, totals);
  EACH (r, num_rows)
    EACH (half, 2) _mm256_storeu_si256((__m256i *)(sums[r] + 8 * half), totals[r][half]);
}

static void ternary(const uint8_t *weights, int64_t num_groups, const int8_t *rows, int64_t row_stride,
                    int32_t num_rows, int32_t sums[][PKV_OUT_BLOCK]) {
  switch (num_rows) {
    case 1: ternary_rows(weights, num_groups, rows, row_stride, 1, sums); break;
    case 2: ternary_rows(weights, num_groups, rows, row_stride, 2, sums); break;
    case 3: ternary_rows(weights, num_groups, rows, row_stride, 3, sums); break;
    default: ternary_rows(weights, num_groups, rows, row_stride, ROWS, sums); break;
  }
}

/* Scaled sums stay in memory, where a group of inputs adds to them: sixteen registers hold no more. */
ALWAYS_INLINE void int8_rows(const uint8_t *weights, int64_t num_groups, const int16_t *rows,
                             int64_t row_stride, int num_rows, float sums[][PKV_OUT_BLOCK]) {
  memset(sums, 0, (size_t)num_rows * sizeof *sums);
  for (int64_t group = 0; group < num_groups; group++, weights += PKV_INT8_GROUP_BYTES) {
    const uint8_t *two = weights + PKV_SCALE_BYTES;
    const int8_t *x = (const int8_t *)(rows + PKV_INT8_GROUP * group);
    __m256i added[ROWS][2];
    EACH (r, num_rows) added[r][0] = added[r][1] = _mm256_setzero_si256();
    for (int i = 0; i < PKV_INT8_GROUP; i += 2, two += 2 * PKV_OUT_BLOCK) {
      if (i % 4 == 0) _mm_prefetch((const char *)two + PREFETCH_BYTES, _MM_HINT_T0);
      __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)two));
      __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(two + 16)));
      EACH (r, num_rows) {
        __m256i pair = four_inputs(x + r * row_stride + 2 * i);
        added[r][0] = _mm256_add_epi32(added[r][0], _mm256_madd_epi16(low, pair));
        added[r][1] = _mm256_add_epi32(added[r][1], _mm256_madd_epi16(high, pair));
        IN_THIS_ORDER(added[r][0], added[r][1]);
      }
    }
    EACH (half, 2) {
      __m128i stored = _mm_loadu_si128((const __m128i *)weights + half);
      __m256 scales = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(stored), 16));
      EACH (r, num_rows) {
        float *sum = sums[r] + 8 * half;
        __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(added[r][half]), scales);
        _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), scaled));
      }
    }
  }
}

static void int8(const uint8_t *weights, int64_t num_groups, const int16_t *rows, int64_t row_stride,
                 int32_t num_rows, float sums[][PKV_OUT_BLOCK]) {
  switch (num_rows) {
    case 1: int8_rows(weights, num_groups, rows, row_stride, 1, sums); break;
    case 2: int8_rows(weights, num_groups, rows, row_stride, 2, sums); break;
    case 3: int8_rows(weights, num_groups, rows, row_stride, 3, sums); break;
    default: int8_rows(weights, num_groups, rows, row_stride, ROWS, sums); break;
  }
}

/* ---- weights in bfloat16: six rows with a block keep their sums in twelve registers */

enum { FLOAT_ROWS = 6 };

ALWAYS_INLINE void bfloat16_rows(const uint16_t *weights, int64_t num_in, const float *rows,
                                 int64_t row_stride, const int num_rows, float sums[][PKV_OUT_BLOCK]) {
  const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
  __m256 totals[FLOAT_ROWS][2];
  EACH (r, num_rows) totals[r][0] = totals[r][1] = _mm256_setzero_ps();
  for (int64_t i = 0; i < num_in; i += 2, weights += 2 * PKV_OUT_BLOCK) {
    _mm_prefetch((const char *)weights + PREFETCH_BYTES, _MM_HINT_T0);
    EACH (half, 2) {
      __m256 widened[2];
      EACH (b, 2) {
        __m256i pairs = load((const uint8_t *)weights + 32 * b);
        widened[b] =
            _mm256_castsi256_ps(half ? _mm256_and_si256(pairs, upper) : _mm256_slli_epi32(pairs, 16));
      }
      EACH (r, num_rows) {
        __m256 x = _mm256_broadcast_ss((const float *)((const char *)rows + r * row_stride) + i + half);
        EACH (b, 2) totals[r][b] = _mm256_fmadd_ps(widened[b], x, totals[r][b]);
      }
    }
  }
  EACH (r, num_rows)
    EACH (b, 2) _mm256_storeu_ps(sums[r] + 8 * b, totals[r][b]);
}

static void bfloat16(const uint16_t *weights, int64_t num_in, int32_t num_blocks, const float *rows,
                     int64_t row_stride, int32_t num_rows, float sums[][PKV_OUT_BLOCK]) {
  for (; num_blocks > 0; num_blocks--, weights += num_in * PKV_OUT_BLOCK, sums += num_rows)
    switch (num_rows) {
      case 1: bfloat16_rows(weights, num_in, rows, row_stride, 1, sums); break;
      case 2: bfloat16_rows(weights, num_in, rows, row_stride, 2, sums); break;
      case 3: bfloat16_rows(weights, num_in, rows, row_stride, 3, sums); break;
      case 4: bfloat16_rows(weights, num_in, rows, row_stride, 4, sums); break;
      case 5: bfloat16_rows(weights, num_in, rows, row_stride, 5, sums); break;
      default: bfloat16_rows(weights, num_in, rows, row_stride, FLOAT_ROWS, sums); break;
    }
}

const pkv_product pkv_product_avx2 = {.name = "avx2",
                                      .row_tile = ROWS,
                                      .ternary = ternary,
                                      .int8 = int8,
                                      .float_tile = FLOAT_ROWS,
                                      .bfloat16 = bfloat16,
                                      ACTIVATIONS};
