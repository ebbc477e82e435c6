/* Ternary products of many rows on CPUs that run table lookups beside multiply-adds.
 *
 * Zen 4 has two ports for vpdpbusd and two for vpermw, one of them shared: multiply-adds alone leave
 * half of the vpermw throughput idle.  Three inputs of a row and three ternary weights have 27 sums.
 * One vector holds them as a table, from which 32 outputs each look up their sum: 96 products per
 * instruction, where a multiply-add has 64.  Of seven groups of inputs three are looked up, twelve
 * inputs at a time, beside four that are multiplied:
 *
 *   a chunk of inputs    | looked up: 3 p groups | multiplied: 4 p groups | the rest, multiplied |
 *   a portion of it      12 inputs looked up, 16 multiplied: 8 rows x 32 outputs = 32 vpermw, 64 vpdpbusd
 *
 * Weights and rows are repacked into portions first.  A lookup gives the integer that multiplying gives:
 * sums have the same bits. */
#ifndef PKV_LOOKUPS_H
#define PKV_LOOKUPS_H

enum {
  MAX_PERIODS = 3, /* the tables of 8 rows then take 24 KiB, most of an L1 cache */
  CHUNK_GROUPS = 7 * MAX_PERIODS,
  MOST_PORTIONS = 4 * (MAX_PERIODS - 1) + 6, /* with the largest rest; more than 4 * MAX_PERIODS */
  WORDS = 32,                                /* bytes of a vector */
};

/* Two blocks of weights: the group that is multiplied, and table indices below 27 for the triples 0 1 2,
 * 4 5 6, 8 9 10 and 3 7 11 of twelve inputs; each quarter of a vector has four outputs of one block,
 * then of the other. */
typedef struct {
  uint8_t multiplied[2][PKV_GROUP_BYTES];
  uint16_t ways[4][WORDS];
} weight_portion;
_Static_assert(sizeof(weight_portion[MOST_PORTIONS]) == PKV_PAIR_BYTES, "scratch of ternary_many");

/* Eight rows: the inputs that are multiplied, and for each triple its table of 27 sums. */
typedef struct {
  int8_t multiplied[ROWS][PKV_IN_GROUP];
  int16_t sums[4][ROWS][WORDS];
} row_portion;

/* Keeps additions in the order of the source: gcc would do all lookups first, and run out of registers. */
#ifdef PKV_EMULATED
#define IN_ORDER(x) (void)(x)
#else
#define IN_ORDER(x) __asm__ volatile("" : "+v"(x))
#endif

ALWAYS_INLINE __m512i codes_of(const uint8_t *group, int quarter) {
  __m512i packed = _mm512_loadu_si512(group);
  return _mm512_and_si512(quarter ? _mm512_srli_epi16(packed, (unsigned)(2 * quarter)) : packed,
                          _mm512_set1_epi8(3));
}

/* Repack a chunk of two blocks. */
static __attribute__((noinline)) void lay_out_weights(weight_portion *portions, const uint8_t *first,
                                                      const uint8_t *second, int64_t num_periods,
                                                      int64_t num_groups) {
  const uint8_t *blocks[2] = {first, second};
  const __m512i of_three = _mm512_set1_epi32(1 | 3 << 8 | 9 << 16);
  const int place[] = {1, 3, 9};
  for (int64_t period = 0; period < num_periods; period++)
    EACH (twelve, 4) {
      weight_portion *portion = portions + 4 * period + twelve;
      __m512i last[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()}, way[2];
      EACH (i, 3) {
        const int quarter = 3 * twelve + i;
        EACH (b, 2) {
          __m512i codes = codes_of(blocks[b] + (3 * period + quarter / 4) * PKV_GROUP_BYTES, quarter % 4);
          way[b] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, of_three);
          last[b] = _mm512_dpbusd_epi32(last[b], codes, _mm512_set1_epi32(place[i] << 24));
        }
        _mm512_store_si512(portion->ways[i], _mm512_packus_epi32(way[0], way[1]));
      }
      _mm512_store_si512(portion->ways[3], _mm512_packus_epi32(last[0], last[1]));
    }
  for (int64_t group = 3 * num_periods; group < num_groups; group++, portions++)
    EACH (b, 2) memcpy(portions->multiplied[b], blocks[b] + group * PKV_GROUP_BYTES, PKV_GROUP_BYTES);
}

/* Three weights, -1, 0 or 1, as bytes to multiply by: half of the 27 combinations in each vector, such
 * that _mm512_packs_epi32 of the products has them in order. */
typedef struct {
  __m512i weights[2];
  __m512i start[2]; /* multiply-adds take one unsigned operand: a row's values plus 128 */
} all_ways;

static all_ways ways_of_three(void) {
  const __m512i zero = _mm512_setzero_si512();
  int8_t weights[2][16][4] = {0};
  for (int n = 0; n < WORDS; n++)
    for (int i = 0, rest = n; i < 3; i++, rest /= 3)
      weights[n / 4 % 2][n / 8 * 4 + n % 4][i] = (int8_t)(rest % 3 - 1);
  all_ways ways;
  EACH (half, 2) {
    ways.weights[half] = _mm512_loadu_si512(weights[half]);
    ways.start[half] =
        _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, _mm512_set1_epi8(-128), ways.weights[half]));
  }
  return ways;
}

/* Repack a chunk of row r. */
static __attribute__((noinline)) void lay_out_row(row_portion *portions, int r, all_ways ways,
                                                  const int8_t *row, int64_t num_periods,
                                                  int64_t num_groups) {
  const __m128i triples = _mm_setr_epi8(0, 1, 2, -1, 4, 5, 6, -1, 8, 9, 10, -1, 3, 7, 11, -1);
  for (int64_t p = 0; p < 4 * num_periods; p++) {
    uint32_t threes[4]; /* of the 16 bytes that are loaded: inputs to multiply follow the last twelve */
    __m128i twelve = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(row + 12 * p)), triples);
    _mm_storeu_si128((__m128i *)threes, _mm_xor_si128(twelve, _mm_set1_epi8(-128)));
    EACH (i, 4) {
      __m512i three = repeated(threes + i);
      _mm512_store_si512(portions[p].sums[i][r],
                         _mm512_packs_epi32(_mm512_dpbusd_epi32(ways.start[0], three, ways.weights[0]),
                                            _mm512_dpbusd_epi32(ways.start[1], three, ways.weights[1])));
    }
  }
  for (int64_t group = 3 * num_periods; group < num_groups; group++, portions++)
    memcpy(portions->multiplied[r], row + group * PKV_IN_GROUP, PKV_IN_GROUP);
}

ALWAYS_INLINE void add_portion(__m512i (*totals)[2], __m512i *looked_up, const weight_portion *weights,
                               const row_portion *rows, const bool looks_up) {
  EACH (quarter, 4) {
    __m512i codes[2], way = _mm512_setzero_si512(), sum = way;
    EACH (b, 2) {
      codes[b] = codes_of(weights->multiplied[b], quarter);
      IN_ORDER(codes[b]);
    }
    if (looks_up) way = _mm512_load_si512(weights->ways[quarter]);
    EACH (r, ROWS) {
      __m512i four = repeated(rows->multiplied[r] + 4 * quarter);
      if (looks_up) sum = _mm512_permutexvar_epi16(way, _mm512_load_si512(rows->sums[quarter][r]));
      EACH (b, 2) {
        totals[r][b] = _mm512_dpbusd_epi32(totals[r][b], codes[b], four);
        IN_ORDER(totals[r][b]);
      }
      if (looks_up) {
        looked_up[r] = _mm512_add_epi16(looked_up[r], sum);
        IN_ORDER(looked_up[r]);
      }
    }
  }
}

/* Sums of 8 rows and two blocks, block_stride rows apart. */
static __attribute__((noinline)) void add_chunk(const weight_portion *weights, const row_portion *rows,
                                                int64_t num_mixed, int64_t num_portions,
                                                int32_t (*sums)[PKV_OUT_BLOCK], int64_t block_stride) {
  __m512i totals[ROWS][2], looked_up[ROWS];
  EACH (r, ROWS) {
    EACH (b, 2) {
      totals[r][b] = _mm512_setzero_si512();
      __builtin_prefetch(sums + b * block_stride + r, 1);
    }
    looked_up[r] = _mm512_setzero_si512();
  }
  int64_t p = 0;
  for (; p < num_mixed; p++) add_portion(totals, looked_up, weights + p, rows + p, true);
  for (; p < num_portions; p++) add_portion(totals, looked_up, weights + p, rows + p, false);
  EACH (r, ROWS) {
    /* Sign-extend: to the upper half of 32 bits, then shift down. */
    __m512i widened[2] = {_mm512_unpacklo_epi16(looked_up[r], looked_up[r]),
                          _mm512_unpackhi_epi16(looked_up[r], looked_up[r])};
    EACH (b, 2) {
      int32_t *to = sums[b * block_stride + r];
      __m512i sum = _mm512_add_epi32(totals[r][b], _mm512_srai_epi32(widened[b], 16));
      _mm512_storeu_si512(to, _mm512_add_epi32(sum, _mm512_loadu_si512(to)));
    }
  }
}

/* A chunk that starts at group `done`, of periods of seven groups. */
ALWAYS_INLINE int64_t periods_of(int64_t num_groups, int64_t done) {
  int64_t periods = (num_groups - done) / 7;
  return periods < MAX_PERIODS ? periods : MAX_PERIODS;
}

/* Tables have weights -1, 0 and 1, codes are larger by one: every sum of a row starts from the sum of
 * its looked-up inputs. */
static void start_sums(const int8_t *row, int64_t num_groups, int32_t (*sums)[PKV_OUT_BLOCK],
                       int64_t num_blocks, int64_t block_stride) {
  int32_t total = 0;
  for (int64_t done = 0; done < num_groups; done += CHUNK_GROUPS)
    for (int64_t group = done; group < done + 3 * periods_of(num_groups, done); group++) {
      __m128i inputs = _mm_loadu_si128((const __m128i *)(row + group * PKV_IN_GROUP));
      __m128i halves = _mm_sad_epu8(_mm_xor_si128(inputs, _mm_set1_epi8(-128)), _mm_setzero_si128());
      total += _mm_cvtsi128_si32(halves) + _mm_extract_epi16(halves, 4) - 128 * PKV_IN_GROUP;
    }
  for (int64_t b = 0; b < num_blocks; b++)
    _mm512_storeu_si512(sums[b * block_stride], _mm512_set1_epi32(total));
}

static void ternary_many(const uint8_t *weights, int64_t num_groups, int64_t num_blocks, const int8_t *rows,
                         int64_t row_stride, int64_t num_rows, int32_t (*sums)[PKV_OUT_BLOCK],
                         void *scratch) {
  const int64_t block_bytes = num_groups * PKV_GROUP_BYTES;
  const all_ways ways = ways_of_three();
  weight_portion(*pairs)[MOST_PORTIONS] = scratch;
  _Alignas(64) row_portion portions[MOST_PORTIONS];
  for (int64_t row = 0; row < num_rows; row++)
    start_sums(rows + row * row_stride, num_groups, sums + row, num_blocks, num_rows);
  for (int64_t done = 0; done < num_groups; done += CHUNK_GROUPS) {
    int64_t count = num_groups - done < CHUNK_GROUPS ? num_groups - done : CHUNK_GROUPS;
    int64_t periods = periods_of(num_groups, done);
    for (int64_t b = 0; b < num_blocks; b += 2) {
      const uint8_t *first = weights + b * block_bytes + done * PKV_GROUP_BYTES;
      lay_out_weights(pairs[b / 2], first, first + block_bytes, periods, count);
    }
    for (int64_t row = 0; row < num_rows; row += ROWS) {
      EACH (r, ROWS)
        lay_out_row(portions, r, ways, rows + (row + r) * row_stride + done * PKV_IN_GROUP, periods, count);
      for (int64_t b = 0; b < num_blocks; b += 2)
        add_chunk(pairs[b / 2], portions, 4 * periods, count - 3 * periods, sums + b * num_rows + row,
                  num_rows);
    }
  }
}

#endif
