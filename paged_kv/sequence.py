"""A sequence: the handle of one growing list of tokens in a cache.

The tokens are in pages; the handle holds the sequence's id and nothing else.

Imports gathered.
"""

from collections import Counter
from types import TracebackType
from typing import overload

import numpy as np
from numpy.typing import NDArray

from ._binding import integer
from .errors import ArgumentError, ReentrantCall, StaleSequence
from .gathered import gather
from .lifetime import Uncopyable
from .pages.match import explain
from .pages.retention import priority_of, seconds
from .store import Store

#: The id of a sequence that was freed.
FREED = -1


class Sequence(Uncopyable):
    """Tokens of one sequence in a cache, made by `cache.sequence()`.

    ``len(seq)`` is the number of committed tokens, and so the next position.  A handle compares by identity
    and is always true.  `with` frees at exit; a handle that is collected is freed, too.
    """

    __slots__ = ("__weakref__", "_num_cached_tokens", "_seq_id", "_store")
    _instead = "fork() shares its pages"

    def __init__(self, store: Store, seq_id: int) -> None:
        self._store = store
        self._seq_id = seq_id
        self._num_cached_tokens = 0
        store.note_handle(self, seq_id)

    def __len__(self) -> int:
        """Tokens ever committed.  Raises: StaleSequence, CacheClosed."""
        self._store.require_open()
        return int(self._store.tables.rows.seq_lens[self._store.tables.rows.row(self._seq_id)])

    def __bool__(self) -> bool:
        return True

    @property
    def num_cached_tokens(self) -> int:
        """How many of its tokens came from the prefix cache when it was made; 0 after `reset`."""
        return self._num_cached_tokens

    @property
    def held_positions(self) -> NDArray[np.int32]:
        """int32 [held]: positions of the held tokens: the sinks and the last `window`, in order."""
        with self._store.reading():
            self._store.require_open()
            return self._store.tables.held_positions(self._store.tables.rows.row(self._seq_id))

    @property
    def attention_lost(self) -> float:
        """How much attention its tokens gave to the pages that it has dropped, while they were there: the sum
        of the pages' mean shares, of 1 for all that a token gives.  0 unless the eviction policy needs mass.

        What later tokens would have given them is not known; it is an estimate, and no bound.
        """
        with self._store.reading():
            self._store.require_open()
            row, budgets = self._store.tables.rows.row(self._seq_id), self._store.budgets
            return 0.0 if budgets is None else float(budgets.attention_lost[row])

    def gather(self, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A copy of one layer's keys and values.

        Returns: (k, v), float32 [held, num_kv_heads, head_dim] and [.., head_dim_v], oldest first: the
        tokens at `held_positions`, which are all of them without a window.
        Raises: ArgumentError, StaleSequence, CacheClosed.  Cost: copies every token.
        """
        k, v, _ = gather(self._store, [self._seq_id], layer, None, None)
        return k[0], v[0]

    @overload
    def fork(self, count: None = None, *, at: int | None = None) -> "Sequence": ...
    @overload
    def fork(self, count: int, *, at: int | None = None) -> "list[Sequence]": ...
    def fork(self, count: int | None = None, *, at: int | None = None) -> "Sequence | list[Sequence]":
        """A sequence that shares the pages of this one, or a list of `count` such.

        Parameters
        ----------
        count : None: one, and no list
        at : how many of its first tokens they hold; None: all that are committed

        Nothing is copied now.  The first sequence to append after the newest token of a shared page writes in
        place, since no other one sees that slot; the others get a copy of their tokens in the page, reserved
        with their steps.  A sequence in an open step can be forked.
        Raises: OutOfSequences, ArgumentError, also when the window at that length would need tokens whose
        pages were released; StaleSequence, CacheClosed.
        Cost: O(pages); takes no page.
        """
        num_forks = 1 if count is None else integer("count", count, 0)
        forks = new_sequences(self._store, num_forks, self, at)
        return forks[0] if count is None else forks

    def retain(self, *, priority: int | None = None, ttl: float | None = None) -> None:
        """How long its pages are worth keeping once no sequence has them; without prefix caching nothing.

        Parameters
        ----------
        priority : 0 is that of others; with p its pages count as used half_life * log2(1 + p) seconds later
            than they were, 600 s for 1.  None: as it is
        ttl : seconds after its end from which they go before all others; `inf`: never.  None: as it is

        It says in which order pages give way, and promises none.  What several sequences share is kept as
        the one wants that keeps it longer.
        Raises: ArgumentError, StaleSequence, CacheClosed.
        """
        priority = None if priority is None else priority_of(priority)
        ttl = None if ttl is None else seconds("ttl", ttl)
        store = self._store
        with store.lock:
            store.reclaim_abandoned()
            row = store.tables.rows.row(self._seq_id)
            if store.index is not None:
                store.index.retention.set_row(row, priority, ttl)

    def truncate(self, length: int) -> None:
        """Forget the newest tokens, from position `length` on, and release their pages.

        Raises: ArgumentError when there are fewer, and when the window at `length` would need tokens whose
        pages were released; SequenceBusy, StaleSequence, CacheClosed.
        Cost: O(released pages).
        """
        with self._store.lock:
            self._store.reclaim_abandoned()
            tables, index = self._store.tables, self._store.index
            tables.truncate(self._seq_id, length)
            if index is not None:
                row = tables.rows.row(self._seq_id)
                index.shorten(row, int(tables.rows.seq_lens[row]))

    def reset(self) -> None:
        """Forget every token and release the pages; the sequence can be used again.

        Raises: SequenceBusy, StaleSequence, CacheClosed.  Cost: O(pages).
        """
        with self._store.lock:
            self._store.reclaim_abandoned()
            if self._store.index is not None:
                self._store.index.leave(self._store.tables.rows.idle_row(self._seq_id))
            self._store.tables.reset(self._seq_id)
            if self._store.budgets is not None:
                self._store.budgets.attention_lost[self._store.tables.rows.row(self._seq_id)] = 0.0
            self._num_cached_tokens = 0

    def free(self) -> None:
        """Release everything; the handle is stale afterwards.

        Raises: SequenceBusy, StaleSequence, CacheClosed.  Cost: O(pages).
        """
        store = self._store
        if self._seq_id == FREED:
            store.require_open()
            raise StaleSequence("the sequence was freed already")
        try:
            lock = store.lock
        except (
            ReentrantCall
        ):  # in a finaliser or a signal handler, inside a call on this cache: when that is over
            store.free_later(self._seq_id)
        else:
            with lock:
                store.reclaim_abandoned()
                # A finaliser of a cycle runs after settle() has freed the cycle's sequences: then this frees
                # nothing.
                if not store.free(self._seq_id):
                    store.tables.rows.idle_row(self._seq_id)  # raises SequenceBusy
        self._seq_id = FREED

    def __enter__(self) -> "Sequence":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._seq_id != FREED and not self._store.closed:
            self.free()


def new_sequences(
    store: Store,
    count: int,
    parent: Sequence | None = None,
    at: object = None,
    salt: bytes = b"",
    priority: int = 0,
    budget: int | None = None,
) -> list[Sequence]:
    """Handles of `count` new sequences: empty and of this salt, or with the first `at` tokens of `parent`.

    Raises: OutOfSequences, ArgumentError, StaleSequence, CacheClosed.
    """
    with store.lock:
        store.reclaim_abandoned()
        # The parent is looked up before there is room for its forks.
        seq_id = None if parent is None else parent._seq_id
        if seq_id is not None:
            store.tables.rows.row(seq_id)
        seq_ids = store.tables.rows.next_seq_ids(count)
        # Handles are made before their rows are taken, so that an interrupt loses none.
        handles = [Sequence(store, seq_id) for seq_id in seq_ids]
        try:
            store.tables.add(seq_ids, seq_id, at, store.salt_number(salt))
            store.start_budgets(seq_ids, seq_id, budget)
            if parent is not None:
                _share_prefix(store, parent, handles)
            elif store.index is not None:
                for new_id in seq_ids:
                    store.index.start(store.tables.rows.row(new_id), None, priority)
        except BaseException:
            free_all(store, seq_ids)
            raise
    return handles


def select_sequences(store: Store, seqs: object, indices: object) -> list[Sequence]:
    """What `PagedKVCache.select` returns."""
    if not isinstance(seqs, (list, tuple)) or not all(
        isinstance(seq, Sequence) and seq._store is store for seq in seqs
    ):
        raise ArgumentError(f"seqs is {seqs!r:.80}; give a list of this cache's sequences")
    if not isinstance(indices, (list, tuple)):
        raise ArgumentError(f"indices is {indices!r:.80}; give a list of integers")
    places = [integer(f"indices[{i}]", index, 0, len(seqs) - 1) for i, index in enumerate(indices)]
    counts = Counter(places)
    left_out = [seq for i, seq in enumerate(seqs) if i not in counts]
    with store.lock:
        store.reclaim_abandoned()
        for seq in (*left_out, *(seqs[i] for i in counts)):
            store.tables.rows.row(seq._seq_id)
        for seq in left_out:
            store.tables.rows.idle_row(seq._seq_id)
    forks: dict[int, list[Sequence]] = {}
    try:
        for i, count in counts.items():
            if count > 1:
                forks[i] = seqs[i].fork(count - 1)
    except BaseException:
        for made in forks.values():
            for fork in made:
                fork.free()
        raise
    for seq in left_out:
        seq.free()
    taken: set[int] = set()
    selected = []
    for i in places:
        selected.append(forks[i].pop() if i in taken else seqs[i])
        taken.add(i)
    return selected


def free_all(store: Store, seq_ids: list[int]) -> None:
    """After an error between rows and their caller, which has no handle; the error may keep ours for long."""
    for seq_id in seq_ids:
        store.free(seq_id)


def _share_prefix(store: Store, parent: Sequence, forks: list[Sequence]) -> None:
    """Forks offer, and were given, as much of a cached prefix as they hold."""
    for fork in forks:
        row = store.tables.rows.row(fork._seq_id)
        seq_len = int(store.tables.rows.seq_lens[row])
        fork._num_cached_tokens = min(parent._num_cached_tokens, seq_len)
        if store.index is not None:
            store.index.fork(store.tables.rows.row(parent._seq_id), row, seq_len)


def matched_sequence(
    store: Store, ids: NDArray[np.int32], salt: bytes, priority: int, budget: int | None = None
) -> Sequence:
    """A new sequence of a salt that shares the longest prefix of these ids that the cache holds.

    Raises: OutOfSequences, CacheClosed.
    """
    with store.lock:
        store.reclaim_abandoned()
        (seq_id,) = store.tables.rows.next_seq_ids(1)
        handle = Sequence(store, seq_id)
        number = store.salt_number(salt)
        if store.index is None:
            store.tables.add([seq_id], salt=number)
            store.start_budgets([seq_id], None, budget)
            return handle
        num_ids, ids = len(ids), store.findable(ids, budget)
        found = store.index.match(ids, number)
        num_tokens, reason = found.num_tokens, explain(store.index, found, ids, number, store.plans).reason
        try:
            row = store.tables.add_pages(seq_id, number, found.page_ids, num_tokens)
            store.start_budgets([seq_id], None, budget)
            store.index.start(row, found, priority)
            handle._num_cached_tokens = num_tokens
            store.index.counts.count(num_ids, num_tokens, reason)
        except BaseException:
            free_all(store, [seq_id])
            raise
    return handle
