import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_kv import ArgumentError
from paged_kv.models.sampling import Sampler


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


@pytest.mark.parametrize("logits", [[np.nan, 1], [np.inf, 1], [-np.inf, -np.inf]])
def test_logits_without_a_maximum_are_refused(logits):
    with pytest.raises(ArgumentError, match="no finite maximum"):
        Sampler().sample(np.array(logits, np.float32))


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"temperature": np.nan}, {"top_p": 0}, {"top_p": 1.1}, {"seed": -1}, {"seed": 0.5}],
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        Sampler(**options)
