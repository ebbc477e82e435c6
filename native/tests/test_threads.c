/* One team of threads for all handles: who may use how many of it, and what is left when handles go. */
#undef NDEBUG
#define _GNU_SOURCE
#include <assert.h>
#include <dirent.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "runtime/threads.h"

enum { ITEMS = 1000 };

static int num_tasks(void) {
  DIR *folder = opendir("/proc/self/task");
  int count = 0;
  while (readdir(folder)) count++;
  closedir(folder);
  return count - 2; /* . and .. */
}

/* Their number once it no longer changes: threads that were joined before are gone. */
static int settled_tasks(void) {
  int count = num_tasks();
  for (int unchanged = 0; unchanged < 50; unchanged++) {
    usleep(1000);
    if (num_tasks() != count) unchanged = 0;
    count = num_tasks();
  }
  return count;
}

/* Does the process come to have so many threads?  One that was joined is listed for a moment longer. */
static bool comes_to_have(int expected) {
  for (int i = 0; i < 2000 && num_tasks() != expected; i++) usleep(1000);
  return num_tasks() == expected;
}

typedef struct {
  atomic_int next;
  atomic_int done;
  atomic_int most_worker;
} count;

static void count_items(void *context, int32_t worker) {
  count *count = context;
  if (worker > count->most_worker) count->most_worker = worker;
  while (atomic_fetch_add(&count->next, 1) < ITEMS) atomic_fetch_add(&count->done, 1);
}

static void run_a_job(pkv_threads *threads, int32_t expected) {
  int32_t num_workers = pkv_threads_claim(threads);
  assert(num_workers == expected);
  count count = {0, 0, 0};
  pkv_threads_run(num_workers, count_items, &count);
  assert(count.done == ITEMS && count.most_worker < num_workers);
  pkv_threads_release(threads);
}

static pkv_threads *handle_of(int32_t num_threads) {
  pkv_threads *threads = NULL;
  assert(pkv_threads_create(num_threads, &threads) == PKV_OK);
  return threads;
}

static void what_is_no_number_of_threads_is_refused(void) {
  pkv_threads *threads = NULL;
  assert(pkv_threads_create(0, &threads) == PKV_BAD_ARGUMENT);
  assert(pkv_threads_create(-1, &threads) == PKV_BAD_ARGUMENT);
  assert(pkv_threads_create(PKV_MAX_THREADS + 1, &threads) == PKV_BAD_ARGUMENT);
  pkv_threads_destroy(NULL);
  assert(pkv_threads_claim(NULL) == 0);
}

static void the_team_is_as_large_as_the_largest_job(void) {
  int before = settled_tasks();
  pkv_threads *handles[10];
  for (int i = 0; i < 10; i++) {
    handles[i] = handle_of(i + 1);
    run_a_job(handles[i], i + 1);
    assert(comes_to_have(before + i));
  }
  for (int i = 0; i < 10; i++) run_a_job(handles[i], i + 1);
  assert(comes_to_have(before + 9));
  for (int i = 0; i < 10; i++) pkv_threads_destroy(handles[i]);
  assert(comes_to_have(before)); /* the last one ends the team */
  pkv_threads *again = handle_of(3);
  run_a_job(again, 3);
  assert(comes_to_have(before + 2));
  pkv_threads_destroy(again);
}

/* Within a job of the team. */
static void run_another_job(void *context, int32_t worker) {
  pkv_threads *other = context;
  if (worker != 0) return;
  int32_t num_workers = pkv_threads_claim(other);
  assert(num_workers == 3);
  count count = {0, 0, 0};
  pkv_threads_run(num_workers, count_items, &count);
  assert(count.done == ITEMS && count.most_worker == 0); /* by its caller alone */
  pkv_threads_release(other);
}

static void a_job_that_finds_the_team_claimed_is_done_by_its_caller(void) {
  pkv_threads *a = handle_of(2), *b = handle_of(3);
  assert(pkv_threads_claim(a) == 2);
  assert(pkv_threads_claim(a) == 0); /* the handle itself is claimed */
  void *of_a = pkv_threads_scratch(a, 100), *of_b = pkv_threads_scratch(b, 100);
  assert(of_a && of_b && of_a != of_b && pkv_threads_scratch(a, 50) == of_a);
  pkv_threads_run(2, run_another_job, b);
  pkv_threads_release(a);
  run_a_job(b, 3);
  pkv_threads_destroy(a);
  pkv_threads_destroy(b);
}

static void *run_many_jobs(void *argument) {
  pkv_threads *threads = argument;
  for (int i = 0; i < 300; i++) {
    int32_t num_workers = pkv_threads_claim(threads);
    count count = {0, 0, 0};
    pkv_threads_run(num_workers, count_items, &count);
    assert(count.done == ITEMS);
    if (num_workers) pkv_threads_release(threads);
  }
  return NULL;
}

static void callers_of_several_handles_do_not_mix(void) {
  pkv_threads *handles[] = {handle_of(2), handle_of(3), handle_of(4)};
  pthread_t callers[6];
  for (int i = 0; i < 6; i++) assert(pthread_create(&callers[i], NULL, run_many_jobs, handles[i / 2]) == 0);
  for (int i = 0; i < 6; i++) assert(pthread_join(callers[i], NULL) == 0);
  for (int i = 0; i < 3; i++) pkv_threads_destroy(handles[i]);
}

/* The child has neither workers nor claims; it starts its own. */
static void a_forked_child_has_a_team_of_its_own(void) {
  pkv_threads *used = handle_of(3), *claimed = handle_of(2);
  run_a_job(used, 3);
  assert(pkv_threads_claim(claimed) == 2);
  pid_t child = fork();
  if (child == 0) {
    int before = settled_tasks(); /* an emulator has threads of its own */
    run_a_job(used, 3);
    run_a_job(claimed, 2);
    bool is_right = comes_to_have(before + 2);
    pkv_threads_destroy(used);
    pkv_threads_destroy(claimed);
    _exit(is_right && comes_to_have(before) ? 0 : 1);
  }
  pkv_threads_release(claimed);
  int status = 1;
  assert(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  run_a_job(used, 3);
  pkv_threads_destroy(used);
  pkv_threads_destroy(claimed);
}

int main(void) {
  what_is_no_number_of_threads_is_refused();
  /* ThreadSanitizer has a thread of its own, once there is a second one: it must not come while threads are
   * counted. */
  callers_of_several_handles_do_not_mix();
  a_job_that_finds_the_team_claimed_is_done_by_its_caller();
  the_team_is_as_large_as_the_largest_job();
#ifndef __SANITIZE_THREAD__ /* which knows no threads after a fork */
  a_forked_child_has_a_team_of_its_own();
#else
  (void)a_forked_child_has_a_team_of_its_own;
#endif
  return 0;
}
