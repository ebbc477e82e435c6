/* What the pages of a step need before a layer's first write: those that held another salt are cleared, and
 * the tokens of shared pages are copied to where their row appends. */
#include "chores.h"

#include <stdbool.h>
#include <string.h>

#include "kernels/kernel.h"

/* What a page holds of each token and head: a row of keys or values, or the scale of one. */
typedef struct {
  char *data;
  int64_t page_stride;
  int64_t head_stride;
  int64_t token_stride;
  int64_t token_bytes;
} side;

/* Fills `sides`, and returns how many there are: 2 to 4. */
static int sides_of(const pkv_pages *pages, side sides[4]) {
  const pkv_scales *k = &pages->k_scales, *v = &pages->v_scales;
  int count = 0;
  sides[count++] = (side){pages->k, pages->k_page_stride, pages->k_head_stride, pages->k_token_stride,
                          pkv_stored_bytes(pages->head_dim, pages->k_dtype)};
  sides[count++] = (side){pages->v, pages->v_page_stride, pages->v_head_stride, pages->v_token_stride,
                          pkv_stored_bytes(pages->head_dim_v, pages->v_dtype)};
  if (pkv_scale_bytes(pages->k_dtype))
    sides[count++] =
        (side){k->data, k->page_stride, k->head_stride, k->token_stride, pkv_scale_bytes(pages->k_dtype)};
  if (pkv_scale_bytes(pages->v_dtype))
    sides[count++] =
        (side){v->data, v->page_stride, v->head_stride, v->token_stride, pkv_scale_bytes(pages->v_dtype)};
  return count;
}

/* One side of each head, of the first tokens of a page: those that the row sees, and no others. */
static void copy_tokens(const side *side, int32_t num_heads, const pkv_plan *plan, int64_t i) {
  char *to = side->data + plan->copied_to[i] * side->page_stride;
  char *from = side->data + plan->copied_from[i] * side->page_stride;
  bool is_dense = side->token_stride == side->token_bytes;
  int64_t num_tokens = plan->copied_tokens[i], num_rows = is_dense ? 1 : num_tokens;
  size_t num_bytes = (size_t)(is_dense ? num_tokens * side->token_bytes : side->token_bytes);
  for (int32_t head = 0; head < num_heads; head++)
    for (int64_t row = 0; row < num_rows; row++) {
      int64_t offset = head * side->head_stride + row * side->token_stride;
      memcpy(to + offset, from + offset, num_bytes);
    }
}

/* One side of each head, of all tokens of a page. */
static void clear_tokens(const side *side, int32_t num_heads, int32_t page_id, int32_t num_tokens) {
  char *page = side->data + page_id * side->page_stride;
  for (int32_t head = 0; head < num_heads; head++)
    for (int32_t token = 0; token < num_tokens; token++)
      memset(page + head * side->head_stride + token * side->token_stride, 0, (size_t)side->token_bytes);
}

void pkv_prepare_pages(const pkv_pages *pages, const pkv_plan *plan) {
  if (plan->is_written[pages->layer]) return;
  side sides[4];
  int num_sides = sides_of(pages, sides);
  for (int64_t i = 0; i < plan->num_scrubs; i++)
    for (int j = 0; j < num_sides; j++)
      clear_tokens(sides + j, pages->num_kv_heads, plan->scrubbed[i], pages->page_size);
  for (int64_t i = 0; i < plan->num_copies; i++)
    for (int j = 0; j < num_sides; j++) copy_tokens(sides + j, pages->num_kv_heads, plan, i);
}
