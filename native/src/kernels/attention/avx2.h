/* Vector functions of AVX2 with FMA and F16C. */
#include <immintrin.h>
#include <math.h>
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

/* The low 16 bits of each lane, whose high bits are zero. */
static inline halves vec_low_halves(ivec bits) {
  __m256i x = (__m256i)bits;
  return (halves)_mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
