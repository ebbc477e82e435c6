/* Which format the slabs of a pool have, and which of their places are free (slabs.c). */
#ifndef PKV_SLABS_H
#define PKV_SLABS_H
#include <stdbool.h>

#include "paged_kv.h"

// clang-format off
/* A page id is slab << shift | place.
 *
 *   formats[s] is -1 when slab s is empty, or trimmed; else it has places[formats[s]] pages
 *   num_free[s] places of a slab with a format are free: the first num_free[s] of free_places[s << shift ..]
 *   a slab with a format has a page that is not free
 *   a slab is on one list: first[f] of those of format f with free places, first[num_formats] of the empty
 *   ones; or on none, when it is full or trimmed
 *   num_slabs_of[f] slabs have format f, with num_free_of[f] free places */
// clang-format on
typedef struct {
  pkv_slab_sizes sizes;
  int32_t shift;
  int32_t num_empty;
  int32_t places[PKV_MAX_FORMATS];
  int32_t num_slabs_of[PKV_MAX_FORMATS];
  int64_t num_free_of[PKV_MAX_FORMATS];
  int32_t first[PKV_MAX_FORMATS + 1];
  int64_t *page_salts; /* pkv_tables.page_salts; NULL: salts are not kept */
  uint8_t *was_used;   /* [num_slabs]: its memory has held pages */
  int8_t *formats;
  int32_t *num_free;
  int32_t *free_places;
  int32_t *next;     /* on its list; -1 at the end */
  int32_t *previous; /* -1 at the beginning */
} pkv_slabs;

/* All slabs are empty.  NULL: there is no memory, or the sizes cannot be. */
pkv_slabs *pkv_slabs_create(const pkv_slab_sizes *sizes);
void pkv_slabs_destroy(pkv_slabs *slabs);

/* Ids are below this number; not all of them are pages. */
int64_t pkv_slabs_num_ids(const pkv_slabs *slabs);
bool pkv_slabs_is_page(const pkv_slabs *slabs, int32_t page);
int32_t pkv_slabs_format(const pkv_slabs *slabs, int32_t page);

/* How many pages of a format `take` would give, one after the other.  O(formats). */
int64_t pkv_slabs_num_available(const pkv_slabs *slabs, int32_t format);
/* The same if the pages that are not `owned` were free, too. */
int64_t pkv_slabs_num_reclaimable(const pkv_slabs *slabs, int32_t format, const int32_t *owned);
/* A free page of a format, of a slab that has the format, or of an empty one that the floors of the others
 * leave; -1 when there is none.  O(formats); of an empty slab, and of its last page given back, O(places). */
int32_t pkv_slabs_take(pkv_slabs *slabs, int32_t format);
/* A page is free again; a slab of free pages only is empty. */
void pkv_slabs_give(pkv_slabs *slabs, int32_t page);

/* Take an empty slab off its list, whose memory is given back, and put it on the list again. */
void pkv_slabs_hide(pkv_slabs *slabs, int32_t slab);
void pkv_slabs_show(pkv_slabs *slabs, int32_t slab);

/* Do the rules above hold?  is_free: of each id. */
bool pkv_slabs_are_whole(const pkv_slabs *slabs, const bool *is_free, const uint8_t *is_hidden);

#endif
