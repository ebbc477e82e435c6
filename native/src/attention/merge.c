/* Merge attention over disjoint parts of the same tokens: each part is weighted by its lse.
 *
 * Source: Ye et al., FlashInfer, MLSys 2025, section 2.2. */
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "paged_kv.h"
#include "kernels/kernel.h"

/* One head.  A part with an lse of -inf counts for nothing, whatever its output holds. */
static float merge_head(const pkv_kernel *kernel, int32_t num_parts, const pkv_tensor *outputs,
                        const float *const *lses, int64_t token, int32_t head, int64_t lse_index, int32_t dim,
                        float *merged) {
  float largest = -INFINITY, values[PKV_MAX_HEAD_DIM];
  for (int32_t part = 0; part < num_parts; part++)
    if (!(lses[part][lse_index] <= largest)) largest = lses[part][lse_index];
  memset(merged, 0, (size_t)dim * sizeof *merged);
  double sum = 0;
  for (int32_t part = 0; part < num_parts; part++) {
    float lse = lses[part][lse_index];
    if (lse == -INFINITY) continue;
    double weight = exp((double)lse - largest);
    sum += weight;
    const pkv_tensor *rows = &outputs[part];
    kernel->widen(values, rows->data + token * rows->token_stride + head * rows->head_stride, dim,
                  rows->dtype);
    for (int32_t d = 0; d < dim; d++) merged[d] += (float)weight * values[d];
  }
  if (sum == 0) return -INFINITY;
  for (int32_t d = 0; d < dim; d++) merged[d] /= (float)sum;
  return (float)(largest + log(sum));
}

pkv_status pkv_merge_states(int32_t num_parts, const pkv_tensor *outputs, const float *const *lses,
                            int64_t num_tokens, int32_t num_heads, int32_t dim, const pkv_tensor *out,
                            float *lse) {
  const pkv_kernel *kernel = pkv_active_kernel();
  if (!kernel || dim < 8 || dim > PKV_MAX_HEAD_DIM || dim % 8) return PKV_BAD_ARGUMENT;
  for (int64_t token = 0; token < num_tokens; token++)
    for (int32_t head = 0; head < num_heads; head++) {
      float merged[PKV_MAX_HEAD_DIM];
      int64_t i = token * num_heads + head;
      lse[i] = merge_head(kernel, num_parts, outputs, lses, token, head, i, dim, merged);
      kernel->narrow(out->data + token * out->token_stride + head * out->head_stride, merged, dim,
                     out->dtype);
    }
  return PKV_OK;
}
