/* The process's OpenMP runtime, where another library has brought one (openmp.c). */
#ifndef PKV_OPENMP_H
#define PKV_OPENMP_H
#include <stdbool.h>

#include "runtime/threads.h"

/* Run work(context, worker) on workers 0 (the caller) to num_workers - 1 at most, on the runtime's threads.
 * Returns: false, and nothing was done, where there is no runtime, or it must not be used: when own threads
 * were chosen, in a forked child, and inside a parallel region. */
bool pkv_openmp_run(int32_t num_workers, pkv_work work, void *context);
/* In a forked child the runtime's threads do not exist, and it would wait for them. */
void pkv_openmp_forget(void);

#endif
