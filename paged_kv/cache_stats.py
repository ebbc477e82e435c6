"""What a cache holds at one moment, in numbers.

Imports store.
"""

from dataclasses import dataclass

from .pages.counts import Counts
from .pages.layout import public_name
from .store import Store


@dataclass(frozen=True)
class FormatStats:
    """The pages of one format."""

    num_pages: int  # owned or kept
    num_bytes: int  # of these
    page_bytes: int
    wasted_bytes: int  # behind the last page of a slab, for each slab that the format has


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds at one moment: num_pages = num_used_pages + num_kept_pages + num_free_pages."""

    num_pages: int
    num_used_pages: int  # owned by a sequence, or reserved by an open step
    num_pinned_pages: int  # of these, held by pins
    num_kept_pages: int  # of cached prefixes, without an owner; a step that lacks pages evicts them
    num_free_pages: int
    num_sequences: int
    num_tokens: int  # committed, in held pages; a slot that several share counts once
    utilization: float  # num_tokens / (num_used_pages * page_size), 0.0 of none
    pool_bytes: int
    formats: dict[str, FormatStats]  # by what its pages store, as "bfloat16" or "int8,int4"
    resident_bytes: int  # of these, those that `trim` has not given back
    num_copies: int  # of shared pages, for those who appended to them; since the cache was built
    bytes_not_read: int  # by attention: shared pages are read once for several sequences; since it was built
    # Of the prefix cache, since the cache was built:
    num_queries: int  # calls of `sequence(tokens)`
    num_queried_tokens: int
    num_hits: int  # of these calls, those that found a token
    num_hit_tokens: int
    bytes_saved: int  # of keys and values that were found, and not computed again
    misses: dict[str, int]  # calls that did not find all, by the reason that `match` gives
    num_evictions: int  # of cached pages
    evictions: dict[str, int]  # by cause: "pressure", "time"
    num_unused_evictions: int  # of pages that no sequence began with since they were published
    num_policy_errors: int  # pages that keep_policy gave no key, so that LRU's was used
    num_dropped_pages: int  # by sequences that held more than their budgets, since the cache was built


def stats_of(store: Store) -> CacheStats:
    """Counts of this moment.  Raises: CacheClosed."""
    with store.reading() as is_alone:
        store.reclaim_abandoned(is_alone)
        if is_alone:
            store.release_old_pins()
        num_pages, num_free = store.pool.counts
        num_tokens, num_sequences = store.tables.num_tokens, store.tables.rows.num_sequences
        num_pinned, num_pins = len(store.pinned_pages()), len(store.pins)
        num_kept, index = store.pool.num_kept, store.index
        counts = index.counts if index is not None else Counts()
    num_used = num_pages - num_free - num_kept
    slots = num_used * store.layout.page_size
    return CacheStats(
        num_pages=num_pages,
        num_used_pages=num_used,
        num_pinned_pages=num_pinned,
        num_kept_pages=num_kept,
        num_free_pages=num_free,
        num_sequences=num_sequences - num_pins,
        num_tokens=num_tokens,
        utilization=num_tokens / slots if slots else 0.0,
        pool_bytes=store.pool.num_bytes,
        formats=_formats(store),
        resident_bytes=store.pool.resident_bytes,
        num_copies=store.tables.num_copies,
        bytes_not_read=store.tables.bytes_not_read,
        num_queries=counts.num_queries,
        num_queried_tokens=counts.num_queried_tokens,
        num_hits=counts.num_hits,
        num_hit_tokens=counts.num_hit_tokens,
        bytes_saved=counts.num_hit_tokens * store.layout.page_bytes // store.layout.page_size,
        misses=dict(counts.misses),
        num_evictions=sum(counts.evictions.values()),
        evictions=dict(counts.evictions),
        num_unused_evictions=counts.num_unused_evictions,
        num_policy_errors=index.retention.num_policy_errors if index else 0,
        num_dropped_pages=store.budgets.num_dropped_pages if store.budgets else 0,
    )


def _formats(store: Store) -> dict[str, FormatStats]:
    found = {}
    for format, layout in enumerate(store.layouts):
        name = public_name(layout.dtypes)
        used = store.pool.num_used(format)
        found[name] = FormatStats(
            used, used * layout.page_bytes, layout.page_bytes, store.pool.wasted_bytes(format)
        )
    return found
