/* Writing the keys and values of new tokens into their slots, whatever their dtype, and reading them back.
 *
 * A slot is page_id * page_size + offset; each head of a token is one dense row there.
 */
#include <string.h>

#include "../include/paged_kv.h"
#include "kernels/kernel.h"

enum { ROWS_AHEAD = 8 }; /* a head's row of keys and one of values, each */

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

/* One head's values, from any dtype to any other, rounded and saturated. */
static void convert(const pkv_kernel *kernel, char *to, int32_t to_dtype, const char *from,
                    int32_t from_dtype, int32_t count) {
  if (from_dtype == PKV_FLOAT32) {
    kernel->narrow(to, (const float *)from, count, to_dtype);
  } else if (from_dtype == to_dtype) {
    memcpy(to, from, (size_t)count * 2);
  } else {
    float values[PKV_MAX_HEAD_DIM];
    kernel->widen(values, from, count, from_dtype);
    kernel->narrow(to, values, count, to_dtype);
  }
}

/* The heads of tokens, one after the other. */
typedef struct {
  int64_t token;
  int32_t head;
  slot_address address;
} cursor;

static void move(cursor *at, const pkv_pages *pages, int64_t num_tokens, const int64_t *slots) {
  at->head++;
  at->address.k += pages->k_head_stride;
  at->address.v += pages->v_head_stride;
  if (at->head < pages->num_kv_heads) return;
  at->head = 0;
  at->token++;
  if (at->token < num_tokens) at->address = address_of(pages, slots[at->token]);
}

/* Rows are written all over memory, and a line has to come before it can be written: it is asked for a few
 * rows ahead.  (Stores past the caches, which fetch no lines, take twice as long.) */
static void ask_for(const char *row, int64_t num_bytes) {
  for (int64_t i = 0; i < num_bytes; i += 64) __builtin_prefetch(row + i, 1);
}

pkv_status pkv_append(const pkv_pages *pages, int64_t num_tokens, const int64_t *slots, const pkv_rows *k,
                      const pkv_rows *v) {
  const pkv_kernel *kernel = pkv_active_kernel();
  if (!kernel) return PKV_BAD_ARGUMENT;
  if (num_tokens < 1) return PKV_OK;
  int64_t k_bytes = pages->head_dim * (pages->k_dtype == PKV_FLOAT32 ? 4 : 2);
  int64_t v_bytes = pages->head_dim_v * (pages->v_dtype == PKV_FLOAT32 ? 4 : 2);
  cursor ahead = {0, 0, address_of(pages, slots[0])};
  for (int i = 0; i < ROWS_AHEAD && ahead.token < num_tokens; i++) {
    ask_for(ahead.address.k, k_bytes);
    ask_for(ahead.address.v, v_bytes);
    move(&ahead, pages, num_tokens, slots);
  }
  for (int64_t token = 0; token < num_tokens; token++) {
    slot_address to = address_of(pages, slots[token]);
    const char *from_k = k->data + token * k->token_stride, *from_v = v->data + token * v->token_stride;
    for (int32_t head = 0; head < pages->num_kv_heads; head++) {
      if (ahead.token < num_tokens) {
        ask_for(ahead.address.k, k_bytes);
        ask_for(ahead.address.v, v_bytes);
        move(&ahead, pages, num_tokens, slots);
      }
      convert(kernel, to.k + head * pages->k_head_stride, pages->k_dtype, from_k + head * k->head_stride,
              k->dtype, pages->head_dim);
      convert(kernel, to.v + head * pages->v_head_stride, pages->v_dtype, from_v + head * v->head_stride,
              v->dtype, pages->head_dim_v);
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
      kernel->widen(k, from.k + head * pages->k_head_stride, pages->head_dim, pages->k_dtype);
      kernel->widen(v, from.v + head * pages->v_head_stride, pages->head_dim_v, pages->v_dtype);
      k += pages->head_dim;
      v += pages->head_dim_v;
    }
  }
  return PKV_OK;
}
