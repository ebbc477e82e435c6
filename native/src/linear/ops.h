/* What operations of a forward pass share: a team that the caller has claimed, and the rotation of a head. */
#ifndef PKV_OPS_H
#define PKV_OPS_H
#include "linear.h"

/* num_workers : as pkv_threads_claim gave it; 0: the caller works alone, and the threads are another's. */
pkv_status pkv_multiply_claimed(pkv_threads *threads, int32_t num_workers, const pkv_matrix *matrix,
                                const pkv_linear *call);

/* Elements i and i + half turn by the angle of cosine[i] and sine[i]. */
static inline void pkv_rotate_head(float *restrict first, int32_t half, const float *restrict cosine,
                                   const float *restrict sine) {
  float *restrict second = first + half;
  for (int32_t i = 0; i < half; i++) {
    float a = first[i], b = second[i];
    first[i] = a * cosine[i] - b * sine[i];
    second[i] = b * cosine[i] + a * sine[i];
  }
}

#endif
