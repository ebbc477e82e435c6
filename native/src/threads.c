/* A small pool of threads: one job at a time, workers asleep in between.
 *
 *   job_number counts jobs; a worker waits until it is not the one it did last
 *   num_working is how many workers are at it; the caller, who works too, then waits until it is 0
 *   is_open says that the job may be joined: until the caller finds nothing left to do
 *   claimed is held from claim to release
 *
 * Who waits looks again and again for SPIN_NS, and then sleeps: a model has a hundred short jobs for a token,
 * one right after the other, and being woken up costs 10 to 100 us.  Nobody waits for a worker to wake up:
 * work is taken in pieces, so what a late one would have done is done when it comes, and the job is closed.
 *
 * A caller who finds the threads claimed computes alone, so nobody ever waits for somebody else's job.
 * Threads start at the first job that has work for two.  A forked child has none of them: there, everything
 * is made anew at the first claim.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "threads.h"

enum { SPIN_NS = 100000, LOOKS_PER_CLOCK = 32 };

typedef struct {
  pkv_threads *threads;
  int32_t index;
} worker_start;

struct pkv_threads {
  int32_t num_threads; /* the caller counted in */
  int32_t num_started; /* workers that run, the caller not counted */
  pthread_t *ids;      /* [num_threads - 1] */
  worker_start *starts;
  atomic_flag claimed;
  unsigned forks; /* the process's count of forks when the threads were started */

  pthread_mutex_t lock; /* guards what follows */
  pthread_cond_t job_is_there;
  pthread_cond_t job_is_done;
  atomic_ullong job_number; /* changed under the lock, as is num_working; looked at without */
  int32_t num_workers;      /* of the job; workers beyond it sleep on */
  atomic_int num_working;
  bool is_open;
  bool is_ending;
  pkv_work work;
  void *context;

  void *scratch;
  size_t scratch_bytes;
};

static atomic_uint num_forks;
static pthread_once_t fork_is_watched = PTHREAD_ONCE_INIT;

static void count_fork(void) { atomic_fetch_add(&num_forks, 1); }
static void watch_forks(void) { pthread_atfork(NULL, NULL, count_fork); }

/* No thread, nothing claimed: as when built, and again in a forked child. */
static void begin_without_threads(pkv_threads *threads) {
  pthread_mutex_init(&threads->lock, NULL);
  pthread_cond_init(&threads->job_is_there, NULL);
  pthread_cond_init(&threads->job_is_done, NULL);
  atomic_flag_clear(&threads->claimed);
  threads->num_started = 0;
  threads->num_working = 0;
  threads->is_open = false;
  threads->forks = num_forks;
}

pkv_status pkv_threads_create(int32_t num_threads, pkv_threads **out) {
  if (num_threads < 1) return PKV_BAD_ARGUMENT;
  pthread_once(&fork_is_watched, watch_forks);
  pkv_threads *threads = calloc(1, sizeof *threads);
  if (!threads) return PKV_OUT_OF_MEMORY;
  threads->num_threads = num_threads;
  threads->ids = calloc((size_t)num_threads, sizeof *threads->ids);
  threads->starts = calloc((size_t)num_threads, sizeof *threads->starts);
  begin_without_threads(threads);
  *out = threads;
  if (threads->ids && threads->starts) return PKV_OK;
  pkv_threads_destroy(threads);
  return PKV_OUT_OF_MEMORY;
}

void pkv_threads_destroy(pkv_threads *threads) {
  if (!threads) return;
  if (threads->forks == num_forks) {
    pthread_mutex_lock(&threads->lock);
    threads->is_ending = true;
    pthread_cond_broadcast(&threads->job_is_there);
    pthread_mutex_unlock(&threads->lock);
    for (int32_t i = 0; i < threads->num_started; i++) pthread_join(threads->ids[i], NULL);
    pthread_mutex_destroy(&threads->lock);
    pthread_cond_destroy(&threads->job_is_there);
    pthread_cond_destroy(&threads->job_is_done);
  }
  free(threads->scratch);
  free(threads->ids);
  free(threads->starts);
  free(threads);
}

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static bool is_idle(pkv_threads *threads) { return threads->num_working == 0; }

/* Look for a while: until there is another job than last_job, or, as its caller, until the job is done. */
static void spin_for_a_job(pkv_threads *threads, uint64_t last_job) {
  for (int64_t end = now_ns() + SPIN_NS; now_ns() < end;)
    for (int i = 0; i < LOOKS_PER_CLOCK; i++, pause_briefly())
      if (threads->job_number != last_job) return;
}

static void spin_until_done(pkv_threads *threads) {
  for (int64_t end = now_ns() + SPIN_NS; now_ns() < end;)
    for (int i = 0; i < LOOKS_PER_CLOCK; i++, pause_briefly())
      if (is_idle(threads)) return;
}

static void *work_until_the_end(void *argument) {
  pkv_threads *threads = ((worker_start *)argument)->threads;
  int32_t index = ((worker_start *)argument)->index;
  uint64_t last_job = 0;
  pthread_mutex_lock(&threads->lock);
  while (true) {
    while (!threads->is_ending && (threads->job_number == last_job || index >= threads->num_workers))
      pthread_cond_wait(&threads->job_is_there, &threads->lock);
    if (threads->is_ending) break;
    last_job = threads->job_number;
    if (threads->is_open) {
      threads->num_working++;
      pthread_mutex_unlock(&threads->lock);
      threads->work(threads->context, index);
      pthread_mutex_lock(&threads->lock);
      if (--threads->num_working == 0) pthread_cond_signal(&threads->job_is_done);
    }
    pthread_mutex_unlock(&threads->lock);
    spin_for_a_job(threads, last_job);
    pthread_mutex_lock(&threads->lock);
  }
  pthread_mutex_unlock(&threads->lock);
  return NULL;
}

int32_t pkv_threads_claim(pkv_threads *threads) {
  if (!threads) return 0;
  if (threads->forks != num_forks) begin_without_threads(threads);
  return atomic_flag_test_and_set(&threads->claimed) ? 0 : threads->num_threads;
}

void pkv_threads_release(pkv_threads *threads) { atomic_flag_clear(&threads->claimed); }

void *pkv_threads_scratch(pkv_threads *threads, size_t num_bytes) {
  if (num_bytes > threads->scratch_bytes) {
    free(threads->scratch);
    threads->scratch = aligned_alloc(64, (num_bytes + 63) / 64 * 64);
    threads->scratch_bytes = threads->scratch ? num_bytes : 0;
  }
  return threads->scratch;
}

/* A system that gives no more threads is no error: fewer do the work. */
static void start_workers(pkv_threads *threads, int32_t num_workers) {
  while (threads->num_started < num_workers - 1) {
    worker_start *start = &threads->starts[threads->num_started];
    *start = (worker_start){threads, threads->num_started + 1};
    if (pthread_create(&threads->ids[threads->num_started], NULL, work_until_the_end, start) != 0) return;
    threads->num_started++;
  }
}

void pkv_threads_run(pkv_threads *threads, int32_t num_workers, pkv_work work, void *context) {
  pthread_mutex_lock(&threads->lock);
  threads->work = work;
  threads->context = context;
  start_workers(threads, num_workers);
  if (num_workers > threads->num_started + 1) num_workers = threads->num_started + 1;
  threads->num_workers = num_workers;
  threads->is_open = true;
  threads->job_number++;
  if (num_workers > 1) pthread_cond_broadcast(&threads->job_is_there);
  pthread_mutex_unlock(&threads->lock);

  work(context, 0);

  pthread_mutex_lock(&threads->lock);
  threads->is_open = false;
  pthread_mutex_unlock(&threads->lock);
  if (num_workers > 1) spin_until_done(threads);
  pthread_mutex_lock(&threads->lock);
  while (threads->num_working > 0) pthread_cond_wait(&threads->job_is_done, &threads->lock);
  pthread_mutex_unlock(&threads->lock);
}
