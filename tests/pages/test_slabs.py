"""Pools of pages of several formats: against a model of who holds what, and the sizes of slabs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_kv import ArgumentError, OutOfPages
from paged_kv.pages.pool import PagePool
from paged_kv.pages.slabs import LEAST_SLABS, slab_sizes

PAGE_BYTES = st.lists(st.integers(1, 60).map(lambda lines: 64 * lines), min_size=1, max_size=4)


class Slabs(RuleBasedStateMachine):
    """Pages are taken, shared, indexed and given back; each is in memory that is its own."""

    def __init__(self):
        super().__init__()
        self.owners = {}  # page id: [format, owners, is_indexed]

    @initialize(page_bytes=PAGE_BYTES, num_slabs=st.integers(4, 20), least=st.integers(0, 8))
    def build(self, page_bytes, num_slabs, least):
        sizes = slab_sizes(num_slabs * max(page_bytes), tuple(page_bytes), (0,) * len(page_bytes))
        room = max(0, sizes.num_slabs - len(page_bytes))
        floors = tuple(min(least, room // len(page_bytes)) + 1 for _ in page_bytes)
        self.sizes = slab_sizes(
            num_slabs * max(page_bytes),
            tuple(page_bytes),
            tuple(floor * places for floor, places in zip(floors, sizes.places, strict=True)),
        )
        self.pool = PagePool(slabs=self.sizes)

    def expected_available(self, format):
        """From the definition: free places of its slabs, and empty slabs beyond the floors of the others."""
        shift = (self.pool.num_ids // self.sizes.num_slabs).bit_length() - 1
        formats = {page >> shift: entry[0] for page, entry in self.owners.items()}
        used = sum(entry[0] == format for entry in self.owners.values())
        counts = [sum(f == one for f in formats.values()) for one in range(len(self.sizes.places))]
        missing = sum(
            max(0, floor - count)
            for one, (floor, count) in enumerate(zip(self.sizes.floors, counts, strict=True))
            if one != format
        )
        empty = self.sizes.num_slabs - len(formats) - self.pool.num_trimmed // self.sizes.places[0]
        places = self.sizes.places[format]
        return counts[format] * places - used + max(0, empty - missing) * places

    @rule(data=st.data(), count=st.integers(0, 12))
    def acquire(self, data, count):
        format = data.draw(st.integers(0, len(self.sizes.places) - 1))
        if count > self.expected_available(format):
            with pytest.raises(OutOfPages):
                self.pool.acquire(count, format)
            return
        for page in self.pool.acquire(count, format).tolist():
            assert page not in self.owners
            self.owners[page] = [format, 1, False]

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), what=st.sampled_from(["share", "release", "index", "forget"]))
    def change(self, data, what):
        page = data.draw(st.sampled_from(sorted(self.owners)))
        entry, ids = self.owners[page], np.array([page], np.int32)
        if what == "share":
            self.pool.share(ids)
            entry[1] += 1
        elif what == "release" and entry[1]:
            self.pool.release(ids)
            entry[1] -= 1
        elif what in ("index", "forget"):
            self.pool.set_indexed(page, what == "index")
            entry[2] = what == "index"
        if not entry[1] and not entry[2]:
            del self.owners[page]

    @rule()
    def trim_and_restore(self):
        self.pool.trim()
        self.pool.check()
        assert self.pool.restore(self.pool.num_trimmed) is None and self.pool.num_trimmed == 0

    @invariant()
    def all_is_explained(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        for format, (floor, places) in enumerate(zip(self.sizes.floors, self.sizes.places, strict=True)):
            used = sum(entry[0] == format for entry in self.owners.values())
            assert self.pool.num_used(format) == used
            available = self.pool.num_available(format)
            assert available == self.expected_available(format)
            assert available + used >= floor * places  # no format starves
        assert all(self.pool.format_of(page) == entry[0] for page, entry in self.owners.items())
        assert self.pool.num_kept == sum(not entry[1] for entry in self.owners.values())


TestSlabs = Slabs.TestCase
TestSlabs.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@given(page_bytes=PAGE_BYTES, num_pages=st.integers(16, 2000), order=st.randoms())
def test_a_pool_that_only_fills_loses_a_slab_a_format_at_most(page_bytes, num_pages, order):
    sizes = slab_sizes(num_pages * max(page_bytes), tuple(page_bytes), (0,) * len(page_bytes))
    pool = PagePool(slabs=sizes)
    formats = [format for format in range(len(page_bytes)) for _ in range(8)]
    order.shuffle(formats)
    used = 0
    while formats:
        format = formats[-1]
        if not pool.num_available(format):
            formats.pop()
            continue
        pool.acquire(min(3, pool.num_available(format)), format)
        used = sum(pool.num_used(one) * size for one, size in enumerate(page_bytes))
        order.shuffle(formats)
    wasted = sizes.num_slabs * max(sizes.wasted)
    assert pool.num_bytes - used <= wasted + len(page_bytes) * sizes.slab_bytes
    pool.check()


@given(page_bytes=PAGE_BYTES, num_pages=st.integers(4, 10**6))
def test_slabs_hold_some_pages_of_each_format_and_waste_little(page_bytes, num_pages):
    num_bytes = num_pages * max(page_bytes)
    sizes = slab_sizes(num_bytes, tuple(page_bytes), (0,) * len(page_bytes))
    assert sizes.num_bytes <= num_bytes < sizes.num_bytes + sizes.slab_bytes
    assert sizes.slab_bytes % max(page_bytes) == 0 and min(sizes.places) >= 1
    assert sizes.num_slabs >= min(LEAST_SLABS, num_pages)
    one = max(max(page_bytes) % size / max(page_bytes) for size in page_bytes)
    assert max(sizes.wasted) / sizes.slab_bytes <= one


def test_memory_without_room_for_each_format_is_refused():
    with pytest.raises(ArgumentError, match="pages of 2 formats need 2 at least; give more memory"):
        slab_sizes(1024, (1024, 64), (1, 1))
    with pytest.raises(ArgumentError, match="need 101 at least"):
        slab_sizes(64 * 1024, (1024, 1024), (100, 1))


def test_one_format_in_slabs_is_a_pool(rng):
    sizes = slab_sizes(64 * 4096, (4096,), (0,))
    pool = PagePool(slabs=sizes)
    assert pool.num_pages == 64 and pool.num_free == 64
    pages = pool.acquire(64)
    assert len(set(pages.tolist())) == 64 and pool.num_free == 0
    pool.release(pages)
    pool.check()
