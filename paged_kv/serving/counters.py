"""Counters of an engine: requests by how they ended, tokens, and histograms of times.

The engine's thread counts, others read; a reader may see one number ahead of another.

Imports nothing.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

#: Upper bounds in seconds, those of vLLM.
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS = tuple(float(mantissa * 10**power) for power in range(6) for mantissa in (1, 2, 5))


class Histogram:
    """How many values are at most each bound, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count a value, so many times."""
        self._counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    @property
    def count(self) -> int:
        return sum(self._counts)

    @property
    def cumulative(self) -> list[int]:
        """Values of at most each bound, and last of all values."""
        return list(accumulate(self._counts))

    def quantile(self, share: float) -> float:
        """The bound that so large a share of the values do not exceed; nan without values."""
        counts = self.cumulative
        if not counts[-1]:
            return float("nan")
        at = bisect_left(counts, share * counts[-1])
        return self.bounds[at] if at < len(self.bounds) else float("inf")


@dataclass
class Counters:
    """What an engine has done since it was built.

    finished : samples by finish_reason
    num_refused : requests that found the queue full
    first_token_seconds : from submission to the first token of a request
    token_seconds : between two tokens of a sample
    queue_seconds, request_seconds : from submission to admission, and to the end
    prefill_seconds, decode_seconds, inference_seconds : from admission to the first token, from there to the
        end, and both
    prompt_tokens, new_tokens, max_tokens, num_samples : of a request
    """

    finished: Counter[str] = field(default_factory=Counter)
    num_requests: int = 0
    num_refused: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_new_tokens: int = 0
    first_token_seconds: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_SECONDS))
    token_seconds: Histogram = field(default_factory=lambda: Histogram(TOKEN_SECONDS))
    queue_seconds: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    request_seconds: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    prefill_seconds: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    decode_seconds: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    inference_seconds: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    max_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    num_samples: Histogram = field(default_factory=lambda: Histogram((1, 2, 5, 10, 20)))
    prompt_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    new_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
