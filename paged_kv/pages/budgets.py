"""Budgets: how much each sequence holds, and what is dropped so that it is no more.

    eviction = eviction_of(page_size, "attention", 1024, ...)     what a cache is built with
    drops = budgets.choose(plan, counts)     before a commit, without the lock: the policy is the caller's
    budgets.drop(drops)                      after it, under the lock

Imports eviction and prefix_index.  The caller holds the cache's lock, except for `choose`.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._binding import integer
from ..errors import ArgumentError
from ..lifetime import Uncopyable
from .block_table import BlockTables, Budget
from .eviction import EvictionPolicy, PagesOfSequence, choose, policy_of
from .layout import num_pages
from .new_tokens import MAX_TOKENS
from .plan import Plan
from .prefix_index import PrefixIndex

#: Newest tokens of a sequence that no eviction policy drops.
GRACE_TOKENS = 64


class Eviction(NamedTuple):
    """How much a sequence may hold, and who says which pages it drops."""

    budget: Budget
    policy: EvictionPolicy


def eviction_of(
    page_size: int,
    eviction: object,
    budget_tokens: object,
    num_sink_tokens: int,
    max_step_tokens: int,
    window: object,
) -> Eviction | None:
    """What sequences may hold; None: all of their tokens."""
    if eviction is None:
        if budget_tokens is not None:
            raise ArgumentError(f"budget_tokens is {budget_tokens!r:.40} without eviction; give both")
        return None
    policy = policy_of(eviction)
    if window is not None:
        raise ArgumentError("a window drops pages by itself; give eviction or window")
    least = least_budget(page_size, num_sink_tokens)
    is_pool = budget_tokens is None
    if is_pool and not isinstance(eviction, str):
        raise ArgumentError(f"eviction is {eviction!r:.60}; a policy of your own needs budget_tokens")
    tokens = MAX_TOKENS if is_pool else integer("budget_tokens", budget_tokens, least, MAX_TOKENS)
    budget = Budget(tokens, max_step_tokens, num_sink_tokens, GRACE_TOKENS, policy.needs_mass, is_pool)
    return Eviction(budget, policy)


def least_budget(page_size: int, num_sink_tokens: int) -> int:
    """Sinks and newest tokens, which always stay, and two pages."""
    return num_pages(num_sink_tokens, page_size) * page_size + GRACE_TOKENS + 2 * page_size


class Drop(NamedTuple):
    """What a row drops."""

    row: int
    numbers: NDArray[np.int32]  # of logical pages, ascending
    attention_lost: float


class Budgets(Uncopyable):
    """Of the rows of tables that have a budget.

    index : None: nothing is published
    """

    def __init__(self, tables: BlockTables, policy: EvictionPolicy, index: PrefixIndex | None) -> None:
        assert tables.budget is not None
        self.tables, self.policy, self.index, self.limits = tables, policy, index, tables.budget
        #: Of each row, how many tokens it may hold.
        self.num_tokens = np.full(tables.rows.max_sequences, self.limits.num_tokens, np.int64)
        #: Of each row, the mean shares of attention of the pages that it has dropped.
        self.attention_lost = np.zeros(tables.rows.max_sequences)
        self.num_dropped_pages = 0
        self.num_packings = 0 if tables.packing is None else len(tables.packing.recent_tokens)

    def start(self, seq_ids: list[int], parent: int | None, num_tokens: int | None) -> None:
        """New sequences have a budget of their own, their parent's, or the usual one."""
        rows = [self.tables.rows.row(seq_id) for seq_id in seq_ids]
        self.num_tokens[rows] = self.limits.num_tokens if num_tokens is None else num_tokens
        self.attention_lost[rows] = 0.0
        if parent is not None:
            row = self.tables.rows.row(parent)
            self.num_tokens[rows], self.attention_lost[rows] = self.num_tokens[row], self.attention_lost[row]

    def findable(self, ids: NDArray[np.int32], num_tokens: int | None) -> NDArray[np.int32]:
        """Of a prompt's ids, those whose match a sequence can hold, and one that is computed."""
        budget = self.limits.num_tokens if num_tokens is None else num_tokens
        return ids[: num_pages(budget, self.tables.page_size) * self.tables.page_size + 1]

    # ---- at a commit

    def choose(self, plan: Plan, counts: NDArray[np.int32] | None) -> list[Drop]:
        """What rows will have to drop at a commit of a plan.  Raises: what the policy raises, ArgumentError.

        The rows are in the plan's step, so nothing of them changes without the lock.
        """
        if not plan.is_open or self.limits.is_pool:
            return []
        tables, page_size = self.tables, self.tables.page_size
        rows, num_new = plan.rows, np.diff(plan.qo_indptr)
        new_lens = plan.seq_lens if counts is None else plan.seq_lens - num_new + counts
        excess = -(-new_lens // page_size) - tables.num_dropped[rows] - -(-self.num_tokens[rows] // page_size)
        has_more = (excess > 0) & (new_lens > tables.rows.seq_lens[rows])
        if self.limits.needs_mass:  # pages of a prefix hit begin with none
            has_more &= tables.mass_rows[rows, 0] + num_new >= self.limits.recent_tokens
        return [
            self._drop_of(plan, i, int(new_lens[i]), int(excess[i]))
            for i in np.flatnonzero(has_more).tolist()
        ]

    def _drop_of(self, plan: Plan, i: int, new_len: int, excess: int) -> Drop:
        """What a row drops, of the pages that it will hold at this length."""
        page_size, own = self.tables.page_size, slice(*plan.kv_indptr[i : i + 2])
        numbers = plan.page_numbers[own]
        numbers = numbers[numbers < num_pages(new_len, page_size)]
        num_new = new_len - int(self.tables.rows.seq_lens[plan.rows[i]])
        masses = self._masses_of(plan, i, new_len, numbers) if self.limits.needs_mass else ()
        can_be_dropped = self.can_be_dropped(numbers, new_len)
        if self.tables.packing is not None:
            # What ages is in fewer bits before it is dropped.
            is_last = self.tables.pool.formats_of(plan.pages_of(i)[: len(numbers)]) == self.num_packings
            if (can_be_dropped & is_last).sum() >= excess:
                can_be_dropped &= is_last
        pages = PagesOfSequence(numbers, can_be_dropped, new_len, num_new, page_size, *masses)
        dropped = choose(self.policy, pages, excess * page_size)
        lost = 0.0
        if pages.mean_mass is not None and (given := float(plan.mass[own].sum())) > 0:
            # All that the step's tokens gave, by token: the pages' masses are sums over layers and heads.
            lost = float(pages.mean_mass[np.isin(numbers, dropped)].sum()) * plan.num_new(i) / given
        return Drop(int(plan.rows[i]), dropped, lost)

    def can_be_dropped(self, numbers: NDArray[np.integer[Any]], seq_len: int) -> NDArray[np.bool_]:
        """Neither the sinks' pages nor those of the newest tokens."""
        first = num_pages(self.limits.num_sink_tokens, self.tables.page_size)
        end = max(seq_len - self.limits.recent_tokens, 0) // self.tables.page_size
        return (numbers >= first) & (numbers < end)

    def _masses_of(
        self, plan: Plan, i: int, new_len: int, numbers: NDArray[np.int32]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and recent mass of a sequence's pages, once a plan is committed."""
        tables, row, page_size = self.tables, plan.rows[i], self.tables.page_size
        old_len, begin = int(tables.rows.seq_lens[row]), int(plan.kv_indptr[i])
        own = slice(begin, begin + len(numbers))
        total, num_rows = plan.mass[own], np.minimum(new_len - old_len, new_len - numbers * page_size)
        # Pages that the step has begun have neither mass nor rows of before.
        num_held = num_pages(old_len, page_size) - tables.num_dropped[row]
        total[:num_held] += tables.mass[row, :num_held]
        num_rows[:num_held] += tables.mass_rows[row, :num_held].astype(np.int32)
        return total / num_rows, plan.recent_mass[own]

    def drop(self, drops: list[Drop]) -> None:
        for row, numbers, lost in drops:
            if self.index is not None:
                self.index.note_drop(row, numbers)
            self.tables.drop(row, numbers)
            self.num_dropped_pages += len(numbers)
            self.attention_lost[row] += lost
