/* What the pages of a step need before a layer's first write: those that held another salt are cleared, and
 * the tokens of shared pages are copied to where their row appends.  Old pages are packed: their tokens
 * copied to a page of another format. */
#include "chores.h"

#include <stdbool.h>
#include <string.h>

#include "place.h"
#include "row.h"

/* Keys or values of a page, all heads. */
typedef struct {
  char *rows;
  int64_t head_stride;
  int64_t token_stride;
  char *scales; /* NULL of dtypes without scales */
  int64_t scale_head_stride;
  int64_t scale_token_stride;
  int32_t dtype;
  int32_t dim;
} side;

static side keys_of(const pkv_pages *pages, int32_t page) {
  pkv_place place = pkv_place_of(pages, page);
  const pkv_pages *own = place.pages;
  return (side){place.k,
                own->k_head_stride,
                own->k_token_stride,
                place.k_scales,
                own->k_scales.head_stride,
                own->k_scales.token_stride,
                own->k_dtype,
                own->head_dim};
}

static side values_of(const pkv_pages *pages, int32_t page) {
  pkv_place place = pkv_place_of(pages, page);
  const pkv_pages *own = place.pages;
  return (side){place.v,
                own->v_head_stride,
                own->v_token_stride,
                place.v_scales,
                own->v_scales.head_stride,
                own->v_scales.token_stride,
                own->v_dtype,
                own->head_dim_v};
}

/* Bytes of each head: of some tokens, token_stride apart. */
static void copy_bytes(char *to, const char *from, int64_t head_stride, int64_t token_stride,
                       int64_t token_bytes, int32_t num_heads, int64_t num_tokens) {
  bool is_dense = token_stride == token_bytes;
  int64_t num_rows = is_dense ? 1 : num_tokens;
  size_t num_bytes = (size_t)(is_dense ? num_tokens * token_bytes : token_bytes);
  for (int32_t head = 0; head < num_heads; head++)
    for (int64_t row = 0; row < num_rows; row++) {
      int64_t offset = head * head_stride + row * token_stride;
      memcpy(to + offset, from + offset, num_bytes);
    }
}

static void clear_bytes(char *rows, int64_t head_stride, int64_t token_stride, int64_t token_bytes,
                        int32_t num_heads, int32_t num_tokens) {
  for (int32_t head = 0; head < num_heads; head++)
    for (int32_t token = 0; token < num_tokens; token++)
      memset(rows + head * head_stride + token * token_stride, 0, (size_t)token_bytes);
}

static void clear_side(side side, int32_t num_heads, int32_t num_tokens) {
  clear_bytes(side.rows, side.head_stride, side.token_stride, pkv_stored_bytes(side.dim, side.dtype),
              num_heads, num_tokens);
  if (side.scales)
    clear_bytes(side.scales, side.scale_head_stride, side.scale_token_stride, pkv_scale_bytes(side.dtype),
                num_heads, num_tokens);
}

static char *scales_of(side side, int32_t head, int64_t token) {
  char *scales = side.scales ? side.scales + head * side.scale_head_stride : NULL;
  return pkv_scales_at(scales, side.scale_token_stride, token, side.dtype, side.dim);
}

/* A full page's keys, whose dims have scales of their own. */
static void pack_channels(const pkv_kernel *kernel, side to, side from, int32_t num_heads,
                          int64_t num_tokens) {
  float values[PKV_CHANNEL_TOKENS * PKV_MAX_HEAD_DIM] __attribute__((aligned(64)));
  for (int32_t head = 0; head < num_heads; head++)
    for (int64_t first = 0; first + PKV_CHANNEL_TOKENS <= num_tokens; first += PKV_CHANNEL_TOKENS) {
      for (int64_t i = 0; i < PKV_CHANNEL_TOKENS; i++)
        pkv_read_row(kernel, (char *)(values + i * from.dim), PKV_FLOAT32,
                     from.rows + head * from.head_stride + (first + i) * from.token_stride,
                     scales_of(from, head, first + i), from.dtype, from.dim);
      kernel->quantise_channels((uint8_t *)to.rows + head * to.head_stride + first * to.token_stride,
                                to.token_stride, (uint16_t *)scales_of(to, head, first), values, to.dim);
    }
}

/* The first tokens of a page, in the format of another page. */
static void copy_side(const pkv_kernel *kernel, side to, side from, int32_t num_heads, int64_t num_tokens) {
  if (to.dtype == from.dtype && to.head_stride == from.head_stride) {
    copy_bytes(to.rows, from.rows, to.head_stride, to.token_stride, pkv_stored_bytes(to.dim, to.dtype),
               num_heads, num_tokens);
    if (to.scales)
      copy_bytes(to.scales, from.scales, to.scale_head_stride, to.scale_token_stride,
                 pkv_scale_bytes(to.dtype), num_heads, num_tokens);
    return;
  }
  if (to.dtype == PKV_INT4_BY_CHANNEL) {
    pack_channels(kernel, to, from, num_heads, num_tokens);
    return;
  }
  float values[PKV_MAX_HEAD_DIM] __attribute__((aligned(64)));
  bool is_same = to.dtype == from.dtype; /* the other side's format differs, and so do the strides */
  for (int32_t head = 0; head < num_heads; head++)
    for (int64_t token = 0; token < num_tokens; token++) {
      char *row = to.rows + head * to.head_stride + token * to.token_stride;
      const char *old = from.rows + head * from.head_stride + token * from.token_stride;
      char *scale =
          to.scales ? to.scales + head * to.scale_head_stride + token * to.scale_token_stride : NULL;
      const char *old_scale =
          from.scales ? from.scales + head * from.scale_head_stride + token * from.scale_token_stride : NULL;
      if (is_same) {
        memcpy(row, old, (size_t)pkv_stored_bytes(to.dim, to.dtype));
        if (scale) memcpy(scale, old_scale, (size_t)pkv_scale_bytes(to.dtype));
        continue;
      }
      pkv_read_row(kernel, (char *)values, PKV_FLOAT32, old, old_scale, from.dtype, from.dim);
      pkv_write_row(kernel, row, scale, to.dtype, (const char *)values, PKV_FLOAT32, to.dim);
    }
}

void pkv_copy_page(const pkv_kernel *kernel, const pkv_pages *pages, int32_t from, int32_t to,
                   int64_t num_tokens) {
  copy_side(kernel, keys_of(pages, to), keys_of(pages, from), pages->num_kv_heads, num_tokens);
  copy_side(kernel, values_of(pages, to), values_of(pages, from), pages->num_kv_heads, num_tokens);
}

void pkv_prepare_pages(const pkv_kernel *kernel, const pkv_pages *pages, const pkv_plan *plan) {
  if (plan->is_written[pages->layer]) return;
  for (int64_t i = 0; i < plan->num_scrubs; i++) {
    clear_side(keys_of(pages, plan->scrubbed[i]), pages->num_kv_heads, pages->page_size);
    clear_side(values_of(pages, plan->scrubbed[i]), pages->num_kv_heads, pages->page_size);
  }
  for (int64_t i = 0; i < plan->num_copies; i++) /* those that the row sees, and no others */
    pkv_copy_page(kernel, pages, plan->copied_from[i], plan->copied_to[i], plan->copied_tokens[i]);
}
