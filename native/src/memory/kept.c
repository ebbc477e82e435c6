/* The heap of kept pages: the page in heap[i] goes before those in heap[2 * i + 1] and heap[2 * i + 2]. */
#include "kept.h"

#include <stdlib.h>

bool pkv_kept_create(pkv_kept *kept, int64_t num_pages) {
  size_t count = (size_t)num_pages;
  *kept = (pkv_kept){.num_pages = num_pages,
                     .heap = malloc(count * sizeof *kept->heap),
                     .places = malloc(count * sizeof *kept->places),
                     .keys = calloc(count, sizeof *kept->keys),
                     .serials = malloc(count * sizeof *kept->serials)};
  if (!kept->heap || !kept->places || !kept->keys || !kept->serials) return false;
  for (int64_t page = 0; page < num_pages; page++) kept->places[page] = -1;
  return true;
}

void pkv_kept_destroy(pkv_kept *kept) {
  free(kept->heap);
  free(kept->places);
  free(kept->keys);
  free(kept->serials);
}

static bool goes_before(const pkv_kept *kept, int32_t page, int32_t other) {
  if (kept->keys[page] != kept->keys[other]) return kept->keys[page] < kept->keys[other];
  return kept->serials[page] < kept->serials[other];
}

static void put(pkv_kept *kept, int64_t place, int32_t page) {
  kept->heap[place] = page;
  kept->places[page] = (int32_t)place;
}

/* Move the page up from this place, past those that it goes before. */
static void move_up(pkv_kept *kept, int64_t place) {
  int32_t page = kept->heap[place];
  while (place > 0 && goes_before(kept, page, kept->heap[(place - 1) / 2])) {
    put(kept, place, kept->heap[(place - 1) / 2]);
    place = (place - 1) / 2;
  }
  put(kept, place, page);
}

/* Move the page down from this place, below those that go before it. */
static void move_down(pkv_kept *kept, int64_t place) {
  int32_t page = kept->heap[place];
  for (;;) {
    int64_t child = 2 * place + 1;
    if (child >= kept->count) break;
    if (child + 1 < kept->count && goes_before(kept, kept->heap[child + 1], kept->heap[child])) child++;
    if (!goes_before(kept, kept->heap[child], page)) break;
    put(kept, place, kept->heap[child]);
    place = child;
  }
  put(kept, place, page);
}

void pkv_kept_add(pkv_kept *kept, int32_t page) {
  kept->serials[page] = kept->num_added++;
  kept->heap[kept->count] = page;
  move_up(kept, kept->count++);
}

void pkv_kept_remove(pkv_kept *kept, int32_t page) {
  int64_t place = kept->places[page];
  int32_t last = kept->heap[--kept->count];
  kept->places[page] = -1;
  if (last == page) return;
  kept->heap[place] = last;
  move_up(kept, place);
  move_down(kept, kept->places[last]);
}

void pkv_kept_set_key(pkv_kept *kept, int32_t page, double key) {
  kept->keys[page] = key;
  if (kept->places[page] < 0) return;
  move_up(kept, kept->places[page]);
  move_down(kept, kept->places[page]);
}

int32_t pkv_kept_first(const pkv_kept *kept) { return kept->count ? kept->heap[0] : -1; }

bool pkv_kept_is_whole(const pkv_kept *kept) {
  int64_t num_placed = 0;
  for (int64_t page = 0; page < kept->num_pages; page++) {
    int64_t place = kept->places[page];
    if (place < -1 || place >= kept->count || (place >= 0 && kept->heap[place] != page)) return false;
    num_placed += place >= 0;
  }
  for (int64_t i = 1; i < kept->count; i++)
    if (goes_before(kept, kept->heap[i], kept->heap[(i - 1) / 2])) return false;
  return num_placed == kept->count;
}
