"""Pins: pages of a cached prefix that no step may evict, for as long as the pin lasts.

A pin is a hidden sequence of these pages, so it takes one of max_sequences, and is given back as one: by
`release`, when its time is over, or when it is collected.

Imports sequence.
"""

from contextlib import suppress
from types import TracebackType
from typing import Literal, TypeAlias

from .errors import CacheClosed, OutOfSequences, StaleSequence
from .lifetime import Uncopyable
from .pages.entry import Entry
from .pages.match import Match
from .pages.prefix_index import PrefixIndex
from .sequence import Sequence, free_all
from .store import Store

Outcome: TypeAlias = Literal["accepted", "clipped", "rejected"]


class Pin(Uncopyable):
    """Tokens whose pages stay, made by `cache.pin(match)`; `with` releases it at exit.

    num_tokens : from the first on
    outcome : "accepted": all that the match has; "clipped": to what is still there, or to the budget;
        "rejected": nothing is left of it, or no sequence is free
    """

    __slots__ = ("__weakref__", "_seq", "num_tokens", "outcome")
    _instead = "pin the match again"

    def __init__(self, seq: Sequence | None, num_tokens: int, outcome: Outcome) -> None:
        self._seq, self.num_tokens, self.outcome = seq, num_tokens, outcome

    def release(self) -> None:
        """Let the pages go, as those of a sequence that ends.  A second release does nothing."""
        seq, self._seq = self._seq, None
        if seq is not None:
            with suppress(StaleSequence, CacheClosed):  # its time was over
                seq.free()

    def __enter__(self) -> "Pin":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def pin(store: Store, match: Match, ttl: float | None) -> Pin:
    """Pin what is there of a match, as far as the budget allows."""
    with store.lock:
        store.reclaim_abandoned()
        store.release_old_pins()
        index = store.index
        if index is None or match.ids is None:
            return Pin(None, 0, "rejected")
        number = store.salts.numbers.get(match.salt, 0)
        found = index.match(match.ids[: match.num_tokens + 1], number)
        num_pages = _pages_in_budget(store, found.page_ids)
        num_tokens = min(found.num_tokens, num_pages * index.page_size)
        if store.tables.window is not None:  # its pages are those of the window: all are needed
            num_tokens = found.num_tokens if num_pages == len(found.page_ids) else 0
        if not num_tokens:
            return Pin(None, 0, "rejected")
        entries = found.entries[: num_tokens // index.page_size]
        seq = _pinned_sequence(store, index, number, entries, found.page_ids[:num_pages], num_tokens)
        if seq is None:
            return Pin(None, 0, "rejected")
        if ttl is not None:
            store.pins[seq._seq_id] = index.retention.clock() + ttl
    return Pin(seq, num_tokens, "accepted" if num_tokens == match.num_tokens else "clipped")


def _pages_in_budget(store: Store, page_ids: list[int]) -> int:
    """How many of these first pages may be pinned; those that are pinned already cost nothing."""
    pinned = store.pinned_pages()
    room = store.max_pinned - len(pinned)
    for i, page_id in enumerate(page_ids):
        room -= page_id not in pinned
        if room < 0:
            return i
    return len(page_ids)


def _pinned_sequence(
    store: Store, index: PrefixIndex, salt: int, path: list[Entry], page_ids: list[int], num_tokens: int
) -> Sequence | None:
    """A hidden sequence of these pages; None when no row is free."""
    try:
        (seq_id,) = store.tables.rows.next_seq_ids(1)
    except OutOfSequences:
        return None
    seq = Sequence(store, seq_id)
    store.pins[seq_id] = float("inf")
    try:
        index.hold(store.tables.add_pages(seq_id, salt, page_ids, num_tokens), path)
    except BaseException:
        free_all(store, [seq_id])
        raise
    return seq
