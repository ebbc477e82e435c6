"""Admission: what a cache holds, and what a request takes of it.

A request is admitted when its prompt and all its new tokens fit, whatever the others do: a running request is
never sent back.

Imports cache.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..cache import PagedKVCache
from ..errors import SequenceTooLong
from ..pages.layout import num_pages
from ..pages.new_tokens import MAX_TOKENS


@dataclass
class Admission:
    """How much a cache holds, and what a request of n tokens takes of it, in the same unit.

    max_sequences, max_seq_len, max_step_tokens : the cache's, where it has such limits
    """

    capacity: int
    cost_of: Callable[[int], int]
    max_sequences: int | None = None
    max_seq_len: int | None = None
    max_step_tokens: int | None = None

    @classmethod
    def pages_of(cls, cache: PagedKVCache) -> "Admission":
        page_size = cache.page_size
        most = MAX_TOKENS if cache.window is None else cache.max_sequence_pages * page_size
        return cls(
            cache.stats().num_pages,
            lambda num_tokens: num_pages(min(num_tokens, most), page_size),
            cache.max_sequences,
            cache.max_seq_len,
            cache.max_step_tokens,
        )


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
