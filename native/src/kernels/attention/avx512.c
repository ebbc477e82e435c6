/* The kernel for AVX-512 (F, BW, DQ, VL). */
#include "avx512.h"

#include "vec.h"
#include "rows.h"
#include "ahead.h"
#include "int8.h"
#include "stream.h"
#include "softmax.h"
#include "fold.h"
#include "state.h"
#include "convert.h"
#include "quantise.h"
#include "finish.h"

const pkv_kernel pkv_kernel_avx512 = {
    .name = "avx512",
    .folds = {[PKV_STREAM] = fold_run, [PKV_COMPUTE] = pkv_compute_avx512},
    KERNEL_FUNCTIONS,
};
