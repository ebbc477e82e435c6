"""Admission: when a request that waits may run.

A cache that cannot evict or share is filled by what its requests take at most: `cost_of` of all their tokens.
A paged cache holds more requests than that:

    a request is admitted when    pages that it will take  <=  available - pages that running ones will take

A request takes none for tokens that others hold, and most end before max_new_tokens, so `will take` counts
the new tokens that requests had of late.  That can be too few: then a step lacks pages, and the newest
request is sent back to wait.  The oldest is never sent back, so that one always ends.

Imports cache and request.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..cache import PagedKVCache
from ..errors import SequenceTooLong
from ..pages.budgets import GRACE_TOKENS
from ..pages.layout import num_pages
from ..pages.match import Match
from ..pages.new_tokens import MAX_TOKENS
from .request import Request

#: New tokens of requests that end are averaged over so many.
NUM_AVERAGED = 32
#: What is expected is the average, and so much of it more.
MARGIN = 0.25


@dataclass
class Admission:
    """How much a cache holds, and what a request of n tokens takes of it, in the same unit.

    available : what requests can take now; None: the cache is full when all costs add up to its capacity
    match : what the cache has of a prompt (ids, salt)
    max_sequences, max_seq_len, max_step_tokens : the cache's, where it has such limits
    has_budget : sequences are cut to a budget at each commit
    """

    capacity: int
    cost_of: Callable[[int], int]
    max_sequences: int | None = None
    max_seq_len: int | None = None
    max_step_tokens: int | None = None
    available: Callable[[], int] | None = None
    match: Callable[[Any, bytes], Match] | None = None
    page_size: int = 1
    has_budget: bool = False
    #: New tokens that a request has, on average; None: too few have ended.
    mean_new_tokens: float | None = None
    num_ended: int = 0

    @classmethod
    def pages_of(cls, cache: PagedKVCache) -> "Admission":
        page_size, budget = cache.page_size, cache.budget_tokens
        most = MAX_TOKENS if cache.window is None else cache.max_sequence_pages * page_size
        if budget is not None:  # beside it, what a prefix hit holds until its first cut, and a begun page
            most = budget + GRACE_TOKENS + page_size
        return cls(
            cache.stats().num_pages,
            lambda num_tokens: num_pages(min(num_tokens, most), page_size),
            cache.max_sequences,
            cache.max_seq_len,
            cache.max_step_tokens,
            lambda: cache.num_available_pages,
            cache.match if cache.prefix_caching else None,
            page_size,
            budget is not None,
        )

    def count_ended(self, num_new_tokens: int) -> None:
        """Learn from a request that ended by itself."""
        self.num_ended += 1
        mean = num_new_tokens if self.mean_new_tokens is None else self.mean_new_tokens
        weight = 1 / min(self.num_ended, NUM_AVERAGED)
        self.mean_new_tokens = mean + weight * (num_new_tokens - mean)

    def will_have(self, request: Request) -> int:
        """Tokens that a request is expected to end with; at least one more than it has."""
        num_new = request.max_new_tokens
        if self.mean_new_tokens is not None and self.num_ended >= NUM_AVERAGED // 4:
            num_new = min(num_new, int((1 + MARGIN) * self.mean_new_tokens) + 1)
        return len(request.prompt) + max(num_new, min(request.max_new_tokens, len(request.new_ids) + 1))

    def on_top(self, step_tokens: int) -> int:
        """What a step of so many tokens takes until its commit cuts sequences to their budgets."""
        return num_pages(step_tokens, self.page_size) if self.has_budget else 0

    def most_of(self, num_tokens: int, count: int, step_tokens: int) -> int:
        """What so many samples of num_tokens take at most, alone in the cache."""
        whole = count * self.cost_of(num_tokens)
        if not self.has_budget:
            return whole
        return min(whole + self.on_top(step_tokens), count * num_pages(num_tokens, self.page_size))

    def has_room_for(self, request: Request, running: Iterable[Request], step_tokens: int) -> bool:
        """Whether a request and its siblings may run beside those that run, in steps of so many tokens."""
        num_siblings = len(request.siblings)
        if self.available is None:
            taken = sum(one.cost for one in running)
            return taken + request.cost * (1 + num_siblings) <= self.capacity
        room = self.available() - self.on_top(step_tokens)
        for one in running:
            if one.seq is None:  # a sample that will be a fork: a copy of the last page, and what it appends
                room -= 1 + self.cost_of(self.will_have(one)) - self.cost_of(len(one.prompt))
            else:
                room -= self.cost_of(self.will_have(one)) - self.cost_of(one.num_fed)
        whole = self.cost_of(self.will_have(request))
        room -= whole + num_siblings * (1 + whole - self.cost_of(len(request.prompt)))
        if room < 0 and self.match is not None:
            room += self.match(request.ids, request.salt).num_held_tokens // self.page_size
        return room >= 0


def require_positions(num_ids: int, max_new_tokens: int, positions: int, whose: str) -> None:
    """SequenceTooLong when a prompt and its new tokens, but for the last, which is not fed, take
    more positions.
    """
    needed = num_ids + max_new_tokens - 1
    if needed > positions:
        raise SequenceTooLong(
            f"a prompt of {num_ids} and {max_new_tokens} new tokens take {needed} positions, {whose} has "
            f"{positions}; shorten the prompt, or ask for fewer new tokens"
        )
