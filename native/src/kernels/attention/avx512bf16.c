/* The kernel for AVX-512 with BF16, which multiplies pairs of bfloat16: Cooper Lake and Zen 4 on.
 *
 * Products of bfloat16 are exact in float32 and summed in float32, so scores are as accurate as with
 * multiply-adds of widened keys, except that results below 2^-126 become 0. */
#define HAS_PAIRS
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

const pkv_kernel pkv_kernel_avx512bf16 = {
    .name = "avx512bf16",
    .multiplies_pairs = 1,
    .folds = {[PKV_STREAM] = fold_run, [PKV_COMPUTE] = pkv_compute_avx512bf16},
    KERNEL_FUNCTIONS,
};
