"""Where the time of a model's steps goes: into its matrices, into attention, and into the rest.

Imports bitnet.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from ..models.decoder import DecoderModel
from ..models.layers import KVStep
from ..models.matrix import Matrix
from ..models.report import Stopwatch
from ..models.ternary import FloatArray


class TimedStep:
    """A step whose appending and attending is timed."""

    def __init__(self, step: Any, clock: Stopwatch) -> None:
        self._step, self._clock = step, clock

    @property
    def positions(self) -> NDArray[Any]:
        positions: NDArray[Any] = self._step.positions
        return positions

    def attend(
        self, layer: int, q: FloatArray, k: FloatArray, v: FloatArray, /, *, out: FloatArray
    ) -> FloatArray:
        begin = time.perf_counter()
        self._step.attend(layer, q, k, v, out=out)
        self._clock.seconds += time.perf_counter() - begin
        return out

    def rollback(self) -> None:
        self._step.rollback()

    def __enter__(self) -> "TimedStep":
        self._step.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._step.__exit__(kind, error, trace)


class TimedCache:
    """A cache whose steps are TimedSteps; everything else is the cache's."""

    def __init__(self, cache: Any, clock: Stopwatch) -> None:
        self._cache, self._clock = cache, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def step(self, seqs: Any, new: Any) -> TimedStep:
        return TimedStep(self._cache.step(seqs, new), self._clock)


class TimedMatrix(Matrix):
    """A matrix whose calls are timed; its weights are those of another."""

    def __init__(self, matrix: Matrix, clock: Stopwatch) -> None:
        self.__dict__ |= matrix.__dict__
        self._clock = clock

    def __call__(self, *args: Any, **options: Any) -> FloatArray:
        begin = time.perf_counter()
        out = super().__call__(*args, **options)
        self._clock.seconds += time.perf_counter() - begin
        return out


@contextmanager
def timed_matrices(model: DecoderModel, clock: Stopwatch) -> Iterator[None]:
    """Within the block, the clock counts what the model's products take, with what is between them."""
    head, model.clock = model.head, clock
    try:
        if isinstance(head, Matrix):
            model.head = TimedMatrix(head, clock)
        yield
    finally:
        model.head, model.clock = head, None


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of a step, and how they divide."""

    total_ms: float
    weights_ms: float
    attention_ms: float

    @property
    def rest_ms(self) -> float:
        return self.total_ms - self.weights_ms - self.attention_ms


def timed_step(
    model: DecoderModel, step: Any, ids: NDArray[Any], rows: NDArray[Any]
) -> tuple[StepTimes, FloatArray]:
    """One forward pass over a step, which is committed: its times, and its logits."""
    weights, attention = Stopwatch(), Stopwatch()
    begin = time.perf_counter()
    with timed_matrices(model, weights), TimedStep(step, attention) as timed:
        kv: KVStep = timed
        logits = model.forward(ids, kv, rows)
    total = time.perf_counter() - begin
    return StepTimes(1e3 * total, 1e3 * weights.seconds, 1e3 * attention.seconds), logits
