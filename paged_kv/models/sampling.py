"""Choosing the next token from logits: the likeliest, or at random from a seeded generator.

Imports errors.
"""

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

    Raises: ArgumentError.
    Source: Holtzman et al., The Curious Case of Neural Text Degeneration, 2020 (top-p).
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        self.temperature, self.top_p = real("temperature", temperature), real("top_p", top_p)
        if self.temperature < 0:
            raise ArgumentError(f"temperature is {temperature}; it must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ArgumentError(f"top_p is {top_p}; it must be above 0 and at most 1")
        self._generator = np.random.default_rng(integer("seed", seed, 0, 2**64))

    # Weights of unlikely tokens underflow to 0, whatever the caller's np.seterr.
    @np.errstate(all="ignore")
    def sample(self, logits: NDArray[np.float32]) -> int:
        """A token id for logits [vocab].

        Raises: ArgumentError when there is none to choose: NaN, +inf, or nothing but -inf.
        Cost: O(vocab); the few likeliest are sorted.
        """
        # argmax finds a NaN where there is one.
        likeliest = int(logits.argmax())
        if not np.isfinite(logits[likeliest]):
            raise ArgumentError("the logits have no finite maximum; there is no token to choose")
        if self.temperature == 0:
            return likeliest
        # The maximum goes first, so that the smallest temperature cannot overflow.
        weights = np.exp((logits - logits[likeliest]).astype(np.float64) / self.temperature)
        tokens, cumulative = _likeliest_part(weights, self.top_p * weights.sum())
        drawn = self._generator.random() * cumulative[-1]
        return int(tokens[np.searchsorted(cumulative[:-1], drawn, "right")])


def _likeliest_part(
    weights: NDArray[np.float64], mass: float
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The fewest of the largest weights whose sum reaches `mass`: (tokens, their cumulative sums)."""
    num_sorted = FIRST_SORTED
    while True:
        if num_sorted < len(weights):
            tokens = np.argpartition(-weights, num_sorted)[:num_sorted]
        else:
            tokens = np.arange(len(weights))
        tokens = tokens[np.lexsort((tokens, -weights[tokens]))]
        cumulative = weights[tokens].cumsum()
        if cumulative[-1] >= mass or num_sorted >= len(weights):
            num_kept = 1 + int(np.searchsorted(cumulative[:-1], mass))
            return tokens[:num_kept], cumulative[:num_kept]
        num_sorted *= 8
