/* Memory of free pages, given back to the system and taken again.
 *
 * The mapping is cut into blocks of HUGE_PAGE bytes.  A block that holds free pages only is given back; each
 * page with a part in it is trimmed: not free until all of its blocks are there again.  A page has a part in
 * each layer's region, so its blocks are scattered, and a block may reach from one region into the next.
 *
 * In a pool of slabs, a slab is what a page is here: free when it is empty. */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "pool.h"

static int64_t part_bytes(const pkv_pool *pool) { return pool->unit_bytes / pool->num_parts; }

static int64_t pool_bytes(const pkv_pool *pool) { return pool->num_units * pool->unit_bytes; }

static int64_t num_blocks(const pkv_pool *pool) { return (pool_bytes(pool) + HUGE_PAGE - 1) / HUGE_PAGE; }

/* The unit whose part is at this byte of the mapping. */
static int32_t page_at(const pkv_pool *pool, int64_t byte) {
  return (int32_t)(byte / part_bytes(pool) % pool->num_units);
}

/* The bytes of a block: the last one may be cut off. */
static int64_t end_of_block(const pkv_pool *pool, int64_t block) {
  int64_t end = (block + 1) * HUGE_PAGE;
  return end < pool_bytes(pool) ? end : pool_bytes(pool);
}

static bool is_free_or_trimmed(const pkv_pool *pool, int32_t page) {
  if (pool->slabs) return pool->slabs->formats[page] < 0;
  return pool->ref_counts[page] == 0 && !pool->is_indexed[page];
}

static bool holds_free_pages_only(const pkv_pool *pool, int64_t block) {
  int64_t step = part_bytes(pool), end = end_of_block(pool, block);
  for (int64_t byte = block * HUGE_PAGE; byte < end; byte = (byte / step + 1) * step)
    if (!is_free_or_trimmed(pool, page_at(pool, byte))) return false;
  return true;
}

static void trim_pages_of(pkv_pool *pool, int64_t block) {
  int64_t step = part_bytes(pool), end = end_of_block(pool, block);
  for (int64_t byte = block * HUGE_PAGE; byte < end; byte = (byte / step + 1) * step) {
    int32_t page = page_at(pool, byte);
    if (pool->is_trimmed[page]) continue;
    pool->is_trimmed[page] = 1;
    pool->trimmed[pool->num_trimmed++] = page;
    if (pool->slabs) pkv_slabs_hide(pool->slabs, page);
  }
}

void pkv_pool_set_parts(pkv_pool *pool, int64_t num_parts) { pool->num_parts = num_parts; }

/* Pages of format 0 that a unit has. */
static int64_t pages_of_unit(const pkv_pool *pool) { return pool->slabs ? pool->slabs->places[0] : 1; }

int64_t pkv_pool_num_trimmed(const pkv_pool *pool) { return pool->num_trimmed * pages_of_unit(pool); }

int64_t pkv_pool_resident_bytes(const pkv_pool *pool) {
  int64_t gone = pool->num_gone * HUGE_PAGE, last = num_blocks(pool) - 1;
  if (pool->is_gone[last]) gone -= (last + 1) * HUGE_PAGE - pool_bytes(pool);
  return pool_bytes(pool) - gone;
}

int64_t pkv_pool_trim(pkv_pool *pool) {
  int64_t before = pkv_pool_resident_bytes(pool);
  for (int64_t block = 0; block < num_blocks(pool); block++) {
    if (pool->is_gone[block] || !holds_free_pages_only(pool, block)) continue;
    size_t num_bytes = (size_t)(end_of_block(pool, block) - block * HUGE_PAGE);
    if (madvise(pool->data + block * HUGE_PAGE, num_bytes, MADV_DONTNEED) != 0) continue;
    pool->is_gone[block] = 1;
    pool->num_gone++;
    trim_pages_of(pool, block);
  }
  int64_t num_free = 0; /* those that are left, in order */
  for (int64_t i = 0; !pool->slabs && i < pool->num_free; i++)
    if (!pool->is_trimmed[pool->free_stack[i]]) pool->free_stack[num_free++] = pool->free_stack[i];
  pool->num_free = num_free;
  return before - pkv_pool_resident_bytes(pool);
}

/* Populate the blocks of a page that are gone. */
static bool restore_page(pkv_pool *pool, int32_t page) {
  int64_t size = part_bytes(pool);
  for (int64_t part = 0; part < pool->num_parts; part++) {
    int64_t begin = (part * pool->num_units + page) * size;
    for (int64_t block = begin / HUGE_PAGE; block * HUGE_PAGE < begin + size; block++) {
      if (!pool->is_gone[block]) continue;
      size_t num_bytes = (size_t)(end_of_block(pool, block) - block * HUGE_PAGE);
      if (!pkv_populate(pool->data + block * HUGE_PAGE, num_bytes)) return false;
      pool->is_gone[block] = 0;
      pool->num_gone--;
    }
  }
  return true;
}

pkv_status pkv_pool_restore(pkv_pool *pool, int64_t count) {
  if (count < 0 || count > pkv_pool_num_trimmed(pool)) return PKV_BAD_ARGUMENT;
  for (; count > 0; count -= pages_of_unit(pool)) {
    int32_t page = pool->trimmed[pool->num_trimmed - 1];
    if (!restore_page(pool, page)) return PKV_OUT_OF_MEMORY;
    pool->num_trimmed--;
    pool->is_trimmed[page] = 0;
    if (pool->slabs)
      pkv_slabs_show(pool->slabs, page);
    else
      pool->free_stack[pool->num_free++] = page;
  }
  return PKV_OK;
}

int64_t pkv_pool_bytes_to_restore(const pkv_pool *pool, int64_t count) {
  count = (count + pages_of_unit(pool) - 1) / pages_of_unit(pool);
  int64_t size = part_bytes(pool), most = pool_bytes(pool) - pkv_pool_resident_bytes(pool);
  /* Each part of a page has at most so many blocks; blocks that pages share count once in `most`. */
  int64_t of_page = pool->num_parts * (size + 2 * (int64_t)HUGE_PAGE);
  return count < most / of_page + 1 && count * of_page < most ? count * of_page : most;
}
