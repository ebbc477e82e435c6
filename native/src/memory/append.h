/* Writes into slots, whose arguments the caller has validated. */
#ifndef PKV_APPEND_H
#define PKV_APPEND_H
#include <stdbool.h>

#include "paged_kv.h"
#include "kernels/kernel.h"

/* past_caches: use streaming stores; all rows are whole cache lines, and nothing reads them soon. */
void pkv_write_rows(const pkv_kernel *kernel, const pkv_pages *pages, int64_t num_tokens,
                    const int64_t *slots, const pkv_tensor *k, const pkv_tensor *v, bool past_caches);

#endif
