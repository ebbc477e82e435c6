"""Beam search: the likeliest whole texts, not the likeliest next token, by forks that share their pages.

    k beams ── logits of each ── likeliest next (beam, token) ── the best k go on: forks
                                                                 texts that end are kept

A beam is a request of the batch, with a sequence of its own.  When all beams of a group have logits, the
group chooses, and each beam takes the ids and the sequence that it goes on with.  So beams need not step
together: one that was preempted is waited for, and feeds its ids again.

Source: transformers' `generate(num_beams=...)`, whose scores and end these are.

Imports request.
"""

from dataclasses import dataclass, field

import numpy as np

from ..models.ternary import FloatArray
from .request import Request


@dataclass(eq=False, slots=True)
class Beam(Request):
    """One of the beams of a group.

    candidates : (number of ids, [(log probability, id)]), what may follow them, the likeliest first
    score : the sum of the log probabilities of its new ids
    """

    candidates: tuple[int, list[tuple[float, int]]] | None = None
    score: float = 0.0

    def draw(self, logits: FloatArray) -> None:
        """Note the likeliest tokens."""
        if self.error is None and (self.candidates is None or self.candidates[0] != self.num_ids):
            try:
                found = likeliest(logits, self.group.num_looked_at)
                # All beams begin alike: one of them speaks for all.
                self.candidates = self.num_ids, found if self.new_ids or self is self.group.beams[0] else []
            except Exception as error:
                self.error = error

    def take_drawn(self) -> bool:
        """The group chooses."""
        return False

    def is_done(self, stop_ids: frozenset[int]) -> bool:
        """Whether the group has its texts."""
        return self.error is not None or bool(self.group.is_done)

    @property
    def is_ready(self) -> bool:
        """Whether it knows what may follow its ids."""
        return self.candidates is not None and self.candidates[0] == self.num_ids


def likeliest(logits: FloatArray, count: int) -> list[tuple[float, int]]:
    """(log probability, id) of the likeliest tokens, the likeliest first, of equals the smaller id."""
    largest = float(logits.max())
    if not np.isfinite(largest):
        raise ValueError("the logits have no finite maximum; there is no token to choose")
    shifted = logits.astype(np.float64) - largest
    log_sum = float(np.log(np.exp(shifted).sum()))
    count = min(count, len(shifted))
    ids = np.argpartition(-shifted, count - 1)[:count]
    ids = ids[np.lexsort((ids, -shifted[ids]))]
    return [(float(shifted[id]) - log_sum, int(id)) for id in ids]


@dataclass(eq=False)
class BeamGroup:
    """The beams of one search, and the texts that have ended.

    stop_ids : end a text
    length_penalty : texts are compared by score / length ** length_penalty
    ended : (that value, new ids), the best first, of as many texts as there are beams at most
    """

    stop_ids: frozenset[int]
    max_new_tokens: int
    length_penalty: float = 1.0
    beams: list[Beam] = field(default_factory=list)
    ended: list[tuple[float, list[int]]] = field(default_factory=list)
    is_done: bool = False

    @property
    def num_looked_at(self) -> int:
        """Of the likeliest tokens of a beam: enough that as many go on as there are beams."""
        return len(self.beams) * (1 + len(self.stop_ids))

    @property
    def is_ready(self) -> bool:
        return all(beam.is_ready for beam in self.beams)

    def choose(self) -> list[tuple[int, int, float]]:
        """(beam, id, score) of each beam that goes on; none when the search is done."""
        length = 1 + len(self.beams[0].new_ids)
        extended = [
            (beam.score + value, place, id)
            for place, beam in enumerate(self.beams)
            for value, id in (beam.candidates or (0, []))[1]
        ]
        extended.sort(key=lambda one: (-one[0], one[1], one[2]))
        going: list[tuple[int, int, float]] = []
        for rank, (score, place, id) in enumerate(extended[: self.num_looked_at]):
            if id in self.stop_ids:
                if rank < len(self.beams):
                    self._end(score, [*self.beams[place].new_ids, id])
            elif len(going) < len(self.beams):
                going.append((place, id, score))
        if length >= self.max_new_tokens:
            for place, id, score in going:
                self._end(score, [*self.beams[place].new_ids, id])
            going = []
        best = going[0][2] / length**self.length_penalty if going else -np.inf
        is_full = len(self.ended) >= len(self.beams)
        self.is_done = not going or (is_full and self.ended[-1][0] >= best)
        if self.is_done:
            self.finish()
        return [] if self.is_done else going

    def finish(self) -> None:
        """Give the beams the ids of the texts."""
        for place, beam in enumerate(self.beams):
            value, ids = self.ended[place] if place < len(self.ended) else (-np.inf, [])
            beam.new_ids, beam.score = list(ids), value

    def _end(self, score: float, new_ids: list[int]) -> None:
        self.ended.append((score / len(new_ids) ** self.length_penalty, new_ids))
        self.ended.sort(key=lambda one: -one[0])
        del self.ended[len(self.beams) :]
