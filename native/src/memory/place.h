/* Where a page is in a layer: its keys and values, and their scales, in the format that it has. */
#ifndef PKV_PLACE_H
#define PKV_PLACE_H
#include "kernels/kernel.h"
#include "paged_kv.h"

typedef struct {
  const pkv_pages *pages; /* strides and dtypes of the page's format */
  char *k;
  char *v;
  char *k_scales; /* NULL of dtypes without scales */
  char *v_scales;
} pkv_place;

static inline pkv_place pkv_place_of(const pkv_pages *pages, int64_t page) {
  int64_t slab_offset = 0;
  if (pages->slab_formats) {
    int64_t slab = page >> pages->slab_shift;
    slab_offset = slab * pages->slab_bytes;
    page &= ((int64_t)1 << pages->slab_shift) - 1;
    for (int32_t format = pages->slab_formats[slab]; format > 0; format--) pages = pages->packed;
  }
  pkv_place place = {.pages = pages,
                     .k = pages->k + slab_offset + page * pages->k_page_stride,
                     .v = pages->v + slab_offset + page * pages->v_page_stride};
  if (pkv_has_scales(pages->k_dtype))
    place.k_scales = pages->k_scales.data + slab_offset + page * pages->k_scales.page_stride;
  if (pkv_has_scales(pages->v_dtype))
    place.v_scales = pages->v_scales.data + slab_offset + page * pages->v_scales.page_stride;
  return place;
}

/* Where the scales of a token are; NULL where there are none. */
static inline char *pkv_scales_at(char *scales, int64_t token_stride, int64_t offset, int32_t dtype,
                                  int32_t dim) {
  if (!scales) return NULL;
  if (dtype == PKV_INT4_BY_CHANNEL) return scales + offset / PKV_CHANNEL_TOKENS * pkv_channel_bytes(dim);
  return scales + offset * token_stride;
}

#endif
