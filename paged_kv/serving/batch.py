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

When a step lacks pages, the newest request of the lowest priority is preempted: its pages are given back, and
it waits with its ids and its sampler.  Admitted again, it feeds its prompt and its new ids, of which the
cache may still have some, and goes on with the same tokens.

Imports request, admission and models.report.
"""

import time
from bisect import insort
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from .._binding import integer, real
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
from ..models.report import GenerationReport
from ..models.sampling import Sampler
from ..models.token_ids import prompt_ids
from ..pages.retention import priority_of, seconds
from ..pages.salts import bytes_of
from ..pages.token_keys import num_common
from .admission import Admission, require_positions
from .beam import Beam, BeamGroup
from .request import Request, stop_set

#: Tokens of one step, where there are prompts to fill it: enough for full matrix products, few enough that
#: running requests do not wait long for their next token.
STEP_TOKENS = 256
#: A prompt waits for another one to compute at least so many tokens that they share.
MIN_SHARED_TOKENS = 32
#: So many waiting prompts are looked at in a step; those behind have to wait for them.
MAX_LOOKED_AT = 256
#: So many requests may overtake one that the cache has no room for yet; then the others wait for it.
MAX_OVERTAKEN = 16
#: Beams of one search, at most.
MAX_BEAMS = 64
#: Steps after which the room is counted again, when no request has ended: others may have freed pages.
STEPS_BETWEEN_COUNTS = 16


class ModelLimits(Protocol):
    """What a model's config says of its inputs."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int: ...


class ServedModel(Protocol):
    """The model that serving needs; DecoderModel is one."""

    @property
    def config(self) -> Any: ...  # ModelLimits

    def forward(self, ids: Any, step: Any, rows: Any) -> Any:
        """Logits float32 [num_rows, vocab_size] after some of a step's tokens, as DecoderModel.forward."""
        ...


class ServingCache(Protocol):
    """The cache that serving needs; PagedKVCache is one."""

    @property
    def prefix_caching(self) -> bool: ...

    @property
    def sequence(self) -> Callable[..., Any]: ...

    def step(self, seqs: Any, new: Any) -> Any: ...


class Batch(Uncopyable):
    """Requests that wait and requests that run, over one cache.

    Parameters
    ----------
    model : a ServedModel, as DecoderModel
    cache : a ServingCache of the model's shape
    admission : what the cache holds
    stop_ids : a request that produces one of these is done
    step_tokens : tokens of a step that has prompts to fill it; a quarter of them are left for prompts,
        however many requests are past theirs
    report : what it takes is added to this one; None: to a new one

    waiting : requests in the order in which they are admitted; of several samples, the first
    running : the others
    only : the request that the next steps are for; None: all are
    sampled : requests that have a new id since the last step
    admitted : requests that began to run, or to run again, since then; of several samples, the first
    """

    def __init__(
        self,
        model: ServedModel,
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
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.sampled: list[Request] = []
        self.admitted: list[Request] = []
        self.report = report or GenerationReport()
        #: Requests that are done and that no step has returned yet, in order.
        self._done: dict[Request, None] = {}
        #: The cache's step that is open, until its `with` has ended it.
        self._step: Any = None
        self._is_stepping = False
        #: The request that steps alone; None: all do.
        self.only: Request | None = None
        #: A step was interrupted, or a request was cancelled: look at all requests, and at their sequences.
        self._is_disturbed = False
        self._num_added = 0
        #: Steps until those that wait are looked at again.
        self._rest = 0

    def add(
        self, prompt: ArrayLike, max_new_tokens: int, sampler: Sampler | None = None, **options: Any
    ) -> Request:
        """Queue a request; options as `add_samples`.

        Raises: ArgumentError for an empty prompt and ids that the vocabulary does not hold; SequenceTooLong,
        OutOfSequences and OutOfPages when it would not fit an empty cache.  What is refused is not queued.
        """
        return self.add_samples(prompt, max_new_tokens, [sampler or Sampler()], **options)[0]

    def add_samples(
        self, prompt: ArrayLike, max_new_tokens: int, samplers: Sequence[Sampler], **options: Any
    ) -> list[Request]:
        """Queue several samples of one prompt, which run together; options and errors as `prepare`."""
        return self.queue(self.prepare(prompt, max_new_tokens, samplers, **options))

    def prepare(
        self,
        prompt: ArrayLike,
        max_new_tokens: int,
        samplers: Sequence[Sampler],
        *,
        logprobs: int | None = None,
        ends: Sequence[Callable[[list[int]], bool]] | None = None,
        priority: int = 0,
        salt: bytes = b"",
        ttl: float | None = None,
        retained: Sequence[tuple[int, int, float | None]] = (),
    ) -> list[Request]:
        """Several samples of one prompt, for `queue`.  Nothing changes, so other threads may prepare them.

        samplers : of each sample, with a method `sample(logits)`, as Sampler
        logprobs : keep the log probability of each new id, and of so many of the likeliest; None: keep none
        ends : for each sample, called with its new ids after each of them; True: its text is whole
        priority : higher ones are admitted first, and sent back last when the pool is full
        salt : only requests of the same salt share pages; of a PagedKVCache
        ttl : seconds that the pages are worth keeping, as `Sequence.retain`; None: as long as others
        retained : (position, priority, ttl): how long the pages of the prompt up to there are worth keeping,
            as `Sequence.retain`
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
        num_tokens = len(ids) + max_new_tokens
        cost = limits.cost_of(num_tokens)
        most = limits.most_of(num_tokens, len(samplers), self.step_tokens)
        if most > limits.capacity:
            raise OutOfPages(
                f"{len(samplers)} x a prompt of {len(ids)} and {max_new_tokens} new tokens take "
                f"{most}, the cache has {limits.capacity}; build a larger one"
            )
        if limits.max_seq_len is not None:
            require_positions(len(ids), max_new_tokens, limits.max_seq_len, "the cache")
        if logprobs is not None:
            integer("logprobs", logprobs, 0, self.model.config.vocab_size)
        if ends is not None and (len(ends) != len(samplers) or not all(map(callable, ends))):
            raise ArgumentError(f"ends is {ends!r:.60}; give a function for each of {len(samplers)} samples")
        priority = integer("priority", priority, -(2**31), 2**31 - 1)
        ttl = None if ttl is None else seconds("ttl", ttl)
        kept = tuple(
            (
                integer("a retained position", at, 1, len(ids)),
                priority_of(worth),
                keep and seconds("ttl", keep),
            )
            for at, worth, keep in retained
        )
        first, *siblings = (
            Request(
                ids,
                max_new_tokens,
                sampler,
                cost,
                num_logprobs=logprobs,
                ends=ends[i] if ends else None,
                priority=priority,
                salt=bytes_of("salt", salt),
                ttl=ttl,
                retained=kept if i == 0 else (),
            )
            for i, sampler in enumerate(samplers)
        )
        first.siblings = siblings
        return [first, *siblings]

    def prepare_beams(
        self,
        prompt: ArrayLike,
        max_new_tokens: int,
        num_beams: int,
        *,
        stop_ids: Sequence[int] = (),
        length_penalty: float = 1.0,
        **options: Any,
    ) -> list[Request]:
        """The beams of a search for likely texts, for `queue`.

        stop_ids : end a text
        length_penalty : texts are compared by the sum of their log probabilities / length ** length_penalty
        options : priority, salt, ttl, retained

        When all are done, each has the ids of a text as `new_ids`, the likeliest first; fewer texts than
        beams leave the others empty.
        Raises: as `prepare`.
        """
        num_beams = integer("num_beams", num_beams, 1, MAX_BEAMS)
        plain = self.prepare(prompt, max_new_tokens, [Sampler()] * num_beams, **options)
        group = BeamGroup(stop_set(stop_ids), max_new_tokens, real("length_penalty", length_penalty))
        for one in plain:
            beam = Beam(one.prompt, max_new_tokens, one.sampler, one.cost, group=group, salt=one.salt)
            beam.priority, beam.ttl, beam.retained = one.priority, one.ttl, one.retained
            group.beams.append(beam)
        group.beams[0].siblings = list(group.beams[1:])
        return list(group.beams)

    def queue(self, requests: list[Request]) -> list[Request]:
        """Queue what `prepare` returned."""
        for request in requests:
            request.serial = self._num_added
            self._num_added += 1
        self._rest = 0
        insort(self.waiting, requests[0], key=_order)
        return requests

    def cancel(self, request: Request, error: Exception | None = None) -> bool:
        """End a request that is not done: its pages are free for others at once.

        The next `step` returns it, with its ids so far and `error`, a RequestCancelled if none is given.
        Samples of the same prompt are not affected; the beams of one search end together.  Called inside a
        step (by a sampler), it takes effect when the step ends.

        Returns: False when the request was done already, or is another batch's.
        """
        if not isinstance(request, Request):
            raise ArgumentError(f"request is {request!r:.60}; give one that `add` returned")
        waiting = [one for first in self.waiting for one in (first, *first.siblings)]
        if request.error is not None or request not in [*self.running, *waiting]:
            return False
        request.error = error or RequestCancelled("the request was cancelled")
        if request.group is not None:
            for beam in request.group.beams:
                beam.error = beam.error or request.error
        self._is_disturbed = True
        if not self._is_stepping:
            self._recover()
        return True

    def step(self) -> list[Request]:
        """Admit requests that fit, take one step.  Returns: the requests that are done.

        A request that fails by itself (its sampler raises, its logits are no numbers, others outside have
        taken the pages or sequences that it needs) is done, with `error` set; the others go on.  Without any
        request, nothing happens.

        Raises: what the model raises, and SequenceBusy, CacheClosed.  Then no request has lost or gained
        a token, and the step can be repeated.
        """
        self._is_stepping = True
        try:
            self._take_step()
        finally:
            self._is_stepping = False
        if self._is_disturbed:
            self._recover()
        done, self._done = list(self._done), {}
        return done

    def _take_step(self) -> None:
        begin = time.perf_counter_ns()
        self.sampled, self.admitted = [], []
        if self._is_disturbed:
            self._recover()
        self._is_disturbed = True
        if self.waiting:
            self._admit()
        chosen, step = self._open(self._choose())
        if step is None and self.running and self.waiting and self.only is None:
            # All that run are beams that wait for one of theirs, which has no room.
            self._preempt(max((one for one in self.running if one.seq is not None), key=_order))
        if step is not None:
            ids, ends, sampling, num_prompt_tokens = [], [], [], 0
            for request, new in chosen:
                ids += new
                fed, num_prompt = request.num_fed + len(new), request.num_prompt
                if fed == num_prompt + len(request.new_ids):
                    sampling.append(request)
                    ends.append(len(ids) - 1)
                if len(new) > 1 or fed <= num_prompt:
                    num_prompt_tokens += len(new)
            with step:
                logits = self.model.forward(np.array(ids), step, np.array(ends, np.int64))
                for request, row in zip(sampling, logits, strict=True):
                    request.draw(row)
                    if request.siblings:
                        for sibling in request.siblings:
                            sibling.draw(row)
            self._step = None
            for request, new in chosen:
                request.num_fed += len(new)
            self._settle([request for request, _ in chosen])
            self.report.count_step(num_prompt_tokens, len(self.sampled), time.perf_counter_ns() - begin)
        self._is_disturbed = any(one.error is not None for one in self.running)  # cancelled meanwhile

    @property
    def is_idle(self) -> bool:
        """Whether the next step would do nothing."""
        return not (self.waiting or self.running or self._done)

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

    def _recover(self) -> None:
        """After an interrupt or a `cancel`, settle all requests, by what their sequences hold."""
        self._abandon_step()
        self._drop_cancelled()
        awaited = {sibling for request in self.running for sibling in request.siblings}
        for request in list(self.running):
            if request.is_leaving:
                self._release(request)
            try:
                request.sync()
            except StaleSequence as error:  # its sequence was freed from outside
                self._fail(request, error)
                continue
            if request.seq is None and request not in awaited and not request.is_done(self.stop_ids):
                self._send_back(request)  # as a preemption that was interrupted
        self._settle([one for one in list(self.running) if not self._was_done(one)])
        self._is_disturbed = False

    def _was_done(self, request: Request) -> bool:
        """Retire a request that was done before; else False."""
        if request.siblings or not request.is_done(self.stop_ids):
            return False
        self._retire(request)
        return True

    def _settle(self, requests: list[Request]) -> None:
        """Take the ids that were drawn in committed steps, fork siblings, end what is done or cancelled."""
        for request in list(requests):
            if request.siblings and (request.error or request.is_past_prompt):
                siblings = list(request.siblings)
                if request.is_past_prompt:
                    self._fork_siblings(request)
                    requests += siblings
                elif request.error:
                    self._hand_over(request)
        for request in requests:
            if request.retained and request.is_past_prompt:
                self._retain(request)
            if request.take_drawn():
                self.sampled.append(request)
            if request.is_done(self.stop_ids) and request in self.running:
                self._retire(request)
        for group in {request.group: None for request in requests if request.group is not None}:
            self._settle_beams(group)

    def _settle_beams(self, group: BeamGroup) -> None:
        """Let the beams of a search go on as it chooses, or end all of them."""
        error = next((beam.error for beam in group.beams if beam.error is not None), None)
        if error is None and group.is_ready:
            moves = group.choose()
            if moves:
                self._move_beams(group, moves)
            self.sampled += group.beams
        if error is None and not group.is_done:
            return
        for beam in group.beams:
            beam.error = beam.error or error
            if beam in self.running or beam in self.waiting:
                self._retire(beam)

    def _move_beams(self, group: BeamGroup, moves: list[tuple[int, int, float]]) -> None:
        """Give each beam the ids and the sequence that it goes on with: forks, where several have one."""
        states = [(beam.seq, beam.num_fed, beam.new_ids) for beam in group.beams]
        parents = {place for place, _, _ in moves}
        for place, beam in enumerate(group.beams):
            if place not in parents:
                self._release(beam)  # before its pages are needed
        taken: set[int] = set()
        for beam, (place, id, score) in zip(group.beams, moves, strict=True):
            seq, num_fed, new_ids = states[place]
            if place in taken and seq is not None:
                try:
                    seq = seq.fork()
                except OutOfSequences:
                    seq = None  # it feeds its ids again
            taken.add(place)
            beam.seq, beam.num_fed = seq, num_fed if seq is not None else 0
            beam.new_ids, beam.score = [*new_ids, id], score
        for beam in group.beams:
            if beam.seq is None:
                self._send_back(beam)
            elif beam not in self.running:
                self.waiting.remove(beam)
                self.running.append(beam)

    def _retain(self, request: Request) -> None:
        """Say how long parts of a prompt that was computed are worth keeping."""
        for at, priority, ttl in request.retained:
            with suppress(OutOfSequences, StaleSequence, ArgumentError), request.seq.fork(at=at) as part:
                part.retain(priority=priority, ttl=ttl)
        request.retained = ()

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
                alive[0].num_fed = request.num_fed
                alive[0].seq = request.seq
                request.seq = None
        request.siblings = []

    def _fork_siblings(self, request: Request) -> None:
        while request.siblings:
            sibling = request.siblings[0]
            if sibling.error is None:
                try:
                    sibling.seq = request.seq.fork()
                    sibling.num_fed = request.num_fed
                except Exception as error:
                    sibling.error = error
            request.siblings.pop(0)

    def _admit(self) -> None:
        """Let requests run, the first ones first, as long as there is room for them."""
        if self._rest > 0:
            self._rest -= 1
            return
        limits, must_rest = self.admission, True
        for first in self.waiting[:MAX_LOOKED_AT]:
            group = [first, *first.siblings]
            if first not in self.running:  # as after an interrupt
                num_sequences = len(self.running) + len(group)
                if limits.max_sequences is not None and num_sequences > limits.max_sequences:
                    break
                if self.running and not limits.has_room_for(first, self.running, self.step_tokens):
                    if first.num_overtaken >= MAX_OVERTAKEN:
                        break
                    continue
                if self.cache.prefix_caching and self._will_find_more(first):
                    must_rest = False
                    continue
                try:
                    first.seq = self._new_sequence(first)
                except OutOfSequences as error:
                    if self.running:
                        break  # one of ours may end
                    self._fail(first, error)
                else:
                    # Nothing is called in between, so no interrupt leaves a sequence without its request.
                    self.running += group
                    self._count_admitted(first)
            if first in self.waiting:
                self.waiting.remove(first)
        self._rest = STEPS_BETWEEN_COUNTS if must_rest else 0

    def _new_sequence(self, request: Request) -> Any:
        """A sequence that begins with what the cache has of all ids of a request."""
        ids = request.ids
        if request.new_ids:
            ids = np.concatenate([ids, np.array(request.new_ids, np.int32)])
        if request.match is None and self.admission.match is not None:
            request.match = self.admission.match(request.ids, request.salt)
        return self.cache.sequence(ids, salt=request.salt) if request.salt else self.cache.sequence(ids)

    def _count_admitted(self, request: Request) -> None:
        self.admitted.append(request)
        request.sync()
        if request.ttl is not None:
            request.seq.retain(ttl=request.ttl)
        if not request.num_preemptions:
            request.num_cached = getattr(request.seq, "num_cached_tokens", 0)
            self.report.num_cached_tokens += request.num_cached
        for other in self.waiting:
            if other is request:
                break
            other.num_overtaken += 1

    def _will_find_more(self, request: Request) -> bool:
        """Is a prompt being computed that has more tokens in common with this one than it holds yet?"""
        computing = [
            one
            for one in self.running
            if not one.is_past_prompt and one.seq is not None and one.salt == request.salt
        ]
        shared = (num_common(one.ids, request.ids[:-1]) - one.num_fed for one in computing)
        return max(shared, default=0) >= MIN_SHARED_TOKENS

    def _choose(self) -> list[tuple[Request, list[int]]]:
        """Who steps, with which ids: tokens first, then prompts as far as there is room."""
        chosen, prompts = [], []
        for request in self.running if self.only is None else [self.only]:
            new_ids = request.new_ids
            num_left = request.num_prompt + len(new_ids) - request.num_fed
            if num_left == 1 and new_ids:
                chosen.append((request, new_ids[-1:]))
            elif num_left and request.seq is not None:
                prompts.append(request)
        if prompts:
            room = max(self.step_tokens - len(chosen), self.step_tokens // 4, 1)
            most = self.admission.max_step_tokens or self.step_tokens
            for request in sorted(prompts, key=_order):
                if room > 0:
                    new = request.next_ids(min(room, most))
                    chosen.append((request, new))
                    room -= len(new)
        return chosen

    def _open(self, chosen: list[tuple[Request, list[int]]]) -> tuple[list[tuple[Request, list[int]]], Any]:
        """Open a step for these, or for those that the cache accepts; None when there are none."""
        while chosen:
            try:
                self._step = self.cache.step([one.seq for one, _ in chosen], [new for _, new in chosen])
                return chosen, self._step
            except OutOfPages as error:
                # The newest gives its pages back.  The oldest keeps them: when it cannot step alone, others
                # outside hold the pages, and it ends.
                last = max((one for one in self.running if one.seq is not None), key=_order)
                if len(self.running) > 1 + len(last.siblings):
                    self._preempt(last)
                else:
                    self._fail(last, error)
                chosen = [(request, new) for request, new in chosen if request.seq is not None]
            except (StaleSequence, SequenceTooLong, ArgumentError):
                if not (refused := self._refused_alone(chosen)):
                    raise
                for request, why in refused.items():
                    self._fail(request, why)
                chosen = [(request, new) for request, new in chosen if request not in refused]
        return chosen, None

    def _preempt(self, request: Request) -> None:
        """Give back a request's pages, and let it wait."""
        request.num_preemptions += 1
        self.report.num_preemptions += 1
        self._release(request)
        self._send_back(request)

    def _send_back(self, request: Request) -> None:
        if request not in self.waiting:
            insort(self.waiting, request, key=_order)
        for one in (request, *request.siblings):
            if one in self.running:
                self.running.remove(one)

    def _release(self, request: Request) -> None:
        request.is_leaving = True
        if request.seq is not None:
            # It may be in a step of another owner, or freed already: the rest goes with the handle.
            with suppress(SequenceBusy, StaleSequence):
                request.seq.free()
        request.num_most_fed = max(request.num_most_fed, request.num_fed)
        request.seq, request.num_fed = None, 0
        request.is_leaving = False

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

    def _retire(self, request: Request) -> None:
        if request.error is None:
            self.admission.count_ended(len(request.new_ids))
        self._release(request)
        self._done[request] = None
        self._rest = 0
        if request in self.running:
            self.running.remove(request)
        if request in self.waiting:
            self.waiting.remove(request)


def _order(request: Request) -> tuple[int, int]:
    return request.order
