"""Plans: what an open step has reserved, as C wrote it.

A plan is one buffer: a `pkv_plan`, followed by its arrays.  C opens it, marks layers as written, and ends
it.  Python reads the arrays in place, as views that cannot be written.

Imports attention.arrays and lifetime.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._binding import ffi, lib
from ..attention.arrays import read_only
from ..lifetime import Uncopyable


class Plan(Uncopyable):
    """A `pkv_plan` and its arrays, in one buffer that the step owns.  `Step` describes the arrays."""

    __slots__ = ("_buffer", "handle", "num_bytes", "num_pages", "num_tokens")

    def __init__(self, num_bytes: int) -> None:
        self.num_tokens = self.num_pages = 0
        self.take_memory(num_bytes)

    def take_memory(self, num_bytes: int) -> None:
        """Allocate at least num_bytes; the plan in it is not open."""
        self._buffer = np.empty((num_bytes + 7) // 8, np.int64)
        self.num_bytes = self._buffer.nbytes
        handle = ffi.from_buffer("pkv_plan *", self._buffer)
        handle.is_open = 0
        self.handle = handle

    @property
    def is_open(self) -> bool:
        """Was it opened, and neither committed nor rolled back?"""
        return bool(self.handle.is_open)

    @property
    def is_written(self) -> bytes:
        """A byte per layer: 1 once it has the new tokens' keys and values."""
        return bytes(ffi.buffer(self.handle.is_written, self.handle.num_layers))

    @property
    def num_seqs(self) -> int:
        return int(self.handle.batch.num_seqs)

    @property
    def batch(self) -> Any:
        """The `pkv_batch *`; it must not outlive the plan."""
        return ffi.addressof(self.handle.batch)

    def int32(self, pointer: Any, count: int) -> NDArray[np.int32]:
        """One of the arrays, as a view that cannot be made writable: C trusts its contents."""
        begin = ffi.cast("char *", pointer) - ffi.cast("char *", self.handle)
        return read_only(self._buffer.view(np.int32)[begin // 4 : begin // 4 + count])

    # ---- its arrays

    @property
    def positions(self) -> NDArray[np.int32]:
        """int32 [num_tokens]: the position of each new token in its sequence."""
        return self.int32(self.handle.positions, self.num_tokens)

    @property
    def qo_indptr(self) -> NDArray[np.int32]:
        """int32 [num_seqs + 1]: where each sequence's rows begin."""
        return self.int32(self.batch.qo_indptr, self.num_seqs + 1)

    @property
    def rows(self) -> NDArray[np.int32]:
        """int32 [num_seqs]: rows of the block tables."""
        return self.int32(self.handle.rows, self.num_seqs)

    @property
    def seq_lens(self) -> NDArray[np.int32]:
        """int32 [num_seqs], including the new tokens."""
        return self.int32(self.batch.seq_lens, self.num_seqs)

    @property
    def new_known(self) -> NDArray[np.int32]:
        """int32 [num_seqs]: new tokens that are known by their ids, all of a sequence or none."""
        return self.int32(self.handle.new_known, self.num_seqs)

    @property
    def is_complete(self) -> bool:
        """Can it be committed: is it open, and every layer written?"""
        return self.is_open and (not self.num_tokens or all(self.is_written))

    @property
    def first_pages(self) -> NDArray[np.int32]:
        """int32 [num_seqs]: the first logical page behind the sinks that is read."""
        return self.int32(self.batch.first_pages, self.num_seqs)

    @property
    def kv_indptr(self) -> NDArray[np.int32]:
        """int32 [num_seqs + 1]: where each sequence's pages begin."""
        return self.int32(self.batch.kv_indptr, self.num_seqs + 1)

    @property
    def page_numbers(self) -> NDArray[np.int32]:
        """int32 [num_pages]: the logical page of each, where pages can be dropped."""
        return self.int32(self.batch.page_numbers, self.num_pages)

    def num_new(self, index: int) -> int:
        """New tokens of one sequence."""
        return int(self.qo_indptr[index + 1] - self.qo_indptr[index])

    @property
    def mass(self) -> NDArray[np.float64]:
        """float64 [num_pages]: attention so far, summed over layers, q heads and rows."""
        return self._units(self.handle.mass)

    @property
    def recent_mass(self) -> NDArray[np.float64]:
        """The same of the last 32 rows of each sequence."""
        recent, num_rows = self._units(self.handle.recent_mass), np.diff(self.qo_indptr)
        is_short = np.repeat(num_rows <= lib.PKV_RECENT_ROWS, np.diff(self.kv_indptr))
        recent[is_short] = self.mass[is_short]
        return recent

    def _units(self, pointer: Any) -> NDArray[np.float64]:
        units = self.int32(pointer, 2 * self.num_pages).view(np.int64)
        return units.astype(np.float64) * np.float64(2.0**-30)

    def forget_ids(self) -> None:
        """Take the new tokens' ids as unknown."""
        for index in range(self.num_seqs):
            self.handle.new_known[index] = 0

    def pages_of(self, index: int) -> NDArray[np.int32]:
        """The pages of one sequence, in logical order."""
        begin, end = self.kv_indptr[index : index + 2]
        return self.int32(self.batch.kv_indices, self.num_pages)[begin:end]

    @property
    def slot_mapping(self) -> NDArray[np.int64]:
        """int64 [num_tokens]: page_id * page_size + offset of each new token."""
        return self.int32(self.handle.slot_mapping, 2 * self.num_tokens).view(np.int64)

    @property
    def first_page(self) -> NDArray[np.int32]:
        """int32 [num_seqs]: the logical page at which each row of `block_table` begins; 0 with sinks, and
        where pages can be dropped."""
        first_pages = self.int32(self.batch.first_pages, self.num_seqs)
        return first_pages if not self.batch.sink_pages else read_only(np.zeros_like(first_pages))

    @property
    def block_table(self) -> NDArray[np.int32]:
        """int32 [num_seqs, max_pages]: page ids in logical order from `first_page` on, else -1."""
        batch = self.batch
        page_ids = self.int32(batch.kv_indices, self.num_pages)
        num_pages = np.diff(self.kv_indptr)
        rows = np.repeat(np.arange(self.num_seqs), num_pages)
        if batch.page_numbers:
            numbers = self.int32(batch.page_numbers, self.num_pages)
            table = np.full((self.num_seqs, numbers.max(initial=-1) + 1), -1, np.int32)
            table[rows, numbers] = page_ids
            return read_only(table)
        # Page i of a sequence's list goes to column i, or past the gap when it holds no sinks.
        gaps = self.int32(batch.first_pages, self.num_seqs) - self.first_page - batch.sink_pages
        gaps = np.where(num_pages > batch.sink_pages, np.maximum(gaps, 0), 0)
        columns = np.arange(self.num_pages) - np.repeat(np.cumsum(num_pages) - num_pages, num_pages)
        columns += np.where(columns >= batch.sink_pages, gaps[rows], 0)
        table = np.full((self.num_seqs, (num_pages + gaps).max(initial=0)), -1, np.int32)
        table[rows, columns] = page_ids
        return read_only(table)
