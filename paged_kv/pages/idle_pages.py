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

from ..lifetime import Uncopyable
from .budgets import Budgets, Drop

#: New twins for each page that a step lacks: a page of int8 that becomes int4 frees a quarter of an open one.
TWINS_PER_PAGE = 4


class IdlePage(NamedTuple):
    """A page that only one sequence has."""

    mean_mass: float
    begin: int  # minus the tokens since its first one
    row: int
    number: int  # among the logical pages
    page_id: int


class IdlePages(Uncopyable):
    """Of the rows of a cache whose pool is the budget.

    layers : `pkv_pages *` of all layers; looked at where pages are packed
    """

    def __init__(self, budgets: Budgets, layers: Any) -> None:
        self._budgets, self._tables, self._layers = budgets, budgets.tables, layers

    def make_room(self, seq_ids: list[int], num_pages: int) -> bool:
        """Make so many pages reclaimable.  Returns False, and changes nothing, when there are too few.

        Cost: O(pages that idle sequences hold), and of 4 * num_pages pages that are packed.
        """
        pool, pages = self._tables.pool, list(self._candidates(seq_ids))
        if pool.num_reclaimable_without([page.page_id for page in pages]) < num_pages:
            return False
        if self._tables.packing is not None:
            pages = self._pack(pages, num_pages)
        groups = self._groups(pages)
        groups.sort(key=lambda group: -pool.format_of(group[0].page_id))
        goes = [page for group in groups for page in group]
        ids = [page.page_id for page in goes]
        count = bisect_left(
            range(len(ids)), num_pages, key=lambda count: pool.num_reclaimable_without(ids[:count])
        )
        self._drop(goes[:count])
        return True

    def _groups(self, pages: list[IdlePage]) -> list[list[IdlePage]]:
        """The pages that give room together, the groups of the least mean mass first."""
        indices = self._tables.pool.that_give_room([page.page_id for page in pages])
        groups = [[pages[i] for i in group] for group in indices]

        def rank(group: list[IdlePage]) -> tuple[float, float]:
            return sum(page.mean_mass for page in group) / len(group), sum(page.begin for page in group)

        return sorted(groups, key=rank)

    def _candidates(self, seq_ids: list[int]) -> list[IdlePage]:
        tables, found = self._tables, []
        stays = {tables.rows.row(seq_id) for seq_id in seq_ids}
        for row in np.flatnonzero(tables.rows.seq_ids[: tables.rows.num_rows] > 0).tolist():
            if row in stays or not tables.rows.is_idle(int(tables.rows.seq_ids[row])):
                continue
            seq_len = int(tables.rows.seq_lens[row])
            numbers, pages = tables.held_pages(row)
            is_free = self._budgets.can_be_dropped(numbers.astype(np.int32), seq_len)
            is_free &= tables.pool.are_alone(pages)
            for cell in np.flatnonzero(is_free).tolist():
                number = int(numbers[cell])
                begin = number * tables.page_size - seq_len
                found.append(IdlePage(self._mean_mass(row, cell), begin, row, number, int(pages[cell])))
        return found

    def _mean_mass(self, row: int, cell: int) -> float:
        """0 without mass."""
        tables = self._tables
        if not self._budgets.limits.needs_mass:
            return 0.0
        return float(tables.mass[row, cell] / max(1, tables.mass_rows[row, cell]))

    def _pack(self, pages: list[IdlePage], num_pages: int) -> list[IdlePage]:
        """Pack pages, as far as it is needed and there is room for twins.  Returns: them, with new ids."""
        tables, pool, left = self._tables, self._tables.pool, TWINS_PER_PAGE * num_pages
        assert tables.packing is not None
        for format in range(len(tables.packing.recent_tokens)):
            now: dict[IdlePage, IdlePage] = {}
            for group in self._groups(pages):
                if left < len(group) or pool.num_reclaimable >= num_pages:
                    break
                if pool.format_of(group[0].page_id) != format or pool.num_available(format + 1) < len(group):
                    continue
                now |= {page: self._packed(page) for page in group}
                left -= len(group)
            pages = [now.get(page, page) for page in pages]
        return pages

    def _packed(self, page: IdlePage) -> IdlePage:
        index = self._budgets.index
        old, new = self._tables.pack_pages(self._layers, page.row, [page.number])
        if old and index is not None:
            index.exchange(old, new)
        return page._replace(page_id=self._tables.page_id(page.row, page.number))

    def _drop(self, pages: list[IdlePage]) -> None:
        numbers: dict[int, list[int]] = {}
        for page in pages:
            numbers.setdefault(page.row, []).append(page.number)
        self._budgets.drop([Drop(row, np.array(sorted(own), np.int32), 0.0) for row, own in numbers.items()])
