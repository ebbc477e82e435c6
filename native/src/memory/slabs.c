/* Slabs: a pool's memory cut into parts of one size, each of pages of one format at a time.
 *
 * Pages of several sizes share a pool so that none has a share of its own which the others cannot use.  An
 * empty slab takes the format of the next page that needs one; when its last page is free again, it is empty.
 * A floor keeps so many slabs for a format, from other formats.
 *
 * What is lost: behind the last place of a slab, and the free places of slabs that are not empty, which other
 * formats cannot use. */
#include "slabs.h"

#include <stdlib.h>

enum { EMPTY = -1, NONE = -1 };

static bool can_be(const pkv_slab_sizes *sizes) {
  if (sizes->num_slabs < 1 || sizes->num_formats < 1 || sizes->num_formats > PKV_MAX_FORMATS) return false;
  int64_t floors = 0;
  for (int32_t f = 0; f < sizes->num_formats; f++) {
    if (sizes->page_bytes[f] < 64 || sizes->page_bytes[f] % 64 || sizes->page_bytes[f] > sizes->slab_bytes ||
        sizes->floors[f] < 0)
      return false;
    floors += sizes->floors[f];
  }
  return sizes->slab_bytes % 64 == 0 && floors <= sizes->num_slabs;
}

static void push(pkv_slabs *slabs, int32_t list, int32_t slab) {
  int32_t first = slabs->first[list];
  slabs->next[slab] = first;
  slabs->previous[slab] = NONE;
  if (first != NONE) slabs->previous[first] = slab;
  slabs->first[list] = slab;
}

static void unlink_slab(pkv_slabs *slabs, int32_t list, int32_t slab) {
  int32_t next = slabs->next[slab], previous = slabs->previous[slab];
  if (next != NONE) slabs->previous[next] = previous;
  if (previous != NONE)
    slabs->next[previous] = next;
  else
    slabs->first[list] = next;
}

pkv_slabs *pkv_slabs_create(const pkv_slab_sizes *sizes) {
  if (!can_be(sizes)) return NULL;
  pkv_slabs *slabs = calloc(1, sizeof *slabs);
  if (!slabs) return NULL;
  slabs->sizes = *sizes;
  int64_t most = 1;
  for (int32_t f = 0; f < sizes->num_formats; f++) {
    int64_t places = sizes->slab_bytes / sizes->page_bytes[f];
    if (places > INT32_MAX) places = INT32_MAX;
    slabs->places[f] = (int32_t)places;
    if (places > most) most = places;
  }
  while ((int64_t)1 << slabs->shift < most) slabs->shift++;
  int64_t num_slabs = sizes->num_slabs;
  if (num_slabs << slabs->shift > INT32_MAX) {
    free(slabs);
    return NULL;
  }
  slabs->formats = malloc((size_t)num_slabs);
  slabs->was_used = calloc((size_t)num_slabs, 1);
  slabs->num_free = calloc((size_t)num_slabs, sizeof *slabs->num_free);
  slabs->free_places = malloc((size_t)(num_slabs << slabs->shift) * sizeof *slabs->free_places);
  slabs->next = malloc((size_t)num_slabs * sizeof *slabs->next);
  slabs->previous = malloc((size_t)num_slabs * sizeof *slabs->previous);
  if (!slabs->formats || !slabs->was_used || !slabs->num_free || !slabs->free_places || !slabs->next ||
      !slabs->previous) {
    pkv_slabs_destroy(slabs);
    return NULL;
  }
  for (int32_t list = 0; list <= sizes->num_formats; list++) slabs->first[list] = NONE;
  for (int64_t slab = num_slabs - 1; slab >= 0; slab--) {
    slabs->formats[slab] = EMPTY;
    push(slabs, sizes->num_formats, (int32_t)slab);
  }
  slabs->num_empty = (int32_t)num_slabs;
  return slabs;
}

void pkv_slabs_destroy(pkv_slabs *slabs) {
  if (!slabs) return;
  free(slabs->formats);
  free(slabs->was_used);
  free(slabs->num_free);
  free(slabs->free_places);
  free(slabs->next);
  free(slabs->previous);
  free(slabs);
}

int64_t pkv_slabs_num_ids(const pkv_slabs *slabs) { return slabs->sizes.num_slabs << slabs->shift; }

bool pkv_slabs_is_page(const pkv_slabs *slabs, int32_t page) {
  if (page < 0 || page >= pkv_slabs_num_ids(slabs)) return false;
  int32_t format = slabs->formats[page >> slabs->shift];
  return format != EMPTY && (page & ((1 << slabs->shift) - 1)) < slabs->places[format];
}

int32_t pkv_slabs_format(const pkv_slabs *slabs, int32_t page) {
  return slabs->formats[page >> slabs->shift];
}

/* Empty slabs that a format may take. */
static int64_t num_to_take(const pkv_slabs *slabs, int32_t format) {
  int64_t count = slabs->num_empty;
  for (int32_t f = 0; f < slabs->sizes.num_formats; f++) {
    int32_t missing = slabs->sizes.floors[f] - slabs->num_slabs_of[f];
    if (f != format && missing > 0) count -= missing;
  }
  return count > 0 ? count : 0;
}

int64_t pkv_slabs_num_available(const pkv_slabs *slabs, int32_t format) {
  return slabs->num_free_of[format] + num_to_take(slabs, format) * slabs->places[format];
}

int64_t pkv_slabs_num_reclaimable(const pkv_slabs *slabs, int32_t format, const int32_t *owned) {
  int64_t num_empty = slabs->num_empty, num_free = 0, num_slabs_of[PKV_MAX_FORMATS] = {0};
  for (int32_t slab = 0; slab < slabs->sizes.num_slabs; slab++) {
    int32_t of_slab = slabs->formats[slab], num_owned = 0;
    if (of_slab == EMPTY) continue;
    const int32_t *first = owned + ((int64_t)slab << slabs->shift);
    for (int32_t place = 0; place < slabs->places[of_slab]; place++) num_owned += first[place] > 0;
    num_empty += num_owned == 0;
    num_slabs_of[of_slab] += num_owned > 0;
    if (num_owned && of_slab == format) num_free += slabs->places[format] - num_owned;
  }
  for (int32_t f = 0; f < slabs->sizes.num_formats; f++) {
    int64_t missing = slabs->sizes.floors[f] - num_slabs_of[f];
    if (f != format && missing > 0) num_empty -= missing;
  }
  return num_free + (num_empty > 0 ? num_empty : 0) * slabs->places[format];
}

/* Give an empty slab a format; its places are free, the first one on top. */
static void set_format(pkv_slabs *slabs, int32_t slab, int32_t format) {
  unlink_slab(slabs, slabs->sizes.num_formats, slab);
  slabs->num_empty--;
  int32_t places = slabs->places[format], *free_places = slabs->free_places + ((int64_t)slab << slabs->shift);
  for (int32_t i = 0; i < places; i++) free_places[i] = places - 1 - i;
  /* The memory held other pages: what a page holds is unknown. */
  for (int32_t i = 0; slabs->page_salts && slabs->was_used[slab] && i < places; i++)
    slabs->page_salts[((int64_t)slab << slabs->shift) + i] = -1;
  slabs->was_used[slab] = 1;
  slabs->formats[slab] = (int8_t)format;
  slabs->num_free[slab] = places;
  slabs->num_slabs_of[format]++;
  slabs->num_free_of[format] += places;
  push(slabs, format, slab);
}

int32_t pkv_slabs_take(pkv_slabs *slabs, int32_t format) {
  if (slabs->first[format] == NONE) {
    if (num_to_take(slabs, format) == 0) return NONE;
    set_format(slabs, slabs->first[slabs->sizes.num_formats], format);
  }
  int32_t slab = slabs->first[format];
  int32_t place = slabs->free_places[((int64_t)slab << slabs->shift) + --slabs->num_free[slab]];
  slabs->num_free_of[format]--;
  if (slabs->num_free[slab] == 0) unlink_slab(slabs, format, slab);
  return slab << slabs->shift | place;
}

void pkv_slabs_give(pkv_slabs *slabs, int32_t page) {
  int32_t slab = page >> slabs->shift, format = slabs->formats[slab];
  if (slabs->num_free[slab] == 0) push(slabs, format, slab);
  slabs->free_places[((int64_t)slab << slabs->shift) + slabs->num_free[slab]++] =
      page & ((1 << slabs->shift) - 1);
  slabs->num_free_of[format]++;
  if (slabs->num_free[slab] < slabs->places[format]) return;
  unlink_slab(slabs, format, slab);
  slabs->num_free_of[format] -= slabs->num_free[slab];
  slabs->num_slabs_of[format]--;
  slabs->num_free[slab] = 0;
  slabs->formats[slab] = EMPTY;
  slabs->num_empty++;
  push(slabs, slabs->sizes.num_formats, slab);
}

void pkv_slabs_hide(pkv_slabs *slabs, int32_t slab) {
  unlink_slab(slabs, slabs->sizes.num_formats, slab);
  slabs->num_empty--;
}

void pkv_slabs_show(pkv_slabs *slabs, int32_t slab) {
  push(slabs, slabs->sizes.num_formats, slab);
  slabs->num_empty++;
}

/* Are the places on a slab's stack the free ones, each once? */
static bool is_slab_whole(const pkv_slabs *slabs, int32_t slab, const bool *is_free, bool *seen) {
  int32_t format = slabs->formats[slab];
  int64_t first_id = (int64_t)slab << slabs->shift, num_free = 0;
  if (format == EMPTY) return slabs->num_free[slab] == 0;
  if (format < 0 || format >= slabs->sizes.num_formats || slabs->num_free[slab] < 0 ||
      slabs->num_free[slab] >= slabs->places[format])
    return false;
  for (int32_t place = 0; place < slabs->places[format]; place++) num_free += is_free[first_id + place];
  if (num_free != slabs->num_free[slab]) return false;
  for (int32_t i = 0; i < slabs->num_free[slab]; i++) {
    int32_t place = slabs->free_places[first_id + i];
    if (place < 0 || place >= slabs->places[format] || !is_free[first_id + place] || seen[first_id + place])
      return false;
    seen[first_id + place] = true;
  }
  return true;
}

/* How many slabs a list has, all of them as they should be; -1 when it is broken. */
static int64_t length_of(const pkv_slabs *slabs, int32_t list, const uint8_t *is_hidden) {
  int64_t count = 0;
  int32_t previous = NONE;
  for (int32_t slab = slabs->first[list]; slab != NONE; slab = slabs->next[slab]) {
    bool is_empty_list = list == slabs->sizes.num_formats;
    bool belongs = slabs->formats[slab] == (is_empty_list ? EMPTY : list) && !is_hidden[slab];
    if (!belongs || slabs->previous[slab] != previous || ++count > slabs->sizes.num_slabs) return -1;
    if (!is_empty_list && slabs->num_free[slab] == 0) return -1;
    previous = slab;
  }
  return count;
}

static bool are_whole(const pkv_slabs *slabs, const bool *is_free, const uint8_t *is_hidden, bool *seen) {
  int64_t num_empty = 0, num_slabs_of[PKV_MAX_FORMATS] = {0}, num_free_of[PKV_MAX_FORMATS] = {0},
          num_with_free[PKV_MAX_FORMATS] = {0};
  for (int32_t slab = 0; slab < slabs->sizes.num_slabs; slab++) {
    int32_t format = slabs->formats[slab];
    if (!is_slab_whole(slabs, slab, is_free, seen) || (is_hidden[slab] && format != EMPTY)) return false;
    num_empty += format == EMPTY && !is_hidden[slab];
    if (format == EMPTY) continue;
    num_slabs_of[format]++;
    num_free_of[format] += slabs->num_free[slab];
    num_with_free[format] += slabs->num_free[slab] > 0;
  }
  for (int32_t f = 0; f < slabs->sizes.num_formats; f++)
    if (num_slabs_of[f] != slabs->num_slabs_of[f] || num_free_of[f] != slabs->num_free_of[f] ||
        length_of(slabs, f, is_hidden) != num_with_free[f])
      return false;
  return num_empty == slabs->num_empty && length_of(slabs, slabs->sizes.num_formats, is_hidden) == num_empty;
}

bool pkv_slabs_are_whole(const pkv_slabs *slabs, const bool *is_free, const uint8_t *is_hidden) {
  bool *seen = calloc((size_t)pkv_slabs_num_ids(slabs), sizeof *seen);
  bool answer = seen && are_whole(slabs, is_free, is_hidden, seen);
  free(seen);
  return answer;
}
