/* Sums of products of bytes with q's words by VNNI, which multiplies bytes: a word is two of them.
 *
 *   word = 256 * high + low       both from -128 to 127
 *
 * Four queries lie side by side, a quarter of a vector each, so that 16 bytes of a key are broadcast to them:
 * a load without a shuffle.  One or two queries are multiplied with 64 bytes at a time. */

static inline __m512i dot_bytes(__m512i sum, __m512i bytes, __m512i signed_bytes) {
#ifdef PKV_EMULATED
  return _mm512_dpbusd_epi32(sum, bytes, signed_bytes);
#else /* gcc would copy sums around the instruction that adds to them */
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "vm"(signed_bytes));
  return sum;
#endif
}

/* High and low bytes of 32 words. */
ALWAYS_INLINE void split_words(const int16_t *from, __m256i *high, __m256i *low) {
  __m512i words = _mm512_loadu_si512(from);
  *low = _mm512_cvtepi16_epi8(words);
  *high = _mm512_cvtepi16_epi8(_mm512_srai_epi16(_mm512_add_epi16(words, _mm512_set1_epi16(128)), 8));
}

/* Sums of the lanes of each quarter, of four vectors: token t's are lane t of their quarters. */
ALWAYS_INLINE __m512i sums_of_quarters(const __m512i x[4]) {
  __m512i even = _mm512_add_epi32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
  __m512i odd = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(even, odd), _mm512_unpackhi_epi64(even, odd));
}

/* Sums of four keys with four queries: high and low have, of each 16 dims, the bytes of the four. */
ALWAYS_INLINE void sum_four_keys(const char *const *rows, int64_t offset, int32_t num_chunks,
                                 const __m512i *high, const __m512i *low, int32_t *sums) {
  __m512i highs[4] = {}, lows[4] = {};
  const char *k[4];
  EACH (t, 4) k[t] = rows[t] + offset;
  EACH (c, num_chunks)
    EACH (t, 4) {
      __m512i key = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(k[t] + 16 * c)));
      highs[t] = dot_bytes(highs[t], key, high[c]);
      lows[t] = dot_bytes(lows[t], key, low[c]);
    }
  __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(sums_of_quarters(highs), 8), sums_of_quarters(lows));
  _mm_storeu_si128((__m128i *)sums, _mm512_castsi512_si128(sum));
  _mm_storeu_si128((__m128i *)(sums + PKV_RUN_TOKENS), _mm512_extracti32x4_epi32(sum, 1));
  _mm_storeu_si128((__m128i *)(sums + 2 * PKV_RUN_TOKENS), _mm512_extracti32x4_epi32(sum, 2));
  _mm_storeu_si128((__m128i *)(sums + 3 * PKV_RUN_TOKENS), _mm512_extracti32x4_epi32(sum, 3));
}

ALWAYS_INLINE void sum_keys_of_four(const head_rows *keys, const head_rows *ahead, const int16_t *const *q,
                                    int32_t num_chunks, int32_t sums[][PKV_RUN_TOKENS]) {
  __m512i high[PKV_MAX_HEAD_DIM / 16], low[PKV_MAX_HEAD_DIM / 16];
  for (int c = 0; c < num_chunks; c += 2)
    for (int i = 0; i < 4; i++) {
      __m256i highs, lows;
      split_words(q[i] + 16 * c, &highs, &lows); /* words are padded to 32 */
      memcpy((char *)(high + c) + 16 * i, &highs, 16);
      memcpy((char *)(low + c) + 16 * i, &lows, 16);
      if (c + 1 == num_chunks) continue;
      memcpy((char *)(high + c + 1) + 16 * i, (char *)&highs + 16, 16);
      memcpy((char *)(low + c + 1) + 16 * i, (char *)&lows + 16, 16);
    }
  for (int32_t t = 0; t < keys->count; t += 4) {
    const char *rows[4];
    EACH (i, 4) {
      rows[i] = keys->rows[t + i < keys->count ? t + i : keys->count - 1];
      prefetch_row(ahead, t + i);
    }
    sum_four_keys(rows, keys->offset, num_chunks, high, low, sums[0] + t);
  }
}

/* Sums of 16 / num_queries keys with one or two queries, of which at least one key is there. */
ALWAYS_INLINE void sum_whole_keys(const char *const *rows, int32_t count, int64_t offset, int32_t dim,
                                  const __m512i high[][PKV_MAX_HEAD_DIM / 64],
                                  const __m512i low[][PKV_MAX_HEAD_DIM / 64], int num_queries,
                                  int32_t sums[][PKV_RUN_TOKENS]) {
  const int num_keys = TILE_SUMS / num_queries;
  ivec all[TILE_SUMS];
  EACH (part, 2) {
    __m512i highs[TILE_SUMS / 2] = {}, lows[TILE_SUMS / 2] = {};
    for (int32_t d = 0; d < dim; d += 64)
      EACH (t, num_keys / 2) {
        int at = part * (num_keys / 2) + t;
        __m512i key = bytes_load(rows[at < count ? at : count - 1] + offset + d, dim - d < 64 ? dim - d : 64);
        EACH (i, num_queries) {
          highs[i * (num_keys / 2) + t] = dot_bytes(highs[i * (num_keys / 2) + t], key, high[i][d / 64]);
          lows[i * (num_keys / 2) + t] = dot_bytes(lows[i * (num_keys / 2) + t], key, low[i][d / 64]);
        }
      }
    EACH (i, num_queries)
      EACH (t, num_keys / 2) {
        int at = i * (num_keys / 2) + t;
        all[i * num_keys + part * (num_keys / 2) + t] =
            (ivec)_mm512_add_epi32(_mm512_slli_epi32(highs[at], 8), lows[at]);
      }
  }
  int32_t added[TILE_SUMS];
  ivec_sums(all, added);
  EACH (i, num_queries) memcpy(sums[i], added + i * num_keys, (size_t)num_keys * sizeof *added);
}

ALWAYS_INLINE void sum_keys_of_few(const head_rows *keys, const head_rows *ahead, const int16_t *const *q,
                                   int num_queries, int32_t sums[][PKV_RUN_TOKENS]) {
  const int num_keys = TILE_SUMS / num_queries;
  __m512i high[2][PKV_MAX_HEAD_DIM / 64] = {}, low[2][PKV_MAX_HEAD_DIM / 64] = {};
  for (int i = 0; i < num_queries; i++)
    for (int32_t d = 0; d < keys->dim; d += 32) {
      __m256i highs, lows;
      split_words(q[i] + d, &highs, &lows);
      memcpy((char *)high[i] + d, &highs, 32);
      memcpy((char *)low[i] + d, &lows, 32);
    }
  for (int32_t t = 0; t < keys->count; t += num_keys) {
    EACH (i, num_keys) prefetch_row(ahead, t + i);
    sum_whole_keys(keys->rows + t, keys->count - t, keys->offset, keys->dim, high, low, num_queries,
                   (int32_t (*)[PKV_RUN_TOKENS])(sums[0] + t));
  }
}

/* Sums of products of all keys with num_queries. */
ALWAYS_INLINE void sum_keys(const head_rows *keys, const head_rows *ahead, const int16_t *const *q,
                            int num_queries, int32_t sums[][PKV_RUN_TOKENS]) {
  if (num_queries < 4)
    sum_keys_of_few(keys, ahead, q, num_queries, sums);
  else if (keys->dim == 128)
    sum_keys_of_four(keys, ahead, q, 8, sums);
  else if (keys->dim == 64)
    sum_keys_of_four(keys, ahead, q, 4, sums);
  else if (keys->dim % 16 == 0)
    sum_keys_of_four(keys, ahead, q, keys->dim / 16, sums);
  else /* two at a time */
    for (int i = 0; i < 4; i += 2) sum_keys_of_few(keys, i ? NULL : ahead, q + i, 2, sums + i);
}
