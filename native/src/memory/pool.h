/* What the files of the pool share: pool.c and trim.c. */
#ifndef PKV_POOL_H
#define PKV_POOL_H
#include <stdbool.h>
#include <stddef.h>

#include "kept.h"
#include "paged_kv.h"
#include "slabs.h"

enum { HUGE_PAGE = 2 << 20 };

struct pkv_pool {
  pkv_slabs *slabs;   /* NULL: all pages have one size */
  int64_t num_pages;  /* ids: of slabs, not all of them are pages */
  int64_t page_bytes; /* of one size */
  int64_t num_units;  /* of memory: pages, or slabs */
  int64_t unit_bytes;
  char *data;    /* num_units * unit_bytes, aligned to HUGE_PAGE */
  void *mapping; /* what munmap needs */
  size_t mapping_bytes;
  int64_t num_free;    /* of one size */
  int32_t *free_stack; /* [num_pages]; the first num_free are free pages */
  int32_t *ref_counts; /* [num_pages]: 0 free or kept, 1 owned, more: shared */
  uint8_t *is_indexed; /* [num_pages] */
  /* [num_pages], of slabs: the page of the same tokens in the next format, and in the one before; -1: none */
  int32_t *packed_twins;
  int32_t *open_twins;
  pkv_kept kept;
  /* A unit has one part in each of num_parts regions of the mapping, which follow each other: a layer's.  A
   * slab has one part. */
  int64_t num_parts;
  int64_t num_trimmed;
  int32_t *trimmed;    /* [num_units]; the first num_trimmed are trimmed units */
  uint8_t *is_trimmed; /* [num_units] */
  uint8_t *is_gone;    /* [blocks of HUGE_PAGE]: its memory was given back */
  int64_t num_gone;
};

/* Touch every OS page now, so that a lack of memory is an error here and not a signal later. */
bool pkv_populate(void *start, size_t bytes);

#endif
