"""Choosing the next token from logits: the likeliest, or at random from a seeded generator.

    logits ── repetition penalty ── / temperature ── top_k ── top_p ── min_p ── draw

Imports errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .._binding import integer, real
from ..errors import ArgumentError

#: How many of the likeliest tokens are sorted at first; more when they do not reach top_p.
FIRST_SORTED = 64


class Sampler:
    """Draws tokens from ``softmax(logits / temperature)``, cut to its likeliest part.

    Parameters
    ----------
    temperature : at least 0; 0 takes the likeliest token and draws nothing
    top_p : above 0, at most 1; the likeliest tokens are kept until their probabilities reach it
    seed : the same seed, logits and order of calls give the same tokens
    top_k : so many of the likeliest tokens are kept, before top_p; 0: all
    min_p : from 0 to 1; tokens less likely than this share of the likeliest are dropped, after top_p
    repetition_penalty : at least 1; logits of tokens that the text has already are divided by it where they
        are above 0, and multiplied where they are below

    Raises: ArgumentError.
    Source: Holtzman et al., The Curious Case of Neural Text Degeneration, 2020 (top-p); Nguyen et al.,
    Turning Up the Heat, 2025 (min-p); Keskar et al., CTRL, 2019 (repetition penalty).
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> None:
        self.temperature, self.top_p = real("temperature", temperature), real("top_p", top_p)
        self.top_k, self.min_p = integer("top_k", top_k, 0), real("min_p", min_p)
        self.repetition_penalty = real("repetition_penalty", repetition_penalty)
        if self.temperature < 0:
            raise ArgumentError(f"temperature is {temperature}; it must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ArgumentError(f"top_p is {top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ArgumentError(f"min_p is {min_p}; it must be from 0 to 1")
        if self.repetition_penalty < 1:
            raise ArgumentError(f"repetition_penalty is {repetition_penalty}; it must be at least 1")
        self._generator = np.random.default_rng(integer("seed", seed, 0, 2**64))

    @property
    def reads_ids(self) -> bool:
        """Whether `sample` needs the ids of the text."""
        return self.repetition_penalty != 1

    # Weights of unlikely tokens underflow to 0, whatever the caller's np.seterr.
    @np.errstate(all="ignore")
    def sample(self, logits: NDArray[np.float32], ids: Sequence[int] = ()) -> int:
        """A token id for logits [vocab].

        ids : of the text so far, prompt and new tokens; for the repetition penalty
        Raises: ArgumentError when there is none to choose: NaN, +inf, or nothing but -inf.
        Cost: O(vocab); the few likeliest are sorted.
        """
        if self.reads_ids and len(ids):
            logits = self._penalised(logits, ids)
        # argmax finds a NaN where there is one.
        likeliest = int(logits.argmax())
        if not np.isfinite(logits[likeliest]):
            raise ArgumentError("the logits have no finite maximum; there is no token to choose")
        if self.temperature == 0:
            return likeliest
        # The maximum goes first, so that the smallest temperature cannot overflow.
        weights = np.exp((logits - logits[likeliest]).astype(np.float64) / self.temperature)
        if 0 < self.top_k < len(weights):
            tokens = _largest(weights, self.top_k)
            cumulative = weights[tokens].cumsum()
            num_kept = 1 + int(np.searchsorted(cumulative[:-1], self.top_p * cumulative[-1]))
            tokens, cumulative = tokens[:num_kept], cumulative[:num_kept]
        else:
            tokens, cumulative = _likeliest_part(weights, self.top_p * weights.sum())
        if self.min_p > 0:  # the likeliest weighs 1
            num_kept = max(1, int((weights[tokens] >= self.min_p).sum()))
            tokens, cumulative = tokens[:num_kept], cumulative[:num_kept]
        drawn = self._generator.random() * cumulative[-1]
        return int(tokens[np.searchsorted(cumulative[:-1], drawn, "right")])

    def _penalised(self, logits: NDArray[np.float32], ids: Sequence[int]) -> NDArray[np.float32]:
        penalised = logits.copy()
        seen = np.unique(np.asarray(ids))
        penalty = np.float32(self.repetition_penalty)
        found = penalised[seen]
        penalised[seen] = np.where(found > 0, found / penalty, found * penalty)
        return penalised


def _largest(weights: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """The tokens of so many largest weights, the largest first, of equals the smaller id."""
    tokens = np.argpartition(-weights, count)[:count] if count < len(weights) else np.arange(len(weights))
    return tokens[np.lexsort((tokens, -weights[tokens]))]


def _likeliest_part(
    weights: NDArray[np.float64], mass: float
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The fewest of the largest weights whose sum reaches `mass`: (tokens, their cumulative sums)."""
    num_sorted = FIRST_SORTED
    while True:
        tokens = _largest(weights, num_sorted)
        cumulative = weights[tokens].cumsum()
        if cumulative[-1] >= mass or num_sorted >= len(weights):
            num_kept = 1 + int(np.searchsorted(cumulative[:-1], mass))
            return tokens[:num_kept], cumulative[:num_kept]
        num_sorted *= 8


def seed_of(seed: int, index: int, sample: int = 0) -> int:
    """A seed for each place in a list of prompts, and each sample of one."""
    seed = integer("seed", seed, 0, 2**64)
    entropy = [seed, index, sample] if sample else [seed, index]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class LogProbability:
    """How likely a token was, and which ones were likeliest; natural logarithms.

    top : (id, log probability) of the likeliest tokens, the likeliest first
    """

    id: int
    value: float
    top: tuple[tuple[int, float], ...] = ()


@np.errstate(all="ignore")
def log_probability(logits: NDArray[np.float32], id: int, num_top: int = 0) -> LogProbability:
    """Of a token by ``log_softmax(logits)``, before temperature and penalties, with the likeliest beside it.

    Cost: O(vocab).
    """
    largest = logits.max()
    total = float(largest) + float(np.log(np.exp((logits - largest).astype(np.float64)).sum()))
    top = _largest(logits.astype(np.float64), min(num_top, len(logits))) if num_top else ()
    likeliest = tuple((int(token), float(logits[token]) - total) for token in top)
    return LogProbability(int(id), float(logits[id]) - total, likeliest)
