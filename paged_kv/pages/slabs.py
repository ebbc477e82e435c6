"""Slabs: the sizes of a pool whose pages have several formats.

The pool's memory is cut into slabs of one size, each with pages of one format at a time (slabs.c).  A slab
has room for some pages of the largest format, as many as waste least behind the last page of a slab, in any
format.

Imports layout.
"""

from dataclasses import dataclass

from ..errors import ArgumentError
from .layout import num_pages

#: So many slabs at least, where the memory is large enough: then no format strands much of it.
LEAST_SLABS = 16


@dataclass(frozen=True)
class SlabSizes:
    """A pool of `num_slabs` slabs of `slab_bytes`."""

    num_slabs: int
    slab_bytes: int
    page_bytes: tuple[int, ...]  # of a page of each format
    floors: tuple[int, ...]  # slabs that the other formats leave each one

    @property
    def num_bytes(self) -> int:
        return self.num_slabs * self.slab_bytes

    @property
    def places(self) -> tuple[int, ...]:
        """Pages of each format in a slab."""
        return tuple(self.slab_bytes // size for size in self.page_bytes)

    @property
    def wasted(self) -> tuple[int, ...]:
        """Bytes behind the last page of a slab, of each format."""
        return tuple(self.slab_bytes % size for size in self.page_bytes)


def slab_sizes(num_bytes: int, page_bytes: tuple[int, ...], least_pages: tuple[int, ...]) -> SlabSizes:
    """Slabs for num_bytes of memory, rounded down.

    Parameters
    ----------
    page_bytes : of a page of each format, multiples of 64
    least_pages : of each format, which the others always leave it; at least one slab

    Raises: ArgumentError when the memory has no room for the least pages of every format.
    """
    largest = max(page_bytes)
    most = max(1, num_bytes // largest // LEAST_SLABS)
    # Of all sizes the one that wastes the smallest share in its worst format; of equals the smallest.
    size = min(
        (count * largest for count in range(1, min(most, 4096) + 1)),
        key=lambda size: max(size % one / size for one in page_bytes),
    )
    floors = tuple(
        max(1, num_pages(least, size // one)) for least, one in zip(least_pages, page_bytes, strict=True)
    )
    if num_bytes // size < sum(floors):
        raise ArgumentError(
            f"{num_bytes:,} bytes are {num_bytes // size} slabs of {size:,}; "
            f"pages of {len(page_bytes)} formats need {sum(floors)} at least; give more memory"
        )
    return SlabSizes(num_bytes // size, size, page_bytes, floors)
