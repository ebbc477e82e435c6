"""Serving many prompts at once: continuous batching over one cache.

A request waits, runs and is done.  Every step takes the next token of each request that is past its prompt,
and fills up with chunks of other prompts, so that no request waits for a long prompt to pass:

    step 1   [a: prompt ............]
    step 2   [a: token][b: prompt .....]
    step 3   [a: token][b: ... prompt][c: prompt .]      one forward pass each

A request is admitted when its prompt and all its new tokens fit whatever the others do.  Several samples of a
prompt share it: the first one computes it, and the others are forks of that.

A step changes a request in two places, its sequence and its ids, and either may be interrupted.  The sequence
is the truth: what it does not hold yet is fed next, and an id that was drawn counts once the sequence holds
all ids before it.  So a step that raised can be repeated, and draws nothing twice.

Imports bitnet, sampling and token_ids.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from .._binding import integer
from ..cache import PagedKVCache
from ..errors import (
    ArgumentError,
    CacheClosed,
    OutOfPages,
    OutOfSequences,
    SequenceBusy,
    SequenceTooLong,
    StaleSequence,
    StepClosed,
)
from ..lifetime import Uncopyable
from ..models.bitnet import BitNetModel, GenerationReport
from ..models.sampling import Sampler
from ..models.ternary import FloatArray
from ..models.token_ids import drawn_id, prompt_ids
from ..pages.block_table import MAX_TOKENS

#: Tokens of one step, where there are prompts to fill it: enough for full matrix products, few enough that
#: running requests do not wait long for their next token.
STEP_TOKENS = 256


class ServingCache(Protocol):
    """What serving asks of a cache; PagedKVCache is one."""

    def sequence(self) -> Any: ...

    def step(self, seqs: Any, new: Any) -> Any: ...


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


@dataclass
class Admission:
    """How much a cache holds, and what a request of n tokens takes of it, in the same unit.

    max_sequences, max_seq_len, max_step_tokens : the cache's, where it has such limits
    """

    capacity: int
    cost_of: Callable[[int], int]
    max_sequences: int | None = None
    max_seq_len: int | None = None
    max_step_tokens: int | None = None

    @classmethod
    def pages_of(cls, cache: PagedKVCache) -> "Admission":
        page_size = cache.page_size
        most = MAX_TOKENS if cache.window is None else cache.max_sequence_pages * page_size
        return cls(
            cache.stats().num_pages,
            lambda num_tokens: -(-min(num_tokens, most) // page_size),
            cache.max_sequences,
            cache.max_seq_len,
            cache.max_step_tokens,
        )


def require_positions(num_ids: int, max_new_tokens: int, positions: int, whose: str) -> None:
    """SequenceTooLong when a prompt and its new tokens, but for the last, which is not fed, take
    more positions.
    """
    needed = num_ids + max_new_tokens - 1
    if needed > positions:
        raise SequenceTooLong(
            f"a prompt of {num_ids} and {max_new_tokens} new tokens take {needed} positions, {whose} has "
            f"{positions}; shorten the prompt, or ask for fewer new tokens"
        )


def stop_set(stop_ids: object) -> frozenset[int]:
    """Ids that end a text; ArgumentError for what is no collection of integers.  Ids beyond the
    vocabulary pass.
    """
    if not isinstance(stop_ids, (list, tuple, set, frozenset, np.ndarray, range)):
        raise ArgumentError(f"stop_ids is {stop_ids!r:.60}; give a list of token ids")
    return frozenset(integer("a stop id", id, -(2**63), 2**64) for id in stop_ids)


class Batch(Uncopyable):
    """Requests that wait and requests that run, over one cache.

    Parameters
    ----------
    model : BitNetModel
    cache : a ServingCache of the model's shape
    admission : what the cache holds
    stop_ids : a request that produces one of these is done
    step_tokens : tokens of a step that has prompts to fill it
    report : what it takes is added to this one; None: to a new one
    """

    def __init__(
        self,
        model: BitNetModel,
        cache: ServingCache,
        admission: Admission,
        *,
        stop_ids: Sequence[int] = (),
        step_tokens: int = STEP_TOKENS,
        report: GenerationReport | None = None,
    ) -> None:
        self.model, self.cache, self.admission = model, cache, admission
        self.stop_ids = stop_set(stop_ids)
        self.step_tokens = integer("step_tokens", step_tokens, 1)
        self.waiting: deque[Request] = deque()  # of several samples, the first
        self.running: list[Request] = []
        self.report = report or GenerationReport()
        #: Requests that are done and that no step has returned yet, in order.
        self._done: dict[Request, None] = {}
        #: The cache's step that is open, until its `with` has ended it.
        self._step: Any = None

    def add(self, prompt: ArrayLike, max_new_tokens: int, sampler: Sampler | None = None) -> Request:
        """Queue a request.

        Raises: ArgumentError for an empty prompt and ids that the vocabulary does not hold; SequenceTooLong,
        OutOfSequences and OutOfPages when it would not fit an empty cache.  What is refused is not queued.
        """
        return self.add_samples(prompt, max_new_tokens, [sampler or Sampler()])[0]

    def add_samples(
        self, prompt: ArrayLike, max_new_tokens: int, samplers: Sequence[Sampler]
    ) -> list[Request]:
        """Queue several samples of one prompt, which run together.  Raises: as `add`."""
        ids = prompt_ids("prompt", prompt, self.model.config.vocab_size)
        max_new_tokens = integer("max_new_tokens", max_new_tokens, 1)
        limits = self.admission
        require_positions(len(ids), max_new_tokens, self.model.config.max_position_embeddings, "the model")
        if not samplers or not all(hasattr(sampler, "sample") for sampler in samplers):
            raise ArgumentError(f"samplers are {samplers!r:.60}; give a Sampler for each sample")
        if limits.max_sequences is not None and len(samplers) > limits.max_sequences:
            raise OutOfSequences(
                f"{len(samplers)} samples of a prompt take as many sequences, the cache has "
                f"{limits.max_sequences}; build one with a larger max_sequences"
            )
        # What samples share is not taken off: when the first one ends early, the others hold it still.
        cost = limits.cost_of(len(ids) + max_new_tokens)
        if cost * len(samplers) > limits.capacity:
            raise OutOfPages(
                f"{len(samplers)} x a prompt of {len(ids)} and {max_new_tokens} new tokens take "
                f"{cost * len(samplers)}, the cache has {limits.capacity}; build a larger one"
            )
        if limits.max_seq_len is not None:
            require_positions(len(ids), max_new_tokens, limits.max_seq_len, "the cache")
        first, *siblings = (Request(ids, max_new_tokens, sampler, cost) for sampler in samplers)
        first.siblings = siblings
        self.waiting.append(first)
        return [first, *siblings]

    def step(self) -> list[Request]:
        """Admit who fits, take one step, return the requests that are done.  Nothing to do: an empty list.

        A request whose own doing fails (its sampler raises, its logits are no numbers, others have taken the
        pages or sequences that it needs) is done, with `error` set; the others go on.

        Raises: what the model raises, and SequenceBusy, CacheClosed.  Then no request has lost or gained
        a token, and the step can be repeated.
        """
        begin = time.perf_counter_ns()
        self._abandon_step()
        self._settle()
        self._admit()
        chosen, step = self._open(self._choose())
        if step is not None:
            ids = [id for _, new in chosen for id in new]
            num_prompt_tokens = sum(len(new) for request, new in chosen if not request.is_past_prompt)
            ends = np.cumsum([len(new) for _, new in chosen]) - 1
            sampling = [i for i, (one, new) in enumerate(chosen) if one.num_fed + len(new) == one.num_ids]
            num_sampled = 0
            with step:
                logits = self.model.forward(ids, step, ends[sampling])
                for i, row in zip(sampling, logits, strict=True):
                    for request in (chosen[i][0], *chosen[i][0].siblings):
                        request.draw(row)
                        num_sampled += request.error is None
            self._step = None
            self._settle()
            self.report.count_step(num_prompt_tokens, num_sampled, time.perf_counter_ns() - begin)
        done, self._done = list(self._done), {}
        return done

    def close(self) -> None:
        """Give back what the running requests hold."""
        self._abandon_step()
        for request in list(self.running):
            self._retire(request)
        self._done.clear()

    # ---- the parts of a step; each may be done again after an interrupt

    def _abandon_step(self) -> None:
        """Roll back a step that an interrupt on the way into its `with`, or out of it, has left open."""
        if self._step is not None:
            with suppress(StepClosed, CacheClosed):
                self._step.rollback()
            self._step = None

    def _settle(self) -> None:
        """Take the ids that were drawn in steps that are committed, fork siblings, end what is done."""
        for request in list(self.running):
            try:
                if request.siblings and (request.error or request.drawn) and request.is_past_prompt:
                    self._fork_siblings(request)
                if not self._is_done(request):
                    request.take_drawn()
            except StaleSequence as error:  # somebody else has freed its sequence
                self._fail(request, error)
        for request in list(self.running):
            if self._is_done(request):
                self._retire(request)

    def _fork_siblings(self, request: Request) -> None:
        while request.siblings:
            sibling = request.siblings[0]
            if sibling.error is None:
                try:
                    sibling.seq = request.seq.fork()
                except Exception as error:
                    sibling.error = error
            request.siblings.pop(0)

    def _admit(self) -> None:
        limits, taken = self.admission, sum(request.cost for request in self.running)
        while self.waiting:
            first = self.waiting[0]
            group = [first, *first.siblings]
            if first not in self.running:  # as after an interrupt
                num_sequences = len(self.running) + len(group)
                if limits.max_sequences is not None and num_sequences > limits.max_sequences:
                    return
                if taken + first.cost * len(group) > limits.capacity:
                    return
                try:
                    first.seq = self.cache.sequence()
                except OutOfSequences as error:
                    if self.running:
                        return  # one of ours may end
                    self._fail(first, error)
                else:
                    taken += first.cost * len(group)
                    self.running += group
            self.waiting.popleft()

    def _choose(self) -> list[tuple[Request, list[int]]]:
        """Who steps, with which ids: tokens first, then prompts as far as there is room."""
        past_prompt = [request for request in self.running if request.is_past_prompt]
        chosen = [(request, request.next_ids(1)) for request in past_prompt]
        room = self.step_tokens - len(chosen)
        most = self.step_tokens if self.admission.max_step_tokens is None else self.admission.max_step_tokens
        for request in self.running:
            if not request.is_past_prompt and room > 0 and request.seq is not None:
                new = request.next_ids(min(room, most))
                chosen.append((request, new))
                room -= len(new)
        return chosen

    def _open(self, chosen: list[tuple[Request, list[int]]]) -> tuple[list[tuple[Request, list[int]]], Any]:
        """A step for these, or for those of them that the cache takes; None for nobody."""
        newest = chosen[-1][0] if chosen else None
        while chosen:
            try:
                self._step = self.cache.step([one.seq for one, _ in chosen], [new for _, new in chosen])
                return chosen, self._step
            except OutOfPages as error:
                # Others hold pages that admission counted on.  The newest wait; if not even the oldest can
                # step, the newest ends, so that its pages are there for the others.
                chosen = chosen[:-1]
                if not chosen and newest is not None:
                    self._fail(newest, error)
            except (StaleSequence, SequenceTooLong, ArgumentError):
                if not (refused := self._refused_alone(chosen)):
                    raise
                for request, why in refused.items():
                    self._fail(request, why)
                chosen = [(request, new) for request, new in chosen if request not in refused]
                newest = chosen[-1][0] if chosen else None
        return chosen, None

    def _refused_alone(self, chosen: list[tuple[Request, list[int]]]) -> dict[Request, Exception]:
        """Who of them cannot step by itself, and why."""
        refused: dict[Request, Exception] = {}
        for request, new in chosen:
            try:
                self.cache.step([request.seq], [new]).rollback()
            except (StaleSequence, SequenceTooLong, ArgumentError) as error:
                refused[request] = error
        return refused

    def _fail(self, request: Request, error: Exception) -> None:
        """End a request, and with it the samples that wait for its prompt."""
        for one in (request, *request.siblings):
            one.error = error
        for one in (request, *request.siblings):
            self._retire(one)

    def _is_done(self, request: Request) -> bool:
        if not request.new_ids or request.error is not None:
            return request.error is not None
        return len(request.new_ids) >= request.max_new_tokens or request.new_ids[-1] in self.stop_ids

    def _retire(self, request: Request) -> None:
        if request.seq is not None:  # a sibling may still wait for its prompt
            # Somebody else may have it in a step, or have freed it: what is left goes with the handle.
            with suppress(SequenceBusy, StaleSequence):
                request.seq.free()
            request.seq = None
        self._done[request] = None
        if request in self.running:
            self.running.remove(request)
