"""Pages of idle sequences, which make room for a step where the pool is the budget.

    idle = IdlePages(budgets, layer_pages)
    idle.make_room(seq_ids, num_pages)      of sequences that are in no step, and not these

Pages that can be packed into fewer bits are, those of the least mean mass first; what is still missing is
dropped, beginning with pages of the last format.  Without mass the oldest are the first.  Packed pages give
room when their slab is empty: those of a slab go together, by their average, or stay.

Imports budgets.  The caller holds the cache's lock.
"""

from bisect import bisect_left
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..lifetime import Uncopyable
from .budgets import Budgets, Drop

#: New twins for each page that a step lacks: a page of int8 that becomes int4 frees a quarter of an open one.
TWINS_PER_PAGE = 4
#: Room is made for so small a share of the pool at least.
SHARE_OF_POOL = 256


class Found(NamedTuple):
    """Pages that only one sequence has, an entry of each."""

    rows: NDArray[np.int64]
    numbers: NDArray[np.int64]  # logical pages
    ids: NDArray[np.int32]
    mean_mass: NDArray[np.float64]  # 0 without mass
    age: NDArray[np.int64]  # tokens since the first one


class IdlePages(Uncopyable):
    """Of the rows of a cache whose pool is the budget.

    layers : `pkv_pages *` of all layers; looked at where pages are packed
    """

    def __init__(self, budgets: Budgets, layers: Any) -> None:
        self._budgets, self._tables, self._layers = budgets, budgets.tables, layers

    def make_room(self, seq_ids: list[int], num_pages: int) -> bool:
        """Make so many pages reclaimable, or if there can be 1/256 of the pool; where pages are packed, also
        room for as many packed ones.  Returns False, and changes nothing, when there are too few.

        Cost: O(pages of the pool), and of 4 * num_pages pages that are packed.
        """
        pool, found = self._tables.pool, self._found(seq_ids)
        most = pool.num_reclaimable_without(found.ids)
        if most < num_pages:
            return False
        # Not a page at a time: looking for it takes longer than a step.
        num_pages = min(most, max(num_pages, pool.num_pages // SHARE_OF_POOL))
        if self._tables.packing is not None:
            # Else the step's own pages could not be packed at its commit, and would stay open.
            num_pages = min(most, num_pages + pool.open_pages_for(num_pages, 1))
            self._pack(found, num_pages)
        goes, _ = self._in_order(found)
        ids = found.ids[goes]
        count = bisect_left(
            range(len(ids)), num_pages, key=lambda count: pool.num_reclaimable_without(ids[:count])
        )
        self._drop(found, goes[:count])
        return True

    def _found(self, seq_ids: list[int]) -> Found:
        """What idle sequences may give up."""
        tables, parts = self._tables, [Found(*(np.empty(0, kind) for kind in "qqidq"))]
        ref_counts, stays = tables.pool.ref_counts(), {tables.rows.row(seq_id) for seq_id in seq_ids}
        for row in np.flatnonzero(tables.rows.seq_ids[: tables.rows.num_rows] > 0).tolist():
            if row in stays or not tables.rows.is_idle(int(tables.rows.seq_ids[row])):
                continue
            seq_len = int(tables.rows.seq_lens[row])
            numbers, ids = tables.held_pages(row)
            is_free = self._budgets.can_be_dropped(numbers, seq_len) & (ref_counts[ids] == 1)
            numbers, rows = numbers[is_free], np.full(is_free.sum(), row)
            mass = self._mean_mass(row, len(is_free))[is_free]
            parts.append(Found(rows, numbers, ids[is_free], mass, seq_len - numbers * tables.page_size))
        return Found(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _mean_mass(self, row: int, num_cells: int) -> NDArray[np.float64]:
        tables = self._tables
        if not self._budgets.limits.needs_mass:
            return np.zeros(num_cells)
        mean: NDArray[np.float64] = tables.mass[row, :num_cells] / np.maximum(
            tables.mass_rows[row, :num_cells], 1
        )
        return mean

    def _in_order(self, found: Found) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Entries that give room, the last format first, then those of the least mean mass, then the oldest;
        and of how many each group is that gives room only together.
        """
        numbers, formats = self._tables.pool.room_groups(found.ids), self._tables.pool.formats_of(found.ids)
        places = np.flatnonzero(numbers >= 0)
        _, first, group, counts = np.unique(
            numbers[places], return_index=True, return_inverse=True, return_counts=True
        )
        mass, age = (
            np.bincount(group, values[places], len(counts)) / counts
            for values in (found.mean_mass, found.age)
        )
        order = np.lexsort((-age, mass, -formats[places[first]]))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        return places[np.argsort(rank[group], kind="stable")], counts[order]

    def _pack(self, found: Found, num_pages: int) -> None:
        """Pack pages, as far as it is needed and there is room for twins; `found` has their new ids then."""
        tables, pool, left = self._tables, self._tables.pool, TWINS_PER_PAGE * num_pages
        assert tables.packing is not None
        for format in range(len(tables.packing.recent_tokens)):
            order, sizes = self._in_order(found)
            ends = np.cumsum(sizes)
            begins = ends - sizes
            is_here = pool.formats_of(found.ids[order[begins]]) == format
            for begin, end in zip(begins[is_here].tolist(), ends[is_here].tolist(), strict=True):
                if left < end - begin or pool.num_reclaimable >= num_pages:
                    break
                if pool.num_available(format + 1) < end - begin:
                    continue
                for i in order[begin:end].tolist():
                    self._pack_page(found, i)
                left -= end - begin

    def _pack_page(self, found: Found, i: int) -> None:
        index, row, number = self._budgets.index, int(found.rows[i]), int(found.numbers[i])
        old, new = self._tables.pack_pages(self._layers, row, [number])
        if old and index is not None:
            index.exchange(old, new)
        found.ids[i] = self._tables.page_id(row, number)

    def _drop(self, found: Found, goes: NDArray[np.int64]) -> None:
        rows, numbers = found.rows[goes], found.numbers[goes]
        self._budgets.drop(
            [Drop(row, np.sort(numbers[rows == row]).astype(np.int32), 0.0) for row in set(rows.tolist())]
        )
