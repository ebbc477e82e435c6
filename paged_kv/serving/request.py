"""A request: one prompt on its way through the batch, and what ends it.

It waits, runs and is done; a running one that is preempted waits again, without its pages but with its ids.
A step changes it in two places, its sequence and its ids, and either may be interrupted.  The sequence is the
truth: ids that it does not hold yet are fed next, and an id that was drawn counts once the sequence holds all
ids before it.  So a step that raised can be repeated, a request that was preempted goes on, and no id is
drawn twice.

Imports models.sampling.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._binding import integer
from ..errors import ArgumentError
from ..models.sampling import LogProbability, Sampler, log_probability
from ..models.ternary import FloatArray


@dataclass(eq=False, slots=True, weakref_slot=True)
class Request:
    """A prompt on its way through the batch.

    cost : what it takes of the cache when it has all its tokens, in the unit of the admission
    num_fed : how many of its ids the sequence holds
    num_most_fed : the most that sequences held, of those that it has given back
    error : what ended it before it was done; None: nothing did
    ends : is called with the new ids after each of them; True: the text is whole
    num_logprobs : log probabilities are kept, with so many of the likeliest tokens; None: none are
    logprobs : of each new id
    priority : higher ones are admitted first, and preempted last
    serial : of the order in which they came
    salt, ttl : of its sequence
    retained : (position, priority, ttl) of beginnings of the prompt that are worth keeping
    match : what the cache had of the prompt when it was admitted first; None: it was not yet, or is no cache
        that says so
    num_cached : tokens of the prompt that were found then
    num_preemptions : how often it was sent back to wait
    num_overtaken : requests behind it that were admitted before it
    """

    prompt: list[int]
    max_new_tokens: int
    sampler: Sampler
    cost: int
    seq: Any = None
    num_fed: int = 0
    num_most_fed: int = 0
    new_ids: list[int] = field(default_factory=list)
    error: Exception | None = None
    ends: Callable[[list[int]], bool] | None = None
    num_logprobs: int | None = None
    logprobs: list[LogProbability] = field(default_factory=list)
    priority: int = 0
    serial: int = 0
    salt: bytes = b""
    ttl: float | None = None
    retained: tuple[tuple[int, int, float | None], ...] = ()
    match: Any = None
    num_cached: int = 0
    num_preemptions: int = 0
    num_overtaken: int = 0
    #: Other samples of the same prompt, which begin as forks when it is computed.
    siblings: list["Request"] = field(default_factory=list)
    #: Of a beam, the search that it is one of.
    group: Any = None
    #: (n, id): the id that was drawn to follow the first n.
    drawn: tuple[int, int] | None = None
    drawn_logprob: LogProbability | None = None
    #: Its sequence is being freed.
    is_leaving: bool = False
    #: What `ends` said of so many new ids.
    has_ended: bool = False
    num_seen: int = 0
    #: The prompt, int32.
    ids: NDArray[np.int32] = field(init=False)
    num_prompt: int = field(init=False)
    _reads_ids: bool = field(init=False)

    def __post_init__(self) -> None:
        self.ids = np.array(self.prompt, np.int32)
        self.num_prompt = len(self.prompt)
        self._reads_ids = bool(getattr(self.sampler, "reads_ids", False))

    @property
    def num_ids(self) -> int:
        return self.num_prompt + len(self.new_ids)

    @property
    def order(self) -> tuple[int, int]:
        """Smaller ones are admitted first."""
        return -self.priority, self.serial

    @property
    def is_past_prompt(self) -> bool:
        return self.num_fed >= self.num_prompt

    def sync(self) -> None:
        """Read what the sequence holds.  Raises: StaleSequence."""
        self.num_fed = 0 if self.seq is None else len(self.seq)

    def next_ids(self, room: int) -> list[int]:
        """The next ids to feed, at most `room`."""
        fed, length = self.num_fed, self.num_prompt
        rest = self.prompt[fed : fed + room]
        return rest + self.new_ids[max(0, fed - length) :][: room - len(rest)]

    def draw(self, logits: FloatArray) -> None:
        """Choose what follows all ids that there are, once; what the sampler raises ends the request."""
        num_ids = self.num_prompt + len(self.new_ids)
        if self.error is not None or (self.drawn is not None and self.drawn[0] == num_ids):
            return
        try:
            if self._reads_ids:
                id = self.sampler.sample(logits, [*self.prompt, *self.new_ids])
            else:
                id = self.sampler.sample(logits)
            if type(id) is not int or not 0 <= id < len(logits):
                id = integer("the id that the sampler drew", id, 0, len(logits) - 1)
            if self.num_logprobs is not None:
                self.drawn_logprob = log_probability(logits, id, self.num_logprobs)
            self.drawn = num_ids, id
        except Exception as error:
            self.error = error

    def take_drawn(self) -> bool:
        """The id that was drawn is the newest, if the sequence holds all before it.  False: there is none."""
        drawn, new_ids = self.drawn, self.new_ids
        if drawn is None or drawn[0] != self.num_fed or drawn[0] != self.num_prompt + len(new_ids):
            return False
        if self.drawn_logprob is not None and len(self.logprobs) == len(new_ids):
            self.logprobs.append(self.drawn_logprob)
        new_ids.append(drawn[1])
        return True

    def is_done(self, stop_ids: frozenset[int]) -> bool:
        """Whether it has ended: by an error, its length, a stop id, or because `ends` says so of the new ids.
        What that raises ends it.
        """
        num_new = len(self.new_ids)
        if self.error is not None or not num_new:
            return self.error is not None
        if self.ends is not None and self.num_seen != num_new:
            try:
                self.has_ended = bool(self.ends(self.new_ids))
            except Exception as error:
                self.error = error
            self.num_seen = num_new
            if self.error is not None:
                return True
        return self.has_ended or num_new >= self.max_new_tokens or self.new_ids[-1] in stop_ids


def stop_set(stop_ids: object) -> frozenset[int]:
    """Ids that end a text; ArgumentError for what is no collection of integers.  Ids beyond the
    vocabulary pass.
    """
    if not isinstance(stop_ids, (list, tuple, set, frozenset, np.ndarray, range)):
        raise ArgumentError(f"stop_ids is {stop_ids!r:.60}; give a list of token ids")
    return frozenset(integer("a stop id", id, -(2**63), 2**64) for id in stop_ids)
