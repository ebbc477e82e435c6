/* One head of one token, from any dtype to any other. */
#ifndef PKV_ROW_H
#define PKV_ROW_H
#include <string.h>

#include "kernels/kernel.h"

/* One head's values from any dtype to another of 16 or 32 bits, rounded and saturated. */
static inline void pkv_convert(const pkv_kernel *kernel, char *to, int32_t to_dtype, const char *from,
                               int32_t from_dtype, int32_t count) {
  if (from_dtype == PKV_FLOAT32) {
    kernel->narrow(to, (const float *)from, count, to_dtype);
  } else if (from_dtype == to_dtype) {
    memcpy(to, from, (size_t)count * 2);
  } else if (to_dtype == PKV_FLOAT32) {
    kernel->widen((float *)to, from, count, from_dtype);
  } else {
    float values[PKV_MAX_HEAD_DIM];
    kernel->widen(values, from, count, from_dtype);
    kernel->narrow(to, values, count, to_dtype);
  }
}

/* One head's values, of a dtype with scales. */
static inline void pkv_quantise_row(const pkv_kernel *kernel, char *to, char *scale, int32_t to_dtype,
                                    const char *from, int32_t from_dtype, int32_t count) {
  float values[PKV_MAX_HEAD_DIM] __attribute__((aligned(64)));
  if (from_dtype != PKV_FLOAT32) {
    kernel->widen(values, from, count, from_dtype);
    from = (const char *)values;
  }
  kernel->quantise((uint8_t *)to, (uint16_t *)scale, (const float *)from, count, to_dtype);
}

/* And back. */
static inline void pkv_dequantise_row(const pkv_kernel *kernel, char *to, int32_t to_dtype, const char *from,
                                      const char *scale, int32_t from_dtype, int32_t count) {
  float values[PKV_MAX_HEAD_DIM] __attribute__((aligned(64)));
  kernel->dequantise(values, (const uint8_t *)from, (const uint16_t *)scale, count, from_dtype);
  kernel->narrow(to, values, count, to_dtype);
}

/* From an array's dtype to what a page stores, with scales where that has some. */
static inline void pkv_write_row(const pkv_kernel *kernel, char *to, char *scale, int32_t to_dtype,
                                 const char *from, int32_t from_dtype, int32_t dim) {
  if (pkv_scale_bytes(to_dtype))
    pkv_quantise_row(kernel, to, scale, to_dtype, from, from_dtype, dim);
  else
    pkv_convert(kernel, to, to_dtype, from, from_dtype, dim);
}

/* And back. */
static inline void pkv_read_row(const pkv_kernel *kernel, char *to, int32_t to_dtype, const char *from,
                                const char *scale, int32_t from_dtype, int32_t dim) {
  if (pkv_has_scales(from_dtype))
    pkv_dequantise_row(kernel, to, to_dtype, from, scale, from_dtype, dim);
  else
    pkv_convert(kernel, to, to_dtype, from, from_dtype, dim);
}

#endif
