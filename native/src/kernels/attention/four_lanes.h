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
