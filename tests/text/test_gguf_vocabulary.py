"""Tokenizers made from a GGUF file's vocabulary: the ids of those that it was written from."""

import json
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_kv import ArgumentError
from paged_kv.text.gguf_vocabulary import WORD_MARK, GGUFVocabulary

tokenizers = pytest.importorskip("tokenizers")

CORPUS = [
    "The cat sat on the mat, and it's 1234 years old.  They'll see:\n\n\tit ran!",
    "def f(x):\n    return x ** 2  # naïve café, 42 times",
    "日本語 and emoji 🙂🙂 and Ünïcode",
] * 5
CONTROL, USER_DEFINED = 3, 4


def trained(pre_tokenizers, **options):
    """(a BPE of bytes, its fields in a GGUF file but for `pre`)"""
    pre, trainers = tokenizers.pre_tokenizers, tokenizers.trainers
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = pre.Sequence(pre_tokenizers)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    fields = {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": [CONTROL, CONTROL] + [1] * (len(tokens) - 2),
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
    } | options
    return made, {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def words(digits):
    """How Llama 3 and Qwen 2 split a text, as their tokenizer.json says it."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # fmt: skip
    pre = tokenizers.pre_tokenizers
    return [
        pre.Split(tokenizers.Regex(pattern), "isolated"),
        pre.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


PRE = tokenizers.pre_tokenizers
KINDS = {
    "gpt-2": [PRE.ByteLevel(add_prefix_space=False)],
    "smollm": [PRE.Digits(individual_digits=True), PRE.ByteLevel(add_prefix_space=False)],
    "qwen2": words(""),
    "llama-bpe": words("{1,3}"),
}
MADE = {pre: trained(steps, pre=pre) for pre, steps in KINDS.items()}


@pytest.mark.parametrize("pre", KINDS)
@given(text=st.text(max_size=60) | st.sampled_from(CORPUS))
def test_a_vocabulary_of_bytes_gives_the_ids_of_its_tokenizer(pre, text):
    expected, fields = MADE[pre]
    if text.encode(errors="replace").decode() != text:
        return
    if pre == "qwen2":
        text = unicodedata.normalize("NFC", text)
    got = GGUFVocabulary(fields, "here.gguf").tokenizer()
    ids = got.encode(text, add_special_tokens=False).ids
    if pre != "llama-bpe":  # whose whole words are tokens, whatever their merges
        assert ids == expected.encode(text, add_special_tokens=False).ids
    assert got.decode(ids) == text


def test_a_word_of_llama_3_that_is_a_token_stays_one():
    _, fields = trained(words("{1,3}"), pre="llama3")
    fields["tokenizer.ggml.tokens"] = [*fields["tokenizer.ggml.tokens"], "xqz"]
    fields["tokenizer.ggml.token_type"] = [*fields["tokenizer.ggml.token_type"], 1]
    tokenizer = GGUFVocabulary(fields, "").tokenizer()
    assert tokenizer.encode("xqz").ids == [len(fields["tokenizer.ggml.tokens"]) - 1]


def test_control_tokens_are_special_and_tokens_of_the_user_are_not():
    _, fields = trained(KINDS["gpt-2"], pre="gpt-2")
    tokens = fields["tokenizer.ggml.tokens"] = [*fields["tokenizer.ggml.tokens"], "<tool>", "<|end|>"]
    fields["tokenizer.ggml.token_type"] = [*fields["tokenizer.ggml.token_type"], USER_DEFINED, CONTROL]
    tokenizer = GGUFVocabulary(fields, "").tokenizer()
    ids = tokenizer.encode("<tool><|end|>").ids
    assert ids == [len(tokens) - 2, len(tokens) - 1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool>"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, []),
        ({"add_bos_token": True}, [0]),
        ({"pre": "llama-bpe"}, [0]),
        ({"pre": "llama-bpe", "add_bos_token": False}, []),
        ({"add_bos_token": True, "bos_token_id": None}, []),
    ],
)
def test_what_begins_a_prompt(fields, expected):
    _, usual = trained(KINDS["gpt-2"], pre="gpt-2")
    given = usual | {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    vocabulary = GGUFVocabulary(given, "")
    assert vocabulary.begin_ids == expected
    assert vocabulary.token("eos") == "</s>" and vocabulary.token("unknown") is None


# ---- of characters, as SentencePiece's

PIECES = ["▁", "t", "h", "e", "c", "a", "▁t", "he", "▁the", "▁c", "at", "▁cat", "th", "▁th"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SCORED = {
    **{"model": "llama", "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    "tokens": ["<unk>", "<s>", "</s>", *BYTES, *PIECES],
    "scores": [0.0] * 259 + [-float(i * 7 % 13) for i in range(len(PIECES))],
    "token_type": [2, 3, 3, *[6] * 256, *[1] * len(PIECES)],
}
SCORED = {f"tokenizer.ggml.{name}": value for name, value in SCORED.items()}


def merged(text):
    """SentencePiece's rule: merge the first of the pairs of neighbours whose union scores best."""
    tokens, scores = (SCORED[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores"))
    score_of = dict(zip(tokens, scores, strict=True))
    parts = list(WORD_MARK + text.replace(" ", WORD_MARK))
    while True:
        unions = [a + b for a, b in pairwise(parts)]
        pairs = [(-score_of[union], i) for i, union in enumerate(unions) if union in score_of]
        if not pairs:
            break
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids = []
    for part in parts:
        known = [part] if part in score_of else [f"<0x{byte:02X}>" for byte in part.encode()]
        ids += [tokens.index(name) for name in known]
    return ids


@given(text=st.text(alphabet="theca é", max_size=20))
def test_a_vocabulary_of_scores_merges_by_score(text):
    vocabulary = GGUFVocabulary(SCORED, "here.gguf")
    tokenizer = vocabulary.tokenizer()
    assert vocabulary.begin_ids == [1]
    if text:  # nothing has no word mark
        assert tokenizer.encode(text, add_special_tokens=False).ids == merged(text)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


WRONG = {
    "another model": ({"model": "t5"}, "the tokenizer is 't5'"),
    "another rule": ({"pre": "tekken"}, "split as 'tekken'"),
    "tokens that are no list": ({"tokens": 5}, "tokens is no list"),
    "tokens that are numbers": ({"tokens": [1, 2]}, "tokens is no list"),
    "too few types": ({"token_type": [1]}, "have 1 types"),
}


@pytest.mark.parametrize(("fields", "words"), WRONG.values(), ids=WRONG)
def test_what_is_not_supported_is_named(fields, words):
    given = MADE["gpt-2"][1] | {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    with pytest.raises(ArgumentError, match=rf"here\.gguf.*{words}"):
        GGUFVocabulary(given, "here.gguf")


@pytest.mark.parametrize(
    ("scores", "words"), [(5, "scores is no list"), (["a"], "no list"), ([0.0], "1 scores")]
)
def test_scores_that_are_none_are_named(scores, words):
    with pytest.raises(ArgumentError, match=rf"here\.gguf: .*{words}"):
        GGUFVocabulary(SCORED | {"tokenizer.ggml.scores": scores}, "here.gguf").tokenizer()


def test_merges_that_are_none_are_named():
    fields = MADE["gpt-2"][1] | {"tokenizer.ggml.merges": ["nothing that is there"]}
    with pytest.raises(ArgumentError, match=r"here\.gguf: its vocabulary makes no tokenizer"):
        GGUFVocabulary(fields, "here.gguf").tokenizer()
