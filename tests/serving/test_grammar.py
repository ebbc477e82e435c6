"""Grammars: every answer is in the language, whatever the model would say."""

import json
import re

import numpy as np
import pytest

from paged_kv import ArgumentError
from paged_kv.models.sampling import Sampler
from paged_kv.serving.grammar import Grammar, GrammarSampler
from paged_kv.text.tokenizer import ModelTokenizer

pytest.importorskip("llguidance")
tokenizers = pytest.importorskip("tokenizers")

END = 0


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, and some tokens of several of them; <end> is 0."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "r"), ("u", "e"), ("tr", "ue"), ('"', ":"), ("1", "2")]
    vocabulary = {"<end>": END}
    for token in [*alphabet, *("".join(merge) for merge in merges)]:
        vocabulary.setdefault(token, len(vocabulary))
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return ModelTokenizer(made)


def text_of(tokenizer, grammar, seed, longest=400):
    """A text by random logits, and whether it came to its end."""
    rng = np.random.default_rng(seed)
    sampler = GrammarSampler(Sampler(1.0, seed=seed), grammar.matcher(tokenizer, frozenset([END])))
    ids = []
    for _ in range(longest):
        logits = rng.standard_normal(300).astype(np.float32)
        logits[END] += 2
        ids.append(sampler.sample(logits))
        if ids[-1] == END:
            return tokenizer.decode(ids), True
    return tokenizer.decode(ids), False


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "is_large": {"type": "boolean"},
        "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["name", "is_large"],
    "additionalProperties": False,
}


def test_every_text_is_json_of_the_schema(tokenizer):
    grammar, num_whole = Grammar.of_json_schema(SCHEMA), 0
    for seed in range(30):
        text, is_whole = text_of(tokenizer, grammar, seed)
        if is_whole:
            num_whole += 1
            value = json.loads(text)
            assert "\n" not in text and ",  " not in text
            assert set(value) <= set(SCHEMA["properties"]) and len(value["name"]) <= 8
            assert isinstance(value["is_large"], bool)
    assert num_whole >= 20


def test_a_schema_may_be_text(tokenizer):
    assert Grammar.of_json_schema(json.dumps(SCHEMA)) == Grammar.of_json_schema(SCHEMA)


def test_every_text_matches_the_expression(tokenizer):
    grammar = Grammar.of_regex(r"(true|12)+x?")
    texts = {text_of(tokenizer, grammar, seed)[0] for seed in range(20)}
    assert len(texts) > 3 and all(re.fullmatch(r"(true|12)+x?", text) for text in texts)


def test_the_matchers_of_one_grammar_are_apart(tokenizer):
    grammar = Grammar.of_regex("ab")
    one, other = (grammar.matcher(tokenizer, frozenset([END])) for _ in range(2))
    (a,) = tokenizer.encode("a")
    one.take(a)
    assert other.allowed(300)[a] and not one.allowed(300)[a]


def test_a_token_that_may_not_come_is_refused(tokenizer):
    matcher = Grammar.of_regex("ab").matcher(tokenizer, frozenset([END]))
    with pytest.raises(ArgumentError, match="followed"):
        matcher.take(tokenizer.encode("b")[0])


def test_logits_beyond_the_vocabulary_are_never_drawn(tokenizer):
    matcher = Grammar.of_regex("[a-z]{1,3}").matcher(tokenizer, frozenset([END]))
    assert not matcher.allowed(300)[tokenizer._tokenizer.get_vocab_size() :].any()
    assert len(matcher.allowed(100)) == 100


NO_GRAMMARS = {
    "text that is no JSON": (Grammar.of_json_schema, "{"),
    "a type that is none": (Grammar.of_json_schema, {"type": "nothing"}),
    "an object that is no JSON": (Grammar.of_json_schema, {"a": object()}),
    "a pattern that is none": (Grammar.of_json_schema, {"type": "string", "pattern": "("}),
    "an expression that is none": (Grammar.of_regex, "("),
    "no text": (Grammar.of_regex, 5),
    "too large": (Grammar.of_regex, "a" * 300_000),
    "a rule that is missing": (Grammar.of_lark, "start: nothing"),
}


@pytest.mark.parametrize(("make", "given"), NO_GRAMMARS.values(), ids=NO_GRAMMARS)
def test_what_is_no_grammar_is_refused(make, given):
    with pytest.raises(ArgumentError, match=r"schema|grammar"):
        make(given)


def test_a_grammar_needs_a_tokenizer_and_an_end(tokenizer):
    with pytest.raises(ArgumentError, match="tokenizer"):
        Grammar.of_regex("a").matcher(None, frozenset([END]))
    with pytest.raises(ArgumentError, match="ends the text"):
        Grammar.of_regex("a").matcher(tokenizer, frozenset())
