/* The kernel for AVX2 with FMA and F16C. */
#include "avx2.h"

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

const pkv_kernel pkv_kernel_avx2 = {
    .name = "avx2",
    .folds = {[PKV_STREAM] = fold_run, [PKV_COMPUTE] = pkv_compute_avx2},
    KERNEL_FUNCTIONS,
};
