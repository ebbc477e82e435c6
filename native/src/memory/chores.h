/* What the pages of a step need before a layer's first write (chores.c). */
#ifndef PKV_CHORES_H
#define PKV_CHORES_H
#include "kernels/kernel.h"
#include "paged_kv.h"

/* Before a layer's first write: clear pages that held another salt, and copy the tokens that the plan names,
 * each row's own. */
void pkv_prepare_pages(const pkv_kernel *kernel, const pkv_pages *pages, const pkv_plan *plan);

/* One layer of a page's first tokens, all heads, in the format of another page, which may be the same. */
void pkv_copy_page(const pkv_kernel *kernel, const pkv_pages *pages, int32_t from, int32_t to,
                   int64_t num_tokens);

#endif
