/* Vector functions of AVX-512 (F, BW, DQ, VL), which all CPUs with AVX-512 have since Skylake-SP. */
#include <math.h>
#include <stddef.h>
#include <string.h>
#ifdef PKV_EMULATED
#include "emulated.h"
#else
#include <immintrin.h>
#endif

#include "paged_kv.h"
#include "kernels/kernel.h"

#define HAS_STREAMING_STORES
enum { WIDTH = 16, TILE_SUMS = 16 };
typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));

static inline vec vec_fma(vec a, vec b, vec c) {
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

#ifdef HAS_PAIRS
/* c + a * b for both bfloat16 halves of each lane, one after the other, as the CPU does. */
static inline vec vec_fma_pairs(vec a, vec b, vec c) {
  return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
#endif

/* Broadcast one float. */
static inline vec vec_all(const float *x) { return (vec)_mm512_set1_ps(*x); }

/* Keeps a vector in a register: gcc would load it again for each multiply-add. */
static inline vec vec_in_register(vec x) {
#ifndef PKV_EMULATED /* emulated vectors have no register */
  __asm__("" : "+v"(x));
#endif
  return x;
}

/* The sum as a tree: halves are added until one lane is left. */
static inline float vec_sum(vec x) {
  __m256 low = _mm512_castps512_ps256((__m512)x);
  __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)x), 1));
  __m256 eight = _mm256_add_ps(low, high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* Sums of a tile: the same additions, on two, four, eight and then sixteen vectors at a time.  Of two
 * vectors, one part each stays in place (a blend) and the others change places (a shuffle): one shuffle
 * for two. */
#define HAS_SUMS
static inline void vec_sums(const vec x[TILE_SUMS], float sums[TILE_SUMS]) {
  const __m512i quarters_swapped =
      _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
  __m512 halves[8], quarters[4], eighths[2];
  for (int i = 0; i < 8; i++) {
    __m512 a = (__m512)x[i], b = (__m512)x[8 + i];
    halves[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
  }
  for (int i = 0; i < 4; i++) {
    __m512 a = halves[i], b = halves[4 + i];
    quarters[i] =
        _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, a, b), _mm512_permutex2var_ps(a, quarters_swapped, b));
  }
  for (int i = 0; i < 2; i++) {
    __m512 a = quarters[2 * i], b = quarters[2 * i + 1];
    eighths[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps(a, b, 0x4e));
  }
  __m512 even = _mm512_shuffle_ps(eighths[0], eighths[1], 0x88);
  __m512 odd = _mm512_shuffle_ps(eighths[0], eighths[1], 0xdd);
  _mm512_storeu_ps(sums, _mm512_add_ps(even, odd));
}

/* The largest lane.  Either all lanes are NaN, or none is. */
static inline float vec_maximum(vec x) {
  __m256 low = _mm512_castps512_ps256((__m512)x);
  __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)x), 1));
  __m256 eight = _mm256_max_ps(low, high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

/* The last eight values of a row, zeros behind. */
#define HAS_PARTIAL_LOADS
static inline vec vec_load_part(const float *from) { return (vec)_mm512_maskz_loadu_ps(0xff, from); }
static inline halves halves_load_part(const char *from) {
  return (halves)_mm256_maskz_loadu_epi16(0xff, from);
}

/* The larger of each lane; b where one is NaN. */
#define HAS_MAX
static inline vec vec_max(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }

/* Is any lane of a comparison true? */
static inline int vec_any(ivec mask) { return _mm512_movepi32_mask((__m512i)mask) != 0; }

static inline vec vec_from_bits(ivec bits) { return (vec)bits; }

/* One shuffle; in loops that wait for memory, widening in the load is faster. */
static inline vec vec_from_bfloat16(halves x) {
#ifdef COMPUTE
  const __m512i to_high = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0,
                                           5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  return (vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, to_high, _mm512_castsi256_si512((__m256i)x));
#else
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
#endif
}

static inline vec vec_from_float16(halves x) { return (vec)_mm512_cvtph_ps((__m256i)x); }

static inline halves vec_to_float16(vec x) {
  return (halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* ---- integers (int8.h) */

enum { VALUE_SUMS = 4 };
typedef int16_t words __attribute__((vector_size(4 * WIDTH)));

/* sum + a * b, of two words a lane. */
static inline ivec words_dot(ivec sum, words a, words b) {
#ifdef HAS_VNNI
  return (ivec)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
  return sum + (ivec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}

/* `count` bytes, a multiple of 8 up to 32; zeros behind. */
static inline words words_from_bytes(const char *from, int count) {
  __m256i x = count == 2 * WIDTH ? _mm256_loadu_si256((const __m256i *)from)
                                 : _mm256_maskz_loadu_epi8(0xffffffffu >> (32 - count), from);
  return (words)_mm512_cvtepu8_epi16(x);
}

static inline __m512i bytes_load(const char *from, int count) {
  return count == 4 * WIDTH ? _mm512_loadu_si512(from)
                            : _mm512_maskz_loadu_epi8(0xffffffffffffffffu >> (64 - count), from);
}

#ifdef HAS_VBMI
/* `count` bytes of two tokens, a multiple of 8 up to 64, side by side: one shuffle for each sixteen dims. */
static inline void pair_bytes(const char *row, const char *next, int count, words pairs[VALUE_SUMS]) {
  const __m512i first =
      _mm512_setr_epi32(0x400000, 0x410001, 0x420002, 0x430003, 0x440004, 0x450005, 0x460006, 0x470007,
                        0x480008, 0x490009, 0x4a000a, 0x4b000b, 0x4c000c, 0x4d000d, 0x4e000e, 0x4f000f);
  __m512i a = bytes_load(row, count), b = bytes_load(next, count);
  for (int i = 0; i < VALUE_SUMS; i++) {
    __m512i which = _mm512_add_epi32(first, _mm512_set1_epi32(0x100010 * i));
    pairs[i] = (words)_mm512_maskz_permutex2var_epi8(0x5555555555555555u, a, which, b);
  }
}
#else
/* `count` bytes of two tokens, a multiple of 8 up to 64, side by side: dims 16 i + 0, 2, 4 and 6 of each
 * quarter i, 1, 3, 5 and 7, 8, 10, ... and 9, 11, ... */
static inline void pair_bytes(const char *row, const char *next, int count, words pairs[VALUE_SUMS]) {
  const __m512i low = _mm512_set1_epi16(0xff);
  __m512i a = bytes_load(row, count), b = bytes_load(next, count);
  __m512i first = _mm512_unpacklo_epi16(a, b), second = _mm512_unpackhi_epi16(a, b);
  pairs[0] = (words)_mm512_and_si512(first, low);
  pairs[1] = (words)_mm512_srli_epi16(first, 8);
  pairs[2] = (words)_mm512_and_si512(second, low);
  pairs[3] = (words)_mm512_srli_epi16(second, 8);
}

/* Sums over such pairs, in the order of the dims. */
#define HAS_PAIR_ORDER
static inline void pairs_in_order(ivec sums[VALUE_SUMS]) {
  __m512i fours[4], a[4];
  for (int i = 0; i < 2; i++) { /* four dims in each quarter */
    fours[2 * i] = _mm512_unpacklo_epi32((__m512i)sums[2 * i], (__m512i)sums[2 * i + 1]);
    fours[2 * i + 1] = _mm512_unpackhi_epi32((__m512i)sums[2 * i], (__m512i)sums[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) { /* transpose the quarters */
    a[2 * i] = _mm512_shuffle_i32x4(fours[2 * i], fours[2 * i + 1], 0x44);
    a[2 * i + 1] = _mm512_shuffle_i32x4(fours[2 * i], fours[2 * i + 1], 0xee);
  }
  for (int i = 0; i < 2; i++) {
    sums[2 * i] = (ivec)_mm512_shuffle_i32x4(a[i], a[2 + i], 0x88);
    sums[2 * i + 1] = (ivec)_mm512_shuffle_i32x4(a[i], a[2 + i], 0xdd);
  }
}
#endif

/* Sums of a tile, as vec_sums. */
static inline void ivec_sums(const ivec x[TILE_SUMS], int32_t sums[TILE_SUMS]) {
  const __m512i quarters_swapped =
      _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
  __m512i halves[8], quarters[4], eighths[2];
  for (int i = 0; i < 8; i++) {
    __m512i a = (__m512i)x[i], b = (__m512i)x[8 + i];
    halves[i] = _mm512_add_epi32(_mm512_mask_blend_epi32(0xff00, a, b), _mm512_shuffle_i32x4(a, b, 0x4e));
  }
  for (int i = 0; i < 4; i++) {
    __m512i a = halves[i], b = halves[4 + i];
    quarters[i] = _mm512_add_epi32(_mm512_mask_blend_epi32(0xf0f0, a, b),
                                   _mm512_permutex2var_epi32(a, quarters_swapped, b));
  }
  for (int i = 0; i < 2; i++) {
    __m512 a = _mm512_castsi512_ps(quarters[2 * i]), b = _mm512_castsi512_ps(quarters[2 * i + 1]);
    eighths[i] = _mm512_add_epi32(_mm512_castps_si512(_mm512_mask_blend_ps(0xcccc, a, b)),
                                  _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x4e)));
  }
  __m512 a = _mm512_castsi512_ps(eighths[0]), b = _mm512_castsi512_ps(eighths[1]);
  __m512i even = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88));
  __m512i odd = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd));
  _mm512_storeu_si512(sums, _mm512_add_epi32(even, odd));
}

/* The low byte of each lane. */
static inline void store_low_bytes(uint8_t *to, ivec x) {
  _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)x));
}

/* The high 16 bits of each lane: every second of 32 halves, in one shuffle. */
#define HAS_HIGH_HALVES
static inline halves vec_high_halves(ivec bits) {
  const __m512i odd = _mm512_setr_epi32(0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019,
                                        0x1f001d, 0, 0, 0, 0, 0, 0, 0, 0);
  return (halves)_mm512_castsi512_si256(_mm512_permutexvar_epi16(odd, (__m512i)bits));
}
