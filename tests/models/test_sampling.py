import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_kv import ArgumentError
from paged_kv.models.sampling import Sampler, log_probability


def kept_tokens(logits, temperature, top_p):
    """The rule in words: the likeliest tokens until their probabilities reach top_p."""
    p = np.exp((logits - logits.max()).astype(float) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    return order[: 1 + np.searchsorted(p[order].cumsum()[:-1], top_p)]


@given(seed=st.integers(0, 2**32), vocab=st.sampled_from([1, 3, 64, 65, 700]), top_p=st.floats(0.01, 0.99))
def test_only_the_likeliest_part_is_drawn(seed, vocab, top_p):
    logits = (3 * np.random.default_rng(seed).standard_normal(vocab)).astype(np.float32)
    sampler = Sampler(0.8, top_p, seed)
    kept = kept_tokens(logits, 0.8, top_p + 1e-9)
    assert all(sampler.sample(logits) in kept for _ in range(20))


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    sampler = Sampler(temperature=1.0, seed=5)
    counts = np.bincount([sampler.sample(logits) for _ in range(4000)], minlength=3) / 4000
    # Four standard deviations of a share at 4000 draws are 0.031.
    np.testing.assert_allclose(counts, [0.1, 0.6, 0.3], atol=0.031)


def test_zero_temperature_is_the_likeliest_and_of_equals_the_first():
    assert Sampler().sample(np.array([1.0, 3.0, 3.0], np.float32)) == 1


def test_the_smallest_temperature_does_not_overflow():
    assert Sampler(temperature=1e-30).sample(np.array([5.0, 1e30, -np.inf], np.float32)) == 1


def kept_by(logits, temperature, top_k, top_p, min_p):
    """The rules in words, one after the other."""
    p = np.exp((logits - logits.max()).astype(float) / temperature)
    order = np.argsort(-p, kind="stable")[: top_k or len(p)]
    share = p[order] / p[order].sum()
    order = order[: 1 + np.searchsorted(share.cumsum()[:-1], top_p)]
    return order[p[order] >= min_p * p.max()]


@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([1, 3, 64, 700]),
    top_k=st.sampled_from([0, 1, 2, 50, 64, 1000]),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_top_k_and_min_p_keep_what_they_say(seed, vocab, top_k, top_p, min_p):
    logits = (3 * np.random.default_rng(seed).standard_normal(vocab)).astype(np.float32)
    sampler = Sampler(0.8, top_p, seed, top_k=top_k, min_p=min_p)
    kept = kept_by(logits, 0.8, top_k, min(1, top_p + 1e-9), max(0, min_p - 1e-9))
    assert all(sampler.sample(logits) in kept for _ in range(20))


def test_each_kept_token_is_drawn():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    for options, expected in (({"top_k": 2}, {0, 1}), ({"min_p": 0.45}, {0, 1, 2}), ({}, {0, 1, 2, 3})):
        sampler = Sampler(1.0, **options)
        assert {sampler.sample(logits) for _ in range(400)} == expected


def test_tokens_of_the_text_are_penalised():
    """CTRL's rule: logits above 0 are divided, those below multiplied; each token once."""
    logits = np.array([2.0, 1.5, -1.0, -1.1], np.float32)
    sampler = Sampler(repetition_penalty=1.5)
    assert sampler.reads_ids and not Sampler().reads_ids
    assert sampler.sample(logits) == 0 and sampler.sample(logits, [0, 0]) == 1
    assert sampler.sample(logits[2:], [0]) == 1
    np.testing.assert_array_equal(logits, np.array([2.0, 1.5, -1.0, -1.1], np.float32))


@given(seed=st.integers(0, 2**32), vocab=st.sampled_from([1, 5, 300]), num_top=st.integers(0, 8))
def test_log_probabilities_are_those_of_the_softmax(seed, vocab, num_top):
    rng = np.random.default_rng(seed)
    logits = (50 * rng.standard_normal(vocab)).astype(np.float32)
    expected = logits.astype(np.longdouble)
    expected = expected - expected.max() - np.log(np.exp(expected - expected.max()).sum())
    found = log_probability(logits, vocab // 2, num_top)
    assert found.id == vocab // 2 and found.value == pytest.approx(float(expected[vocab // 2]), abs=1e-5)
    order = np.argsort(-logits, kind="stable")[:num_top]
    assert [id for id, _ in found.top] == order.tolist()
    np.testing.assert_allclose([value for _, value in found.top], expected[order].astype(float), atol=1e-5)


@pytest.mark.parametrize("logits", [[np.nan, 1], [np.inf, 1], [-np.inf, -np.inf]])
def test_logits_without_a_maximum_are_refused(logits):
    with pytest.raises(ArgumentError, match="no finite maximum"):
        Sampler().sample(np.array(logits, np.float32))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": np.nan},
        {"top_p": 0},
        {"top_p": 1.1},
        {"seed": -1},
        {"seed": 0.5},
        {"top_k": -1},
        {"top_k": 1.5},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.9},
    ],
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        Sampler(**options)
