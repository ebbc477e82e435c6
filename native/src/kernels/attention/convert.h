/* Stored values to float32 and back: rounded to nearest even, saturated, copied past the caches. */
/* Clamp finite values to +-largest; inf and NaN pass.  Rounding cannot carry the rest to inf. */
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

/* Round to 16 bits; is_in_range: no value is beyond the stored range, inf or NaN. */
ALWAYS_INLINE void narrow_vec(char *stored, vec x, int count, int32_t dtype, bool is_in_range) {
  halves h;
  if (dtype == PKV_FLOAT16)
    h = vec_to_float16(is_in_range ? x : saturate(x, 65504.0f));
  else if (is_in_range)
    h = vec_high_halves(rounded_to_bfloat16((ivec)x));
  else
    h = vec_to_bfloat16(saturate(x, 0x1.fep127f));
  memcpy(stored, &h, (size_t)count * 2);
}

/* Returns `largest` minus each magnitude, ORed together: negative where one is beyond it. */
ALWAYS_INLINE ivec narrow_all(char *stored, const float *values, int64_t count, int32_t dtype,
                              bool is_in_range) {
  const ivec largest = (ivec)((vec){} + (dtype == PKV_BFLOAT16 ? 0x1.fep127f : 65504.0f));
  ivec room = {};
  for (int64_t i = 0; i < count; i += WIDTH) {
    int some = HAS_PART && count - i < WIDTH ? PART : WIDTH;
    vec x = vec_in_register(some == WIDTH ? vec_load(values + i) : vec_load_part(values + i));
    room |= largest - ((ivec)x & 0x7fffffff);
    if (some == WIDTH)
      narrow_vec(stored + 2 * i, x, WIDTH, dtype, is_in_range);
    else
      narrow_vec(stored + 2 * i, x, PART, dtype, is_in_range);
  }
  return room;
}

/* Values out of range are rare, and their path takes twice as long: assume none, and convert again when
 * there was one. */
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

/* Whole cache lines, so that the write-combining buffers fill. */
static void copy_past_caches(char *to, const char *from, int64_t num_bytes) {
#ifdef HAS_STREAMING_STORES /* defined by headers with AVX */
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
