"""Options of a request: how its new tokens are drawn, and what ends it.

Imports request and grammar.
"""

import secrets
from dataclasses import dataclass
from typing import Any

from .._binding import integer, real
from ..errors import ArgumentError
from ..models.sampling import Sampler, seed_of
from ..text.stop_strings import StopStrings
from ..text.tokenizer import ModelTokenizer
from .grammar import Grammar, GrammarSampler
from .request import stop_set

#: Samples of one request, at most.
MAX_SAMPLES = 128


@dataclass(frozen=True)
class Sampling:
    """How the new tokens of a request are drawn, and what ends it.

    max_tokens : new tokens of each sample, at most
    temperature, top_p, top_k, min_p, repetition_penalty : as Sampler
    seed : of the generators, one for each sample; the same seed gives the same tokens, whatever else is
        served.  None: a seed that differs each time
    n : samples
    stop : texts that end a sample
    stop_ids : ids that end a sample; None: the model's
    logprobs : keep the log probability of each new id, and of so many of the likeliest; None: keep none
    grammar : what the text must be; None: any
    num_beams : above 1: search for the n likeliest texts with so many beams, which come when they are whole;
        with neither temperature, grammar nor logprobs
    length_penalty : beams are compared by the sum of their log probabilities / length ** length_penalty

    Raises: ArgumentError.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] | list[str] = ()
    stop_ids: Any = None
    logprobs: int | None = None
    grammar: Grammar | None = None
    num_beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        integer("max_tokens", self.max_tokens, 1)
        integer("n", self.n, 1, MAX_SAMPLES)
        if self.seed is not None:
            integer("seed", self.seed, 0, 2**64)
        StopStrings(self.stop)
        if self.stop_ids is not None:
            stop_set(self.stop_ids)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise ArgumentError(f"grammar is {self.grammar!r:.60}; give a Grammar")
        self._sampler(0)
        integer("num_beams", self.num_beams, 1, MAX_SAMPLES)
        real("length_penalty", self.length_penalty)
        if self.num_beams > 1:
            if self.n > self.num_beams:
                raise ArgumentError(
                    f"n is {self.n}, and num_beams {self.num_beams}; beams give as many texts"
                )
            if self.temperature or self.grammar is not None or self.logprobs is not None:
                raise ArgumentError("num_beams goes with temperature 0, without grammar and logprobs")

    def _sampler(self, seed: int) -> Sampler:
        return Sampler(
            self.temperature,
            self.top_p,
            seed,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )

    def samplers(self, tokenizer: ModelTokenizer | None, stop_ids: frozenset[int]) -> list[Any]:
        """A sampler for each sample; those of `generate(model, [prompt], seed=seed)`."""
        seed = secrets.randbits(64) if self.seed is None else self.seed
        samplers = [self._sampler(seed_of(seed, 0, i)) for i in range(self.n)]
        if self.grammar is None:
            return samplers
        return [GrammarSampler(sampler, self.grammar.matcher(tokenizer, stop_ids)) for sampler in samplers]
