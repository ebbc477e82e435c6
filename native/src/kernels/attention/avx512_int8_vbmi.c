/* The AVX-512 kernels' fold for keys or values of 8 bits, with VNNI and VBMI: the same bits. */
#define HAS_VNNI
#define HAS_VBMI
#include "avx512.h"

#include "vec.h"
#include "rows.h"
#include "ahead.h"
#include "int8.h"
#include "stream.h"
#include "softmax.h"
#include "fold.h"

void pkv_fold_int8_vbmi(const pkv_layer *layer, const pkv_run *run, const float *q, pkv_state state) {
  fold_run(layer, run, q, state);
}
