/* The portable kernel: the one to read first, and the one that runs anywhere. */
#define COMPUTE /* with four lanes, arithmetic is the limit even for pages in memory */
#include "portable.h"

#include "vec.h"
#include "rows.h"
#include "ahead.h"
#include "int8.h"
#include "compute.h"
#include "softmax.h"
#include "fold.h"
#include "state.h"
#include "convert.h"
#include "quantise.h"
#include "finish.h"

const pkv_kernel pkv_kernel_portable = {
    .name = "portable",
    .folds = {[PKV_COMPUTE] = fold_run},
    KERNEL_FUNCTIONS,
};
