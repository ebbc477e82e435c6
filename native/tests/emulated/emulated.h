/* AVX-512 on a machine that has AVX2 only: SIMDe's emulation, and what its release 0.7.4 lacks: four
 * conversions and a shift, each as two halves, two masked loads and a shuffle of quarters.  For tests: it is
 * slow. */
#ifndef PKV_EMULATED_H
#define PKV_EMULATED_H
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>
#include <string.h>

typedef union {
  simde__m512 floats;
  simde__m512i ints;
  __m256 float_halves[2];
  __m256i int_halves[2];
} pkv_512;

typedef union {
  __m256i all;
  __m128i halves[2];
} pkv_256;

#undef _mm512_cvtepu16_epi32
static inline simde__m512i _mm512_cvtepu16_epi32(__m256i x) {
  pkv_256 from = {x};
  pkv_512 to;
  for (int i = 0; i < 2; i++) to.int_halves[i] = _mm256_cvtepu16_epi32(from.halves[i]);
  return to.ints;
}

#undef _mm512_cvtepi32_ps
static inline simde__m512 _mm512_cvtepi32_ps(simde__m512i x) {
  pkv_512 from = {.ints = x}, to;
  for (int i = 0; i < 2; i++) to.float_halves[i] = _mm256_cvtepi32_ps(from.int_halves[i]);
  return to.floats;
}

#undef _mm512_cvtph_ps
static inline simde__m512 _mm512_cvtph_ps(__m256i x) {
  pkv_256 from = {x};
  pkv_512 to;
  for (int i = 0; i < 2; i++) to.float_halves[i] = _mm256_cvtph_ps(from.halves[i]);
  return to.floats;
}

/* Rounding is an immediate: to nearest even, the only one in use. */
static inline __m256i pkv_nearest_halves(simde__m512 x) {
  pkv_512 from = {x};
  pkv_256 to;
  for (int i = 0; i < 2; i++)
    to.halves[i] = _mm256_cvtps_ph(from.float_halves[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return to.all;
}
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, rounding) pkv_nearest_halves(x)

/* Of eight values: the only mask in use. */
static inline simde__m512 pkv_eight_floats(const float *from) {
  pkv_512 to = {0};
  memcpy(&to, from, 8 * sizeof *from);
  return to.floats;
}
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps(mask, from) pkv_eight_floats(from)

static inline __m256i pkv_eight_halves(const void *from) {
  pkv_256 to = {0};
  memcpy(&to, from, 16);
  return to.all;
}
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16(mask, from) pkv_eight_halves(from)

#undef _mm512_srai_epi32
static inline simde__m512i _mm512_srai_epi32(simde__m512i x, unsigned count) {
  pkv_512 to = {.ints = x};
  for (int i = 0; i < 2; i++) to.int_halves[i] = _mm256_srai_epi32(to.int_halves[i], (int)count);
  return to.ints;
}

#undef _mm512_madd_epi16
static inline simde__m512i _mm512_madd_epi16(simde__m512i a, simde__m512i b) {
  pkv_512 x = {.ints = a}, y = {.ints = b};
  for (int i = 0; i < 2; i++) x.int_halves[i] = _mm256_madd_epi16(x.int_halves[i], y.int_halves[i]);
  return x.ints;
}

#undef _mm512_cvtepu8_epi16
static inline simde__m512i _mm512_cvtepu8_epi16(__m256i x) {
  pkv_256 from = {x};
  pkv_512 to;
  for (int i = 0; i < 2; i++) to.int_halves[i] = _mm256_cvtepu8_epi16(from.halves[i]);
  return to.ints;
}

/* The first bytes, as many as the mask has ones, which are its low bits. */
static inline __m256i pkv_some_bytes_256(uint32_t mask, const void *from) {
  pkv_256 to = {0};
  memcpy(&to, from, (size_t)__builtin_popcount(mask));
  return to.all;
}
#undef _mm256_maskz_loadu_epi8
#define _mm256_maskz_loadu_epi8(mask, from) pkv_some_bytes_256(mask, from)

static inline simde__m512i pkv_some_bytes_512(uint64_t mask, const void *from) {
  pkv_512 to = {0};
  memcpy(&to, from, (size_t)__builtin_popcountll(mask));
  return to.ints;
}
#undef _mm512_maskz_loadu_epi8
#define _mm512_maskz_loadu_epi8(mask, from) pkv_some_bytes_512(mask, from)

/* The low byte of each lane of four or two bytes. */
static inline void pkv_low_bytes(uint8_t *to, simde__m512i x, int lane_bytes) {
  for (int i = 0; i < 64 / lane_bytes; i++) to[i] = ((uint8_t *)&x)[lane_bytes * i];
}
#undef _mm512_cvtepi32_epi8
static inline __m128i _mm512_cvtepi32_epi8(simde__m512i x) {
  pkv_256 to;
  pkv_low_bytes((uint8_t *)&to, x, 4);
  return to.halves[0];
}
#undef _mm512_cvtepi16_epi8
static inline __m256i _mm512_cvtepi16_epi8(simde__m512i x) {
  pkv_256 to;
  pkv_low_bytes((uint8_t *)&to, x, 2);
  return to.all;
}

/* Quarters: two of a, two of b. */
static inline simde__m512 pkv_shuffle_quarters(simde__m512 a, simde__m512 b, int which) {
  simde__m512 to;
  for (int i = 0; i < 4; i++)
    memcpy((char *)&to + 16 * i, (char *)(i < 2 ? &a : &b) + 16 * (which >> 2 * i & 3), 16);
  return to;
}
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(a, b, which) pkv_shuffle_quarters(a, b, which)

#endif
