/* What the pages of a step need before a layer's first write (chores.c). */
#ifndef PKV_CHORES_H
#define PKV_CHORES_H
#include "paged_kv.h"

/* Before a layer's first write: clear pages that held another salt, and copy the tokens that the plan names,
 * each row's own. */
void pkv_prepare_pages(const pkv_pages *pages, const pkv_plan *plan);

#endif
