"""The engine: one thread that steps a batch, for requests from any thread and from asyncio.

    submit(prompt, sampling) ── command ──▶ thread: Batch.step ── Sample ── Piece ──▶ Handle, in any thread
    handle.cancel()          ── command ──▶                                          or event loop

A request is validated and tokenized by the thread that submits it, so that what could never be served is
refused at once.  What it produces comes to its handle piece by piece.  A request that fails ends alone; when
the model itself raises, each running request takes a step alone, and those that raise end.

Imports options, handle, counters and batch.
"""

import asyncio
import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from .._binding import integer, real
from ..cache import PagedKVCache
from ..errors import (
    ArgumentError,
    CacheClosed,
    DeadlineExceeded,
    EngineClosed,
    QueueFull,
    RequestCancelled,
)
from ..lifetime import Uncopyable
from ..models.report import GenerationReport
from ..text.tokenizer import ModelTokenizer
from .admission import Admission
from .batch import STEP_TOKENS, Batch, ServedModel
from .counters import Counters
from .handle import Handle, Piece, Sample
from .options import Sampling
from .request import Request, stop_set

#: Requests that wait at most; further ones are refused.
MAX_WAITING = 256


class Engine(Uncopyable):
    """Serves requests of any number of threads over one cache, in a thread of its own.

    Parameters
    ----------
    model : a ServedModel, as DecoderModel
    cache : a PagedKVCache of the model's shape; while the engine runs, only its counts are read elsewhere
    tokenizer : for prompts that are text, for the text of new ids, and for stop strings; None: ids only
    max_waiting : requests that wait at most
    step_tokens : tokens of a step that has prompts to fill it
    clock : seconds

    counters : what it has done, Counters
    `with` closes it at exit; one that is never closed runs as long as the process.
    Raises: ArgumentError.
    """

    _instead = "threads share it"

    def __init__(
        self,
        model: ServedModel,
        cache: PagedKVCache,
        *,
        tokenizer: ModelTokenizer | None = None,
        max_waiting: int = MAX_WAITING,
        step_tokens: int = STEP_TOKENS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.cache, self.tokenizer, self.clock = model, cache, tokenizer, clock
        self.max_waiting = integer("max_waiting", max_waiting, 1)
        self.counters = Counters()
        self._stop_ids = getattr(model.config, "stop_ids", ())
        self._batch = Batch(model, cache, Admission.pages_of(cache), step_tokens=step_tokens)
        #: Of requests that are not done.
        self._handles: dict[Request, Handle] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._has_commands = threading.Condition()
        self._num_submitted = 0  # requests among the commands
        #: (when, serial number, handle), the earliest first.
        self._deadlines: list[tuple[float, int, Handle]] = []
        self._woken: dict[asyncio.AbstractEventLoop, list[Handle]] = {}
        #: When what runs is cut off; None: the engine takes requests.
        self._closing: float | None = None
        self._failure: BaseException | None = None
        self._sampled_before: set[Request] = set()
        self._stepped_at = self._step_began = 0.0
        self._thread = threading.Thread(target=self._run, name="paged_kv engine", daemon=True)
        self._thread.start()

    # ---- for any thread

    def submit(
        self,
        prompt: Any,
        sampling: Sampling | None = None,
        *,
        priority: int = 0,
        salt: bytes = b"",
        ttl: float | None = None,
        retained: Sequence[tuple[int, int, float | None]] = (),
        timeout: float | None = None,
        on_piece: Callable[[Piece], object] | None = None,
    ) -> Handle:
        """Queue a prompt.

        Parameters
        ----------
        prompt : token ids, or a text where there is a tokenizer
        sampling : how its new tokens are drawn, and how many; None: Sampling()
        priority : higher ones are admitted first, and preempted last
        salt : only requests of the same salt share pages
        ttl : seconds that its pages are worth keeping; None: as long as others
        retained : (position, priority, ttl): how long the pages of the prompt up to there are worth keeping,
            as `Sequence.retain`
        timeout : seconds from now after which it ends with DeadlineExceeded; None: never
        on_piece : called with each piece in the engine's thread, so it must be short; an exception ends the
            sample

        Returns: Handle.
        Raises: ArgumentError, SequenceTooLong, OutOfSequences, OutOfPages for what could never be served;
        QueueFull, EngineClosed.  Cost: tokenizes, and copies the ids.
        """
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise ArgumentError(f"sampling is {sampling!r:.60}; give a Sampling")
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ArgumentError("the prompt is text, and the engine has no tokenizer; give token ids")
            prompt = self.tokenizer.encode(prompt)
        if sampling.stop and self.tokenizer is None:
            raise ArgumentError("stop strings need a tokenizer; give the engine one")
        if timeout is not None and real("timeout", timeout, 0.0) == 0:
            raise ArgumentError("timeout is 0; give seconds above 0, or None")
        self._require_room()
        stop_ids = stop_set(self._stop_ids if sampling.stop_ids is None else sampling.stop_ids)
        samples = []
        for i in range(sampling.n):
            stream = None if self.tokenizer is None else self.tokenizer.stream(sampling.stop)
            samples.append(Sample(i, sampling.max_tokens, stop_ids, stream))
        kept: dict[str, Any] = {"priority": priority, "salt": salt, "ttl": ttl, "retained": retained}
        if sampling.num_beams > 1:
            requests = self._batch.prepare_beams(
                prompt,
                sampling.max_tokens,
                sampling.num_beams,
                stop_ids=tuple(stop_ids),
                length_penalty=sampling.length_penalty,
                **kept,
            )
        else:
            requests = self._batch.prepare(
                prompt,
                sampling.max_tokens,
                sampling.samplers(self.tokenizer, stop_ids),
                logprobs=sampling.logprobs,
                ends=samples,
                **kept,
            )
        handle = Handle(requests, samples, self.clock(), self._wake, self._cancel, on_piece)
        with self._has_commands:
            self._require_room()
            self._num_submitted += 1
            self._commands.append(lambda: self._take(handle, timeout))
            self._has_commands.notify()
        return handle

    def _require_room(self) -> None:
        if self._closing is not None:
            raise EngineClosed("the engine was closed, and takes no requests") from self._failure
        if self.num_waiting >= self.max_waiting:
            self.counters.num_refused += 1
            raise QueueFull(f"{self.num_waiting} requests wait, as many as may; try again later")

    def _cancel(self, handle: Handle) -> None:
        with self._has_commands:
            if self._closing is None or self._thread.is_alive():
                error = RequestCancelled("the request was cancelled")
                self._commands.append(lambda: self._end(handle, error))
                self._has_commands.notify()

    @property
    def num_waiting(self) -> int:
        """Requests that wait to be admitted."""
        return len(self._batch.waiting) + self._num_submitted

    @property
    def num_running(self) -> int:
        """Samples that run."""
        return len(self._batch.running)

    @property
    def report(self) -> GenerationReport:
        """What its steps took."""
        return self._batch.report

    @property
    def is_open(self) -> bool:
        """Whether it takes requests."""
        return self._closing is None

    def close(self, drain: float = 0.0) -> None:
        """Take no more requests, let those that are there end within `drain` seconds, then cancel the rest.

        Returns when its thread has ended.  The cache stays open.  A second close waits for the first.
        """
        with self._has_commands:
            cut_off = self.clock() + real("drain", drain, 0.0)
            self._closing = cut_off if self._closing is None else min(self._closing, cut_off)
            self._has_commands.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._take_step()
        except BaseException as error:  # of the engine or the cache, not of a request
            self._failure = error
        with self._has_commands:
            self._closing = self.clock()
        self._take_commands()
        why: Exception = RequestCancelled("the engine was closed")
        if self._failure is not None:
            why = EngineClosed(f"the engine has failed: {self._failure!r:.200}")
        for handle in dict.fromkeys(self._handles.values()):
            for sample in handle.samples:
                sample.end(why)
        self._handles.clear()
        self._flush()
        with suppress(CacheClosed):
            self._batch.close()

    def _wait_for_work(self) -> bool:
        """Take commands, and sleep while there is nothing to do.  False: the engine ends."""
        while True:
            self._take_commands()
            if self._closing is not None and (self._batch.is_idle or self.clock() >= self._closing):
                return False
            if not self._batch.is_idle:
                return True
            with self._has_commands:
                while not self._commands and self._closing is None:
                    self._has_commands.wait()

    def _take_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _take(self, handle: Handle, timeout: float | None) -> None:
        self._batch.queue(handle.requests)
        self._handles.update(dict.fromkeys(handle.requests, handle))
        self._num_submitted -= 1
        self.counters.num_requests += 1
        if timeout is not None:
            when = handle.submitted_at + timeout
            heapq.heappush(self._deadlines, (when, handle.requests[0].serial, handle))

    def _end(self, handle: Handle, error: Exception) -> None:
        for request in handle.requests:
            if request in self._handles:
                self._batch.cancel(request, error)

    def _end_late(self) -> None:
        now = self.clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, handle = heapq.heappop(self._deadlines)
            late = now - handle.submitted_at
            self._end(handle, DeadlineExceeded(f"the request was not done after {late:.1f} s"))

    def _take_step(self) -> None:
        if self._deadlines:
            self._end_late()
        self._step_began = self.clock()
        try:
            done = self._batch.step()
        except CacheClosed:
            raise
        except Exception:
            done = self._step_alone()
        now = self.clock()
        self._count_tokens(now)
        for request in done:
            handle = self._handles.pop(request)
            place = handle.requests.index(request)
            if place >= len(handle.samples):
                continue  # a beam that is none of the best
            sample = handle.samples[place]
            if request.group is not None and request.error is None:
                sample.take_whole()
            sample.end(request.error)
            self.counters.finished[sample.finish_reason or "error"] += 1
            if handle.is_done and handle.done_at is None:
                self._count_done(handle, now)
        self._flush()

    def _step_alone(self) -> list[Request]:
        """After the model raised: let each running request step alone, and end those that raise."""
        batch, done = self._batch, list[Request]()
        try:
            for request in list(batch.running):
                if request.seq is not None and request in batch.running:
                    batch.only = request
                    try:
                        done += batch.step()
                    except CacheClosed:
                        raise
                    except Exception as error:
                        batch.cancel(request, error)
        finally:
            batch.only = None
        return done

    def _wake(self, handle: Handle) -> None:
        """A coroutine's handle has a piece; its loop is woken once for all pieces of a step."""
        if handle.loop is not None:
            self._woken.setdefault(handle.loop, []).append(handle)

    def _flush(self) -> None:
        woken, self._woken = self._woken, {}
        for loop, handles in woken.items():
            with suppress(RuntimeError):  # the loop was closed: those requests have no reader
                loop.call_soon_threadsafe(_wake_all, handles)

    def _count_tokens(self, now: float) -> None:
        """Times between tokens: a sample that had one in the step before waited for this step."""
        counters, sampled, num_after = self.counters, self._batch.sampled, 0
        for request in self._batch.admitted:
            handle = self._handles[request]
            if handle.admitted_at is None:
                handle.admitted_at = max(self._step_began, handle.submitted_at)
                counters.queue_seconds.observe(handle.admitted_at - handle.submitted_at)
        for request in sampled:
            num_after += request in self._sampled_before
            if len(request.new_ids) == 1:
                handle = self._handles[request]
                if handle.first_token_at is None:
                    handle.first_token_at = now
                    counters.first_token_seconds.observe(now - handle.submitted_at)
        if not sampled:
            return
        if num_after:
            counters.token_seconds.observe(now - self._stepped_at, num_after)
        counters.num_new_tokens += len(sampled)
        self._sampled_before, self._stepped_at = set(sampled), now

    def _count_done(self, handle: Handle, now: float) -> None:
        handle.done_at, counters, usage = now, self.counters, handle.usage
        counters.request_seconds.observe(now - handle.submitted_at)
        if handle.admitted_at is not None and handle.first_token_at is not None:
            counters.prefill_seconds.observe(handle.first_token_at - handle.admitted_at)
            counters.decode_seconds.observe(now - handle.first_token_at)
            counters.inference_seconds.observe(now - handle.admitted_at)
        counters.max_tokens.observe(handle.requests[0].max_new_tokens)
        counters.num_samples.observe(len(handle.samples))
        counters.prompt_tokens.observe(usage.prompt_tokens)
        counters.new_tokens.observe(usage.new_tokens)
        counters.num_prompt_tokens += usage.prompt_tokens
        counters.num_cached_tokens += usage.cached_tokens


def _wake_all(handles: list[Handle]) -> None:
    for handle in handles:
        handle.wake()
