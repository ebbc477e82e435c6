"""Grammars: texts that an answer must be, such as JSON of a schema, enforced token by token.

    logits ── tokens that the grammar does not allow: -inf ── Sampler ── the id, which the matcher takes

llguidance (the extra `grammar`) compiles a grammar and says which tokens may follow.

Imports text.tokenizer.
"""

import json
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..extras import require
from ..models.sampling import Sampler
from ..text.tokenizer import ModelTokenizer

#: Bytes of a grammar, at most: compiling is not stopped once it has begun.
MAX_BYTES = 2**18
#: JSON on one line.  A model that may write any white space may write it for ever.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Grammar:
    """What a text must be; made by `of_json_schema`, `of_json`, `of_regex` or `of_lark`.

    source : as llguidance reads it
    """

    source: str

    @classmethod
    def of_json_schema(cls, schema: object) -> Self:
        """JSON of a schema, a dict or its text, on one line.

        Raises: ArgumentError that says what is wrong with it.
        """
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise ArgumentError(f"the schema is no JSON: {error}") from None
        return cls._of("grammar_from_json_schema", text, COMPACT)

    @classmethod
    def of_json(cls) -> Self:
        """Any JSON object."""
        return cls.of_json_schema({"type": "object"})

    @classmethod
    def of_regex(cls, pattern: str) -> Self:
        """Texts that a regular expression matches as a whole."""
        return cls._of("grammar_from_regex", pattern)

    @classmethod
    def of_lark(cls, grammar: str) -> Self:
        """Texts of a context-free grammar, in llguidance's dialect of Lark."""
        return cls._of("grammar_from_lark", grammar)

    @classmethod
    def _of(cls, maker: str, text: str, *options: object) -> Self:
        if not isinstance(text, str):
            raise ArgumentError(f"the grammar is {text!r:.60}; give a text")
        if len(text.encode("utf-8", "replace")) > MAX_BYTES:
            raise ArgumentError(f"the grammar has more than {MAX_BYTES} bytes")
        matcher = require("llguidance", "grammar").LLMatcher
        try:
            source: str = getattr(matcher, maker)(text, *options)
        except Exception as error:  # the package raises no other type
            raise ArgumentError(f"the grammar is none: {error}") from None
        problem = matcher.validate_grammar(source)
        if problem:
            raise ArgumentError(f"the grammar is none: {problem}")
        return cls(source)

    def matcher(self, tokenizer: ModelTokenizer | None, stop_ids: frozenset[int]) -> "Matcher":
        """What follows the tokens of one text.  Raises: ArgumentError."""
        if tokenizer is None:
            raise ArgumentError("a grammar needs a tokenizer; give the engine one")
        if not stop_ids:
            raise ArgumentError("a grammar needs a token that ends the text; stop_ids is empty")
        return Matcher(self, tokenizer, stop_ids)


class Matcher:
    """Which tokens may follow those of one text so far."""

    def __init__(self, grammar: Grammar, tokenizer: ModelTokenizer, stop_ids: frozenset[int]) -> None:
        package = require("llguidance", "grammar")
        vocabulary = tokenizer.grammar_vocabulary(stop_ids)
        self._matcher = package.LLMatcher(vocabulary, grammar.source)
        self._fill = require("llguidance.numpy", "grammar")
        self._mask = self._fill.allocate_token_bitmask(1, vocabulary.vocab_size)
        self._require()

    def _require(self) -> None:
        if self._matcher.is_error():
            raise ArgumentError(f"the grammar cannot be followed: {self._matcher.get_error()}")

    def allowed(self, num_logits: int) -> NDArray[np.bool_]:
        """bool [num_logits]: the tokens that may come next."""
        self._fill.fill_next_token_bitmask(self._matcher, self._mask, 0)
        self._require()
        bits = np.unpackbits(self._mask[0].view(np.uint8), bitorder="little")[:num_logits]
        allowed = np.zeros(num_logits, bool)
        allowed[: len(bits)] = bits
        return allowed

    def take(self, id: int) -> None:
        """The next token is this one.  Raises: ArgumentError when it may not be."""
        self._matcher.consume_token(id)
        self._require()


class GrammarSampler:
    """A Sampler that draws what a matcher allows."""

    def __init__(self, sampler: Sampler, matcher: Matcher) -> None:
        self._sampler, self._matcher = sampler, matcher

    @property
    def reads_ids(self) -> bool:
        """Whether `sample` needs the ids of the text."""
        return self._sampler.reads_ids

    def sample(self, logits: NDArray[np.float32], ids: Any = ()) -> int:
        """As Sampler.sample.  Each id that it returns is part of the text."""
        allowed = self._matcher.allowed(len(logits))
        id = self._sampler.sample(np.where(allowed, logits, np.float32(-np.inf)), ids)
        self._matcher.take(id)
        return id
