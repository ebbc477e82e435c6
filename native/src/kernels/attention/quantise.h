/* Floats as 8-bit integers and a scale, and back; and q as 16-bit integers, which are multiplied with them.
 *
 * A row's scale is its largest magnitude / 127, rounded up to bfloat16; a code is the nearest integer to
 * value / scale, ties to even, stored as code + 128.  Rows of smaller magnitudes than 127 * 2^-100 are stored
 * as 0, with the scale 0.  A row with NaN or infinity has the scale NaN. */

enum { LARGEST_CODE = 127, LARGEST_Q_WORD = 32512 /* 127 * 256: both of its bytes are 8-bit integers */ };

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

static void quantise(uint8_t *bytes, uint16_t *scale, const float *values, int64_t count) {
  const float to_byte = 0x1.8p23f + 128; /* adding it leaves code + 128 in the low byte */
  float largest = largest_magnitude(values, (int32_t)count), exact = largest / LARGEST_CODE, rounded;
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

static void dequantise(float *values, const uint8_t *bytes, const uint16_t *scale, int64_t count) {
  uint32_t bits = (uint32_t)*scale << 16;
  float factor;
  memcpy(&factor, &bits, sizeof factor);
  for (int64_t i = 0; i < count; i++) values[i] = (float)(bytes[i] - 128) * factor;
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
