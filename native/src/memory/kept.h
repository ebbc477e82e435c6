/* Kept pages in the order in which they give way: those of small keys first, and of equal keys those first
 * that have been kept for longer. */
#ifndef PKV_KEPT_H
#define PKV_KEPT_H
#include <stdbool.h>
#include <stdint.h>

/* A binary heap: no page goes before heap[(i - 1) / 2], its parent. */
typedef struct {
  int64_t num_pages;
  int64_t count;
  int64_t num_added; /* so far */
  int32_t *heap;     /* [count] */
  int32_t *places;   /* [num_pages]: of a kept page, where in the heap it is; -1 of others */
  double *keys;      /* [num_pages], of all pages */
  int64_t *serials;  /* [num_pages]: num_added when a page was kept */
} pkv_kept;

/* False when there is too little memory; destroy it in any case. */
bool pkv_kept_create(pkv_kept *kept, int64_t num_pages);
void pkv_kept_destroy(pkv_kept *kept);
/* O(log count), and O(1) for a page that goes after all others. */
void pkv_kept_add(pkv_kept *kept, int32_t page);
void pkv_kept_remove(pkv_kept *kept, int32_t page);
/* Change the key of a page, kept or not. */
void pkv_kept_set_key(pkv_kept *kept, int32_t page, double key);
/* The page that goes first; -1 when there is none. */
int32_t pkv_kept_first(const pkv_kept *kept);
/* Is it a heap, with each page in its place?  O(num_pages). */
bool pkv_kept_is_whole(const pkv_kept *kept);

#endif
