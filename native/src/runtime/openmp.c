/* The OpenMP runtime that the process has already, found and not linked.
 *
 * torch multiplies on the threads of an OpenMP runtime, which spin for a while after each of its operators,
 * on the cores that ours want: an attention on two threads of our own, between two of torch's products, takes
 * as long as on one.  On torch's threads there is one pool.
 *
 * Loaded objects are looked through again when their number has changed: torch may be imported at any time.
 * All members of the runtime's team are called, since a team of another size would be made anew; those beyond
 * the job's workers return at once.
 *
 * Entry points: GOMP_parallel of libgomp, which libomp and libiomp5 have too. */
#define _GNU_SOURCE
#include "runtime/openmp.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  void (*parallel)(void (*body)(void *), void *data, unsigned num_threads, unsigned flags);
  int (*thread_num)(void);
  int (*max_threads)(void);
  int (*in_parallel)(void);
} runtime;

typedef struct {
  pkv_work work;
  void *context;
  int32_t num_workers;
  int (*thread_num)(void);
} job;

/* Counting the loaded objects takes 100 ns: not for each of a model's products. */
enum { JOBS_PER_LOOK = 32 };

static atomic_int chosen = PKV_THREADS_AUTO;
static atomic_bool is_forgotten;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards what follows */
static unsigned long long num_loaded;                    /* objects, when they were last looked through */
static unsigned num_jobs;
static runtime found;

/* ---- looking for it */

static int count_objects(struct dl_phdr_info *info, size_t size, void *count) {
  (void)size;
  *(unsigned long long *)count = info->dlpi_adds;
  return 1; /* the first object says it for all */
}

/* 2: the one that torch brings; 1: another one; 0: no OpenMP runtime. */
static int rank_of(const char *path) {
  const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
  bool is_one = !strncmp(name, "libgomp", 7) || !strncmp(name, "libomp", 6) || !strncmp(name, "libiomp5", 8);
  return is_one ? (strstr(path, "/torch/") ? 2 : 1) : 0;
}

typedef struct {
  char path[4096];
  int rank;
} candidate;

static int take_best(struct dl_phdr_info *info, size_t size, void *best_so_far) {
  (void)size;
  candidate *best = best_so_far;
  int rank = info->dlpi_name ? rank_of(info->dlpi_name) : 0;
  if (rank > best->rank && strlen(info->dlpi_name) < sizeof best->path) {
    strcpy(best->path, info->dlpi_name);
    best->rank = rank;
  }
  return 0;
}

static runtime look(void) {
  candidate best = {.rank = 0};
  dl_iterate_phdr(take_best, &best);
  void *library = best.rank ? dlopen(best.path, RTLD_NOW | RTLD_NOLOAD) : NULL;
  if (!library) return (runtime){NULL, NULL, NULL, NULL};
  runtime at;
  *(void **)&at.parallel = dlsym(library, "GOMP_parallel");
  *(void **)&at.thread_num = dlsym(library, "omp_get_thread_num");
  *(void **)&at.max_threads = dlsym(library, "omp_get_max_threads");
  *(void **)&at.in_parallel = dlsym(library, "omp_in_parallel");
  if (!at.thread_num || !at.max_threads || !at.in_parallel) at.parallel = NULL;
  return at;
}

/* What is there now; `parallel` is NULL where nothing is. */
static runtime current(bool is_exact) {
  pthread_mutex_lock(&lock);
  if (is_exact || num_jobs++ % JOBS_PER_LOOK == 0) {
    unsigned long long count = 0;
    dl_iterate_phdr(count_objects, &count);
    if (count != num_loaded) found = look();
    num_loaded = count;
  }
  runtime at = found;
  pthread_mutex_unlock(&lock);
  return at;
}

/* ---- using it */

static void work_as_member(void *data) {
  const job *job = data;
  int32_t worker = job->thread_num();
  if (worker < job->num_workers) job->work(job->context, worker);
}

bool pkv_openmp_run(int32_t num_workers, pkv_work work, void *context) {
  if (chosen == PKV_THREADS_OWN || is_forgotten) return false;
  runtime at = current(false);
  if (!at.parallel || at.in_parallel()) return false;
  int num_members = at.max_threads();
  if (num_members < 2) return false;
  job job = {work, context, num_workers, at.thread_num};
  at.parallel(work_as_member, &job, (unsigned)num_members, 0);
  return true;
}

void pkv_openmp_forget(void) {
  pthread_mutex_init(&lock, NULL);
  is_forgotten = true;
}

void pkv_threads_choose(int32_t choice) { chosen = choice; }

int32_t pkv_threads_in_use(void) {
  bool is_there = chosen != PKV_THREADS_OWN && !is_forgotten && current(true).parallel;
  return is_there ? PKV_THREADS_AUTO : PKV_THREADS_OWN;
}
