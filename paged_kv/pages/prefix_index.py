"""The prefix index: which pages hold which tokens, so that a new sequence begins with what is there already.

    entries   sorted by their keys: the serial number of the entry before, or the salt, and the page's ids
    by_page   page id -> its entry; a page has at most one
    paths     row -> the entries of its full pages whose ids are known, in order

A key holds all tokens of its page and names the entry of the page before, so a look-up compares every token
of the prefix.

The first copy of a page is the indexed one.  The pool keeps an indexed page when its last owner releases it,
until `make_room` needs it; `evicted` remembers what has gone.  The last, open page of a sequence is found in
the block tables, without an entry.

An interrupt may come between any two lines, also of a sorted container.  Each method that changes something
does it within `with self._change`; the next call finds that one did not end, and rebuilds everything from
`by_page`.  The pool marks a page as indexed before it has an entry, and until after it had one.

Imports block_table, retention, evicted, events, entry, counts, token_keys, salts, plan and lifetime.  The
caller holds the cache's lock.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sortedcontainers import SortedDict

from ..lifetime import Change, Uncopyable
from .block_table import BlockTables
from .counts import Counts
from .entry import HOLLOW, Entry
from .events import Events
from .evicted import Evicted
from .plan import Plan
from .retention import FOREVER, Retention
from .salts import Salts
from .token_keys import continues, following, ids_of, key_of, longest

#: So many evicted pages are remembered at most.
MAX_REMEMBERED = 16384


class Found(NamedTuple):
    """A prefix of some tokens that the index has.

    entries : of its full pages
    page_ids : all its pages
    num_tokens : of them, short of the last one of a prompt
    reach : tokens of all entries, and of an open page behind them; more where a window lacks pages
    serial : of what its full pages end with, an entry or the salt
    """

    entries: list[Entry]
    page_ids: list[int]
    num_tokens: int
    reach: int
    serial: bytes


class PrefixIndex(Uncopyable):
    """The index of one cache's pages, which has no window."""

    def __init__(self, tables: BlockTables, salts: Salts, retention: Retention, events: Events) -> None:
        self.tables, self.pool, self.page_size = tables, tables.pool, tables.page_size
        self.entries: Any = SortedDict()
        self.by_page: dict[int, Entry] = {}
        #: Of each page in it the page before, for those who draw the tree; HOLLOW: none, or it has gone.
        self.parents = np.full(tables.pool.num_ids, HOLLOW, np.int32)
        self.paths: dict[int, list[Entry]] = {}
        #: Of each row's path, the serial number of the last entry, and the length.
        self._ends = np.zeros(tables.rows.max_sequences, np.int64)
        self._path_lens = np.zeros(tables.rows.max_sequences, np.int32)
        #: Does a row hold a page other than its entry's, having computed the same tokens?
        self._has_other_pages = np.zeros(tables.rows.max_sequences, np.bool_)
        self.salts, self.retention, self.events = salts, retention, events
        self.evicted = Evicted(min(4 * tables.pool.num_pages, MAX_REMEMBERED))
        self.counts = Counts()
        self._change = Change(self.repair)

    # ---- look-up

    def match(self, ids: NDArray[np.int32], salt: int) -> Found:
        """The longest prefix that is there, short of the last token, which has to be computed.

        Cost: a look-up for each page, and a comparison with the open pages of sequences that agree so far.
        """
        limit, width = max(0, len(ids) - 1), 4 * self.page_size
        tokens, entries, serial = key_of(ids[:limit]), [], salt.to_bytes(8)
        for begin in range(0, limit // self.page_size * width, width):
            entry = self.entries.get(serial + tokens[begin : begin + width])
            if entry is None:
                break
            entries.append(entry)
            serial = entry.serial
        page_ids, num_tokens = [entry.page_id for entry in entries], len(entries) * self.page_size
        page_id, num_more = self._longest(serial, len(entries), ids[num_tokens:limit][: self.page_size])
        if num_more:
            page_ids.append(page_id)
        return Found(entries, page_ids, num_tokens + num_more, num_tokens + num_more, serial)

    def _longest(self, serial: bytes, depth: int, rest: NDArray[np.int32]) -> tuple[int, int]:
        """The page that follows an entry and agrees with `rest` for longest, and for how many tokens."""
        entry, num_agreed = longest(self.entries, serial, rest)
        page_ids, agreed, _ = self._open_pages(serial, depth, rest)
        has_page = entry is not None and entry.page_id != HOLLOW
        if agreed.size and agreed.max() > (num_agreed if has_page else 0):
            return int(page_ids[agreed.argmax()]), int(agreed.max())
        return (entry.page_id if entry else -1), num_agreed

    def _open_pages(
        self, serial: bytes, depth: int, rest: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]:
        """Page `depth` of rows whose path ends here: page ids, tokens that agree with `rest`, known ones."""
        tables = self.tables
        rows = np.flatnonzero(self._ends[: tables.rows.num_rows] == int.from_bytes(serial))
        num_known = tables.rows.num_known[rows] - depth * self.page_size
        rows, num_known = rows[num_known > 0], num_known[num_known > 0]
        if not rows.size:
            return _NONE, _NONE.astype(np.int64), _NONE
        page_ids = tables.page_ids[rows, tables.cell(depth)]
        agrees = tables.token_ids[page_ids, : len(rest)] == rest
        agreed = np.minimum(np.logical_and.accumulate(agrees, axis=1).sum(axis=1), num_known)
        return page_ids, agreed, num_known

    def goes_on(self, found: Found, ids: NDArray[np.int32]) -> bool:
        """Does the index have a token that follows what it found of these ids?"""
        depth = len(found.entries)
        agreed_ids = ids[depth * self.page_size : found.num_tokens]
        _, agreed, num_known = self._open_pages(found.serial, depth, agreed_ids)
        is_longer = (agreed == len(agreed_ids)) & (num_known > len(agreed_ids))
        return bool(is_longer.any()) or continues(self.entries, found.serial + key_of(agreed_ids))

    # ---- what rows offer

    def start(self, row: int, found: Found | None, priority: int) -> None:
        """A new sequence is empty, or has what a match found."""
        with self._change:
            self.retention.set_row(row, priority, FOREVER)
            self._has_other_pages[row] = False
            self._set_path(row, [] if found is None else found.entries[: found.num_tokens // self.page_size])
            if found is not None and found.page_ids:
                num_pages = -(-found.num_tokens // self.page_size)
                self.retention.find(row, *self._held_pages(row, num_pages))

    def hold(self, row: int, entries: list[Entry]) -> None:
        """A new row has the pages of these entries, and is no use of them."""
        with self._change:
            self.retention.set_row(row, 0, FOREVER)
            self._has_other_pages[row] = False
            self._set_path(row, entries)

    def fork(self, parent: int, row: int, length: int) -> None:
        """A new sequence shares the pages of the parent's first tokens."""
        with self._change:
            self.retention.copy_row(parent, row)
            self._has_other_pages[row] = self._has_other_pages[parent]
            self._set_path(row, self.paths.get(parent, [])[: length // self.page_size])

    def _set_path(self, row: int, path: list[Entry]) -> None:
        self.paths[row] = path
        self._ends[row] = int.from_bytes(path[-1].serial) if path else self.tables.rows.salts[row]
        self._path_lens[row] = len(path)

    def publish(self, rows: NDArray[np.int32]) -> None:
        """Index the full pages of known ids that a commit has completed."""
        with self._change:
            tables = self.tables
            has_more = tables.rows.num_known[rows] // self.page_size > self._path_lens[rows]
            for row in rows[has_more].tolist():
                path = self.paths.get(row, [])
                if path and path[-1].is_dropped:
                    path = []
                num_full = int(tables.rows.num_known[row]) // self.page_size
                self._publish_pages(row, path, tables.page_ids[row, len(path) : num_full])

    def _publish_pages(self, row: int, path: list[Entry], page_ids: NDArray[np.int32]) -> None:
        """Index the full pages that follow a row's path."""
        new, positions = [], []
        for page_id, ids in zip(page_ids.tolist(), self.tables.token_ids[page_ids], strict=True):
            entry, is_new = self._entry(row, path, ids, page_id)
            if is_new:
                new.append(page_id)
                positions.append(len(path) * self.page_size)
            elif entry.page_id != page_id:
                self._has_other_pages[row] = True
            path.append(entry)
        self._set_path(row, path)
        if new:
            self.retention.publish(row, new, positions)

    def shorten(self, row: int, length: int) -> None:
        """A row forgets its tokens from `length` on; its full pages stay indexed."""
        with self._change:
            path, num_left = self.paths.get(row, []), length // self.page_size
            gone = [(i, entry.page_id) for i, entry in enumerate(path[num_left:]) if entry.page_id != HOLLOW]
            self._set_path(row, path[:num_left])
            if gone:
                places, page_ids = zip(*gone, strict=True)
                positions = [(num_left + place) * self.page_size for place in places]
                self.retention.leave(row, np.array(page_ids, np.int32), positions)

    def leave(self, row: int) -> None:
        """Before a row releases its pages: index the open one, too, and give all their keys."""
        with self._change:
            path, num_known = self.paths.get(row, []), int(self.tables.rows.num_known[row])
            num_open = num_known - len(path) * self.page_size
            pages, positions = self._left_pages(row, path)
            if not (path and path[-1].is_dropped) and 0 < num_open < self.page_size:
                page_id = int(self.tables.page_ids[row, self.tables.cell(len(path))])
                ids = self.tables.token_ids[page_id, :num_open]
                if not self._is_indexed(self._end_of(row, path), ids):
                    entry, is_new = self._entry(row, path, ids, page_id)
                    if is_new:
                        self.retention.publish(row, [page_id], [len(path) * self.page_size])
                    pages = np.append(pages, np.int32(entry.page_id))
                    positions = [*positions, len(path) * self.page_size]
            if len(pages):
                self.retention.leave(row, pages, positions)
            self._has_other_pages[row] = False
            self._set_path(row, [])

    def _left_pages(self, row: int, path: list[Entry]) -> tuple[NDArray[np.int32], Sequence[int]]:
        """The pages of a row's path, and the positions of their first tokens."""
        if not self._has_other_pages[row]:
            return self._held_pages(row, len(path))
        # Those of an entry that another row has dropped may hold something else by now.
        there = [(i, entry.page_id) for i, entry in enumerate(path) if not entry.is_dropped]
        places, page_ids = zip(*there, strict=True) if there else ((), ())
        return np.array(page_ids, np.int32), [place * self.page_size for place in places]

    def _held_pages(self, row: int, num_pages: int) -> tuple[NDArray[np.int32], Sequence[int]]:
        """A row's first num_pages pages, as far as it holds them, and the positions of their first tokens."""
        if self.tables.budget is None:
            positions = range(0, num_pages * self.page_size, self.page_size)
            return self.tables.page_ids[row, :num_pages], positions
        logical, pages = self.tables.held_pages(row)
        num_pages = int(np.searchsorted(logical, num_pages))
        return pages[:num_pages], (logical[:num_pages] * self.page_size).tolist()

    def note_drop(self, row: int, numbers: NDArray[np.int32]) -> None:
        """Before a row releases these logical pages: its own ones that are indexed stay, as if it ended."""
        with self._change:
            logical, pages = self.tables.held_pages(row)
            pages = pages[np.searchsorted(logical, numbers)]
            is_own = np.array([page in self.by_page for page in pages.tolist()], bool)
            if is_own.any():
                positions = (numbers[is_own] * self.page_size).tolist()
                self.retention.leave(row, pages[is_own], positions)

    def _end_of(self, row: int, path: list[Entry]) -> bytes:
        """What the page after a row's path follows: the last entry, or the salt."""
        return path[-1].serial if path else int(self.tables.rows.salts[row]).to_bytes(8)

    def has_entries(self, salt: int) -> bool:
        """Is a page of this salt indexed?"""
        return continues(self.entries, salt.to_bytes(8))

    def _is_indexed(self, serial: bytes, ids: NDArray[np.int32]) -> bool:
        """Does an entry behind this one begin with these tokens?"""
        key = serial + key_of(ids)
        return key in self.entries or continues(self.entries, key)

    def _entry(self, row: int, path: list[Entry], ids: NDArray[np.int32], page_id: int) -> tuple[Entry, bool]:
        """The entry of these tokens of a row: the one that is there, or a new one of its page.

        Returns: it; is it new?
        """
        key = self._end_of(row, path) + key_of(ids)
        there: Entry | None = self.entries.get(key)
        if there is not None and there.page_id != HOLLOW:
            return there, False
        shorter = self.by_page.get(page_id)  # the page was open when it was indexed
        if shorter is not None:
            self.drop(shorter, None)  # what it named is in the new entry
        self.pool.set_indexed(page_id, True)
        if there is not None:
            there.page_id = page_id
            self.by_page[page_id] = there
            self._note_parent(there)
            self.events.stored(there)
            return there, True
        serial = self.evicted.take(key) or next(self.salts.serials).to_bytes(8)
        before = path[-1] if path else self.salts.name(int(self.tables.rows.salts[row]))
        entry = Entry(key, page_id, serial, before)
        self.by_page[page_id] = entry
        self._note_parent(entry)
        self.entries[key] = entry
        if entry.num_tokens == self.page_size:
            self.events.stored(entry)
        return entry, True

    def _note_parent(self, entry: Entry) -> None:
        before = entry.before
        self.parents[entry.page_id] = before.page_id if isinstance(before, Entry) else HOLLOW

    # ---- after an interrupt

    def require_whole(self) -> None:
        """At the beginning of a call: repair what an interrupt has left."""
        if self._change.is_under_way:
            self.repair()

    def repair(self) -> None:
        """Build everything again from the entries of `by_page` that follow one another."""
        alive = set[Entry]()
        for entry in self.by_page.values():
            chain = [entry]
            while chain[-1] not in alive and isinstance(chain[-1].before, Entry):
                chain.append(chain[-1].before)
            for one in reversed(chain):
                if one.is_dropped or (one.page_id != HOLLOW and self.by_page.get(one.page_id) is not one):
                    break  # and those behind it are dead, too
                alive.add(one)
        for entry in self.by_page.values():
            entry.is_dropped = entry not in alive
        self.by_page = {entry.page_id: entry for entry in alive if entry.page_id != HOLLOW}
        self.entries = SortedDict({entry.key: entry for entry in alive})
        for entry in self.by_page.values():
            self._note_parent(entry)
        for page_id in range(self.pool.num_ids):
            if self.pool.is_indexed(page_id) and page_id not in self.by_page:
                self.pool.set_indexed(page_id, False)
        self.evicted.clear()
        self.retention.repair()
        self.events.forget(sum(entry.num_tokens == self.page_size for entry in self.by_page.values()))
        self._change.is_under_way = False

    # ---- what has to go

    def drop(self, entry: Entry, cause: str | None, num_free: int | None = None) -> None:
        """Forget all that follows an entry, and the entry last; kept pages of theirs are free then.

        cause : of an eviction, which is remembered
        num_free : stop when so many pages are free
        """
        found, now = [entry], self.retention.clock()
        for one in found:
            found += [self.entries[key] for key in following(self.entries, one.serial)]
        for one in reversed(found):
            if num_free is not None and self.pool.num_free >= num_free:
                break
            one.is_dropped = True
            if cause is not None:
                self.evicted.remember(one.key, one.serial, cause, now)
                self.count_eviction(one.page_id, cause)
            is_full = one.num_tokens == self.page_size and one.page_id != HOLLOW
            if self.entries.pop(one.key, None) is not None and is_full:
                self.events.removed(one)
            if self.by_page.get(one.page_id) is one:
                del self.by_page[one.page_id]
                self.retention.forget(one.page_id)
                self.pool.set_indexed(one.page_id, False)

    def evict(self, entry: Entry, cause: str, num_free: int) -> None:
        """Take the page of an entry, and before it those that follow, until so many are free."""
        self.drop(entry, cause, num_free)

    def count_eviction(self, page_id: int, cause: str) -> None:
        if page_id == HOLLOW:
            return
        self.counts.evictions[cause] += 1
        if cause == "pressure":
            self.retention.evict(page_id)
        self.counts.num_unused_evictions += not self.retention.was_found(page_id)

    def has_followers(self, entry: Entry) -> bool:
        return continues(self.entries, entry.serial)

    def full_entries(self) -> Iterator[Entry]:
        """The entries of full pages, each after the one before it."""
        waiting: list[Entry] = [one for one in self.entries.values() if isinstance(one.before, bytes)]
        while waiting:
            entry = waiting.pop()
            if entry.num_tokens == self.page_size and entry.page_id != HOLLOW:
                yield entry
            waiting += [self.entries[key] for key in following(self.entries, entry.serial)]

    def clear(self, plans: Iterable[Plan]) -> int:
        """Forget all entries and evictions, and publish nothing that rows hold or open steps compute.

        Returns: how many kept pages are free now.
        """
        with self._change:
            self.tables.rows.num_known[: self.tables.rows.num_rows] = 0
            for plan in plans:
                if plan.is_open:
                    plan.forget_ids()
            num_free = self.pool.num_free
            found = list(self.entries.values())
            self.entries.clear()
            self.events.cleared()
            self.evicted.clear()
            for entry in found:
                entry.is_dropped = True
                if self.by_page.pop(entry.page_id, None) is not None:
                    self.retention.forget(entry.page_id)
                    self.pool.set_indexed(entry.page_id, False)
            for row in list(self.paths):
                self._set_path(row, [])
            return self.pool.num_free - num_free

    def make_room(self, num_pages: int, because: str | None = None) -> bool:
        """Evict kept pages, as `retention` orders them, until so many are free.

        because : the cause; None: as `retention` says

        Returns False, and evicts nothing, when there are too few.  Cost: O(log n) for each.
        """
        with self._change:
            pool = self.pool
            if pool.num_reclaimable < num_pages:
                return False
            while pool.num_free < num_pages:
                page_id, cause = self.retention.next_page()
                entry = self.by_page.get(page_id)
                if entry is None:  # an interrupt came while it was indexed
                    pool.set_indexed(page_id, False)
                else:
                    self.evict(entry, because or cause, num_pages)
            return True

    def exchange(self, old_pages: list[int], new_pages: list[int]) -> None:
        """Name these pages instead, which hold the same tokens.

        A page that is exchanged twice in a row, from format to format, is free in between, so that a page of
        a later exchange may have its id.
        """
        last: dict[int, int] = {}
        pairs = []
        for old, new in zip(reversed(old_pages), reversed(new_pages), strict=True):
            last[old] = last.get(new, new)
            pairs.append((old, last[old]))
        with self._change:
            named = [(old, new, self.by_page[old]) for old, new in reversed(pairs) if old in self.by_page]
            for old, new, entry in named:
                self.pool.set_indexed(new, True)
                del self.by_page[old]
                entry.page_id = new
                self.by_page[new] = entry
                self.parents[new] = self.parents[old]
                self.parents[self.parents == old] = new
                self.retention.move(old, new)
                self.pool.set_indexed(old, False)
            self._has_other_pages[list(self.paths)] = True  # those that hold the old pages still

    def release_tails(self, rows: list[int]) -> None:
        """Forget the pages that these rows append to, so that sole owners append in place."""
        with self._change:
            tables = self.tables
            for row in rows:
                offset = int(tables.rows.seq_lens[row]) % self.page_size
                indexed = self.by_page.get(tables.tail_page(row)) if offset else None
                if indexed is not None:
                    self.drop(indexed, "pressure")

    def broken_rule(self) -> str | None:
        """A sentence about what is wrong, for `check`; None: entries and pages agree.  Cost: O(pages)."""
        serials, num_hollow = {entry.serial for entry in self.entries.values()}, 0
        entry: Entry
        for key, entry in self.entries.items():
            ids, before = ids_of(key), entry.before
            is_first = isinstance(before, bytes) and self.salts.numbers[before] == int.from_bytes(key[:8])
            if key != entry.key or not (is_first or key[:8] in serials):
                return f"the entry of page {entry.page_id} follows one that was dropped"
            if entry.page_id == HOLLOW:
                if not self.has_followers(entry):
                    return "an entry without a page is followed by none"
                num_hollow += 1
                continue
            if self.by_page.get(entry.page_id) is not entry:
                return f"page {entry.page_id} has several entries"
            if not self.pool.is_indexed(entry.page_id):
                return f"page {entry.page_id} is not marked as indexed"
            if not np.array_equal(ids, self.tables.token_ids[entry.page_id, : len(ids)]):
                return f"page {entry.page_id} holds other tokens than its entry"
        if len(self.by_page) + num_hollow != len(self.entries):
            return "a page is named by no entry"
        return None


_NONE = np.empty(0, np.int32)
