/* Write the keys and values of new tokens into their slots, from any dtype to any other, and read them
 * back.
 *
 * A slot is page_id * page_size + offset; each head of a token is one dense row there.
 *
 * The rows of many tokens are scattered over memory.  A store through the caches first loads the line
 * and evicts another one, so many rows are written with streaming stores: three times as fast, and they
 * will be read together with all other tokens of their sequence anyway.  A few rows, and rows that
 * attention reads at once, stay in the caches. */
#include "append.h"

#include <stdatomic.h>
#include <string.h>

#include "gate.h"

enum {
  ROWS_AHEAD = 8, /* rows of K and of V, each */
  BYTES_PAST_CACHES = 128 << 10,
};

static int64_t row_bytes(int32_t dim, int32_t dtype) { return dim * (dtype == PKV_FLOAT32 ? 4 : 2); }

typedef struct {
  char *k;
  char *v;
} slot_address;

static slot_address address_of(const pkv_pages *pages, int64_t slot) {
  int64_t page = slot / pages->page_size, offset = slot % pages->page_size;
  return (slot_address){pages->k + page * pages->k_page_stride + offset * pages->k_token_stride,
                        pages->v + page * pages->v_page_stride + offset * pages->v_token_stride};
}

/* One side of each head, of the first tokens of a page: those that the row sees, and no others. */
static void copy_tokens(char *side, int64_t page_stride, int64_t head_stride, int64_t token_stride,
                        int32_t num_heads, int64_t token_bytes, const pkv_plan *plan, int64_t i) {
  char *to = side + plan->copied_to[i] * page_stride, *from = side + plan->copied_from[i] * page_stride;
  bool is_dense = token_stride == token_bytes;
  int64_t num_tokens = plan->copied_tokens[i], num_rows = is_dense ? 1 : num_tokens;
  size_t num_bytes = (size_t)(is_dense ? num_tokens * token_bytes : token_bytes);
  for (int32_t head = 0; head < num_heads; head++)
    for (int64_t row = 0; row < num_rows; row++) {
      int64_t offset = head * head_stride + row * token_stride;
      memcpy(to + offset, from + offset, num_bytes);
    }
}

/* One side of each head, of all tokens of a page. */
static void clear_tokens(char *page, int64_t head_stride, int64_t token_stride, int32_t num_heads,
                         int32_t num_tokens, int64_t token_bytes) {
  for (int32_t head = 0; head < num_heads; head++)
    for (int32_t token = 0; token < num_tokens; token++)
      memset(page + head * head_stride + token * token_stride, 0, (size_t)token_bytes);
}

void pkv_prepare_pages(const pkv_pages *pages, const pkv_plan *plan) {
  if (plan->is_written[pages->layer]) return;
  int64_t k_bytes = row_bytes(pages->head_dim, pages->k_dtype);
  int64_t v_bytes = row_bytes(pages->head_dim_v, pages->v_dtype);
  for (int64_t i = 0; i < plan->num_scrubs; i++) {
    clear_tokens(pages->k + plan->scrubbed[i] * pages->k_page_stride, pages->k_head_stride,
                 pages->k_token_stride, pages->num_kv_heads, pages->page_size, k_bytes);
    clear_tokens(pages->v + plan->scrubbed[i] * pages->v_page_stride, pages->v_head_stride,
                 pages->v_token_stride, pages->num_kv_heads, pages->page_size, v_bytes);
  }
  for (int64_t i = 0; i < plan->num_copies; i++) {
    copy_tokens(pages->k, pages->k_page_stride, pages->k_head_stride, pages->k_token_stride,
                pages->num_kv_heads, k_bytes, plan, i);
    copy_tokens(pages->v, pages->v_page_stride, pages->v_head_stride, pages->v_token_stride,
                pages->num_kv_heads, v_bytes, plan, i);
  }
}

/* One head's values from any dtype to any other, rounded and saturated. */
static void convert(const pkv_kernel *kernel, char *to, int32_t to_dtype, const char *from,
                    int32_t from_dtype, int32_t count) {
  if (from_dtype == PKV_FLOAT32) {
    kernel->narrow(to, (const float *)from, count, to_dtype);
  } else if (from_dtype == to_dtype) {
    memcpy(to, from, (size_t)count * 2);
  } else if (to_dtype == PKV_FLOAT32) {
    kernel->widen((float *)to, from, count, from_dtype);
  } else {
    float values[PKV_MAX_HEAD_DIM];
    kernel->widen(values, from, count, from_dtype);
    kernel->narrow(to, values, count, to_dtype);
  }
}

/* The same with streaming stores, for whole cache lines. */
static void convert_past_caches(const pkv_kernel *kernel, char *to, int32_t to_dtype, const char *from,
                                int32_t from_dtype, int32_t count) {
  char row[PKV_MAX_HEAD_DIM * sizeof(float)] __attribute__((aligned(64)));
  if (from_dtype != to_dtype) {
    convert(kernel, row, to_dtype, from, from_dtype, count);
    from = row;
  }
  kernel->copy_past_caches(to, from, row_bytes(count, to_dtype));
}

/* Walks the heads of the tokens, one after the other. */
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

/* Rows are scattered over memory, and a store needs its cache line: prefetch a few rows ahead. */
static void prefetch_slot(const cursor *at, const pkv_pages *pages) {
  int64_t k_bytes = row_bytes(pages->head_dim, pages->k_dtype);
  int64_t v_bytes = row_bytes(pages->head_dim_v, pages->v_dtype);
  for (int64_t i = 0; i < k_bytes; i += 64) __builtin_prefetch(at->address.k + i, 1);
  for (int64_t i = 0; i < v_bytes; i += 64) __builtin_prefetch(at->address.v + i, 1);
}

void pkv_write_rows(const pkv_kernel *kernel, const pkv_pages *pages, int64_t num_tokens,
                    const int64_t *slots, const pkv_tensor *k, const pkv_tensor *v, bool past_caches) {
  if (num_tokens < 1) return;
  cursor at = {0, 0, address_of(pages, slots[0])}, ahead = at;
  for (int i = 0; i < ROWS_AHEAD && ahead.token < num_tokens && !past_caches; i++) {
    prefetch_slot(&ahead, pages);
    move(&ahead, pages, num_tokens, slots);
  }
  void (*write)(const pkv_kernel *, char *, int32_t, const char *, int32_t, int32_t) =
      past_caches ? convert_past_caches : convert;
  for (; at.token < num_tokens; move(&at, pages, num_tokens, slots)) {
    if (ahead.token < num_tokens && !past_caches) {
      prefetch_slot(&ahead, pages);
      move(&ahead, pages, num_tokens, slots);
    }
    write(kernel, at.address.k, pages->k_dtype,
          k->data + at.token * k->token_stride + at.head * k->head_stride, k->dtype, pages->head_dim);
    write(kernel, at.address.v, pages->v_dtype,
          v->data + at.token * v->token_stride + at.head * v->head_stride, v->dtype, pages->head_dim_v);
  }
  if (past_caches) atomic_thread_fence(memory_order_seq_cst);
}

static bool is_whole_lines(uint64_t number) { return number % 64 == 0; }

static bool has_whole_lines(const pkv_pages *pages) {
  return is_whole_lines((uintptr_t)pages->k) && is_whole_lines((uintptr_t)pages->v) &&
         is_whole_lines((uint64_t)(pages->k_page_stride | pages->k_head_stride | pages->k_token_stride)) &&
         is_whole_lines((uint64_t)(pages->v_page_stride | pages->v_head_stride | pages->v_token_stride)) &&
         is_whole_lines((uint64_t)row_bytes(pages->head_dim, pages->k_dtype)) &&
         is_whole_lines((uint64_t)row_bytes(pages->head_dim_v, pages->v_dtype));
}

static void append(const pkv_kernel *kernel, const pkv_pages *pages, int64_t num_tokens, const int64_t *slots,
                   const pkv_tensor *k, const pkv_tensor *v) {
  int64_t token_bytes = pages->num_kv_heads * (row_bytes(pages->head_dim, pages->k_dtype) +
                                               row_bytes(pages->head_dim_v, pages->v_dtype));
  bool is_much = num_tokens * token_bytes >= BYTES_PAST_CACHES;
  pkv_write_rows(kernel, pages, num_tokens, slots, k, v, is_much && has_whole_lines(pages));
}

pkv_status pkv_append(const pkv_pages *pages, int64_t num_tokens, const int64_t *slots, const pkv_tensor *k,
                      const pkv_tensor *v) {
  const pkv_kernel *kernel = pkv_active_kernel();
  if (!kernel) return PKV_BAD_ARGUMENT;
  if (!pkv_gate_enter(pages->gate)) return PKV_CLOSED;
  append(kernel, pages, num_tokens, slots, k, v);
  pkv_gate_leave(pages->gate);
  return PKV_OK;
}

pkv_status pkv_step_write(const pkv_pages *pages, pkv_plan *plan, const pkv_tensor *k, const pkv_tensor *v) {
  const pkv_kernel *kernel = pkv_active_kernel();
  if (!kernel) return PKV_BAD_ARGUMENT;
  if (!plan->is_open) return pkv_why_closed(pages->gate);
  if (!pkv_gate_enter(pages->gate)) return PKV_CLOSED;
  pkv_prepare_pages(pages, plan);
  append(kernel, pages, plan->batch.qo_indptr[plan->batch.num_seqs], plan->slot_mapping, k, v);
  plan->is_written[pages->layer] = 1;
  pkv_gate_leave(pages->gate);
  return PKV_OK;
}

pkv_status pkv_append_to_ring(const pkv_pages *pages, const int32_t *page_ids, int64_t *seq_lens,
                              int64_t entry, const pkv_tensor *k, const pkv_tensor *v) {
  int64_t slot = (int64_t)page_ids[entry] * pages->page_size + seq_lens[entry] % pages->page_size;
  pkv_status status = pkv_append(pages, 1, &slot, k, v);
  seq_lens[entry] += status == PKV_OK;
  return status;
}

/* One side of a token, from a slot or, from NULL, zeros. */
static void gather_heads(const pkv_kernel *kernel, const pkv_tensor *to, int64_t token, const char *from,
                         int64_t head_stride, int32_t dtype, int32_t num_heads, int32_t dim) {
  char *row = to->data + token * to->token_stride;
  for (int32_t head = 0; head < num_heads; head++, row += to->head_stride)
    if (from)
      convert(kernel, row, to->dtype, from + head * head_stride, dtype, dim);
    else
      memset(row, 0, (size_t)row_bytes(dim, to->dtype));
}

pkv_status pkv_gather(const pkv_pages *pages, int64_t num_tokens, const int64_t *slots, const pkv_tensor *k,
                      const pkv_tensor *v) {
  const pkv_kernel *kernel = pkv_active_kernel();
  if (!kernel) return PKV_BAD_ARGUMENT;
  if (!pkv_gate_enter(pages->gate)) return PKV_CLOSED;
  for (int64_t token = 0; token < num_tokens; token++) {
    slot_address from = {NULL, NULL};
    if (slots[token] >= 0) from = address_of(pages, slots[token]);
    gather_heads(kernel, k, token, from.k, pages->k_head_stride, pages->k_dtype, pages->num_kv_heads,
                 pages->head_dim);
    gather_heads(kernel, v, token, from.v, pages->v_head_stride, pages->v_dtype, pages->num_kv_heads,
                 pages->head_dim_v);
  }
  pkv_gate_leave(pages->gate);
  return PKV_OK;
}
