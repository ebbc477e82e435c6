"""The store: what a cache, its sequences and its steps share.

Pool, block tables, layout and threads, and one lock.  The lock covers bookkeeping; it is not held while
attention runs.  Calls that read or write pages enter the store for as long as they run, so that closing can
wait for them.

Imports block_table.  Imported by sequence, step and cache, which hold it and not each other.
"""

import threading
from collections.abc import Callable
from types import TracebackType

from ._binding import ffi, integer, new_pages, new_threads
from .block_table import BlockTables, Window
from .errors import CacheClosed
from .layout import PageLayout
from .pool import PagePool


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
        num_threads: int,
    ) -> None:
        self.layout = layout
        self.threads = new_threads(num_threads)
        self.pool = PagePool(num_pages, layout.page_bytes)
        self.tables = BlockTables(self.pool, layout.page_size, max_sequences, max_seq_len, window)
        self.layer_pages = ffi.new("pkv_pages[]", layout.num_layers)
        for layer in range(layout.num_layers):
            self._describe_layer(layer, num_pages)
        self.lock = threading.Lock()
        self.closed = False
        #: What to call for each open step when the cache is closed; the lock is held then.
        self.open_steps: dict[object, Callable[[], None]] = {}
        self._num_running = 0
        self._idle = threading.Condition(self.lock)

    def _describe_layer(self, layer: int, num_pages: int) -> None:
        layout = self.layout
        k = self.pool.address + layer * num_pages * layout.block_bytes
        self.layer_pages[layer] = new_pages(
            k,
            k + layout.head_bytes // 2,
            (layout.block_bytes, layout.head_bytes, layout.token_bytes),
            layout.dtype,
            layout.page_size,
            layout.num_kv_heads,
            layout.head_dim,
        )[0]

    def require_open(self) -> None:
        if self.closed:
            raise CacheClosed("the cache was closed; build a new one")

    def layer(self, layer: object) -> int:
        """`layer` as an index; ArgumentError when there is no such layer."""
        return integer("layer", layer, 0, self.layout.num_layers - 1)

    def __enter__(self) -> "Store":
        with self.lock:
            self.require_open()
            self._num_running += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.lock:
            self._num_running -= 1
            if not self._num_running:
                self._idle.notify_all()

    def close(self) -> None:
        """Refuse new calls, wait for those that run, roll open steps back, give the memory back."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            self._idle.wait_for(lambda: not self._num_running)
            for roll_back in list(self.open_steps.values()):
                roll_back()
            self.pool.close()
            ffi.release(self.threads)
