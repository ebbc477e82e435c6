/* Stored values to float32 and back: rounded to nearest even, saturated, copied past the caches. */
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

static void prepare_q(float *prepared, const char *q, int32_t dtype, float scale, int32_t head_dim) {
  int32_t d = 0;
  for (; d + WIDTH <= head_dim; d += WIDTH)
    vec_store(prepared + d, vec_load_stored(q, d, WIDTH, dtype) * scale);
  if (HAS_PART && d < head_dim) vec_store(prepared + d, vec_load_stored(q, d, PART, dtype) * scale);
}
