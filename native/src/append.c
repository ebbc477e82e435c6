/* Writing the keys and values of new tokens into their slots, and reading them back.
 *
 * A slot is page_id * page_size + offset; each head of a token is one dense row there.
 */
#include <string.h>

#include "../include/paged_kv.h"
#include "kernels/kernel.h"

typedef struct {
  char *k;
  char *v;
} slot_address;

static slot_address address_of(const pkv_pages *pages, int64_t slot) {
  int64_t page = slot / pages->page_size, offset = slot % pages->page_size;
  return (slot_address){pages->k + page * pages->k_page_stride + offset * pages->k_token_stride,
                        pages->v + page * pages->v_page_stride + offset * pages->v_token_stride};
}

void pkv_copy_blocks(const pkv_pages *pages, int64_t count, const int32_t *from, const int32_t *to) {
  for (int64_t i = 0; i < count; i++)
    memcpy(pages->k + to[i] * pages->k_page_stride, pages->k + from[i] * pages->k_page_stride,
           (size_t)pages->k_page_stride);
}

pkv_status pkv_append(const pkv_pages *pages, int64_t num_tokens, const int64_t *slots, const float *k,
                      const float *v) {
  const pkv_kernel *kernel = pkv_active_kernel();
  if (!kernel) return PKV_BAD_ARGUMENT;
  for (int64_t token = 0; token < num_tokens; token++) {
    slot_address to = address_of(pages, slots[token]);
    for (int32_t head = 0; head < pages->num_kv_heads; head++) {
      kernel->narrow(to.k + head * pages->k_head_stride, k, pages->head_dim, pages->dtype);
      kernel->narrow(to.v + head * pages->v_head_stride, v, pages->head_dim, pages->dtype);
      k += pages->head_dim;
      v += pages->head_dim;
    }
  }
  return PKV_OK;
}

pkv_status pkv_gather(const pkv_pages *pages, int64_t num_tokens, const int64_t *slots, float *k, float *v) {
  const pkv_kernel *kernel = pkv_active_kernel();
  if (!kernel) return PKV_BAD_ARGUMENT;
  for (int64_t token = 0; token < num_tokens; token++) {
    slot_address from = address_of(pages, slots[token]);
    for (int32_t head = 0; head < pages->num_kv_heads; head++) {
      kernel->widen(k, from.k + head * pages->k_head_stride, pages->head_dim, pages->dtype);
      kernel->widen(v, from.v + head * pages->v_head_stride, pages->head_dim, pages->dtype);
      k += pages->head_dim;
      v += pages->head_dim;
    }
  }
  return PKV_OK;
}
