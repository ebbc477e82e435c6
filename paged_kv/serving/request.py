"""A request: one prompt on its way through the batch, and what ends it.

It waits, runs and is done.  A step changes it in two places, its sequence and its ids, and either may be
interrupted.  The sequence is the truth: ids that it does not hold yet are fed next, and an id that was drawn
counts once the sequence holds all ids before it.  So a step that raised can be repeated, and draws no id
twice.

Imports models.sampling and models.token_ids.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from .._binding import integer
from ..errors import ArgumentError
from ..models.sampling import LogProbability, Sampler, log_probability
from ..models.ternary import FloatArray
from ..models.token_ids import drawn_id


@dataclass(eq=False)
class Request:
    """A prompt on its way through the batch.

    error : what ended it before it was done; None: nothing did
    ends : is called with the new ids after each of them; True: the text is whole
    num_logprobs : log probabilities are kept, with so many of the likeliest tokens; None: none are
    logprobs : of each new id
    """

    prompt: list[int]
    max_new_tokens: int
    sampler: Sampler
    cost: int
    seq: Any = None
    new_ids: list[int] = field(default_factory=list)
    error: Exception | None = None
    ends: Callable[[list[int]], bool] | None = None
    num_logprobs: int | None = None
    logprobs: list[LogProbability] = field(default_factory=list)
    #: Other samples of the same prompt, which begin as forks when it is computed.
    siblings: list["Request"] = field(default_factory=list)
    #: (n, id): the id that was drawn to follow the first n.
    drawn: tuple[int, int] | None = None
    drawn_logprob: LogProbability | None = None
    #: What `ends` said of so many new ids.
    has_ended: bool = False
    num_seen: int = 0

    def __post_init__(self) -> None:
        #: The prompt, int32.
        self.ids = np.array(self.prompt, np.int32)

    @property
    def num_ids(self) -> int:
        return len(self.prompt) + len(self.new_ids)

    @property
    def num_fed(self) -> int:
        """How many of them the sequence holds."""
        return 0 if self.seq is None else len(self.seq)

    @property
    def is_past_prompt(self) -> bool:
        return self.num_fed >= len(self.prompt)

    def next_ids(self, room: int) -> list[int]:
        """The next ids to feed, at most `room`."""
        fed = self.num_fed
        rest = self.prompt[fed : fed + room] if fed < len(self.prompt) else []
        return rest or self.new_ids[fed - len(self.prompt) :][:room]

    def draw(self, logits: FloatArray) -> None:
        """Choose what follows all ids that there are, once; what the sampler raises ends the request."""
        if self.error is None and (self.drawn is None or self.drawn[0] != self.num_ids):
            try:
                id = drawn_id(self.sampler, logits, chain(self.prompt, self.new_ids))
                if self.num_logprobs is not None:
                    self.drawn_logprob = log_probability(logits, id, self.num_logprobs)
                self.drawn = self.num_ids, id
            except Exception as error:
                self.error = error

    def take_drawn(self) -> None:
        """The id that was drawn is the newest, if the sequence holds all before it.  Raises:
        StaleSequence.
        """
        num_fed = self.num_fed
        if self.drawn is not None and self.drawn[0] == self.num_ids == num_fed:
            logprob, id = self.drawn_logprob, self.drawn[1]
            if logprob is not None and len(self.logprobs) == len(self.new_ids):
                self.logprobs.append(logprob)
            self.new_ids.append(id)

    def is_whole(self) -> bool:
        """Whether `ends` says so of the new ids; what it raises ends the request."""
        if self.ends is None or self.num_seen == len(self.new_ids):
            return self.has_ended
        try:
            self.has_ended = bool(self.ends(self.new_ids))
        except Exception as error:
            self.error = error
        self.num_seen = len(self.new_ids)
        return self.has_ended


def stop_set(stop_ids: object) -> frozenset[int]:
    """Ids that end a text; ArgumentError for what is no collection of integers.  Ids beyond the
    vocabulary pass.
    """
    if not isinstance(stop_ids, (list, tuple, set, frozenset, np.ndarray, range)):
        raise ArgumentError(f"stop_ids is {stop_ids!r:.60}; give a list of token ids")
    return frozenset(integer("a stop id", id, -(2**63), 2**64) for id in stop_ids)
