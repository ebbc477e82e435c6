"""Pages of the pool that an index names: they are kept when their last owner releases them."""

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from paged_kv import ArgumentError, OutOfPages, PagedKVError
from paged_kv.pages.pool import PagePool

NUM_PAGES = 6


def test_a_free_page_cannot_be_indexed():
    pool = PagePool(2, 64)
    (page,) = pool.acquire(1)
    with pytest.raises((PagedKVError, ArgumentError), match="set_indexed"):
        pool.set_indexed(1 - int(page), True)
    pool.check()


def test_a_key_is_a_number_and_of_a_page():
    pool = PagePool(2, 64)
    for change in (pool.set_keys, pool.raise_keys):
        for pages, key in (([0, 1], float("nan")), ([0, 2], 1.0), ([-1], 1.0)):
            with pytest.raises(PagedKVError):
                change(np.array(pages, np.int32), key)
        change(np.array([], np.int32), float("inf"))
    pool.check()


def test_many_kept_pages_give_way_in_the_order_of_their_keys():
    num_pages, rng = 3000, np.random.default_rng(1)
    pool = PagePool(num_pages, 64)
    keys = rng.integers(0, 50, num_pages).astype(float)
    for page in pool.acquire(num_pages).tolist():
        pool.set_indexed(page, True)
        pool.set_keys(np.array([page], np.int32), keys[page])
    order = rng.permutation(num_pages).astype(np.int32)
    pool.release(order)
    pool.check()
    for page in sorted(order.tolist(), key=lambda page: keys[page]):  # sorted is stable: the order of release
        assert pool.first_kept == page
        pool.set_indexed(page, False)
    assert pool.first_kept == -1 and pool.num_free == num_pages
    pool.check()


class KeptPages(RuleBasedStateMachine):
    """The pool beside a dictionary of references, a set of indexed pages, and the kept ones in order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES, 64)
        self.references = dict.fromkeys(range(NUM_PAGES), 0)
        self.indexed: set[int] = set()
        self.kept: list[int] = []
        self.keys = dict.fromkeys(range(NUM_PAGES), 0.0)

    def owned(self) -> list[int]:
        return [page for page, count in self.references.items() if count]

    @rule(count=st.integers(1, 3))
    def acquire(self, count: int) -> None:
        num_free = NUM_PAGES - len(self.owned()) - len(self.kept)
        if count > num_free:
            with pytest.raises(OutOfPages):
                self.pool.acquire(count)
            return
        for page in self.pool.acquire(count):
            assert self.references[int(page)] == 0 and int(page) not in self.kept
            self.references[int(page)] = 1

    @precondition(lambda self: self.owned() or self.kept)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.owned() + self.kept))
        self.pool.share(np.array([page], np.int32))
        self.references[page] += 1
        if page in self.kept:
            self.kept.remove(page)

    @precondition(lambda self: self.owned())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.owned()))
        self.pool.release(np.array([page], np.int32))
        self.references[page] -= 1
        if not self.references[page] and page in self.indexed:
            self.kept.append(page)

    @precondition(lambda self: self.owned())
    @rule(data=st.data())
    def index(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.owned()))
        self.pool.set_indexed(page, True)
        self.indexed.add(page)

    @precondition(lambda self: self.indexed)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.indexed)))
        self.pool.set_indexed(page, False)
        self.indexed.remove(page)
        if page in self.kept:
            self.kept.remove(page)

    @rule(data=st.data(), key=st.floats(-2, 2), is_raised=st.booleans())
    def set_keys(self, data: st.DataObject, key: float, is_raised: bool) -> None:
        pages = data.draw(st.lists(st.integers(0, NUM_PAGES - 1), max_size=3))
        change = self.pool.raise_keys if is_raised else self.pool.set_keys
        change(np.array(pages, np.int32), key)
        for page in pages:
            self.keys[page] = max(self.keys[page], key) if is_raised else key

    @invariant()
    def pages_add_up(self) -> None:
        self.pool.check()
        assert self.pool.num_kept == len(self.kept)
        assert self.pool.num_free == NUM_PAGES - len(self.owned()) - len(self.kept)
        first = min(self.kept, key=lambda page: (self.keys[page], self.kept.index(page)), default=-1)
        assert self.pool.first_kept == first


TestKeptPages = KeptPages.TestCase
