"""The page pool: pages in one aligned mapping, counted by their owners; of one size, or of several formats.

A page is free, owned (one reference), shared (several), or kept: no owner holds it, but an index names it.
Calls take and give back n pages at once, all of them or none.

All memory is touched when the pool is built, so that a lack of it is an error then and not a signal later.

Imports _binding, machine, lifetime and slabs.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import machine
from .._binding import check, ffi, int32_pointer, integer, lib
from ..errors import OutOfPages
from ..lifetime import Uncopyable
from .slabs import SlabSizes

MAX_PAGE_BYTES = 2**40


class PagePool(Uncopyable):
    """num_pages pages of page_bytes bytes (a multiple of 64), reserved once and never moved.

    num_parts : regions that follow each other, each with an equal part of every page
    slabs : instead of the above, of pages of several formats; `acquire` gives pages of format 0 unless it
        says another one, and ids are not consecutive: arrays by page id have `num_ids` entries

    Raises: ArgumentError; MemoryError, naming both sizes, when the machine or its control group has less.
    Cost: touches every byte once.
    """

    def __init__(
        self, num_pages: int = 1, page_bytes: int = 64, num_parts: int = 1, slabs: SlabSizes | None = None
    ) -> None:
        self.slabs = slabs
        self.num_pages = integer("num_pages", num_pages, 1)
        self.page_bytes = integer("page_bytes", page_bytes, 64, MAX_PAGE_BYTES)
        self.num_bytes = self.num_pages * self.page_bytes
        what = f"a pool of {self.num_pages} pages of {self.page_bytes} bytes ({mebibytes(self.num_bytes)})"
        if slabs is not None:
            self.num_bytes = slabs.num_bytes
            what = (
                f"a pool of {slabs.num_slabs} slabs of {slabs.slab_bytes} bytes ({mebibytes(self.num_bytes)})"
            )
        _require_memory(self.num_bytes)
        # The destructor exists before the pool does, so that an interrupt in between leaks no memory.
        self._owner = ffi.gc(ffi.new("pkv_pool **"), lib.pkv_pool_destroy)
        if slabs is None:
            check(lib.pkv_pool_create(self.num_pages, self.page_bytes, self._owner), what)
            lib.pkv_pool_set_parts(self._owner[0], num_parts)
        else:
            sizes = [slabs.num_slabs, slabs.slab_bytes, len(slabs.page_bytes), slabs.page_bytes, slabs.floors]
            check(lib.pkv_pool_create_slabs(ffi.new("pkv_slab_sizes *", sizes), self._owner), what)
            self.num_pages = slabs.num_slabs * max(slabs.places)
        self.handle = self._owner[0]
        #: Page ids are below it.
        self.num_ids = int(lib.pkv_pool_num_ids(self.handle))

    def num_available(self, format: int) -> int:
        """Pages of a format that can be taken now."""
        return int(lib.pkv_pool_num_available(self.handle, format))

    @property
    def num_reclaimable(self) -> int:
        """Pages of format 0 that can be taken once all kept pages are evicted."""
        return int(lib.pkv_pool_num_reclaimable(self.handle, 0))

    def num_reclaimable_without(self, page_ids: NDArray[np.int32]) -> int:
        """The same, if these pages, which have one owner each, had none."""
        ids = ffi.from_buffer("int32_t[]", page_ids)
        return int(lib.pkv_pool_num_reclaimable_without(self.handle, 0, len(page_ids), ids))

    def open_pages_for(self, count: int, format: int) -> int:
        """Pages of format 0 that take the slabs of `count` pages of a format."""
        if self.slabs is None:
            return 0
        places = self.slabs.places
        return int(-(-count // places[format]) * places[0])

    def room_groups(self, page_ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """Which of these pages, which have one owner each, leave room for pages of format 0 only together.

        Returns: a number of each; pages of format 0 leave room alone, those of other formats that empty a
        slab have the number of the first of them.  -1: others have pages of its slab, so that it leaves none
        """
        each = np.arange(len(page_ids))
        if self.slabs is None:
            return each
        slabs, is_owned = page_ids >> lib.pkv_pool_shift(self.handle), self.ref_counts() > 0
        num_owned = is_owned.reshape(self.slabs.num_slabs, -1).sum(axis=1)
        num_here = np.bincount(slabs, minlength=self.slabs.num_slabs)
        first = np.full(self.slabs.num_slabs, len(page_ids))
        np.minimum.at(first, slabs, each)
        together = np.where(num_here[slabs] == num_owned[slabs], first[slabs], -1)
        groups: NDArray[np.int64] = np.where(self.formats_of(page_ids) == 0, each, together)
        return groups

    @property
    def counts(self) -> tuple[int, int]:
        """How many pages there are, as they lie, and how many of them are free; empty slabs have pages of the
        smallest format.
        """
        if self.slabs is None:
            return self.num_pages, self.num_free + self.num_trimmed
        formats = ffi.buffer(lib.pkv_pool_slab_formats(self.handle), self.slabs.num_slabs)
        slabs = np.bincount(np.frombuffer(formats, np.int8) + 1, minlength=len(self.slabs.places) + 1)
        places = (max(self.slabs.places), *self.slabs.places)
        num_pages = int(slabs @ np.array(places))
        return num_pages, num_pages - sum(map(self.num_used, range(len(self.slabs.places))))

    def wasted_bytes(self, format: int) -> int:
        """Behind the last page of the slabs that a format has."""
        if self.slabs is None:
            return 0
        formats = ffi.buffer(lib.pkv_pool_slab_formats(self.handle), self.slabs.num_slabs)
        num_slabs = int((np.frombuffer(formats, np.int8) == format).sum())
        return num_slabs * self.slabs.wasted[format]

    def twin(self, page_id: int) -> int:
        """The page of the same tokens in the other format; -1: none."""
        return int(lib.pkv_pool_twin(self.handle, page_id))

    def num_used(self, format: int) -> int:
        """Pages of a format that are owned or kept."""
        return int(lib.pkv_pool_num_used(self.handle, format))

    def format_of(self, page_id: int) -> int:
        """The format of a page that is not free."""
        return int(lib.pkv_pool_format(self.handle, page_id))

    def formats_of(self, page_ids: NDArray[np.int32]) -> NDArray[np.int8]:
        """The formats of pages that are not free."""
        if self.slabs is None:
            return np.zeros(len(page_ids), np.int8)
        formats = ffi.buffer(lib.pkv_pool_slab_formats(self.handle), self.slabs.num_slabs)
        found: NDArray[np.int8] = np.frombuffer(formats, np.int8)[page_ids >> lib.pkv_pool_shift(self.handle)]
        return found

    @property
    def num_free(self) -> int:
        return int(lib.pkv_pool_num_free(self.handle))

    @property
    def num_trimmed(self) -> int:
        """Pages that would be free, but whose memory was given back."""
        return int(lib.pkv_pool_num_trimmed(self.handle))

    @property
    def resident_bytes(self) -> int:
        """Bytes that were not given back."""
        return int(lib.pkv_pool_resident_bytes(self.handle))

    def trim(self) -> int:
        """Give back the memory of blocks of 2 MiB that hold free pages only.  Returns: the bytes."""
        return int(lib.pkv_pool_trim(self.handle))

    def restore(self, count: int) -> str | None:
        """Take memory again, so that `count` trimmed pages are free.

        Returns: None; or a sentence, when the machine or its control group has less.  Another process may
        still take it in between.
        """
        needed = int(lib.pkv_pool_bytes_to_restore(self.handle, count))
        available = machine.available_memory()
        if available is None or needed <= available:
            if lib.pkv_pool_restore(self.handle, count) == lib.PKV_OK:
                return None
            available = available or 0
        memory = f"{mebibytes(needed)} again, {mebibytes(available)} are available"
        return f"{count} of them were trimmed and take {memory}"

    @property
    def num_kept(self) -> int:
        return int(lib.pkv_pool_num_kept(self.handle))

    @property
    def first_kept(self) -> int:
        """The kept page of the smallest key, and of these the one kept for longest; -1 when there is none."""
        return int(lib.pkv_pool_first_kept(self.handle))

    def key(self, page_id: int) -> float:
        """By which the page gives way when it is kept."""
        return float(lib.pkv_pool_key(self.handle, page_id))

    def set_keys(self, page_ids: NDArray[np.int32], key: float) -> None:
        """Set the keys by which kept pages give way."""
        ids = int32_pointer("page_ids", page_ids)
        check(lib.pkv_pool_set_keys(self.handle, len(page_ids), ids, key), "set_keys")

    def raise_keys(self, page_ids: NDArray[np.int32], key: float) -> None:
        """Set those that are smaller."""
        ids = int32_pointer("page_ids", page_ids)
        check(lib.pkv_pool_raise_keys(self.handle, len(page_ids), ids, key), "raise_keys")

    def set_indexed(self, page_id: int, is_indexed: bool) -> None:
        """Note whether an index names an owned or kept page; a kept page that none names is free."""
        check(lib.pkv_pool_set_indexed(self.handle, page_id, is_indexed), "set_indexed")

    def is_indexed(self, page_id: int) -> bool:
        return bool(lib.pkv_pool_is_indexed(self.handle, page_id))

    def is_kept(self, page_id: int) -> bool:
        """Does an index name it, and nothing own it?"""
        return self.is_indexed(page_id) and lib.pkv_pool_ref_count(self.handle, page_id) == 0

    def ref_counts(self) -> NDArray[np.int32]:
        """How many own each page, of all ids, int32 [num_ids]; 0 of an id that is no page."""
        counts, is_indexed = np.empty(self.num_ids, np.int32), np.empty(self.num_ids, np.uint8)
        into = ffi.from_buffer("int32_t[]", counts), ffi.from_buffer("uint8_t[]", is_indexed)
        lib.pkv_pool_describe(self.handle, *into)
        return counts

    def num_owned(self, page_ids: list[int]) -> int:
        """How many of these pages have an owner; ids below 0 are none."""
        return sum(lib.pkv_pool_ref_count(self.handle, id) > 0 for id in page_ids if id >= 0)

    def acquire(self, count: int, format: int = 0) -> NDArray[np.int32]:
        """`count` free pages, now owned; OutOfPages, and nothing taken, when there are fewer."""
        count = integer("count", count, 0)
        if count > self.num_available(format):
            raise OutOfPages(
                f"requested {count} pages, {self.num_available(format)} of {self.num_pages} are free; "
                "free a sequence or build a larger pool"
            )
        page_ids = np.empty(count, np.int32)
        ids = int32_pointer("page_ids", page_ids)
        check(lib.pkv_pool_acquire_format(self.handle, format, count, ids), "acquire")
        return page_ids

    def share(self, page_ids: NDArray[np.int32]) -> None:
        """One owner more for each page; PagedKVError, and nothing changed, when one is free."""
        ids = int32_pointer("page_ids", page_ids)
        check(lib.pkv_pool_share(self.handle, len(page_ids), ids), "share")

    def release(self, page_ids: NDArray[np.int32]) -> None:
        """One owner fewer for each page; PagedKVError, and nothing changed, when one is not owned."""
        ids = int32_pointer("page_ids", page_ids)
        check(lib.pkv_pool_release(self.handle, len(page_ids), ids), "release")

    def check(self) -> None:
        """Raise InvariantViolation unless every invariant of pool.c holds."""
        check(lib.pkv_pool_check(self.handle), "check")

    def data(self) -> NDArray[np.uint8]:
        """Every byte of every page, uint8 [num_pages * page_bytes], in place: what tests poison and read.

        It must not be used after `close`.
        """
        return np.frombuffer(ffi.buffer(self.address, self.num_bytes), np.uint8)

    def array(
        self, shape: tuple[int, ...], dtype: str, strides: tuple[int, ...] | None = None, *, writable: bool
    ) -> NDArray[Any]:
        """The first bytes as an array, in place, which keeps the pool alive; strides in bytes, None: dense.

        Neither an array that is not writable nor a part of it can be made so: its base has no writable
        buffer.
        """
        return np.asarray(_Memory(self, shape, dtype, strides, writable))

    @property
    def address(self) -> Any:
        """The first byte, as a `char *`; a multiple of 2 MiB."""
        return lib.pkv_pool_data(self.handle)

    def close(self) -> None:
        """Release the memory.  Nothing of the pool may be used afterwards."""
        ffi.release(self._owner)


class _Memory:
    """A pool's memory in the form that numpy reads."""

    def __init__(
        self,
        pool: PagePool,
        shape: tuple[int, ...],
        dtype: str,
        strides: tuple[int, ...] | None,
        writable: bool,
    ) -> None:
        self.pool = pool
        self.__array_interface__ = {
            "version": 3,
            "typestr": np.dtype(dtype).str,
            "data": (int(ffi.cast("uintptr_t", pool.address)), not writable),
            "shape": shape,
            "strides": strides,
        }


def _require_memory(num_bytes: int) -> None:
    available = machine.available_memory()
    if available is not None and num_bytes > available:
        raise MemoryError(
            f"requested a pool of {mebibytes(num_bytes)}, {mebibytes(available)} are available; "
            "request fewer pages or a smaller memory="
        )


def mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
