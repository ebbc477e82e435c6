/* What the instruction sets with vectors of four floats share. */
enum { WIDTH = 4, TILE_SUMS = 8 };
typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));

/* Broadcast one float. */
static inline vec vec_all(const float *x) { return (vec){*x, *x, *x, *x}; }

static inline vec vec_in_register(vec x) { return x; }

/* The sum as a tree: halves are added until one lane is left. */
static inline float vec_sum(vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }

/* The largest lane.  Either all lanes are NaN, or none is. */
static inline float vec_maximum(vec x) {
  float low = x[0] > x[2] ? x[0] : x[2], high = x[1] > x[3] ? x[1] : x[3];
  return low > high ? low : high;
}

/* Is any lane of a comparison true? */
static inline int vec_any(ivec mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }

static inline vec vec_from_bits(ivec bits) { return (vec)bits; }

/* ---- integers (int8.h) */

enum { VALUE_SUMS = 2 };
typedef int16_t words __attribute__((vector_size(4 * WIDTH)));
typedef uint8_t four_bytes __attribute__((vector_size(WIDTH)));
typedef uint8_t eight_bytes __attribute__((vector_size(2 * WIDTH)));

/* Eight bytes; the count of all parts. */
static inline words words_from_bytes(const char *from, int count) {
  (void)count;
  eight_bytes x;
  memcpy(&x, from, sizeof x);
  return __builtin_convertvector(x, words);
}

/* Eight bytes of two tokens, side by side. */
static inline void pair_bytes(const char *row, const char *next, int count, words pairs[VALUE_SUMS]) {
  (void)count;
  for (int i = 0; i < VALUE_SUMS; i++) {
    four_bytes a, b;
    memcpy(&a, row + i * WIDTH, sizeof a);
    memcpy(&b, next + i * WIDTH, sizeof b);
    pairs[i] = (words)(__builtin_convertvector(a, ivec) | __builtin_convertvector(b, ivec) << 16);
  }
}

static inline void ivec_sums(const ivec x[TILE_SUMS], int32_t sums[TILE_SUMS]) {
  for (int i = 0; i < TILE_SUMS; i++) sums[i] = x[i][0] + x[i][1] + x[i][2] + x[i][3];
}

/* The low byte of each lane. */
static inline void store_low_bytes(uint8_t *to, ivec x) {
  four_bytes bytes = __builtin_convertvector(x & 0xff, four_bytes);
  memcpy(to, &bytes, sizeof bytes);
}
