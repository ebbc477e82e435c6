"""A handle: what its owner has of a request that an engine serves, and what comes of it.

    engine's thread    Sample(new_ids) ── Piece ──▶ handle's queue ──▶ for piece in handle, or result()

A handle is read by one thread or one coroutine, which may be any; `cancel` may be called by all.

Imports request.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeAlias

from ..errors import DeadlineExceeded, RequestCancelled
from ..models.sampling import LogProbability
from .request import Request

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "timeout", "error"]


@dataclass(slots=True)
class Piece:
    """What one step adds to a sample.

    index : of the sample
    id : the new id; None: there is none, the sample has ended
    text : what can be shown of it now; empty while a character or a stop string may be incomplete
    finish_reason : None: the sample goes on
    """

    index: int
    id: int | None
    text: str = ""
    logprob: LogProbability | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Usage:
    """What a request took, as the cache counts it.

    cached_tokens : of the prompt, that the cache had
    written_tokens : of the prompt, that were computed and written into pages
    new_tokens : of all samples
    miss_reason : why no more of the prompt was cached, as `PagedKVCache.match` says; None: it was not
        admitted
    """

    prompt_tokens: int
    cached_tokens: int
    written_tokens: int
    new_tokens: int
    num_preemptions: int
    miss_reason: str | None


class Sample:
    """One sample of a request: its ids and its text so far, and how it ended.

    finish_reason : None: it goes on
    error : what ended it before it was whole; None: nothing did
    """

    def __init__(self, index: int, max_tokens: int, stop_ids: frozenset[int], stream: Any) -> None:
        self.index, self.finish_reason = index, None
        self.error: Exception | None = None
        self._max_tokens, self._stop_ids, self._stream = max_tokens, stop_ids, stream
        self._has_stops = stream is not None and stream.has_stops
        self._texts: list[str] = []
        self._push: Callable[[Piece], None] = lambda piece: None

    finish_reason: FinishReason | None

    @property
    def ids(self) -> list[int]:
        """New ids, with the stop id if one came."""
        return list(self._request.new_ids) if self._request.group is None or self.finish_reason else []

    @property
    def text(self) -> str:
        """The text of the new ids, up to a stop string; empty without a tokenizer."""
        return "".join(self._texts)

    def begin(self, request: Request, push: Callable[[Piece], None]) -> None:
        """Say where its ids come from and where its pieces go."""
        self._request, self._push = request, push

    @property
    def logprobs(self) -> list[LogProbability]:
        """Of each new id; none unless they were required."""
        return list(self._request.logprobs)

    def __call__(self, new_ids: list[int]) -> bool:
        """Take the newest id; True: the sample is whole.  Called by the batch, in the engine's thread."""
        id, stream, text = new_ids[-1], self._stream, ""
        reason: FinishReason | None = None
        if id in self._stop_ids:
            reason = "stop"
        elif stream is not None:
            text = stream.add(id)
            if self._has_stops and stream.has_stopped:
                reason = "stop"
        if reason is None and len(new_ids) >= self._max_tokens:
            reason = "length"
        if reason is not None:
            self.finish_reason = reason
            if stream is not None:
                text += stream.finish()
        if text:
            self._texts.append(text)
        logprobs = self._request.logprobs
        self._push(Piece(self.index, id, text, logprobs[-1] if logprobs else None, reason))
        return reason is not None

    def take_whole(self) -> None:
        """Take all ids at once, of a search that has ended."""
        ids = self._request.new_ids
        if not any(self(ids[:count]) for count in range(1, len(ids) + 1)):
            self.finish_reason = "stop"
            self._push(Piece(self.index, None, finish_reason="stop"))

    def end(self, error: Exception | None) -> None:
        """Note what ended it before it was whole, if something did."""
        if self.finish_reason is None and error is not None:
            self.error = error
            if isinstance(error, DeadlineExceeded):
                self.finish_reason = "timeout"
            else:
                self.finish_reason = "cancelled" if isinstance(error, RequestCancelled) else "error"
            text = "" if self._stream is None else self._stream.finish()
            if text:
                self._texts.append(text)
            self._push(Piece(self.index, None, text, None, self.finish_reason, error))


class Handle:
    """A request that an engine serves; made by `engine.submit`.

    Iterate over it, or `async for`, for its pieces, once; or call `result`.

    samples : of each sample its ids, text, log probabilities, finish_reason and error so far
    submitted_at, admitted_at, first_token_at, done_at : by the engine's clock; None: not yet
    """

    def __init__(
        self,
        requests: list[Request],
        samples: list[Sample],
        submitted_at: float,
        wake: Callable[["Handle"], None],
        cancel: Callable[["Handle"], None],
        on_piece: Callable[[Piece], object] | None = None,
    ) -> None:
        self.requests, self.samples = requests, samples
        self.submitted_at = submitted_at
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.done_at: float | None = None
        self.is_cancelled = False
        self._queue: SimpleQueue[Piece] = SimpleQueue()
        self._num_open = len(samples)  # whose last piece was not read yet
        self._wake, self._cancel, self._on_piece = wake, cancel, on_piece
        #: Of the coroutine that reads: its loop, and what it waits for.
        self.loop: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None
        for request, sample in zip(requests, samples, strict=False):  # of beams, the best
            sample.begin(request, self._push)

    def _push(self, piece: Piece) -> None:
        self._queue.put(piece)
        if self.loop is not None:
            self._wake(self)
        if self._on_piece is not None and piece.error is None:
            self._on_piece(piece)

    # ---- for the reader

    def __iter__(self) -> Iterator[Piece]:
        """The pieces of all samples, as they come; waits for the next one."""
        while self._num_open:
            yield self._read(self._queue.get())

    def result(self, timeout: float | None = None) -> list[Sample]:
        """Wait until all samples are done.

        timeout : seconds to wait for each piece; None: as long as it takes
        Raises: the first error of a sample; TimeoutError, and the request goes on.
        """
        while self._num_open:
            try:
                self._read(self._queue.get(timeout=timeout))
            except Empty:
                raise TimeoutError(f"no token within {timeout} s") from None
        return self._whole()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """The same for a coroutine; one that is cancelled or closed early cancels the request."""
        async for pieces in self.batches():
            for piece in pieces:
                yield piece

    async def batches(self) -> AsyncIterator[list[Piece]]:
        """The pieces that are there, and were not read yet; waits for one when there is none."""
        try:
            while self._num_open:
                pieces = [self._read(await self._next())]
                while not self._queue.empty():
                    pieces.append(self._read(self._queue.get_nowait()))
                yield pieces
        finally:
            if self._num_open:
                self.cancel()

    async def wait(self) -> list[Sample]:
        """As `result`, for a coroutine."""
        async for _ in self:
            pass
        return self._whole()

    def cancel(self) -> None:
        """End what is not done yet; pages are free with the engine's next step."""
        self.is_cancelled = True
        self._cancel(self)

    async def _next(self) -> Piece:
        if self.loop is None:
            self.loop = asyncio.get_running_loop()
        while True:
            self._waiter = self.loop.create_future()
            try:
                return self._queue.get_nowait()
            except Empty:
                await self._waiter

    def wake(self) -> None:
        """Let the coroutine go on.  Called in its loop."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _read(self, piece: Piece) -> Piece:
        if piece.finish_reason is not None:
            self._num_open -= 1
        return piece

    def _whole(self) -> list[Sample]:
        for sample in self.samples:
            if sample.error is not None:
                raise sample.error
        return self.samples

    # ---- what it took

    @property
    def is_done(self) -> bool:
        return all(sample.finish_reason is not None for sample in self.samples)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        first = self.requests[0]
        length, fed = len(first.prompt), max(max(one.num_most_fed, one.num_fed) for one in self.requests)
        cached, match = first.num_cached, first.match
        return Usage(
            prompt_tokens=length,
            cached_tokens=cached,
            written_tokens=max(0, min(fed, length) - cached),
            new_tokens=sum(len(request.new_ids) for request in self.requests[: len(self.samples)]),
            num_preemptions=sum(request.num_preemptions for request in self.requests),
            miss_reason=None if match is None else match.reason,
        )
