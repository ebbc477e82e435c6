/* Threads within the library: who else computes (threads.c). */
#ifndef PKV_THREADS_H
#define PKV_THREADS_H
#include <stddef.h>

#include "../include/paged_kv.h"

typedef void (*pkv_work)(void *context, int32_t worker);

/* Claim the handle, and the team if it is free, for one job: how many workers the job has, the caller among
 * them; 0 when the handle is claimed already. */
int32_t pkv_threads_claim(pkv_threads *threads);
/* Memory of the job, kept for the next one; NULL when there is none. */
void *pkv_threads_scratch(pkv_threads *threads, size_t num_bytes);
/* With more than one worker: run work(context, worker) on workers 0 (the caller) to num_workers - 1; returns
 * when all are done. */
void pkv_threads_run(pkv_threads *threads, int32_t num_workers, pkv_work work, void *context);
void pkv_threads_release(pkv_threads *threads);

#endif
