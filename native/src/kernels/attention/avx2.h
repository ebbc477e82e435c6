/* Vector functions of AVX2 with FMA and F16C. */
#include <immintrin.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#include "paged_kv.h"
#include "kernels/kernel.h"

#define HAS_STREAMING_STORES
enum { WIDTH = 8, TILE_SUMS = 8 };
typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));

static inline vec vec_fma(vec a, vec b, vec c) {
  return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

/* Broadcast one float. */
static inline vec vec_all(const float *x) { return (vec)_mm256_broadcast_ss(x); }

/* Keeps a vector in a register: gcc would load it again for each multiply-add. */
static inline vec vec_in_register(vec x) {
  __asm__("" : "+x"(x));
  return x;
}

/* The sum as a tree: halves are added until one lane is left. */
static inline float vec_sum(vec x) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* Sums of a tile: the same additions, on two, four and then eight vectors at a time.  Of two vectors,
 * one part each stays in place (a blend) and the others change places (a shuffle): one shuffle for two. */
#define HAS_SUMS
static inline void vec_sums(const vec x[TILE_SUMS], float sums[TILE_SUMS]) {
  __m256 halves[4], quarters[2];
  for (int i = 0; i < 4; i++) {
    __m256 a = (__m256)x[i], b = (__m256)x[4 + i];
    halves[i] = _mm256_add_ps(_mm256_blend_ps(a, b, 0xf0), _mm256_permute2f128_ps(a, b, 0x21));
  }
  for (int i = 0; i < 2; i++) {
    __m256 a = halves[2 * i], b = halves[2 * i + 1];
    quarters[i] = _mm256_add_ps(_mm256_blend_ps(a, b, 0xcc), _mm256_shuffle_ps(a, b, 0x4e));
  }
  __m256 even = _mm256_shuffle_ps(quarters[0], quarters[1], 0x88);
  __m256 odd = _mm256_shuffle_ps(quarters[0], quarters[1], 0xdd);
  _mm256_storeu_ps(sums, _mm256_add_ps(even, odd));
}

/* The largest lane.  Either all lanes are NaN, or none is. */
static inline float vec_maximum(vec x) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

/* The larger of each lane; b where one is NaN. */
#define HAS_MAX
static inline vec vec_max(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }

/* Is any lane of a comparison true? */
static inline int vec_any(ivec mask) { return _mm256_movemask_ps((__m256)mask) != 0; }

static inline vec vec_from_bits(ivec bits) { return (vec)bits; }

/* One shuffle; in loops that wait for memory, widening in the load is faster. */
static inline vec vec_from_bfloat16(halves x) {
#ifdef COMPUTE
  const __m256i to_high = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8,
                                           9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return (vec)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256((__m128i)x), to_high);
#else
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)x), 16);
#endif
}

static inline vec vec_from_float16(halves x) { return (vec)_mm256_cvtph_ps((__m128i)x); }

static inline halves vec_to_float16(vec x) {
  return (halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* ---- integers (int8.h) */

enum { VALUE_SUMS = 2 };
typedef int16_t words __attribute__((vector_size(4 * WIDTH)));

/* sum + a * b, of two words a lane. */
static inline ivec words_dot(ivec sum, words a, words b) {
  return sum + (ivec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}

/* `count` bytes, 16 or 8; zeros behind. */
static inline words words_from_bytes(const char *from, int count) {
  __m128i x =
      count == 2 * WIDTH ? _mm_loadu_si128((const __m128i *)from) : _mm_loadl_epi64((const void *)from);
  return (words)_mm256_cvtepu8_epi16(x);
}

/* `count` bytes of two tokens, 16 or 8, side by side. */
static inline void pair_bytes(const char *row, const char *next, int count, words pairs[VALUE_SUMS]) {
  bool is_whole = count == VALUE_SUMS * WIDTH;
  __m128i a = is_whole ? _mm_loadu_si128((const __m128i *)row) : _mm_loadl_epi64((const void *)row);
  __m128i b = is_whole ? _mm_loadu_si128((const __m128i *)next) : _mm_loadl_epi64((const void *)next);
  pairs[0] = (words)_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b));
  pairs[1] = (words)_mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b));
}

/* Sums of a tile, as vec_sums. */
static inline void ivec_sums(const ivec x[TILE_SUMS], int32_t sums[TILE_SUMS]) {
  __m256i halves[4];
  for (int i = 0; i < 4; i++) {
    __m256i a = (__m256i)x[i], b = (__m256i)x[4 + i];
    halves[i] = _mm256_add_epi32(_mm256_blend_epi32(a, b, 0xf0), _mm256_permute2x128_si256(a, b, 0x21));
  }
  __m256i even = _mm256_hadd_epi32(halves[0], halves[1]), odd = _mm256_hadd_epi32(halves[2], halves[3]);
  _mm256_storeu_si256((__m256i *)sums, _mm256_hadd_epi32(even, odd));
}

/* The low byte of each lane. */
static inline void store_low_bytes(uint8_t *to, ivec x) {
  const __m256i low = _mm256_set1_epi32(0x0c080400);
  __m256i four = _mm256_shuffle_epi8((__m256i)x, low);
  __m128i eight = _mm_unpacklo_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
  _mm_storel_epi64((__m128i *)to, eight);
}

/* The low 16 bits of each lane, whose high bits are zero. */
static inline halves vec_low_halves(ivec bits) {
  __m256i x = (__m256i)bits;
  return (halves)_mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
