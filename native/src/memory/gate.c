#define _GNU_SOURCE
#include "gate.h"

#include <time.h>

void pkv_gate_close(pkv_gate *gate) {
  const struct timespec a_moment = {.tv_nsec = 50000};
  __atomic_store_n(&gate->is_closed, 1, __ATOMIC_SEQ_CST);
  while (__atomic_load_n(&gate->running, __ATOMIC_SEQ_CST)) nanosleep(&a_moment, NULL);
}

void pkv_gate_forget_others(pkv_gate *gate) { __atomic_store_n(&gate->running, 0, __ATOMIC_SEQ_CST); }
