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

#include "chores.h"
#include "gate.h"
#include "place.h"
#include "row.h"

enum {
  ROWS_AHEAD = 8, /* rows of K and of V, each */
  BYTES_PAST_CACHES = 128 << 10,
};

typedef struct {
  const pkv_pages *pages; /* of the page's format */
  char *k;
  char *v;
  char *k_scale; /* of dtypes that have some */
  char *v_scale;
} slot_address;

static slot_address address_of(const pkv_pages *pages, int64_t slot) {
  int64_t offset = slot % pages->page_size;
  pkv_place place = pkv_place_of(pages, slot / pages->page_size);
  pages = place.pages;
  slot_address address = {.pages = pages,
                          .k = place.k + offset * pages->k_token_stride,
                          .v = place.v + offset * pages->v_token_stride};
  address.k_scale =
      pkv_scales_at(place.k_scales, pages->k_scales.token_stride, offset, pages->k_dtype, pages->head_dim);
  address.v_scale =
      pkv_scales_at(place.v_scales, pages->v_scales.token_stride, offset, pages->v_dtype, pages->head_dim_v);
  return address;
}

/* pkv_convert with streaming stores, for whole cache lines. */
static void convert_past_caches(const pkv_kernel *kernel, char *to, int32_t to_dtype, const char *from,
                                int32_t from_dtype, int32_t count) {
  char row[PKV_MAX_HEAD_DIM * sizeof(float)] __attribute__((aligned(64)));
  if (from_dtype != to_dtype) {
    pkv_convert(kernel, row, to_dtype, from, from_dtype, count);
    from = row;
  }
  kernel->copy_past_caches(to, from, pkv_stored_bytes(count, to_dtype));
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
  if (pkv_scale_bytes(pages->k_dtype)) at->address.k_scale += pages->k_scales.head_stride;
  if (pkv_scale_bytes(pages->v_dtype)) at->address.v_scale += pages->v_scales.head_stride;
  if (at->head < pages->num_kv_heads) return;
  at->head = 0;
  at->token++;
  if (at->token < num_tokens) at->address = address_of(pages, slots[at->token]);
}

/* Rows are scattered over memory, and a store needs its cache line: prefetch a few rows ahead. */
static void prefetch_slot(const cursor *at, const pkv_pages *pages) {
  int64_t k_bytes = pkv_stored_bytes(pages->head_dim, pages->k_dtype);
  int64_t v_bytes = pkv_stored_bytes(pages->head_dim_v, pages->v_dtype);
  for (int64_t i = 0; i < k_bytes; i += 64) __builtin_prefetch(at->address.k + i, 1);
  for (int64_t i = 0; i < v_bytes; i += 64) __builtin_prefetch(at->address.v + i, 1);
  if (pkv_scale_bytes(pages->k_dtype)) __builtin_prefetch(at->address.k_scale, 1);
  if (pkv_scale_bytes(pages->v_dtype)) __builtin_prefetch(at->address.v_scale, 1);
}

/* A row of one side. */
static void write_row(const pkv_kernel *kernel, char *to, char *scale, int32_t to_dtype, const char *from,
                      int32_t from_dtype, int32_t dim, bool past_caches) {
  if (past_caches && !pkv_scale_bytes(to_dtype))
    convert_past_caches(kernel, to, to_dtype, from, from_dtype, dim);
  else
    pkv_write_row(kernel, to, scale, to_dtype, from, from_dtype, dim);
}

void pkv_write_rows(const pkv_kernel *kernel, const pkv_pages *pages, int64_t num_tokens,
                    const int64_t *slots, const pkv_tensor *k, const pkv_tensor *v, bool past_caches) {
  if (num_tokens < 1) return;
  cursor at = {0, 0, address_of(pages, slots[0])}, ahead = at;
  for (int i = 0; i < ROWS_AHEAD && ahead.token < num_tokens && !past_caches; i++) {
    prefetch_slot(&ahead, pages);
    move(&ahead, pages, num_tokens, slots);
  }
  for (; at.token < num_tokens; move(&at, pages, num_tokens, slots)) {
    if (ahead.token < num_tokens && !past_caches) {
      prefetch_slot(&ahead, pages);
      move(&ahead, pages, num_tokens, slots);
    }
    write_row(kernel, at.address.k, at.address.k_scale, pages->k_dtype,
              k->data + at.token * k->token_stride + at.head * k->head_stride, k->dtype, pages->head_dim,
              past_caches);
    write_row(kernel, at.address.v, at.address.v_scale, pages->v_dtype,
              v->data + at.token * v->token_stride + at.head * v->head_stride, v->dtype, pages->head_dim_v,
              past_caches);
  }
  if (past_caches) atomic_thread_fence(memory_order_seq_cst);
}

static bool is_whole_lines(uint64_t number) { return number % 64 == 0; }

static bool has_whole_lines(const pkv_pages *pages) {
  return is_whole_lines((uintptr_t)pages->k) && is_whole_lines((uintptr_t)pages->v) &&
         is_whole_lines((uint64_t)(pages->k_page_stride | pages->k_head_stride | pages->k_token_stride)) &&
         is_whole_lines((uint64_t)(pages->v_page_stride | pages->v_head_stride | pages->v_token_stride)) &&
         is_whole_lines((uint64_t)pkv_stored_bytes(pages->head_dim, pages->k_dtype)) &&
         is_whole_lines((uint64_t)pkv_stored_bytes(pages->head_dim_v, pages->v_dtype));
}

static void append(const pkv_kernel *kernel, const pkv_pages *pages, int64_t num_tokens, const int64_t *slots,
                   const pkv_tensor *k, const pkv_tensor *v) {
  int64_t token_bytes = pages->num_kv_heads * (pkv_stored_bytes(pages->head_dim, pages->k_dtype) +
                                               pkv_stored_bytes(pages->head_dim_v, pages->v_dtype));
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
  pkv_prepare_pages(kernel, pages, plan);
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
                         int64_t head_stride, const char *scale, int64_t scale_stride, int32_t dtype,
                         int32_t num_heads, int32_t dim) {
  char *row = to->data + token * to->token_stride;
  for (int32_t head = 0; head < num_heads; head++, row += to->head_stride)
    if (from)
      pkv_read_row(kernel, row, to->dtype, from + head * head_stride, scale + head * scale_stride, dtype,
                   dim);
    else
      memset(row, 0, (size_t)pkv_stored_bytes(dim, to->dtype));
}

pkv_status pkv_gather(const pkv_pages *pages, int64_t num_tokens, const int64_t *slots, const pkv_tensor *k,
                      const pkv_tensor *v) {
  const pkv_kernel *kernel = pkv_active_kernel();
  if (!kernel) return PKV_BAD_ARGUMENT;
  if (!pkv_gate_enter(pages->gate)) return PKV_CLOSED;
  for (int64_t token = 0; token < num_tokens; token++) {
    slot_address from = {.pages = pages};
    if (slots[token] >= 0) from = address_of(pages, slots[token]);
    const pkv_pages *own = from.pages;
    gather_heads(kernel, k, token, from.k, own->k_head_stride, from.k_scale, own->k_scales.head_stride,
                 own->k_dtype, own->num_kv_heads, own->head_dim);
    gather_heads(kernel, v, token, from.v, own->v_head_stride, from.v_scale, own->v_scales.head_stride,
                 own->v_dtype, own->num_kv_heads, own->head_dim_v);
  }
  pkv_gate_leave(pages->gate);
  return PKV_OK;
}
