/* The process's team of threads: one job at a time, workers asleep in between.  Where the process has an
 * OpenMP runtime, as with torch, its threads do the jobs (openmp.c), and the team stays empty.
 *
 *   team      the workers; it grows to the largest num_workers of a job, and ends with the last handle
 *   handle    a pkv_threads: how many of the team its jobs may use, and scratch memory of its own
 *
 *   job_number   counts jobs; a worker waits until it differs from the number of its last job
 *   num_working  workers in the job; the caller, who works too, then waits until it is 0
 *   is_open      workers may join the job: until the caller finds no piece left
 *   claimed      a handle from claim to release, the team while a job of several workers runs
 *
 * A waiting thread spins for SPIN_NS, then sleeps: a model has a hundred short jobs per token, one right
 * after the other, and a wake-up takes 10 to 100 us.  No job waits for a worker to wake up: work is
 * taken in pieces, so by the time a late worker comes, its share is done and the job is closed.
 *
 * When the team is claimed, the caller of another job computes it alone, so no job waits for another
 * one.  Workers start at the first job with work for two.  A forked child has none of them: there, the
 * team is empty again. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "openmp.h"
#include "threads.h"

enum { SPIN_NS = 100000, LOOKS_PER_CLOCK = 32 };

struct pkv_threads {
  int32_t num_threads; /* the caller included */
  atomic_flag claimed;
  atomic_uint forks; /* the process's count of forks when `claimed` was last valid */
  void *scratch;     /* of the job that has claimed the handle, kept for the next one */
  size_t scratch_bytes;
};

static struct {
  atomic_flag claimed;
  pthread_mutex_t lock;                         /* guards what follows */
  pthread_cond_t job_is_there[PKV_MAX_THREADS]; /* per worker: only those of the job are woken */
  pthread_cond_t job_is_done;
  pthread_t ids[PKV_MAX_THREADS]; /* per worker, from 1; the caller is worker 0 */
  int32_t num_started;            /* running workers, without the caller */
  atomic_ullong job_number;       /* written under the lock, as is num_working; read without */
  int32_t num_workers;            /* of the job; workers beyond it sleep on */
  atomic_int num_working;
  bool is_open;
  bool is_ending;
  pkv_work work;
  void *context;
} team;

static atomic_uint num_forks;
static pthread_mutex_t handles_lock = PTHREAD_MUTEX_INITIALIZER; /* guards num_handles, and the team's end */
static int64_t num_handles;
static pthread_once_t is_set_up = PTHREAD_ONCE_INIT;

/* No worker, nothing claimed: initially, and again in a forked child. */
static void set_up_team(void) {
  pthread_mutex_init(&team.lock, NULL);
  for (int32_t i = 0; i < PKV_MAX_THREADS; i++) pthread_cond_init(&team.job_is_there[i], NULL);
  pthread_cond_init(&team.job_is_done, NULL);
  atomic_flag_clear(&team.claimed);
  team.num_started = 0;
  team.num_working = 0;
  team.is_open = team.is_ending = false;
}

static void set_up_child(void) {
  atomic_fetch_add(&num_forks, 1);
  pkv_openmp_forget();
  pthread_mutex_init(&handles_lock, NULL);
  set_up_team();
}

static void set_up(void) {
  set_up_team();
  pthread_atfork(NULL, NULL, set_up_child);
}

/* Join the workers.  The caller holds handles_lock, and no job runs. */
static void end_team(void) {
  pthread_mutex_lock(&team.lock);
  team.is_ending = true;
  for (int32_t i = 1; i <= team.num_started; i++) pthread_cond_signal(&team.job_is_there[i]);
  pthread_mutex_unlock(&team.lock);
  for (int32_t i = 1; i <= team.num_started; i++) pthread_join(team.ids[i], NULL);
  team.num_started = 0;
  team.is_ending = false;
}

pkv_status pkv_threads_create(int32_t num_threads, pkv_threads **out) {
  if (num_threads < 1 || num_threads > PKV_MAX_THREADS) return PKV_BAD_ARGUMENT;
  pthread_once(&is_set_up, set_up);
  pkv_threads *threads = calloc(1, sizeof *threads);
  if (!threads) return PKV_OUT_OF_MEMORY;
  threads->num_threads = num_threads;
  atomic_flag_clear(&threads->claimed);
  atomic_init(&threads->forks, num_forks);
  pthread_mutex_lock(&handles_lock);
  num_handles++;
  pthread_mutex_unlock(&handles_lock);
  *out = threads;
  return PKV_OK;
}

void pkv_threads_destroy(pkv_threads *threads) {
  if (!threads) return;
  pthread_mutex_lock(&handles_lock);
  if (--num_handles == 0) end_team();
  pthread_mutex_unlock(&handles_lock);
  free(threads->scratch);
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

/* Spin until there is another job than last_job, for a while. */
static void spin_for_a_job(uint64_t last_job) {
  for (int64_t end = now_ns() + SPIN_NS; now_ns() < end;)
    for (int i = 0; i < LOOKS_PER_CLOCK; i++, pause_briefly())
      if (team.job_number != last_job) return;
}

static void spin_until_done(void) {
  for (int64_t end = now_ns() + SPIN_NS; now_ns() < end;)
    for (int i = 0; i < LOOKS_PER_CLOCK; i++, pause_briefly())
      if (team.num_working == 0) return;
}

static void *work_until_the_end(void *argument) {
  int32_t index = (int32_t)(intptr_t)argument;
  uint64_t last_job = 0;
  pthread_mutex_lock(&team.lock);
  while (true) {
    while (!team.is_ending && (team.job_number == last_job || index >= team.num_workers))
      pthread_cond_wait(&team.job_is_there[index], &team.lock);
    if (team.is_ending) break;
    last_job = team.job_number;
    if (team.is_open) {
      team.num_working++;
      pthread_mutex_unlock(&team.lock);
      team.work(team.context, index);
      pthread_mutex_lock(&team.lock);
      if (--team.num_working == 0) pthread_cond_signal(&team.job_is_done);
    }
    pthread_mutex_unlock(&team.lock);
    spin_for_a_job(last_job);
    pthread_mutex_lock(&team.lock);
  }
  pthread_mutex_unlock(&team.lock);
  return NULL;
}

int32_t pkv_threads_claim(pkv_threads *threads) {
  if (!threads) return 0;
  /* In a forked child, the thread that had claimed the handle does not exist. */
  if (threads->forks != num_forks && atomic_exchange(&threads->forks, num_forks) != num_forks)
    atomic_flag_clear(&threads->claimed);
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

/* A system that gives no more threads is no error: fewer workers do the job. */
static void start_workers(int32_t num_workers) {
  while (team.num_started < num_workers - 1) {
    int32_t index = team.num_started + 1;
    if (pthread_create(&team.ids[index], NULL, work_until_the_end, (void *)(intptr_t)index) != 0) return;
    team.num_started++;
  }
}

static void run_with_the_team(int32_t num_workers, pkv_work work, void *context) {
  pthread_mutex_lock(&team.lock);
  team.work = work;
  team.context = context;
  start_workers(num_workers);
  if (num_workers > team.num_started + 1) num_workers = team.num_started + 1;
  team.num_workers = num_workers;
  team.is_open = true;
  team.job_number++;
  for (int32_t i = 1; i < num_workers; i++) pthread_cond_signal(&team.job_is_there[i]);
  pthread_mutex_unlock(&team.lock);

  work(context, 0);

  pthread_mutex_lock(&team.lock);
  team.is_open = false;
  pthread_mutex_unlock(&team.lock);
  if (num_workers > 1) spin_until_done();
  pthread_mutex_lock(&team.lock);
  while (team.num_working > 0) pthread_cond_wait(&team.job_is_done, &team.lock);
  pthread_mutex_unlock(&team.lock);
}

void pkv_threads_run(int32_t num_workers, pkv_work work, void *context) {
  if (num_workers < 2 || atomic_flag_test_and_set(&team.claimed)) {
    work(context, 0); /* which takes all pieces */
    return;
  }
  if (!pkv_openmp_run(num_workers, work, context)) run_with_the_team(num_workers, work, context);
  atomic_flag_clear(&team.claimed);
}
