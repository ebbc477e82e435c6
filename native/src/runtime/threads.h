/* Threads within the library (threads.c). */
#ifndef PKV_THREADS_H
#define PKV_THREADS_H
#include <stddef.h>

#include "paged_kv.h"

typedef void (*pkv_work)(void *context, int32_t worker);

/* Claim the handle for one job.  Returns how many workers the job may have, the caller included; 0 when
 * the handle is claimed already. */
int32_t pkv_threads_claim(pkv_threads *threads);
/* Scratch memory of the job, kept for the next one; NULL when memory is out. */
void *pkv_threads_scratch(pkv_threads *threads, size_t num_bytes);
/* Run work(context, worker) on workers 0 (the caller) to num_workers - 1, or on worker 0 alone while the
 * team runs another job.  work takes pieces until none are left, so one worker can do all.  Returns when
 * all is done. */
void pkv_threads_run(int32_t num_workers, pkv_work work, void *context);
void pkv_threads_release(pkv_threads *threads);

#endif
