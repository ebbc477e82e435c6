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


class KeptPages(RuleBasedStateMachine):
    """The pool beside a dictionary of references, a set of indexed pages, and a list of kept ones."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES, 64)
        self.references = dict.fromkeys(range(NUM_PAGES), 0)
        self.indexed: set[int] = set()
        self.kept: list[int] = []

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

    @invariant()
    def pages_add_up(self) -> None:
        self.pool.check()
        assert self.pool.num_kept == len(self.kept)
        assert self.pool.num_free == NUM_PAGES - len(self.owned()) - len(self.kept)
        assert self.pool.oldest_kept == (self.kept[0] if self.kept else -1)


TestKeptPages = KeptPages.TestCase
