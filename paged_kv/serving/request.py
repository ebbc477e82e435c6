"""A request: one prompt on its way through the batch, and what ends it.

It waits, runs and is done.  A step changes it in two places, its sequence and its ids, and either may be
interrupted.  The sequence is the truth: ids that it does not hold yet are fed next, and an id that was drawn
counts once the sequence holds all ids before it.  So a step that raised can be repeated, and draws no id
twice.

Imports models.sampling and models.token_ids.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .._binding import integer
from ..errors import ArgumentError
from ..models.sampling import Sampler
from ..models.ternary import FloatArray
from ..models.token_ids import drawn_id


@dataclass(eq=False)
class Request:
    """A prompt on its way through the batch.

    error : what ended it before it was done; None: nothing did
    """

    prompt: list[int]
    max_new_tokens: int
    sampler: Sampler
    cost: int
    seq: Any = None
    new_ids: list[int] = field(default_factory=list)
    error: Exception | None = None
    #: Other samples of the same prompt, which begin as forks when it is computed.
    siblings: list["Request"] = field(default_factory=list)
    #: (n, id): the id that was drawn to follow the first n.
    drawn: tuple[int, int] | None = None

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
                self.drawn = self.num_ids, drawn_id(self.sampler, logits)
            except Exception as error:
                self.error = error

    def take_drawn(self) -> None:
        """The id that was drawn is the newest, if the sequence holds all before it.  Raises:
        StaleSequence.
        """
        num_fed = self.num_fed
        if self.drawn is not None and self.drawn[0] == self.num_ids == num_fed:
            self.new_ids.append(self.drawn[1])


def stop_set(stop_ids: object) -> frozenset[int]:
    """Ids that end a text; ArgumentError for what is no collection of integers.  Ids beyond the
    vocabulary pass.
    """
    if not isinstance(stop_ids, (list, tuple, set, frozenset, np.ndarray, range)):
        raise ArgumentError(f"stop_ids is {stop_ids!r:.60}; give a list of token ids")
    return frozenset(integer("a stop id", id, -(2**63), 2**64) for id in stop_ids)
