"""Frames: what a pool looks like at one moment, and what has changed since the one before.

    {"t": seconds, "kind": "full" or "delta", "page_size": .., "num_pages": ..,
     "pages": [page, state, references, owner, parent, page, ...],
     "seqs": [[row, serial, tokens, [page, ...] or null], ...], "gone": [row, ...], "stats": {...}}

A page's state is 0 free, 1 kept or 2 owned, + 4 pinned, + 8 in an open step.  Its owner is the first row that
holds it; its parent is the page before it in the prefix index; -1 is none.  A full frame names all pages that
are not free and all sequences, a delta those that have changed; null: the pages of a sequence have not.

`cache.record(path)` writes a file of such lines, and the server's page draws them.

Imports store.
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._binding import ffi, int32_pointer, lib, real
from .errors import CacheClosed
from .lifetime import Uncopyable
from .pages.rows import ROW_BITS
from .store import Store

FREE, KEPT, OWNED, PINNED, OPEN = 0, 1, 2, 4, 8
NONE = -1
#: Frames of a recording after which one is full, so that a reader can begin in the middle.
FRAMES_BETWEEN_FULL = 100


class Held(NamedTuple):
    """The pages that sequences hold, one array entry a sequence, or one a page of each.

    rows, serials, lens, counts : of each sequence its row, a serial number, its tokens, and how many pages
    ids : pages of the first sequence in order, then those of the second, ...
    is_open : of each of these, whether an open step writes it
    """

    rows: NDArray[np.int64]
    serials: NDArray[np.int64]
    lens: NDArray[np.int64]
    counts: NDArray[np.int64]
    ids: NDArray[np.int32]
    is_open: NDArray[np.bool_]


class Frames:
    """The frames of one cache, for one reader.

    Cost of `next`: O(num_pages + held pages), in numpy; the cache's lock is held for a part of it.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock, self._begin = store, clock, clock()
        num_pages, max_sequences = store.pool.num_ids, store.rows.max_sequences
        self._ref_counts, self._indexed = np.zeros(num_pages, np.int32), np.zeros(num_pages, np.uint8)
        #: int32 [4, num_pages]: state, references, owner and parent, as the last frame had them.
        self._pages = np.zeros((4, num_pages), np.int32)
        #: [3, max_sequences]: serial number, tokens and a hash of the pages of each row, likewise.
        self._seqs = np.zeros((3, max_sequences), np.int64)
        ring_pages = store.tables.page_ids.shape[1]
        self._weights = np.random.default_rng().integers(2**62, size=(ring_pages,))
        self._is_first = True

    def next(self, *, full: bool = False) -> dict[str, Any]:
        """The frame of now.

        full : everything, not only what has changed since the last frame; the first one always is
        Raises: CacheClosed.
        """
        store = self._store
        with store.lock:
            store.reclaim_abandoned()
            lib.pkv_pool_describe(
                store.pool.handle,
                int32_pointer("ref_counts", self._ref_counts),
                ffi.from_buffer("uint8_t[]", self._indexed),
            )
            now = self._clock() - self._begin
            held = self._held()
            pinned = [store.rows.row(seq_id) for seq_id in store.pins if store.rows.is_idle(seq_id)]
            parents = None if store.index is None else store.index.parents.copy()
            stats = self._stats()
        full, self._is_first = full or self._is_first, False
        pages = self._described(held, pinned, parents)
        is_changed = pages[0] != FREE if full else (pages != self._pages).any(axis=0)
        changed = np.flatnonzero(is_changed)
        self._pages = pages
        listed, gone = self._changed_seqs(held, full)
        return {
            "t": round(now, 4),
            "kind": "full" if full else "delta",
            "page_size": store.layout.page_size,
            "num_pages": store.pool.num_ids,
            "pages": np.vstack([changed, pages[:, changed]]).T.ravel().tolist(),
            "seqs": listed,
            "gone": gone,
            "stats": stats,
        }

    def _held(self) -> Held:
        rows, tables, page_size = self._store.rows, self._store.tables, self._store.layout.page_size
        live = np.flatnonzero(rows.seq_ids[: rows.num_rows] > 0)
        serials, lens = rows.seq_ids[live] >> ROW_BITS, rows.seq_lens[live].astype(np.int64)
        if tables.window is not None:  # what an open step has reserved is not shown
            parts = [tables.held_pages(row)[1] for row in live.tolist()]
            counts = np.array([len(part) for part in parts], np.int64)
            ids = np.concatenate([np.empty(0, np.int32), *parts])
            return Held(live, serials, lens, counts, ids, np.zeros(len(ids), bool))
        reserved = rows.reserved_lens[live]
        counts = -(-np.maximum(lens, reserved) // page_size)
        place = np.arange(counts.max(initial=0))
        is_there = place < counts[:, None]
        is_open = (place >= (lens // page_size)[:, None]) & (reserved > lens)[:, None]
        return Held(
            live, serials, lens, counts, tables.page_ids[live, : len(place)][is_there], is_open[is_there]
        )

    def _described(
        self, held: Held, pinned: list[int], parents: NDArray[np.int32] | None
    ) -> NDArray[np.int32]:
        """int32 [4, num_pages]: state, references, owner and parent of each page."""
        pages = np.empty((4, len(self._ref_counts)), np.int32)
        is_indexed = self._indexed != 0
        pages[0] = np.where(self._ref_counts > 0, OWNED, self._indexed * np.uint8(KEPT))
        pages[1], pages[2] = self._ref_counts, NONE
        pages[3] = NONE if parents is None else np.where(is_indexed, parents, NONE)
        rows = np.repeat(held.rows, held.counts)
        pages[2, held.ids[::-1]] = rows[::-1]  # of several, the first row
        pages[0, held.ids[held.is_open]] |= OPEN
        if pinned:
            pages[0, held.ids[np.isin(rows, pinned)]] |= PINNED
        return pages

    def _changed_seqs(self, held: Held, full: bool) -> tuple[list[Any], list[int]]:
        """Sequences that are new or not as they were, and rows that are none any more."""
        if full:
            self._seqs[:] = 0
        ends: NDArray[np.int64] = np.cumsum(held.counts)
        begins = ends - held.counts
        places = np.arange(len(held.ids)) - np.repeat(begins, held.counts)
        sums: NDArray[np.int64] = np.concatenate(
            [[0], (self._weights[places] * (held.ids + 1)).cumsum()]
        )  # modulo 2**64
        seqs = np.zeros_like(self._seqs)
        seqs[:, held.rows] = held.serials, held.lens, sums[ends] - sums[begins]
        is_new = seqs != self._seqs
        listed = []
        for i in np.flatnonzero(is_new[:, held.rows].any(axis=0)).tolist():
            row = int(held.rows[i])
            has_other_pages = is_new[0, row] or is_new[2, row]
            ids = held.ids[begins[i] : ends[i]].tolist() if has_other_pages else None
            listed.append([row, int(held.serials[i]), int(held.lens[i]), ids])
        gone = np.flatnonzero((self._seqs[0] > 0) & (seqs[0] == 0)).tolist()
        self._seqs = seqs
        return listed, gone

    def _stats(self) -> dict[str, Any]:
        store = self._store
        pool, index = store.pool, store.index
        num_kept, (num_pages, num_free) = pool.num_kept, pool.counts
        return {
            "used": num_pages - num_free - num_kept,
            "kept": num_kept,
            "free": num_free,
            "tokens": store.tables.num_tokens,
            "sequences": store.rows.num_sequences,
            "queried": index.counts.num_queried_tokens if index else 0,
            "hits": index.counts.num_hit_tokens if index else 0,
            "evictions": sum(index.counts.evictions.values()) if index else 0,
        }


class Recording(Uncopyable):
    """A thread that writes frames into a file; made by `cache.record`.

    `with` or `close` ends it; so does the end of its cache.
    """

    _instead = "record into another file"

    def __init__(self, store: Store, path: Path, every: float) -> None:
        self._frames, self._every = Frames(store), every
        self._file = path.open("w", encoding="utf-8")
        self._is_over = threading.Event()
        self.num_frames = 0
        self._thread = threading.Thread(target=self._run, name="paged_kv recording", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                is_last = self._is_over.wait(self._every if self.num_frames else 0)
                self._write()
                if is_last:
                    return
        except CacheClosed:
            pass

    def _write(self) -> None:
        frame = self._frames.next(full=self.num_frames % FRAMES_BETWEEN_FULL == 0)
        self._file.write(json.dumps(frame, separators=(",", ":")) + "\n")
        self._file.flush()
        self.num_frames += 1

    def close(self) -> None:
        """Write the last frame, and close the file."""
        self._is_over.set()
        self._thread.join()
        self._file.close()

    def __enter__(self) -> "Recording":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def record(store: Store, path: object, every: object) -> Recording:
    """What `PagedKVCache.record` returns."""
    store.require_open()
    return Recording(store, Path(str(path)), real("every", every, 0.001))
