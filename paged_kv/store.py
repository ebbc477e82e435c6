"""The store: what a cache, its sequences and its steps share.

Pool, block tables, layout and threads, and one lock.  The lock covers bookkeeping; it is not held while
attention runs.  Calls that read or write pages enter the store for as long as they run, so that closing can
wait for them.

Imports block_table and attention.  Imported by sequence, step and cache, which hold it and not each other.
"""

import os
import threading
from collections import deque
from types import TracebackType
from typing import TypeVar
from weakref import WeakSet

from ._binding import DTYPE_CODES, ffi, integer, shared_threads
from .attention import Append, RepeatedAttention
from .block_table import BlockTables, Plan, Window
from .errors import CacheClosed
from .layout import PageLayout
from .machine import shared_cache_bytes
from .pool import PagePool

Call = TypeVar("Call", Append, RepeatedAttention)


class Store:
    """Pages for `num_pages * layout.page_size` tokens and the rows of `max_sequences` sequences.

    `with store:` runs a call that touches pages: CacheClosed when it is too late for that.
    """

    def __init__(
        self,
        layout: PageLayout,
        num_pages: int,
        max_sequences: int,
        max_seq_len: int,
        window: Window | None,
        num_threads: int | None,
    ) -> None:
        self.layout = layout
        self.threads = shared_threads(num_threads)
        self.pool = PagePool(num_pages, layout.page_bytes)
        self.tables = BlockTables(self.pool, layout.page_size, max_sequences, max_seq_len, window)
        self.layer_pages = ffi.new("pkv_pages[]", layout.num_layers)
        self.pages_of = [self.layer_pages + layer for layer in range(layout.num_layers)]
        #: Calls that can be repeated; whoever repeats one takes it for as long as it runs.
        self.repeatable: deque[RepeatedAttention] = deque(maxlen=4)
        self.repeatable_appends: deque[Append] = deque(maxlen=4)
        # All layers are read in turn, and whatever a model reads between them.
        cached_bytes = shared_cache_bytes() // 2 // layout.num_layers
        for layer in range(layout.num_layers):
            self._describe_layer(layer, num_pages, cached_bytes)
        self.closed = False
        #: Plans of open steps, by identity.
        self.open_plans: dict[int, Plan] = {}
        #: What collected handles leave behind.  Their finalisers may run anywhere, also while the lock is
        #: held: they only append here, and whoever takes the lock next settles it.
        self.abandoned_plans: deque[Plan] = deque()
        self.abandoned_keys: deque[int] = deque()
        self._renew_lock()
        _stores.add(self)

    def _renew_lock(self) -> None:
        """A lock that nobody holds: at first, and in a forked child, whose other threads are not there."""
        self.lock = threading.Lock()
        self._idle = threading.Condition(self.lock)
        #: An entry for each call that runs.  It is made before `closed` is looked at, and `close` looks for
        #: entries after it has set that: one of the two sees the other, and no call waits for a lock.
        self._running: deque[None] = deque()

    def _describe_layer(self, layer: int, num_pages: int, cached_bytes: int) -> None:
        layout = self.layout
        k = self.pool.address + layer * num_pages * layout.block_bytes
        self.layer_pages[layer] = {
            "k": ffi.cast("char *", k),
            "v": ffi.cast("char *", k + layout.page_size * layout.key_bytes),
            "k_page_stride": layout.block_bytes,
            "k_head_stride": layout.head_bytes,
            "k_token_stride": layout.key_bytes,
            "v_page_stride": layout.block_bytes,
            "v_head_stride": layout.head_bytes,
            "v_token_stride": layout.value_bytes,
            "k_dtype": DTYPE_CODES[layout.dtype],
            "v_dtype": DTYPE_CODES[layout.dtype],
            "page_size": layout.page_size,
            "num_kv_heads": layout.num_kv_heads,
            "head_dim": layout.head_dim,
            "head_dim_v": layout.head_dim_v,
            "cached_bytes": cached_bytes,
        }

    def require_open(self) -> None:
        if self.closed:
            raise CacheClosed("the cache was closed; build a new one")

    def settle(self) -> None:
        """First of what is done under the lock: CacheClosed, or give back what collected handles held."""
        self.require_open()
        while self.abandoned_plans:
            self.roll_back(self.abandoned_plans.popleft())
        while self.abandoned_keys:
            self.tables.free(self.abandoned_keys.popleft())

    def roll_back(self, plan: Plan) -> None:
        del self.open_plans[id(plan)]
        self.tables.rollback(plan)

    def layer(self, layer: object) -> int:
        """`layer` as an index; ArgumentError when there is no such layer."""
        if type(layer) is int and 0 <= layer < len(self.pages_of):
            return layer
        return integer("layer", layer, 0, self.layout.num_layers - 1)

    def __enter__(self) -> "Store":
        self._running.append(None)
        if self.closed:
            self.__exit__(None, None, None)
            self.require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running:  # a child that was forked within a call has none
            self._running.pop()
        if self.closed:
            with self.lock:
                self._idle.notify_all()

    def close(self) -> None:
        """Refuse new calls, wait for those that run, roll open steps back, give the memory back."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            self._idle.wait_for(lambda: not self._running)
            for plan in list(self.open_plans.values()):
                self.roll_back(plan)
            self.pool.close()


def taken(calls: deque[Call]) -> Call | None:
    """The last of them, which is the taker's until it is put back; threads may take at once."""
    try:
        return calls.pop()
    except IndexError:
        return None


_stores: WeakSet[Store] = WeakSet()


def _renew_locks() -> None:
    for store in _stores:
        store._renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
