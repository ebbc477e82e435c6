/* Rotary positions: element i of a head turns with element i + head_dim / 2, by an angle of its token's
 * position.
 *
 * Source: Su et al., RoFormer, 2021.
 */
#include "../include/paged_kv.h"

void pkv_rotate(const pkv_rows *rows, int64_t num_tokens, int32_t num_heads, int32_t head_dim,
                const int32_t *positions, const float *cosines, const float *sines) {
  int32_t half = head_dim / 2;
  for (int64_t token = 0; token < num_tokens; token++) {
    const float *restrict cosine = cosines + (int64_t)positions[token] * half;
    const float *restrict sine = sines + (int64_t)positions[token] * half;
    for (int32_t head = 0; head < num_heads; head++) {
      float *restrict first = (float *)(rows->data + token * rows->token_stride + head * rows->head_stride);
      float *restrict second = first + half;
      for (int32_t i = 0; i < half; i++) {
        float a = first[i], b = second[i];
        first[i] = a * cosine[i] - b * sine[i];
        second[i] = b * cosine[i] + a * sine[i];
      }
    }
  }
}
