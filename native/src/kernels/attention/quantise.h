/* Floats as integers of 8 or 4 bits and their scales, and back; and q as integers of 16 bits, which are
 * multiplied with them.
 *
 *   8 bits   A row's scale is its largest magnitude / 127, rounded up to bfloat16; a code is the nearest
 * integer to value / scale, ties to even, stored as code + 128.  Rows of smaller magnitudes than 127 * 2^-100
 *            are stored as 0, with the scale 0.
 *   4 bits   A row's minimum is rounded down to bfloat16; its scale is (largest - minimum) / 15, rounded up.
 * A code is the nearest integer to (value - minimum) / scale, from 0 to 15.  Scales below 2^-100 are 0.
 *
 * Finite values beyond 2^127, or 2^126 of 4 bits, saturate.  A row with NaN or infinity has the scale NaN. */

enum {
  LARGEST_CODE = 127,
  LARGEST_NIBBLE = 15,
  LARGEST_Q_WORD = 32512 /* 127 * 256: both of its bytes are 8-bit integers */
};

/* The largest magnitude of `count` values; NaN where one is NaN or infinite. */
ALWAYS_INLINE float largest_magnitude(const float *values, int32_t count) {
  vec most = {}, flaws = {};
  for (int32_t i = 0; i < count; i += WIDTH) {
    vec x = vec_load_n(values + i, count - i < WIDTH ? PART : WIDTH);
    vec magnitude = (vec)((ivec)x & 0x7fffffff);
    most = vec_max(magnitude, most);
    flaws += magnitude * 0.0f;
  }
  float flaw = vec_sum(flaws);
  return flaw == 0 ? vec_maximum(most) : __builtin_nanf("");
}

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

/* The smallest of `count` values, which are finite. */
ALWAYS_INLINE float smallest_value(const float *values, int32_t count) {
  vec most = (vec){} - __builtin_inff();
  for (int32_t i = 0; i < count; i += WIDTH) {
    bool is_part = HAS_PART && count - i < WIDTH;
    vec x = is_part ? vec_load_n(values + i, PART) : vec_load(values + i);
    /* Behind a part are zeros, which must not count. */
    if (is_part) x = vec_select(ivec_load(lane_numbers) < PART, x, (vec){} + values[i]);
    most = vec_max(-x, most);
  }
  return -vec_maximum(most);
}

ALWAYS_INLINE float largest_value(const float *values, int32_t count) {
  vec most = (vec){} - __builtin_inff();
  for (int32_t i = 0; i < count; i += WIDTH) {
    bool is_part = HAS_PART && count - i < WIDTH;
    vec x = is_part ? vec_load_n(values + i, PART) : vec_load(values + i);
    if (is_part) x = vec_select(ivec_load(lane_numbers) < PART, x, (vec){} + values[i]);
    most = vec_max(x, most);
  }
  return vec_maximum(most);
}

static void quantise_int4(uint8_t *bytes, uint16_t *scales, const float *values, int64_t count,
                          float magnitude) {
  const int32_t dim = (int32_t)count, half = dim / 2;
  uint32_t scale = 0x7fc00000, minimum = 0x7fc00000;
  memset(bytes, 0, (size_t)half);
  if (magnitude == magnitude) {
    float least = smallest_value(values, dim), largest = largest_value(values, dim);
    minimum = least < 0 ? rounded_away(least) : bits_of_float(least) & 0xffff0000;
    scale = rounded_away(largest / LARGEST_NIBBLE - float_of_bits(minimum) / LARGEST_NIBBLE);
    if (float_of_bits(scale) < 0x1p-100f) scale = 0;
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
  for (int32_t i = 0; i < half; i += 4) {
    uint32_t low, high;
    memcpy(&low, codes + i, sizeof low);
    memcpy(&high, codes + half + i, sizeof high);
    low |= high << 4;
    memcpy(bytes + i, &low, sizeof low);
  }
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

static void dequantise(float *values, const uint8_t *bytes, const uint16_t *scales, int64_t count,
                       int32_t dtype) {
  float scale = float_of_bits((uint32_t)scales[0] << 16);
  int64_t half = count / 2;
  if (dtype == PKV_INT8) {
    for (int64_t i = 0; i < count; i++) values[i] = (float)(bytes[i] - 128) * scale;
    return;
  }
  float minimum = float_of_bits((uint32_t)scales[1] << 16);
  for (int64_t i = 0; i < half; i++) {
    values[i] = (float)(bytes[i] & 15) * scale + minimum;
    values[half + i] = (float)(bytes[i] >> 4) * scale + minimum;
  }
}

static void prepare_q8(pkv_q8 *prepared, const char *q, int32_t dtype, float scale, int32_t head_dim) {
  const float least = 0x1p-100f; /* so that LARGEST_Q_WORD / least is finite */
  float values[PKV_MAX_HEAD_DIM + 16] __attribute__((aligned(64)));
  int16_t *words = (int16_t *)(prepared + 1);
  prepare_q(values, q, dtype, scale, head_dim);
  float largest = largest_magnitude(values, head_dim);
  if (largest < least) largest = least;
  vec inverse = (vec){} + LARGEST_Q_WORD / largest;
  ivec sums = {};
  int32_t padded = (head_dim + 31) / 32 * 32;
  memset(words, 0, (size_t)padded * sizeof *words);
  for (int32_t i = 0; i < head_dim; i += WIDTH) { /* prepare_q has padded with zeros */
    ivec word = (ivec)(vec_load(values + i) * inverse + 0x1.8p23f) - 0x4b400000;
    halves low = vec_high_halves(word << 16);
    memcpy(words + i, &low, sizeof low);
    sums += word;
  }
  uint32_t sum = 0;
  for (int i = 0; i < WIDTH; i++) sum += (uint32_t)sums[i];
  prepared->sum = (int32_t)sum;
  prepared->scale = largest / LARGEST_Q_WORD;
}
