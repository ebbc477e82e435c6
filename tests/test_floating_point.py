"""Results do not depend on what the caller wants to hear about overflow and underflow (`np.seterr`)."""

import warnings

import numpy as np
import pytest
from conftest import make_cache, rows

import paged_kv
from paged_kv.models.bitnet import BitNetModel, DecoderConfig
from paged_kv.models.layers import Rotation, rope_frequencies
from paged_kv.models.matrix import int8_matrix
from paged_kv.models.sampling import Sampler
from paged_kv.models.ternary import quantise_activations, ternarise
from paged_kv.serving.generate import generate

CONFIG = DecoderConfig(256, 32, 32, 1, 2, 1, 16, 128, 10000.0, 1e-5, 1, 2)
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 8192},
}
TINY, HUGE = np.float32(1e-45), np.float32(3e38)


def arrays(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rows(rng, *shape) for shape in shapes]


@np.errstate(all="ignore")
def scaled(array, factor):
    """The test's own arithmetic, which is not what is tested."""
    return array * np.float32(factor)


def sampled():
    logits = np.array([0, -800, -1e30, -np.inf], np.float32)
    return [Sampler(t, p, 1).sample(logits) for t in (1.0, 0.02, 1e-30, 1e30) for p in (1.0, 0.5, 1e-30)]


def attended():
    q, k, v = arrays(1, (3, 4, 32), (3, 2, 32), (3, 2, 32))
    k[1] *= 1e18
    q[2] = TINY
    with make_cache(num_layers=1) as cache, cache.step([cache.sequence()], [3]) as step:
        return step.attend(
            0, q, k, v, return_lse=True, sinks=[-1e38, 0, 1, 1e38], alibi_slopes=[1e-45, 0, 1, 9]
        )


def by_reference():
    q, k, v = arrays(1, (3, 4, 32), (3, 2, 32), (3, 2, 32))
    k[1] *= 1e18
    options = {"logits_soft_cap": 1e-30, "sinks": np.array([-1e38, 0, 1, 1e38]), "return_lse": True}
    return [*paged_kv.reference.attend(q, k, v, **options), paged_kv.reference.attend(q, k, v, window=1)]


def merged():
    outputs, lses = arrays(2, (3, 2, 2, 16), (3, 2, 2))
    lses[0], lses[1, 0] = -np.inf, -3e38
    return paged_kv.merge_states(scaled(outputs, 1e-40), lses)


def in_8_bits():
    (weights,) = arrays(3, (16, 16))
    weights[1], weights[2], weights[3] = TINY, HUGE, 0
    matrix = int8_matrix(weights)
    return [matrix.packed, matrix.scales, matrix(np.eye(16, dtype=np.float32))]


def in_2_bits():
    (weights,) = arrays(4, (16, 16))
    weights[1], weights[2] = TINY, HUGE
    return [*ternarise(weights), *ternarise(scaled(weights, 1e-44)), *quantise_activations(weights)]


def rotated():
    heads = np.full((2, 1, 16), TINY)
    tables = [rope_frequencies(128, theta, scaling) for theta in (1e-30, 1e38) for scaling in (None, LLAMA3)]
    Rotation(rope_frequencies(16, 1e38), 10**6)(heads, np.array([0, 99999], np.int32))
    return [heads, *tables]


def generated():
    models = [BitNetModel.random(CONFIG, head=head) for head in ("int8", "bfloat16", "float32")]
    options = {"max_new_tokens": 3, "temperature": 0.02, "stop_ids": ()}
    return [ids for model in models for ids in generate(model, [[5, 6], [7]], **options).ids]


def passed_on():
    model = BitNetModel.random(CONFIG, head="float32")
    model.embedding[5] = 1  # 1e-45 and more, as bfloat16's bits
    with model.new_cache(num_pages=1) as cache, cache.step([cache.sequence()], [2]) as step:
        return [model.forward([5, 6], step, [0, 1])]


WORK = [
    *(sampled, attended, by_reference, merged, in_8_bits, in_2_bits, rotated, generated, passed_on),
]


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_results_are_the_same_whatever_the_caller_wants_to_hear(work):
    with np.errstate(all="ignore"):
        expected = work()
    for rule in ("raise", "warn"):
        with np.errstate(all=rule), warnings.catch_warnings():
            warnings.simplefilter("error")
            got = work()
        for mine, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(mine, other)


def test_a_row_of_subnormal_weights_counts_as_zeros():
    weights = np.full((16, 16), TINY)
    matrix = int8_matrix(weights)
    assert not matrix.packed.any() and not matrix(np.ones((1, 16), np.float32)).any()


def test_the_callers_rules_are_what_they_were():
    with np.errstate(all="raise"):
        for work in WORK:
            work()
        assert set(np.geterr().values()) == {"raise"}
