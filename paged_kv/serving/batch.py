"""Continuous batching: many prompts served at once over one cache.

Every step takes the next token of each request that is past its prompt,
and fills up with chunks of other prompts, so that no request waits for a long prompt to pass:

    step 1   [a: prompt ............]
    step 2   [a: token][b: prompt .....]
    step 3   [a: token][b: ... prompt][c: prompt .]      one forward pass each

Prompts begin with what the cache has of them.  One that shares its beginning with a prompt that is being
computed waits until that part can be found; others overtake it.

Several samples of a prompt share it: the first one computes it, and the others are forks of that.  A request
can be cancelled at any time; when it computes the prompt of other samples, the next of them goes on with it.

Imports request, admission and models.bitnet.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from .._binding import integer
from ..errors import (
    ArgumentError,
    CacheClosed,
    OutOfPages,
    OutOfSequences,
    RequestCancelled,
    SequenceBusy,
    SequenceTooLong,
    StaleSequence,
    StepClosed,
)
from ..lifetime import Uncopyable
from ..models.decoder import DecoderModel
from ..models.report import GenerationReport
from ..models.sampling import Sampler
from ..models.token_ids import prompt_ids
from ..pages.token_keys import num_common
from .admission import Admission, require_positions
from .request import Request, stop_set

#: Tokens of one step, where there are prompts to fill it: enough for full matrix products, few enough that
#: running requests do not wait long for their next token.
STEP_TOKENS = 256
#: A prompt waits for another one to compute at least so many tokens that they share.
MIN_SHARED_TOKENS = 32
#: So many waiting prompts are looked at in a step; those behind have to wait for them.
MAX_LOOKED_AT = 256


class ServingCache(Protocol):
    """The cache that serving needs; PagedKVCache is one."""

    @property
    def prefix_caching(self) -> bool: ...

    def sequence(self, tokens: Any = None) -> Any: ...

    def step(self, seqs: Any, new: Any) -> Any: ...


class Batch(Uncopyable):
    """Requests that wait and requests that run, over one cache.

    Parameters
    ----------
    model : DecoderModel
    cache : a ServingCache of the model's shape
    admission : what the cache holds
    stop_ids : a request that produces one of these is done
    step_tokens : tokens of a step that has prompts to fill it
    report : what it takes is added to this one; None: to a new one
    """

    def __init__(
        self,
        model: DecoderModel,
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
        self._is_stepping = False

    def add(
        self, prompt: ArrayLike, max_new_tokens: int, sampler: Sampler | None = None, **options: Any
    ) -> Request:
        """Queue a request; options as `add_samples`.

        Raises: ArgumentError for an empty prompt and ids that the vocabulary does not hold; SequenceTooLong,
        OutOfSequences and OutOfPages when it would not fit an empty cache.  What is refused is not queued.
        """
        return self.add_samples(prompt, max_new_tokens, [sampler or Sampler()], **options)[0]

    def add_samples(
        self,
        prompt: ArrayLike,
        max_new_tokens: int,
        samplers: Sequence[Sampler],
        *,
        logprobs: int | None = None,
        ends: Sequence[Callable[[list[int]], bool]] | None = None,
    ) -> list[Request]:
        """Queue several samples of one prompt, which run together.

        logprobs : keep the log probability of each new id, and of so many of the likeliest; None: keep none
        ends : for each sample, called with its new ids after each of them; True: its text is whole
        Raises: as `add`.
        """
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
        if logprobs is not None:
            integer("logprobs", logprobs, 0, self.model.config.vocab_size)
        if ends is not None and (len(ends) != len(samplers) or not all(map(callable, ends))):
            raise ArgumentError(f"ends is {ends!r:.60}; give a function for each of {len(samplers)} samples")
        first, *siblings = (
            Request(ids, max_new_tokens, sampler, cost, num_logprobs=logprobs, ends=ends[i] if ends else None)
            for i, sampler in enumerate(samplers)
        )
        first.siblings = siblings
        self.waiting.append(first)
        return [first, *siblings]

    def cancel(self, request: Request) -> bool:
        """End a request that is not done: its pages are free for others at once.

        The next `step` returns it, with its ids so far and a RequestCancelled as `error`.  Samples of the
        same prompt are not affected.  Called inside a step (by a sampler), it takes effect when the step
        ends.

        Returns: False when the request was done already, or is another batch's.
        """
        if not isinstance(request, Request):
            raise ArgumentError(f"request is {request!r:.60}; give one that `add` returned")
        waiting = [one for first in self.waiting for one in (first, *first.siblings)]
        if request.error is not None or request not in [*self.running, *waiting]:
            return False
        request.error = RequestCancelled("the request was cancelled")
        if not self._is_stepping:
            self._abandon_step()
            self._settle()
        return True

    def step(self) -> list[Request]:
        """Admit requests that fit, take one step.  Returns: the requests that are done.

        A request that fails by itself (its sampler raises, its logits are no numbers, others have taken the
        pages or sequences that it needs) is done, with `error` set; the others go on.  Without any request,
        nothing happens.

        Raises: what the model raises, and SequenceBusy, CacheClosed.  Then no request has lost or gained
        a token, and the step can be repeated.
        """
        self._is_stepping = True
        try:
            self._take_step()
        finally:
            self._is_stepping = False
        self._settle()  # also what was cancelled meanwhile
        done, self._done = list(self._done), {}
        return done

    def _take_step(self) -> None:
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
        """Take the ids that were drawn in committed steps, fork siblings, end what is done or cancelled."""
        self._drop_cancelled()
        for request in list(self.running):
            try:
                if request.siblings and (request.error or request.drawn):
                    if request.is_past_prompt:
                        self._fork_siblings(request)
                    elif request.error:
                        self._hand_over(request)
                if not self._is_done(request):
                    request.take_drawn()
            except StaleSequence as error:  # its sequence was freed from outside
                self._fail(request, error)
        for request in list(self.running):
            if self._is_done(request):
                self._retire(request)

    def _drop_cancelled(self) -> None:
        """Of the requests that wait."""
        for i, first in enumerate(self.waiting):
            group = [first, *first.siblings]
            alive = [request for request in group if request.error is None]
            if len(alive) == len(group) or first in self.running:
                continue
            self._done |= dict.fromkeys([request for request in group if request.error is not None])
            if alive:
                alive[0].siblings = alive[1:]
                self.waiting[i] = alive[0]
        for first in list(self.waiting):
            if first.error is not None and first not in self.running:
                self.waiting.remove(first)

    def _hand_over(self, request: Request) -> None:
        """The next sample goes on with the prompt of a request that has ended before it was computed."""
        alive = [sibling for sibling in request.siblings if sibling.error is None]
        if alive:
            alive[0].siblings = alive[1:]
            if request.seq is not None:  # else this was done already, before an interrupt
                alive[0].seq = request.seq
                request.seq = None
        request.siblings = []

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
        for first in [*itertools.islice(self.waiting, MAX_LOOKED_AT)]:
            group = [first, *first.siblings]
            if first not in self.running:  # as after an interrupt
                num_sequences = len(self.running) + len(group)
                if limits.max_sequences is not None and num_sequences > limits.max_sequences:
                    return
                if taken + first.cost * len(group) > limits.capacity:
                    return
                if self.cache.prefix_caching and self._will_find_more(first):
                    continue
                try:
                    first.seq = self.cache.sequence(first.ids)
                except OutOfSequences as error:
                    if self.running:
                        return  # one of ours may end
                    self._fail(first, error)
                else:
                    # Nothing is called in between, so no interrupt leaves a sequence without its request.
                    self.running += group
                    taken += first.cost * len(group)
                    self.report.num_cached_tokens += getattr(first.seq, "num_cached_tokens", 0)
            self.waiting.remove(first)

    def _will_find_more(self, request: Request) -> bool:
        """Is a prompt being computed that has more tokens in common with this one than it holds yet?"""
        computing = [one for one in self.running if one.seq is not None and not one.is_past_prompt]
        shared = (num_common(one.ids, request.ids[:-1]) - one.num_fed for one in computing)
        return max(shared, default=0) >= MIN_SHARED_TOKENS

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
        """Open a step for these, or for those that the cache accepts; None when there are none."""
        newest = chosen[-1][0] if chosen else None
        while chosen:
            try:
                self._step = self.cache.step([one.seq for one, _ in chosen], [new for _, new in chosen])
                return chosen, self._step
            except OutOfPages as error:
                # Pages that admission counted on are held from outside.  The newest wait; when not even the
                # oldest can step, the newest ends, so that its pages are free for the others.
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
        is_whole = request.is_whole()
        if request.error is not None:
            return True
        is_full = len(request.new_ids) >= request.max_new_tokens
        return is_full or is_whole or request.new_ids[-1] in self.stop_ids

    def _retire(self, request: Request) -> None:
        if request.seq is not None:  # a sibling may still wait for its prompt
            # It may be in a step of another owner, or freed already: the rest goes with the handle.
            with suppress(SequenceBusy, StaleSequence):
                request.seq.free()
            request.seq = None
        self._done[request] = None
        if request in self.running:
            self.running.remove(request)
