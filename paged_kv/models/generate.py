"""Serving many prompts at once: continuous batching over one cache.

A request waits, runs and is done.  Every step takes the next token of each request that is past its prompt,
and fills up with chunks of the prompts of others, so that nobody waits for a long prompt to pass:

    step 1   [a: prompt ............]
    step 2   [a: token][b: prompt .....]
    step 3   [a: token][b: ... prompt][c: prompt .]      one forward pass each

A request is admitted when its prompt and all its new tokens fit whatever the others do: nothing that runs
ever has to be sent back.  Several samples of a prompt share it: the first one computes it, and the others are
forks of that.

Imports bitnet and sampling.  Imported by demo.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._binding import integer
from ..cache import PagedKVCache
from ..errors import ArgumentError, OutOfPages, SequenceBusy
from ..lifetime import Uncopyable
from .bitnet import BitNetModel, GenerationReport
from .sampling import Sampler

#: Tokens of one step, where there are prompts to fill it: enough for full matrix products, few enough that
#: running requests do not wait long for their next token.
STEP_TOKENS = 256


class ServingCache(Protocol):
    """What serving asks of a cache; PagedKVCache is one."""

    def sequence(self) -> Any: ...

    def step(self, seqs: Any, new: Any) -> Any: ...


@dataclass(eq=False)
class Request:
    """A prompt on its way through the batch."""

    prompt: list[int]
    max_new_tokens: int
    sampler: Sampler
    cost: int
    seq: Any = None
    num_fed: int = 0
    new_ids: list[int] = field(default_factory=list)
    #: Other samples of the same prompt, which begin as forks when it is computed.
    siblings: list["Request"] = field(default_factory=list)

    def next_ids(self, room: int) -> list[int]:
        """What the next step takes of this request: its last token, or at most `room` of its prompt."""
        return self.new_ids[-1:] or self.prompt[self.num_fed : self.num_fed + room]

    @property
    def is_past_prompt(self) -> bool:
        return self.num_fed >= len(self.prompt)


@dataclass
class Admission:
    """How much a cache holds, and what a request of n tokens takes of it, in the same unit."""

    capacity: int
    cost_of: Callable[[int], int]

    @classmethod
    def pages_of(cls, cache: PagedKVCache) -> "Admission":
        page_size = cache.page_size
        return cls(cache.stats().num_pages, lambda num_tokens: -(-num_tokens // page_size))


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
        self.stop_ids = frozenset(stop_ids)
        self.step_tokens = integer("step_tokens", step_tokens, 1)
        self.waiting: deque[Request] = deque()  # of several samples, the first
        self.running: list[Request] = []
        self.report = report or GenerationReport()

    def add(self, prompt: ArrayLike, max_new_tokens: int, sampler: Sampler | None = None) -> Request:
        """Queue a request.

        Raises: ArgumentError for an empty prompt; OutOfPages when it would not fit an empty cache.
        """
        return self.add_samples(prompt, max_new_tokens, [sampler or Sampler()])[0]

    def add_samples(
        self, prompt: ArrayLike, max_new_tokens: int, samplers: Sequence[Sampler]
    ) -> list[Request]:
        """Queue several samples of one prompt, which run together.  Raises: as `add`."""
        ids = [integer("a prompt's id", id, 0) for id in np.asarray(prompt).ravel().tolist()]
        max_new_tokens = integer("max_new_tokens", max_new_tokens, 1)
        if not ids:
            raise ArgumentError("a prompt is empty; give at least one token, such as the begin token")
        # What samples share is not taken off: when the first one ends early, the others hold it still.
        cost = self.admission.cost_of(len(ids) + max_new_tokens)
        if cost * len(samplers) > self.admission.capacity:
            raise OutOfPages(
                f"{len(samplers)} x a prompt of {len(ids)} and {max_new_tokens} new tokens take "
                f"{cost * len(samplers)}, the cache has {self.admission.capacity}; build a larger one"
            )
        first, *siblings = (Request(ids, max_new_tokens, sampler, cost) for sampler in samplers)
        first.siblings = siblings
        self.waiting.append(first)
        return [first, *siblings]

    def step(self) -> list[Request]:
        """Admit who fits, take one step, return the requests that are done.  Nothing to do: an empty list."""
        begin = time.perf_counter_ns()
        self._admit()
        chosen = self._choose()
        if not chosen:
            return []
        ids = [id for _, new in chosen for id in new]
        num_prompt_tokens = sum(len(new) for request, new in chosen if not request.is_past_prompt)
        for request, new in chosen:
            request.num_fed += len(new)
        ends = np.cumsum([len(new) for _, new in chosen]) - 1
        sampling = [i for i, (request, _) in enumerate(chosen) if request.is_past_prompt]
        with self.cache.step([request.seq for request, _ in chosen], [new for _, new in chosen]) as step:
            logits = self.model.forward(ids, step, ends[sampling])
        num_sampled = 0
        for i, row in zip(sampling, logits, strict=True):
            request = chosen[i][0]
            for sibling in request.siblings:
                sibling.seq, sibling.num_fed = request.seq.fork(), request.num_fed
                sibling.new_ids.append(sibling.sampler.sample(row))
            num_sampled += 1 + len(request.siblings)
            request.siblings = []
            request.new_ids.append(request.sampler.sample(row))
        done = [request for request in self.running if self._is_done(request)]
        for request in done:
            self._retire(request)
        self.report.count_step(num_prompt_tokens, num_sampled, time.perf_counter_ns() - begin)
        return done

    def close(self) -> None:
        """Give back what the running requests hold."""
        for request in list(self.running):
            try:
                self._retire(request)
            except SequenceBusy:
                # An interrupt on the way into a `with` or out of it has left a step open.  That goes, and
                # then its sequences, when the interrupt's traceback does.
                request.seq = None
                self._retire(request)

    def _admit(self) -> None:
        taken = sum(request.cost for request in self.running)
        while self.waiting:
            request = self.waiting[0]
            cost = request.cost * (1 + len(request.siblings))
            if taken + cost > self.admission.capacity:
                return
            request.seq = self.cache.sequence()
            taken += cost
            self.running += [self.waiting.popleft(), *request.siblings]

    def _choose(self) -> list[tuple[Request, list[int]]]:
        """Who steps, with which ids: tokens first, then prompts as far as there is room."""
        past_prompt = [request for request in self.running if request.is_past_prompt]
        chosen = [(request, request.next_ids(1)) for request in past_prompt]
        room = self.step_tokens - len(chosen)
        for request in self.running:
            if not request.is_past_prompt and room > 0 and request.seq is not None:
                new = request.next_ids(room)
                chosen.append((request, new))
                room -= len(new)
        return chosen

    def _is_done(self, request: Request) -> bool:
        if not request.new_ids:
            return False
        return len(request.new_ids) >= request.max_new_tokens or request.new_ids[-1] in self.stop_ids

    def _retire(self, request: Request) -> None:
        if request.seq is not None:  # a sibling may still wait for its prompt
            request.seq.free()
            request.seq = None
        self.running.remove(request)


@dataclass(frozen=True)
class Generation:
    """What `generate` returns."""

    ids: list[NDArray[np.int32]]  # the new ids of each prompt
    report: GenerationReport


def generate(
    model: BitNetModel,
    prompts: Sequence[ArrayLike],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    n: int = 1,
    stop_ids: Sequence[int] | None = None,
    cache: PagedKVCache | None = None,
    progress: Callable[[Batch], object] | None = None,
) -> Generation:
    """Go on with many prompts at once.

    Parameters
    ----------
    model : BitNetModel
    prompts : token ids of each
    max_new_tokens : of each prompt
    temperature, top_p, seed : as Sampler; each prompt draws from a generator of its own, seeded by `seed` and
        its place in the list, so what it draws does not depend on the others
    n : samples of each prompt, which share its pages
    stop_ids : tokens that end a text; None: the model's
    cache : one of `model.new_cache(...)`; None: one that holds all prompts at once
    progress : called with the Batch after each step

    Returns: Generation, the new ids of each prompt in order (n of each in a row), and what it took.
    Raises: ArgumentError, OutOfPages (a prompt that would not fit an empty cache).
    """
    report = GenerationReport()
    new_ids: list[list[int]] = [[] for _ in range(len(prompts) * integer("n", n, 1, 2**16))]
    for index, id in generate_stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        n=n,
        stop_ids=stop_ids,
        cache=cache,
        progress=progress,
        report=report,
    ):
        new_ids[index].append(id)
    return Generation([np.array(ids, np.int32) for ids in new_ids], report)


def generate_stream(
    model: BitNetModel,
    prompts: Sequence[ArrayLike],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    n: int = 1,
    stop_ids: Sequence[int] | None = None,
    cache: PagedKVCache | None = None,
    progress: Callable[[Batch], object] | None = None,
    report: GenerationReport | None = None,
) -> Iterator[tuple[int, int]]:
    """As `generate`, token by token as they come.

    report : filled while it goes on

    Yields: (place in what `generate` would return, id).  Closing the iterator gives back what it holds.
    """
    own_cache, n = None, integer("n", n, 1, 2**16)
    if cache is None:
        lengths = [np.asarray(prompt).size + max_new_tokens for prompt in prompts]
        num_pages = n * sum(-(-length // 64) for length in lengths)
        own_cache = cache = model.new_cache(
            num_pages=max(1, num_pages), page_size=64, max_sequences=max(1, n * len(prompts))
        )
    stop_ids = model.config.stop_ids if stop_ids is None else stop_ids
    batch = Batch(model, cache, Admission.pages_of(cache), stop_ids=stop_ids, report=report)
    try:
        requests = [
            request
            for i, prompt in enumerate(prompts)
            for request in batch.add_samples(
                prompt, max_new_tokens, [Sampler(temperature, top_p, seed_of(seed, i, j)) for j in range(n)]
            )
        ]
        places = {request: index for index, request in enumerate(requests)}
        num_told = [0] * len(requests)
        while batch.waiting or batch.running:
            done = batch.step()
            if progress is not None:
                progress(batch)
            for request in (*done, *batch.running):
                index = places[request]
                for id in request.new_ids[num_told[index] :]:
                    num_told[index] += 1
                    yield index, id
    finally:
        batch.close()
        if own_cache is not None:
            own_cache.close()


def seed_of(seed: int, index: int, sample: int = 0) -> int:
    """A seed for each place in a list of prompts, and each sample of one."""
    entropy = [seed, index, sample] if sample else [seed, index]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
