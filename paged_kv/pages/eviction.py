"""Eviction: which pages a sequence with a budget drops, once it holds more tokens than that.

    numbers = choose(policy, pages, excess_tokens)      before each commit that would hold too much

A page is kept or dropped for all layers and heads, since they have one block table.  Tokens that are kept
have their true positions.  Never dropped are pages of the sinks, pages of the newest tokens, and what is not
full.

Imports layout and errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from .layout import num_pages


@dataclass(frozen=True)
class PagesOfSequence:
    """What a policy looks at: the pages that a sequence will hold when its step is committed.

    numbers : int32 [n], logical pages, ascending: page j has the tokens from j * page_size on
    can_be_dropped : bool [n]
    num_tokens, num_new_tokens : of the sequence, once the step is committed, and of the step
    page_size : tokens of a page
    mean_mass : float64 [n], how much attention a page gets: the probabilities of its tokens, summed over
        layers and heads, as the mean over all rows that could see the page since the sequence began or was
        found in the prefix cache.  None unless the policy needs mass
    recent_mass : float64 [n], the same of the step's last 32 rows, summed
    """

    numbers: NDArray[np.int32]
    can_be_dropped: NDArray[np.bool_]
    num_tokens: int
    num_new_tokens: int
    page_size: int
    mean_mass: NDArray[np.float64] | None = None
    recent_mass: NDArray[np.float64] | None = None


class EvictionPolicy(Protocol):
    """Which pages a sequence drops.

    needs_mass : does `drop` look at attention mass?  It is collected then
    """

    needs_mass: bool

    def drop(self, pages: PagesOfSequence, excess_tokens: int) -> Sequence[int]:
        """Logical pages to drop: at least ceil(excess_tokens / page_size) of those that can be dropped, or
        all of these.  Whatever it raises, the commit raises, and the step stays open."""
        ...


class KeepNewest:
    """Drop the oldest pages behind the sinks: a window, as StreamingLLM has it.

    Source: Xiao et al., Efficient streaming language models with attention sinks, 2024.
    """

    needs_mass = False

    def drop(self, pages: PagesOfSequence, excess_tokens: int) -> Sequence[int]:
        candidates = pages.numbers[pages.can_be_dropped]
        return [int(number) for number in candidates[: num_pages(excess_tokens, pages.page_size)]]


class KeepAttended:
    """Drop the pages that get least attention; of equal ones the oldest.

    At the end of a prompt the last rows count, so that a question there keeps what answers it; after single
    tokens the mean over all rows.

    Source: Li et al., SnapKV, 2024, for the last rows of a prompt; Zhang et al., H2O, 2023, with the mean
    over rows in place of the sum, which starves new tokens.
    """

    needs_mass = True

    def drop(self, pages: PagesOfSequence, excess_tokens: int) -> Sequence[int]:
        mass = pages.recent_mass if pages.num_new_tokens > 1 else pages.mean_mass
        assert mass is not None
        candidates = pages.numbers[pages.can_be_dropped]
        order = np.argsort(mass[pages.can_be_dropped], kind="stable")
        chosen = candidates[order[: num_pages(excess_tokens, pages.page_size)]]
        return [int(number) for number in chosen]


#: What `PagedKVCache(eviction=)` takes by name.
POLICIES: dict[str, type[KeepNewest | KeepAttended]] = {"window": KeepNewest, "attention": KeepAttended}


def policy_of(eviction: object) -> EvictionPolicy:
    """A policy, by its name or itself.  Raises: ArgumentError."""
    if isinstance(eviction, str) and eviction in POLICIES:
        return POLICIES[eviction]()
    if isinstance(eviction, str) or not callable(getattr(eviction, "drop", None)):
        names = " or ".join(f'"{name}"' for name in POLICIES)
        raise ArgumentError(f"eviction is {eviction!r:.60}; give {names}, or an object with drop()")
    if type(getattr(eviction, "needs_mass", None)) is not bool:
        raise ArgumentError(f"eviction is {eviction!r:.60}; its needs_mass must be True or False")
    return cast(EvictionPolicy, eviction)


def choose(policy: EvictionPolicy, pages: PagesOfSequence, excess_tokens: int) -> NDArray[np.int32]:
    """The logical pages that a policy drops, ascending.

    Raises: ArgumentError where it names pages that cannot be dropped, one of them twice, or too few; and
    whatever the policy raises.
    """
    named = policy.drop(pages, excess_tokens)
    try:
        numbers = np.array(named, np.int64).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError(
            f"drop() of {type(policy).__name__} gave {named!r:.60}; give page numbers"
        ) from None
    candidates = pages.numbers[pages.can_be_dropped]
    wrong = ~np.isin(numbers, candidates)
    if wrong.any():
        raise ArgumentError(
            f"drop() of {type(policy).__name__} names page {numbers[wrong][0]}, which it cannot drop: it is "
            "a sink's, of the newest tokens, or not there"
        )
    numbers = np.sort(numbers)
    if (numbers[1:] == numbers[:-1]).any():
        raise ArgumentError(f"drop() of {type(policy).__name__} names a page twice")
    least = min(num_pages(excess_tokens, pages.page_size), len(candidates))
    if len(numbers) < least:
        raise ArgumentError(
            f"drop() of {type(policy).__name__} names {len(numbers)} pages, {least} have to go: the sequence "
            f"holds {excess_tokens} tokens too many"
        )
    return numbers.astype(np.int32)
