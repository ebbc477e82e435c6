/* Floats as integers of 8 or 4 bits and their scales, and back; and q as integers of 16 bits, which are
 * multiplied with them.
 *
 * 8 bits: a row's scale is its largest magnitude / 127, rounded up to bfloat16.  A code is the nearest
 * integer to value / scale, ties to even, stored as code + 128.  Rows of smaller magnitudes than 127 * 2^-100
 * are stored as 0, with the scale 0.
 *
 * 4 bits: a minimum is rounded down to bfloat16; the scale is (largest - minimum) / 15, rounded up.  A code
 * is the nearest integer to (value - minimum) / scale, from 0 to 15.  Scales below 2^-100 are 0.  Of a row of
 * values, or of a dim of 64 tokens' keys.
 *
 * Finite values beyond 2^127, or 2^126 of 4 bits, saturate.  What has NaN or infinity has the scale NaN. */

enum { LARGEST_CODE = 127, LARGEST_NIBBLE = 15 };

/* magnitude: the largest of the values, or NaN. */
static void quantise_int8(uint8_t *bytes, uint16_t *scale, const float *values, int64_t count,
                          float magnitude) {
  const float to_byte = 0x1.8p23f + 128; /* adding it leaves code + 128 in the low byte */
  float exact = magnitude / LARGEST_CODE, rounded;
  uint32_t bits;
  memcpy(&bits, &exact, sizeof bits);
  bits = (bits + 0xffff) & 0xffff0000;
  if (!(exact >= 0x1p-100f)) bits = exact != exact ? 0x7fc00000 : 0;
  memcpy(&rounded, &bits, sizeof rounded);
  *scale = (uint16_t)(bits >> 16);
  if (rounded != rounded || rounded == 0) {
    memset(bytes, LARGEST_CODE + 1, (size_t)count);
    return;
  }
  float inverse = 1 / rounded;
  for (int64_t i = 0; i < count; i += WIDTH) {
    bool is_part = HAS_PART && count - i < WIDTH;
    ivec codes = (ivec)(vec_load_n(values + i, is_part ? PART : WIDTH) * inverse + to_byte);
    uint8_t part[WIDTH];
    store_low_bytes(is_part ? part : bytes + i, codes);
    if (is_part) memcpy(bytes + i, part, PART);
  }
}

static float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

/* The nearest bfloat16 that is not smaller; of -x, not larger. */
static uint32_t rounded_away(float value) { return (bits_of_float(value) + 0xffff) & 0xffff0000; }

/* The scale and the minimum of values between these two, as bits of floats that bfloat16 holds. */
static void scale_nibbles(float least, float largest, uint32_t *scale, uint32_t *minimum) {
  *minimum = least < 0 ? rounded_away(least) : bits_of_float(least) & 0xffff0000;
  *scale = rounded_away(largest / LARGEST_NIBBLE - float_of_bits(*minimum) / LARGEST_NIBBLE);
  if (float_of_bits(*scale) < 0x1p-100f) *scale = 0;
}

/* The smallest and the largest of `count` values, which are finite. */
ALWAYS_INLINE void range_of(const float *values, int32_t count, float *least, float *largest) {
  vec below = (vec){} - __builtin_inff(), above = below;
  for (int32_t i = 0; i < count; i += WIDTH) {
    bool is_part = HAS_PART && count - i < WIDTH;
    vec x = is_part ? vec_load_n(values + i, PART) : vec_load(values + i);
    /* Behind a part are zeros, which must not count. */
    if (is_part) x = vec_select(ivec_load(lane_numbers) < PART, x, (vec){} + values[i]);
    below = vec_max(-x, below);
    above = vec_max(x, above);
  }
  *least = -vec_maximum(below);
  *largest = vec_maximum(above);
}

/* Low and high halves of a row, side by side. */
ALWAYS_INLINE void pack_nibbles(uint8_t *bytes, const uint8_t *codes, int32_t half) {
  typedef uint8_t few_bytes __attribute__((vector_size(16)));
  int32_t i = 0;
  for (; i + 16 <= half; i += 16) {
    few_bytes low, high;
    memcpy(&low, codes + i, sizeof low);
    memcpy(&high, codes + half + i, sizeof high);
    low |= high << 4;
    memcpy(bytes + i, &low, sizeof low);
  }
  for (; i < half; i += 4) {
    uint32_t low, high;
    memcpy(&low, codes + i, sizeof low);
    memcpy(&high, codes + half + i, sizeof high);
    low |= high << 4;
    memcpy(bytes + i, &low, sizeof low);
  }
}

static void quantise_int4(uint8_t *bytes, uint16_t *scales, const float *values, int64_t count,
                          float magnitude) {
  const int32_t dim = (int32_t)count, half = dim / 2;
  uint32_t scale = 0x7fc00000, minimum = 0x7fc00000;
  memset(bytes, 0, (size_t)half);
  if (magnitude == magnitude) {
    float least, largest;
    range_of(values, dim, &least, &largest);
    scale_nibbles(least, largest, &scale, &minimum);
  }
  scales[0] = (uint16_t)(scale >> 16);
  scales[1] = (uint16_t)(minimum >> 16);
  if (!(float_of_bits(scale) > 0)) return;
  vec inverse = (vec){} + 1 / float_of_bits(scale), base = (vec){} + float_of_bits(minimum);
  uint8_t codes[PKV_MAX_HEAD_DIM + 16];
  for (int32_t i = 0; i < dim; i += WIDTH) {
    vec x = vec_load_n(values + i, HAS_PART && dim - i < WIDTH ? PART : WIDTH);
    vec code = (x - base) * inverse;
    code = vec_select((ivec)(code > (float)LARGEST_NIBBLE), (vec){} + (float)LARGEST_NIBBLE, code);
    code = vec_select((ivec)(code < 0.0f), (vec){}, code);
    store_low_bytes(codes + i, (ivec)(code + 0x1.8p23f));
  }
  pack_nibbles(bytes, codes, half);
}

static void quantise(uint8_t *bytes, uint16_t *scales, const float *values, int64_t count, int32_t dtype) {
  float limited[PKV_MAX_HEAD_DIM], limit = dtype == PKV_INT4 ? 0x1p126f : 0x1p127f;
  float magnitude = largest_magnitude(values, (int32_t)count);
  if (magnitude > limit) { /* saturate, so that what is read does not overflow */
    for (int64_t i = 0; i < count; i++)
      limited[i] = values[i] > limit ? limit : values[i] < -limit ? -limit : values[i];
    values = limited;
    magnitude = limit;
  }
  if (dtype == PKV_INT4)
    quantise_int4(bytes, scales, values, count, magnitude);
  else
    quantise_int8(bytes, scales, values, count, magnitude);
}

/* Bytes as integers. */
ALWAYS_INLINE ivec ivec_from_bytes(const uint8_t *from, int count) {
  typedef uint8_t some_bytes __attribute__((vector_size(WIDTH)));
  some_bytes x = {};
  if (count == WIDTH)
    memcpy(&x, from, sizeof x);
  else
    memcpy(&x, from, PART);
  return __builtin_convertvector(x, ivec);
}

/* The first `count` lanes, WIDTH or PART. */
ALWAYS_INLINE void store_n(void *to, vec x, int count) {
  if (count == WIDTH)
    memcpy(to, &x, sizeof x);
  else
    memcpy(to, &x, PART * sizeof(float));
}

ALWAYS_INLINE void dequantise_codes(float *values, const uint8_t *codes, const uint16_t *scales, int32_t dim,
                                    bool is_by_channel) {
  vec scale = (vec){} + float_of_bits((uint32_t)scales[0] << 16);
  vec minimum = (vec){} + float_of_bits((uint32_t)scales[1] << 16);
  for (int32_t i = 0; i < dim; i += WIDTH) {
    int count = HAS_PART && dim - i < WIDTH ? PART : WIDTH;
    if (is_by_channel) {
      ivec pair = (ivec)vec_load_n((const float *)(scales + 2 * i), count);
      scale = vec_from_bits(pair << 16);
      minimum = vec_from_bits(pair & ~0xffff);
    }
    store_n(values + i, __builtin_convertvector(ivec_from_bytes(codes + i, count), vec) * scale + minimum,
            count);
  }
}

static void dequantise(float *values, const uint8_t *bytes, const uint16_t *scales, int64_t count,
                       int32_t dtype) {
  const int32_t dim = (int32_t)count;
  if (dtype == PKV_INT8) {
    float scale = float_of_bits((uint32_t)scales[0] << 16);
    for (int32_t i = 0; i < dim; i += WIDTH) {
      int some = HAS_PART && dim - i < WIDTH ? PART : WIDTH;
      ivec codes = ivec_from_bytes(bytes + i, some) - 128;
      store_n(values + i, __builtin_convertvector(codes, vec) * scale, some);
    }
    return;
  }
  uint8_t codes[PKV_MAX_HEAD_DIM + 64];
  unpack_row((const char *)bytes, dim / 2, codes);
  if (dtype == PKV_INT4)
    dequantise_codes(values, codes, scales, dim, false);
  else
    dequantise_codes(values, codes, scales, dim, true);
}

/* Scales and minima of the dims from `values` on, of all rows; NaN where a value is NaN or infinite. */
ALWAYS_INLINE void scale_channels(const float *values, int32_t dim, int count, vec *scale, vec *minimum) {
  const ivec high = (ivec){} + ~0xffff;
  vec least = (vec){} + 0x1p126f, largest = (vec){} - 0x1p126f, flaws = {};
  for (int32_t t = 0; t < PKV_CHANNEL_TOKENS; t++) {
    vec x = vec_load_n(values + t * dim, count);
    flaws += (vec)((ivec)x & 0x7fffffff) * 0.0f;
    largest = vec_max(x, largest);
    least = -vec_max(-x, -least);
  }
  /* Saturate. */
  largest = vec_select((ivec)(largest > 0x1p126f), (vec){} + 0x1p126f, largest);
  least = vec_select((ivec)(least < -0x1p126f), (vec){} - 0x1p126f, least);
  ivec up = (ivec)(least < 0.0f) & 0xffff;
  *minimum = (vec)(((ivec)least + up) & high);
  vec exact = largest / (float)LARGEST_NIBBLE - *minimum / (float)LARGEST_NIBBLE;
  *scale = (vec)(((ivec)exact + 0xffff) & high);
  *scale = (vec)((ivec)*scale & ~(ivec)(*scale < 0x1p-100f));
  ivec is_nan = (ivec)(flaws != 0.0f);
  *scale = vec_select(is_nan, (vec){} + __builtin_nanf(""), *scale);
  *minimum = vec_select(is_nan, (vec){} + __builtin_nanf(""), *minimum);
}

/* Codes of these dims, of all rows: 0 where the scale is 0 or NaN. */
ALWAYS_INLINE void code_channels(uint8_t *codes, const float *values, int32_t dim, int count, vec scale,
                                 vec minimum) {
  const vec most = (vec){} + (float)LARGEST_NIBBLE;
  ivec has_scale = (ivec)(scale > 0.0f);
  vec inverse = (vec)((ivec)(1.0f / scale) & has_scale);
  for (int32_t t = 0; t < PKV_CHANNEL_TOKENS; t++) {
    vec x = vec_load_n(values + t * dim, count);
    vec code = (vec)((ivec)((x - minimum) * inverse) & has_scale);
    code = vec_select((ivec)(code > most), most, code);
    code = vec_select((ivec)(code < 0.0f), (vec){}, code);
    uint8_t part[WIDTH];
    store_low_bytes(count == WIDTH ? codes + t * dim : part, (ivec)(code + 0x1.8p23f));
    if (count != WIDTH) memcpy(codes + t * dim, part, PART);
  }
}

static void quantise_channels(uint8_t *bytes, int64_t stride, uint16_t *scales, const float *values,
                              int32_t dim) {
  uint8_t codes[PKV_CHANNEL_TOKENS * PKV_MAX_HEAD_DIM];
  for (int32_t d = 0; d < dim; d += WIDTH) {
    int count = dim - d < WIDTH ? PART : WIDTH;
    vec scale, minimum;
    scale_channels(values + d, dim, count, &scale, &minimum);
    code_channels(codes + d, values + d, dim, count, scale, minimum);
    ivec pairs = (ivec)(((ivec)scale >> 16) & 0xffff) | ((ivec)minimum & ~0xffff);
    store_n(scales + 2 * d, (vec)pairs, count);
  }
  for (int32_t t = 0; t < PKV_CHANNEL_TOKENS; t++) pack_nibbles(bytes + t * stride, codes + t * dim, dim / 2);
}

static void prepare_q8(pkv_q8 *prepared, const char *q, int32_t dtype, float scale, int32_t head_dim) {
  float values[PKV_MAX_HEAD_DIM + 16] __attribute__((aligned(64)));
  prepare_q(values, q, dtype, scale, head_dim);
  round_q(values, head_dim, prepared, (int16_t *)(prepared + 1));
}
