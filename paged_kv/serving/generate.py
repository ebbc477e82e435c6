"""Generation: the new tokens of many prompts, in one batch, whole or token by token.

Imports batch and text.tokenizer.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .._binding import integer
from ..cache import PagedKVCache
from ..errors import ArgumentError
from ..models.decoder import DecoderModel
from ..models.report import GenerationReport
from ..models.sampling import LogProbability, Sampler, seed_of
from ..models.token_ids import prompt_ids
from ..pages.layout import num_pages
from ..text.tokenizer import ModelTokenizer, TextStream
from .admission import Admission, require_positions
from .batch import Batch, ServingCache
from .request import Request, stop_set

__all__ = ["Admission", "Batch", "Generation", "Request", "ServingCache", "generate", "generate_stream"]

PAGE_SIZE = 64


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    ids : of each prompt its new ids, int32; or the error that ended it, in their place
    texts : with a tokenizer, the text of the new ids, up to a stop string
    logprobs : if required, a LogProbability of each new id
    """

    ids: list[Any]
    report: GenerationReport
    texts: list[str] | None = None
    logprobs: list[list[LogProbability]] | None = None

    @property
    def errors(self) -> list[Exception | None]:
        """What ended each prompt before it was done; None: nothing did."""
        return [ids if isinstance(ids, Exception) else None for ids in self.ids]


def generate(
    model: DecoderModel,
    prompts: Sequence[ArrayLike],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    n: int = 1,
    stop_ids: Sequence[int] | None = None,
    tokenizer: ModelTokenizer | None = None,
    stop: Sequence[str] = (),
    logprobs: int | None = None,
    cache: PagedKVCache | None = None,
    progress: Callable[[Batch], object] | None = None,
) -> Generation:
    """Generate new tokens for many prompts at once.

    Parameters
    ----------
    model : DecoderModel
    prompts : token ids of each
    max_new_tokens : of each prompt
    temperature, top_p, top_k, min_p, repetition_penalty, seed : as Sampler; each prompt draws from its own
        generator, seeded by `seed` and its place in the list, so what it draws does not depend on the others
    n : samples of each prompt, which share its pages
    stop_ids : tokens that end a text; None: the model's
    tokenizer : for texts and stop strings
    stop : texts that end a text; they need a tokenizer
    logprobs : keep the log probability of each new id, and of so many of the likeliest; None: keep none
    cache : one of `model.new_cache(...)`; None: one that holds all prompts at once
    progress : called with the Batch after each step

    Returns: Generation, the new ids of each prompt in order (n of each in a row), and what it took.  A prompt
    that fails (logits that are no numbers, pages held from outside) has its error in the place of its ids.
    Raises: ArgumentError, SequenceTooLong, OutOfSequences and OutOfPages for a prompt that could never be
    served, before any work is done; what `progress` and the model raise.
    """
    report = GenerationReport()
    new_ids: list[Any] = [[] for _ in range(len(_list_of(prompts)) * integer("n", n, 1, 2**16))]
    found: list[Request] = []
    for index, id in generate_stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        n=n,
        stop_ids=stop_ids,
        tokenizer=tokenizer,
        stop=stop,
        logprobs=logprobs,
        cache=cache,
        progress=progress,
        report=report,
        requests=found,
    ):
        if isinstance(id, Exception):
            new_ids[index] = id
        else:
            new_ids[index].append(id)
    whole = [ids if isinstance(ids, Exception) else np.array(ids, np.int32) for ids in new_ids]
    texts = None
    if tokenizer is not None:
        texts = [_text_of(request.new_ids, tokenizer.stream(stop)) for request in found]
    kept = None if logprobs is None else [request.logprobs for request in found]
    return Generation(whole, report, texts, kept)


def generate_stream(
    model: DecoderModel,
    prompts: Sequence[ArrayLike],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    n: int = 1,
    stop_ids: Sequence[int] | None = None,
    tokenizer: ModelTokenizer | None = None,
    stop: Sequence[str] = (),
    logprobs: int | None = None,
    cache: PagedKVCache | None = None,
    progress: Callable[[Batch], object] | None = None,
    report: GenerationReport | None = None,
    requests: list[Request] | None = None,
) -> Generator[tuple[int, int | Exception], None, None]:
    """As `generate`, token by token.

    report : updated after each step
    requests : receives the Request of each text, in order

    Yields: (place in what `generate` would return, id); (place, error) last, for a prompt that failed.
    Closing the iterator releases what it holds.
    """
    own_cache, n = None, integer("n", n, 1, 2**16)
    max_new_tokens = integer("max_new_tokens", max_new_tokens, 1)
    seed = integer("seed", seed, 0, 2**64)
    new_sampler = partial(
        Sampler, temperature, top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty
    )
    new_sampler()  # refuses what no sampler can be
    if stop and tokenizer is None:
        raise ArgumentError("stop strings need a tokenizer; give ModelTokenizer.from_pretrained(...)")
    stop_ids = tuple(stop_set(model.config.stop_ids if stop_ids is None else stop_ids))
    ids_of = [
        prompt_ids(f"prompts[{i}]", prompt, model.config.vocab_size)
        for i, prompt in enumerate(_list_of(prompts))
    ]
    for ids in ids_of:
        require_positions(len(ids), max_new_tokens, model.config.max_position_embeddings, "the model")
    if cache is None:
        most_pages = n * sum(num_pages(len(ids) + max_new_tokens, PAGE_SIZE) for ids in ids_of)
        own_cache = cache = model.new_cache(
            num_pages=max(1, most_pages), page_size=PAGE_SIZE, max_sequences=max(1, n * len(ids_of))
        )
    batch = Batch(model, cache, Admission.pages_of(cache), stop_ids=stop_ids, report=report)
    try:
        added = []
        for i, prompt in enumerate(ids_of):
            samplers = [new_sampler(seed=seed_of(seed, i, j)) for j in range(n)]
            ends = [_StopsAt(tokenizer.stream(stop)) for _ in samplers] if tokenizer and stop else None
            added += batch.add_samples(prompt, max_new_tokens, samplers, logprobs=logprobs, ends=ends)
        if requests is not None:
            requests += added
        places = {request: index for index, request in enumerate(added)}
        num_yielded = [0] * len(added)
        while batch.waiting or batch.running:
            done = batch.step()
            if progress is not None:
                progress(batch)
            for request in (*done, *batch.running):
                index = places[request]
                for id in request.new_ids[num_yielded[index] :]:
                    num_yielded[index] += 1
                    yield index, id
                if request.error is not None:
                    yield index, request.error
    finally:
        batch.close()
        if own_cache is not None:
            own_cache.close()


class _StopsAt:
    """Whether a request's text has come to a stop string."""

    def __init__(self, stream: TextStream) -> None:
        self._stream, self._num_read = stream, 0

    def __call__(self, new_ids: list[int]) -> bool:
        for id in new_ids[self._num_read :]:
            self._num_read += 1
            self._stream.add(id)
        return self._stream.has_stopped


def _text_of(ids: list[int], stream: TextStream) -> str:
    return "".join([*map(stream.add, ids), stream.finish()])


def _list_of(prompts: object) -> list[Any]:
    if isinstance(prompts, str) or not hasattr(prompts, "__len__") or not hasattr(prompts, "__iter__"):
        raise ArgumentError(f"prompts is {prompts!r:.60}; give a list with the token ids of each prompt")
    return list(prompts)
