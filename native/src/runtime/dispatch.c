/* Which kernel runs, and which of its folds: one table of kernels, best first.  PAGED_KV_KERNEL names
 * another one.
 *
 * Compiled without flags for any instruction set, so that it can run, and choose, anywhere. */
#include <stdatomic.h>
#ifdef PKV_HAVE_AVX2
#include <cpuid.h>
#endif
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "paged_kv.h"
#include "kernels/product.h"
#include "kernels/kernel.h"

static int always(void) { return 1; }

#ifdef PKV_HAVE_AVX2
static int has_avx2(void) {
  unsigned eax, ebx, ecx, edx;
  /* clang's __builtin_cpu_supports has no f16c before version 16. */
  int has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c;
}
#endif

#ifdef PKV_HAVE_AVX512
static int has_avx512(void) {
#ifdef PKV_EMULATED
  return has_avx2();
#else
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
}
#endif

#ifdef PKV_HAVE_AVX512BF16
static int has_avx512bf16(void) {
#ifdef PKV_EMULATED
  return has_avx512();
#else
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#endif
}
#endif

#ifdef PKV_HAVE_VNNI
static int has_vnni(void) {
#ifdef PKV_EMULATED
  return 1;
#else
  return __builtin_cpu_supports("avx512vnni");
#endif
}
#endif

#ifdef PKV_HAVE_VBMI
static int has_vbmi(void) {
#ifdef PKV_EMULATED
  return 1;
#else
  return has_vnni() && __builtin_cpu_supports("avx512vbmi");
#endif
}
#endif

#ifdef PKV_HAVE_VNNI
/* AMD's CPUs run vpermw on a port that multiply-adds leave free, Intel's do not. */
static int looks_up_beside(void) {
#ifdef PKV_EMULATED
  return 1;
#else
  return __builtin_cpu_is("amd");
#endif
}
#endif

static const struct {
  const pkv_kernel *kernel;
  const pkv_product *product;
  int (*is_available)(void);
} kernels[] = {
#ifdef PKV_HAVE_AVX512BF16
    {&pkv_kernel_avx512bf16, &pkv_product_avx2, has_avx512bf16},
#endif
#ifdef PKV_HAVE_AVX512
    {&pkv_kernel_avx512, &pkv_product_avx2, has_avx512},
#endif
#ifdef PKV_HAVE_AVX2
    {&pkv_kernel_avx2, &pkv_product_avx2, has_avx2},
#endif
#ifdef __aarch64__
    {&pkv_kernel_neon, &pkv_product_neon, always},
#endif
    {&pkv_kernel_portable, &pkv_product_portable, always},
};
enum { NUM_KERNELS = sizeof kernels / sizeof kernels[0], NOT_CHOSEN = -2, NONE = -1 };

static atomic_int active = NOT_CHOSEN;

static int choose(void) {
  const char *wanted = getenv("PAGED_KV_KERNEL");
  for (int i = 0; i < NUM_KERNELS; i++)
    if (kernels[i].is_available() && (!wanted || !*wanted || strcmp(wanted, kernels[i].kernel->name) == 0))
      return i;
  return NONE;
}

const char *pkv_kernel_name(int32_t index) {
  return index >= 0 && index < NUM_KERNELS ? kernels[index].kernel->name : NULL;
}

int32_t pkv_kernel_is_available(int32_t index) {
  return index >= 0 && index < NUM_KERNELS && kernels[index].is_available();
}

pkv_status pkv_kernel_select(int32_t index) {
  if (!pkv_kernel_is_available(index)) return PKV_BAD_ARGUMENT;
  active = index;
  return PKV_OK;
}

int32_t pkv_kernel_active(void) {
  if (active == NOT_CHOSEN) active = choose();
  return active;
}

const pkv_kernel *pkv_active_kernel(void) {
  int32_t index = pkv_kernel_active();
  return index < 0 ? NULL : kernels[index].kernel;
}

/* With fewer queries, memory is the limit, else arithmetic.  Measured on Zen 4, on both sides of these
 * numbers. */
static int32_t least_queries_to_compute(int32_t k_dtype) {
  switch (k_dtype) {
    case PKV_FLOAT32: return 32;
    case PKV_BFLOAT16_PAIRS: return 16;
    default: return 4; /* 16 bits are widened once for each four of them */
  }
}

static bool is_avx512(const pkv_kernel *kernel) { return strncmp(kernel->name, "avx512", 6) == 0; }

/* A fold for keys or values with scales; NULL: the kernel's own.  Bfloat16 in pairs only the kernel's own
 * reads. */
static pkv_fold *int8_fold(const pkv_kernel *kernel, const pkv_layer *layer) {
  bool is_int8 = pkv_has_scales(layer->k.dtype) || pkv_has_scales(layer->v.dtype);
  if (!is_int8 || layer->k.dtype == PKV_BFLOAT16_PAIRS || !is_avx512(kernel)) return NULL;
#ifdef PKV_HAVE_VBMI
  if (has_vbmi()) return pkv_fold_int8_vbmi;
#endif
#ifdef PKV_HAVE_VNNI
  if (has_vnni()) return pkv_fold_int8_vnni;
#endif
  return NULL;
}

pkv_fold *pkv_choose_fold(const pkv_kernel *kernel, const pkv_layer *layer, int32_t num_queries,
                          int32_t is_cached) {
  pkv_fold *fold = int8_fold(kernel, layer);
  if (fold) return fold;
  bool is_stream = !is_cached && num_queries < least_queries_to_compute(layer->k.dtype);
  return is_stream && kernel->folds[PKV_STREAM] ? kernel->folds[PKV_STREAM] : kernel->folds[PKV_COMPUTE];
}

const pkv_product *pkv_active_product(void) {
  int32_t index = pkv_kernel_active();
  if (index < 0) return NULL;
#ifdef PKV_HAVE_VNNI
  /* Skylake's AVX-512 lacks VNNI. */
  if (is_avx512(kernels[index].kernel) && has_vnni())
    return looks_up_beside() ? &pkv_product_vnni_lookups : &pkv_product_vnni;
#endif
  return kernels[index].product;
}
