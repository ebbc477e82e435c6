"""The prefix index of a cache with a window: a match needs the pages of the sinks and of the window only.

Pages that leave the window of a sequence are kept, like those of sequences that end, and may go while later
ones of the same prefix stay.  So an entry outlives its page, as long as others follow it: it is *hollow*
then, and a look-up passes through it.  A match of length L needs the sinks' pages and those from L - window
on; it is the longest for which all of these are there.

A commit releases the pages that leave the window, so they are published just before it.

Imports prefix_index and token_keys.
"""

import itertools
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .block_table import BlockTables
from .entry import HOLLOW, Entry
from .events import Events
from .plan import Plan
from .prefix_index import Found, PrefixIndex
from .retention import Retention
from .salts import Salts
from .token_keys import key_of

#: Pages of one sequence that are published; those of a longer one are not.
MAX_PATH = 65536
#: Entries without a page, in all; the oldest go with all that follows them.
MAX_HOLLOW = 65536
#: In place of a serial number, of a row that offers nothing more.
MUTE = -1


class WindowedIndex(PrefixIndex):
    """The index of one cache's pages, which has a window."""

    def __init__(self, tables: BlockTables, salts: Salts, retention: Retention, events: Events) -> None:
        super().__init__(tables, salts, retention, events)
        #: Entries in the order in which they lost their pages; some have one again, or are gone.
        self._hollow: deque[Entry] = deque()

    def match(self, ids: NDArray[np.int32], salt: int) -> Found:
        """The longest prefix whose sinks and window are there, short of the last token.

        Cost: a look-up for each page of all that was computed of it.
        """
        found = super().match(ids, salt)
        if not found.page_ids:
            return found
        tables = self.tables
        pages = np.array(found.page_ids)
        lengths = np.minimum((np.arange(len(pages)) + 1) * self.page_size, found.num_tokens)
        missing = np.where(pages < 0, np.arange(len(pages)), -1)
        first_pages = np.array([tables.first_page_at(length) for length in lengths.tolist()])
        # For a prefix that ends in page i: none is missing from its window's first page on, nor of the sinks.
        is_there = np.maximum.accumulate(missing) < first_pages
        sinks = missing[: tables.sink_pages] >= 0
        if sinks.any():
            is_there[int(sinks.argmax()) :] = False
        if not is_there.any():
            return found._replace(page_ids=[], num_tokens=0)
        last = int(np.flatnonzero(is_there)[-1])
        needed = [*range(min(tables.sink_pages, last + 1)), *range(int(first_pages[last]), last + 1)]
        return found._replace(page_ids=pages[needed].tolist(), num_tokens=int(lengths[last]))

    def publish_step(self, plan: Plan, counts: NDArray[np.int32] | None = None) -> None:
        """Index the full pages that the commit of a step is about to complete.

        counts : how many of each sequence's new tokens it keeps; None: all
        """
        tables, rows = self.tables, plan.rows
        new_known = plan.new_known if counts is None else np.minimum(plan.new_known, counts)
        old_lens, known = tables.rows.seq_lens[rows], tables.rows.num_known[rows]
        known = np.where(known == old_lens, known + new_known, known)
        has_more = (known // self.page_size > self._path_lens[rows]) & (self._ends[rows] != MUTE)
        has_more &= np.diff(plan.qo_indptr) > 0  # the plan lists no pages of a sequence that it skips
        if not has_more.any():
            return
        with self._change:
            for i in np.flatnonzero(has_more).tolist():
                row, num_full = int(rows[i]), int(known[i]) // self.page_size
                path = self.paths.get(row, [])
                if path and path[-1].is_dropped:
                    path = []
                gap = int(plan.first_pages[i]) - tables.sink_pages  # pages that the row has let go
                if num_full > MAX_PATH or (gap > 0 and len(path) < tables.sink_pages + gap):
                    self._ends[row] = MUTE  # a page that would have to be published is gone
                else:
                    self._publish_pages(row, path, plan.pages_of(i)[len(path) - gap : num_full - gap])

    def _is_indexed(self, serial: bytes, ids: NDArray[np.int32]) -> bool:
        """Does a page behind this entry begin with these tokens?"""
        key = serial + key_of(ids)
        begins_so = itertools.takewhile(lambda other: other.startswith(key), self.entries.irange(key))
        return any(self.entries[other].page_id != HOLLOW for other in itertools.islice(begins_so, 8))

    def _set_path(self, row: int, path: list[Entry]) -> None:
        super()._set_path(row, path)
        if self.tables.rows.num_known[row] // self.page_size > len(path):
            self._ends[row] = MUTE  # the page that follows is not its open one

    def evict(self, entry: Entry, cause: str, num_free: int) -> None:
        """Take the page of an entry; the entry stays as long as others follow it."""
        page_id = entry.page_id
        self.count_eviction(page_id, cause)
        if entry.num_tokens == self.page_size:
            self.events.removed(entry)
        del self.by_page[page_id]
        self.retention.forget(page_id)
        entry.page_id = HOLLOW
        self.pool.set_indexed(page_id, False)
        now = self.retention.clock()
        one: Entry | bytes = entry
        while isinstance(one, Entry) and one.page_id == HOLLOW and not self.has_followers(one):
            one.is_dropped = True
            self.entries.pop(one.key, None)
            self.evicted.remember(one.key, one.serial, cause, now)
            one = one.before
        if not entry.is_dropped:
            self._hollow.append(entry)
        while len(self._hollow) > MAX_HOLLOW:
            oldest = self._hollow.popleft()
            if oldest.page_id == HOLLOW and not oldest.is_dropped:
                self.drop(oldest, None)

    def _left_pages(self, row: int, path: list[Entry]) -> tuple[NDArray[np.int32], Sequence[int]]:
        return self._held_pages(row, len(path))

    def _held_pages(self, row: int, num_pages: int) -> tuple[NDArray[np.int32], Sequence[int]]:
        logical, pages = self.tables.held_pages(row)
        is_first = logical < num_pages
        return pages[is_first], (logical[is_first] * self.page_size).tolist()
