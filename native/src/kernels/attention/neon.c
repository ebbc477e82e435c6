/* The kernel for NEON, which every 64-bit ARM has. */
#define COMPUTE /* four values at a time are multiplied more slowly than they come from memory */
#include "neon.h"

#include "vec.h"
#include "rows.h"
#include "compute.h"
#include "fold.h"
#include "state.h"
#include "convert.h"
#include "finish.h"

const pkv_kernel pkv_kernel_neon = {
    .name = "neon",
    .folds = {[PKV_COMPUTE] = fold_run},
    .prepare_q = prepare_q,
    .merge = merge,
    .finish = finish,
    .narrow = narrow,
    .widen = widen,
    .copy_past_caches = copy_past_caches,
};
