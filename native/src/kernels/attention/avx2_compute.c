/* The compute fold of avx2.c: the same bits. */
#define COMPUTE
#include "avx2.h"

#include "vec.h"
#include "rows.h"
#include "ahead.h"
#include "int8.h"
#include "compute.h"
#include "softmax.h"
#include "fold.h"

void pkv_compute_avx2(const pkv_layer *layer, const pkv_run *run, const float *q, pkv_state state) {
  fold_run(layer, run, q, state);
}
