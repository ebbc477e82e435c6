"""Retention: in which order the pages of cached prefixes give way.

Each page has a key, set when it is published, and raised when it is found or its sequence ends; smaller ones
go first.  The key of the default policy, LRU, is

    last_used + half_life * log2(1 + priority)

so a priority of 1 is worth one half-life of not being used, and 3 two.  Keys do not change between uses.
Pages whose time to live is over go before all others.

What uses a page uses those before it, so keys do not grow along a chain: its end goes first.

Imports pool.  The caller holds the cache's lock.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from sortedcontainers import SortedList

from .._binding import integer, real
from ..errors import ArgumentError
from .pool import PagePool

FOREVER = math.inf
#: Of the time that pages are idle before they are evicted; as benchmarks/eviction.py found it.
COST_WEIGHT = 0.2
#: Evictions that an average is over.
NUM_AVERAGED = 256


class KeptPage(NamedTuple):
    """What a policy knows of a page."""

    position: int  # of its first token in its sequence
    num_hits: int  # of sequences that began with it since it was published
    last_used: float  # now, in seconds of the cache's clock
    priority: int  # of the sequence that uses it
    half_life: float  # seconds
    idle_seconds: float  # that pages were not used before steps evicted them, of late; half_life before any


class KeepPolicy(Protocol):
    """Gives each page its key when it is found and when its sequence ends; pages of small keys go first.

    The last key that was given counts.  If a page goes, those that follow it go before it, whatever their
    keys.

    Called under the cache's lock, so it must not use the cache.  If it raises, or returns no number, the
    page gets LRU's key, and `stats().num_policy_errors` counts it.
    """

    def key(self, page: KeptPage) -> float: ...


class CostAware:
    """Pages that are found often, and are dear to compute again, stay longer than LRU would keep them.

    The key is LRU's, and for each doubling of (how often it was found + 1) * cost a fifth of the time that
    pages are idle before they are evicted.  The cost of a token grows with its position, as attention does.

    Parameters
    ----------
    even_position : where attention costs as much as the matrices do; some 16,384 for a model of 1B
    """

    def __init__(self, even_position: int = 16384) -> None:
        self.even_position = integer("even_position", even_position, 1)

    def key(self, page: KeptPage) -> float:
        worth = (1 + page.num_hits) * (1 + page.position / self.even_position)
        priority = page.half_life * math.log2(1 + page.priority)
        return page.last_used + priority + COST_WEIGHT * page.idle_seconds * math.log2(worth)


class Retention:
    """Keys and deadlines of one pool's pages, and priorities of rows."""

    def __init__(
        self,
        pool: PagePool,
        max_sequences: int,
        page_size: int,
        clock: Callable[[], float],
        half_life: float,
        policy: KeepPolicy | None,
    ) -> None:
        self.pool, self.page_size, self.clock = pool, page_size, clock
        self.half_life, self.policy = half_life, policy
        self._priorities = np.zeros(max_sequences, np.int64)
        #: Zeros: forever.  Untouched, the rows of sequences that never come cost no memory.
        self._ttls = np.zeros(max_sequences)
        self._num_hits = np.zeros(pool.num_ids, np.int32)
        self._last_used = np.zeros(pool.num_ids)
        self._idle_seconds = half_life
        #: When a page's time is over; -inf for one that no sequence has left yet.
        self._deadlines = np.full(pool.num_ids, -FOREVER)
        #: (deadline, page id), of those that are finite.
        self._by_deadline: Any = SortedList()
        self.num_policy_errors = 0

    # ---- rows

    def set_row(self, row: int, priority: int | None, ttl: float | None) -> None:
        """Change what is given, of a row and the pages it will leave."""
        if priority is not None:
            self._priorities[row] = priority
        if ttl is not None:
            self._ttls[row] = 0 if ttl == FOREVER else ttl

    def copy_row(self, parent: int, row: int) -> None:
        """A fork has the priority and ttl of its parent."""
        self._priorities[row], self._ttls[row] = self._priorities[parent], self._ttls[parent]

    # ---- pages

    def publish(self, row: int, page_ids: list[int], positions: list[int]) -> None:
        """Pages whose tokens begin at these positions are indexed; what was there before is forgotten."""
        pages = np.array(page_ids, np.int32)
        self._num_hits[pages] = 0
        self._set_deadlines(pages, -FOREVER)
        self._rank(row, pages, positions, self.pool.set_keys)

    def find(self, row: int, pages: NDArray[np.int32], positions: Sequence[int]) -> None:
        """A new sequence begins with these pages, whose tokens begin at these positions."""
        self._num_hits[pages] += 1
        self._rank(row, pages, positions, self.pool.raise_keys)

    def leave(self, row: int, pages: NDArray[np.int32], positions: Sequence[int]) -> None:
        """A sequence that has these pages, whose tokens begin at these positions, ends or is cut."""
        ttl = float(self._ttls[row]) or FOREVER
        if ttl == FOREVER and not self._by_deadline:
            self._deadlines[pages] = FOREVER
        else:
            self._set_deadlines(pages, np.maximum(self._deadlines[pages], self.clock() + ttl))
        self._rank(row, pages, positions, self.pool.raise_keys)

    def was_found(self, page_id: int) -> bool:
        """Did a sequence begin with this page since it was published?"""
        return bool(self._num_hits[page_id])

    def next_page(self) -> tuple[int, str]:
        """The kept page that goes next, and why; there is one."""
        now = self.clock()
        while self._by_deadline and self._by_deadline[0][0] <= now:
            deadline, page_id = self._by_deadline[0]
            if self.pool.is_kept(page_id):
                return page_id, "time"
            self._by_deadline.discard((deadline, page_id))  # it has an owner, whose end will set another one
        return self.pool.first_kept, "pressure"

    def evict(self, page_id: int) -> None:
        """A step takes a page."""
        idle = self.clock() - float(self._last_used[page_id])
        self._idle_seconds += (idle - self._idle_seconds) / NUM_AVERAGED

    def move(self, old: int, new: int) -> None:
        """What was known of a page is known of another one, which holds the same tokens."""
        self._num_hits[new], self._last_used[new] = self._num_hits[old], self._last_used[old]
        pages = np.array([new], np.int32)
        self._set_deadlines(pages, self._deadlines[old])
        self.pool.set_keys(pages, self.pool.key(old))
        self.forget(old)

    def forget(self, page_id: int) -> None:
        """A page is not indexed any more."""
        if self._by_deadline:
            self._by_deadline.discard((self._deadlines[page_id], page_id))

    def repair(self) -> None:
        """An interrupt came while deadlines changed."""
        pages = np.flatnonzero(np.isfinite(self._deadlines))
        self._by_deadline = SortedList(
            (float(self._deadlines[page]), page) for page in pages.tolist() if self.pool.is_indexed(page)
        )

    def _set_deadlines(self, pages: NDArray[np.int32], deadlines: Any) -> None:
        old = self._deadlines[pages]
        self._deadlines[pages] = deadlines
        new = self._deadlines[pages]
        for page_id, before, after in zip(pages.tolist(), old.tolist(), new.tolist(), strict=True):
            if before == after:
                continue
            if math.isfinite(before):
                self._by_deadline.discard((before, page_id))
            if math.isfinite(after):
                self._by_deadline.add((after, page_id))

    def _rank(
        self,
        row: int,
        pages: NDArray[np.int32],
        positions: Sequence[int],
        change: Callable[[NDArray[np.int32], float], None],
    ) -> None:
        """Give pages whose tokens begin at these positions their keys."""
        now, priority = self.clock(), int(self._priorities[row])
        self._last_used[pages] = now
        if self.policy is None:
            change(pages, now + self.half_life * math.log2(1 + priority))
            return
        for index, page_id in enumerate(pages.tolist()):
            page = KeptPage(
                positions[index],
                int(self._num_hits[page_id]),
                now,
                priority,
                self.half_life,
                self._idle_seconds,
            )
            self.pool.set_keys(pages[index : index + 1], self._key_of(self.policy, page))

    def _key_of(self, policy: KeepPolicy, page: KeptPage) -> float:
        try:
            key = float(policy.key(page))
            if not math.isnan(key):
                return key
        except Exception:  # of the caller's code, whatever it is: pages are kept without it
            pass
        self.num_policy_errors += 1
        return page.last_used + page.half_life * math.log2(1 + page.priority)


def priority_of(priority: object) -> int:
    """Raises: ArgumentError unless it is an integer from 0 to 2**31 - 1."""
    return integer("priority", priority, 0, 2**31 - 1)


def seconds(name: str, value: object) -> float:
    """A number of seconds above 0, `inf` included.  Raises: ArgumentError."""
    if isinstance(value, float) and value == FOREVER:
        return FOREVER
    number = real(name, value, 0.0)
    if number == 0:
        raise ArgumentError(f"{name} is 0; give a number of seconds above 0")
    return number
