/* The ceilings of this machine: plain reads and writes, by threads that do nothing else.
 *
 *   walk_read    adds up memory in the order of a list of chunks (pages in their order, or one after the
 * other) walk_write   fills memory, by ordinary stores
 *
 * Each thread takes an equal share of the chunks. Compiled by the benchmarks that need it, with
 * -march=native.
 */
#include <pthread.h>
#include <stdint.h>
#include <string.h>

typedef float vec __attribute__((vector_size(32)));

typedef struct {
  char *base;
  int64_t chunk_bytes;
  const int64_t *offsets; /* [num_chunks] */
  int64_t num_chunks;
  float sum;
} share;

static void *read_share(void *argument) {
  share *s = argument;
  vec sums[8] = {};
  for (int64_t c = 0; c < s->num_chunks; c++) {
    const vec *from = (const vec *)(s->base + s->offsets[c]);
    for (int64_t i = 0; i < s->chunk_bytes / (int64_t)sizeof(vec); i += 8)
      for (int j = 0; j < 8; j++) sums[j] += from[i + j];
  }
  for (int j = 1; j < 8; j++) sums[0] += sums[j];
  s->sum = sums[0][0];
  return NULL;
}

static void *write_share(void *argument) {
  share *s = argument;
  for (int64_t c = 0; c < s->num_chunks; c++) memset(s->base + s->offsets[c], (int)c, (size_t)s->chunk_bytes);
  return NULL;
}

enum { MAX_THREADS = 64 };

static float walk(void *(*work)(void *), char *base, int64_t chunk_bytes, const int64_t *offsets,
                  int64_t num_chunks, int64_t num_threads) {
  share shares[MAX_THREADS];
  pthread_t ids[MAX_THREADS];
  if (num_threads > MAX_THREADS) num_threads = MAX_THREADS;
  for (int64_t i = 0; i < num_threads; i++) {
    int64_t begin = num_chunks * i / num_threads, end = num_chunks * (i + 1) / num_threads;
    shares[i] = (share){base, chunk_bytes, offsets + begin, end - begin, 0};
  }
  for (int64_t i = 1; i < num_threads; i++) pthread_create(&ids[i], NULL, work, &shares[i]);
  work(&shares[0]);
  for (int64_t i = 1; i < num_threads; i++) pthread_join(ids[i], NULL);
  float sum = 0;
  for (int64_t i = 0; i < num_threads; i++) sum += shares[i].sum;
  return sum;
}

/* chunk_bytes is a multiple of 256, base and offsets of 32. */
float walk_read(char *base, int64_t chunk_bytes, const int64_t *offsets, int64_t num_chunks,
                int64_t num_threads) {
  return walk(read_share, base, chunk_bytes, offsets, num_chunks, num_threads);
}

void walk_write(char *base, int64_t chunk_bytes, const int64_t *offsets, int64_t num_chunks,
                int64_t num_threads) {
  walk(write_share, base, chunk_bytes, offsets, num_chunks, num_threads);
}
