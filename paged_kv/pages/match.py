"""A match: how much of a prompt is there, and why it is not more.

Reasons, and the order in which they are tried:

    disabled     the cache was built without prefix caching
    full         all is there but the last token, which has to be computed
    in_flight    the next tokens are in an open step: once it commits, they can be found
    evicted      the next tokens were there: `cause` and `age` say why and how long ago they went
    window_passed    later pages are there, but not all that the window needs
    diverged     what is there goes on with another token at position `at`, in page `page`
    other_salt   one of the salts in `also` has more
    longer       everything that is there agrees, and the rest of the prompt is new
    first        not one token agrees, and none was evicted

Imports plan and prefix_index.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .plan import Plan
from .prefix_index import Found, PrefixIndex
from .token_keys import num_common

Reason: TypeAlias = Literal[
    "disabled", "full", "in_flight", "evicted", "window_passed", "diverged", "other_salt", "longer", "first"
]


@dataclass(frozen=True)
class Match:
    """What `cache.sequence` would find of a prompt at this moment; no promise, since pages may go."""

    num_tokens: int
    reason: Reason
    would_have_hit: int  # tokens, but for the reason
    at: int | None = None  # diverged: position of the first token that differs
    page: int | None = None  # and the page it is in, counted from the first of the sequence
    cause: str | None = None  # evicted: "pressure" (a step needed room), "time" (its ttl) or "limit" (trim)
    age: float | None = None  # and seconds since then
    #: Of these tokens, those in pages that sequences hold: a sequence that begins with them takes no free or
    #: kept page for them.
    num_held_tokens: int = field(default=0, compare=False)
    #: What was matched, for `pin`.
    ids: NDArray[np.int32] | None = field(default=None, repr=False, compare=False)
    salt: bytes = field(default=b"", repr=False, compare=False)

    @property
    def num_lost(self) -> int:
        """Tokens that would have matched but for the reason."""
        return self.would_have_hit - self.num_tokens

    def of(self, ids: NDArray[np.int32], salt: bytes, num_held_tokens: int = 0) -> "Match":
        """The same, and what was matched."""
        return replace(self, ids=ids, salt=salt, num_held_tokens=min(num_held_tokens, self.num_tokens))


def explain(
    index: PrefixIndex,
    found: Found,
    ids: NDArray[np.int32],
    salt: int,
    plans: Iterable[Plan],
    also: Iterable[int] = (),
) -> Match:
    """Why a match found no more of these ids.

    salt, also : numbers of salts; 0: of one that no sequence has
    plans : of open steps

    Cost: of a full match, O(1); else of a few look-ups, and of a comparison with each sequence in an open
    step that begins with the same token.
    """
    num_tokens, limit = found.num_tokens, max(0, len(ids) - 1)
    if num_tokens == limit:
        return Match(num_tokens, "full", num_tokens)
    in_flight = _in_flight(index, ids[:limit], salt, plans)
    if in_flight > num_tokens:
        return Match(num_tokens, "in_flight", in_flight)
    first_page = len(found.entries) * index.page_size
    num_more, eviction = index.evicted.longest(found.serial, ids[first_page:limit], index.page_size)
    if eviction is not None and first_page + num_more > num_tokens:
        age = index.retention.clock() - eviction.when
        return Match(num_tokens, "evicted", first_page + num_more, cause=eviction.cause, age=age)
    if found.reach > num_tokens:
        return Match(num_tokens, "window_passed", found.reach)
    return _not_there(index, found, ids, also)


def _not_there(index: PrefixIndex, found: Found, ids: NDArray[np.int32], also: Iterable[int]) -> Match:
    """Reasons of tokens that were never there with this salt."""
    num_tokens = found.num_tokens
    if num_tokens and index.goes_on(found, ids):
        return Match(num_tokens, "diverged", num_tokens, at=num_tokens, page=num_tokens // index.page_size)
    elsewhere = max((index.match(ids, other).num_tokens for other in also), default=0)
    if elsewhere > num_tokens:
        return Match(num_tokens, "other_salt", elsewhere)
    return Match(num_tokens, "longer" if num_tokens else "first", num_tokens)


def _in_flight(index: PrefixIndex, ids: NDArray[np.int32], salt: int, plans: Iterable[Plan]) -> int:
    """Of these ids, how many a sequence in an open step will have, if it commits."""
    tables, longest = index.tables, 0
    for plan in plans:
        if not plan.is_open or not plan.num_pages:
            continue
        rows, first_pages = plan.rows, plan.int32(plan.batch.kv_indices, plan.num_pages)[plan.kv_indptr[:-1]]
        is_alike = (plan.new_known > 0) & (tables.rows.num_known[rows] == tables.rows.seq_lens[rows])
        is_alike &= plan.first_pages <= tables.sink_pages  # else pages, and with them ids, are gone
        is_alike &= (tables.rows.salts[rows] == salt) & (tables.token_ids[first_pages, 0] == ids[0])
        for i in np.flatnonzero(is_alike).tolist():
            num_tokens = int(tables.rows.seq_lens[rows[i]] + plan.new_known[i])
            held = tables.token_ids[plan.pages_of(i)].reshape(-1)[:num_tokens]
            longest = max(longest, num_common(held, ids))
    return longest
