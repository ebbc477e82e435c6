/* A gate before a cache's pages: it counts the calls that run on them, and closing waits until they have
 * left.
 *
 *   running    calls between enter and leave
 *   is_closed  set once; no call enters after it
 *
 * A call counts itself first and then reads is_closed; closing sets is_closed first and then reads
 * running, so at least one of the two notices the other. */
#ifndef PKV_GATE_H
#define PKV_GATE_H
#include <stdbool.h>
#include <stddef.h>

#include "paged_kv.h"

static inline void pkv_gate_leave(pkv_gate *gate) {
  if (gate) __atomic_sub_fetch(&gate->running, 1, __ATOMIC_SEQ_CST);
}

/* False when the gate is closed.  NULL, for pages that belong to no cache, is always open. */
static inline bool pkv_gate_enter(pkv_gate *gate) {
  if (!gate) return true;
  __atomic_add_fetch(&gate->running, 1, __ATOMIC_SEQ_CST);
  if (!__atomic_load_n(&gate->is_closed, __ATOMIC_SEQ_CST)) return true;
  pkv_gate_leave(gate);
  return false;
}

/* Why the plan of a step is not open: the cache was closed, or the step has ended. */
static inline pkv_status pkv_why_closed(const pkv_gate *gate) {
  return gate && __atomic_load_n(&gate->is_closed, __ATOMIC_SEQ_CST) ? PKV_CLOSED : PKV_STEP_CLOSED;
}

#endif
