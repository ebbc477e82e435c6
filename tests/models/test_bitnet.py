"""The model against its plain reference.

int8 rounding is a step function: an activation that lies halfway between two steps goes one way or the
other by its last bit, so two right implementations differ by a tenth of a logit now and then.  So: with our
attention in the reference, everything is equal but for the head's last digits; without, the difference is
what the reference itself shows when its embedding is off by 1e-6.
"""

import importlib
import os
from pathlib import Path

import numpy as np
import pytest

from paged_kv import ArgumentError
from paged_kv.models.bitnet import BitNetModel, DecoderConfig
from paged_kv.models.sampling import Sampler

ROOT = Path(__file__).parents[2]
NUM_TOKENS = 400


@pytest.fixture(scope="module")
def reference():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks/tiny_bitnet")
        yield importlib.import_module("reference")


@pytest.fixture(scope="module")
def model():
    return BitNetModel.tiny()


@pytest.fixture(scope="module")
def held_out_ids(reference):
    tokenizer = reference.bpe.Tokenizer(reference.MODEL / "tokenizer.json")
    source = (Path(os.__file__).parent / "textwrap.py").read_text()
    return np.array([0, *tokenizer.encode(f"# textwrap.py\n{source}")])[:NUM_TOKENS]


def forward(model, ids, chunks):
    """Logits of every token, fed to a cache in chunks."""
    logits = []
    with model.new_cache(num_pages=20) as cache:
        seq = cache.sequence()
        for part in np.split(ids, np.cumsum(chunks)[:-1]):
            with cache.step([seq], [part]) as step:
                logits.append(model.forward(part, step, np.arange(len(part))))
    return np.concatenate(logits)


def test_with_our_attention_and_norms_the_reference_agrees(model, reference, held_out_ids, monkeypatch):
    def attend_by_cache(q, k, v):
        with model.new_cache(num_pages=20) as cache, cache.sequence() as seq:
            step = cache.step([seq], [len(q)])
            out = step.attend(0, *map(np.ascontiguousarray, (q, k, v)))
            step.rollback()
            return out

    def norm_in_lanes(x, weight, eps):
        """The kernels' order: sixteen sums of every sixteenth square, then halves onto each other."""
        sums = np.add.reduce((x * x).reshape(len(x), -1, 16), axis=1)
        while sums.shape[1] > 1:
            sums = sums[:, : sums.shape[1] // 2] + sums[:, sums.shape[1] // 2 :]
        return x / np.sqrt(sums / np.float32(x.shape[1]) + np.float32(eps)) * weight

    monkeypatch.setattr(reference, "causal_attention", attend_by_cache)
    monkeypatch.setattr(reference, "rms_norm", norm_in_lanes)
    expected = reference.forward(*reference.load(), held_out_ids)
    got = forward(model, held_out_ids, [NUM_TOKENS])
    # The head alone rounds its input, to 16 bits.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3)


def test_against_the_plain_reference_we_differ_as_it_does_from_itself(model, reference, held_out_ids):
    config, weights = reference.load()
    plain = reference.forward(config, weights, held_out_ids)
    name, jitter = "model.embed_tokens.weight", 0.0
    for seed in range(3):
        noise = 1 + 1e-6 * np.random.default_rng(seed).standard_normal(weights[name].shape)
        nudged = weights | {name: (weights[name] * noise).astype(np.float32)}
        jittered = reference.forward(config, nudged, held_out_ids)
        jitter = max(jitter, np.abs(jittered - plain).max())
    got = forward(model, held_out_ids, [NUM_TOKENS])
    assert np.abs(got - plain).max() <= jitter < 0.3
    second, first = np.sort(plain, axis=1)[:, -2:].T
    is_clear = first - second > 2 * jitter
    assert is_clear.mean() > 0.5
    np.testing.assert_array_equal(got.argmax(1)[is_clear], plain.argmax(1)[is_clear])


def test_the_logits_are_those_that_transformers_gave(model):
    """Recorded by `python parity.py --record`, with what its own embedding off by 1e-6 changes there."""
    with np.load(Path(__file__).parent / "transformers_logits.npz") as file:
        recorded = dict(file)
    jitter = float(recorded.pop("jitter"))
    assert 0 < jitter < 0.3
    prompts = [name for name in recorded if name.startswith("ids_")]
    assert len(prompts) == 3
    for name in prompts:
        ids, expected = recorded[name], recorded[name.replace("ids", "logits")]
        got = forward(model, ids, [len(ids)])[-len(expected) :]
        assert np.abs(got - expected).max() <= jitter
        second, first = np.sort(expected, axis=1)[:, -2:].T
        is_clear = first - second > 2 * jitter
        np.testing.assert_array_equal(got.argmax(1)[is_clear], expected.argmax(1)[is_clear])


def test_bits_depend_on_neither_chunks_nor_the_rest_of_the_batch(model, held_out_ids):
    expected = forward(model, held_out_ids, [NUM_TOKENS])
    np.testing.assert_array_equal(forward(model, held_out_ids, [1, 2, 97, 200, 33, 67]), expected)
    with model.new_cache(num_pages=60) as cache:
        seqs = [cache.sequence() for _ in range(3)]
        batch = [held_out_ids[:150], held_out_ids[40:90], held_out_ids[:33]]
        with cache.step(seqs, batch) as step:
            logits = model.forward(np.concatenate(batch), step, step.qo_indptr[1:] - 1)
    np.testing.assert_array_equal(logits[[0, 2]], expected[[149, 32]])


def test_a_sequence_goes_on_where_it_stands(model):
    at_once = BitNetModel.tiny().generate_sequence(30, 0, [0, 100, 200])
    model.reset_sequence(3)
    seen = []
    first = model.generate_sequence(10, 3, [0, 100, 200], progress=seen.append)
    model.generate_sequence(5, 2)  # another entry in between
    rest = model.generate_sequence(20, 3)
    assert at_once.dtype == np.int32
    np.testing.assert_array_equal(np.concatenate([first, rest]), at_once)
    assert seen == list(range(1, 11))
    assert model.report.num_new_tokens == 35 and "35 new tokens" in str(model.report)


def test_sampling_is_seeded(model):
    texts = []
    for seed in (1, 1, 2):
        model.reset_sequence(0)
        sampler = Sampler(temperature=0.9, top_p=0.9, seed=seed)
        texts.append(model.generate_sequence(20, 0, sampler=sampler).tolist())
    assert texts[0] == texts[1] != texts[2]


def test_what_the_model_cannot_take_is_refused(model):
    with model.new_cache(num_pages=40, max_seq_len=1100) as cache:
        seq = cache.sequence()
        for ids in ([2048], [-1]):
            step = cache.step([seq], [1])
            with pytest.raises(ArgumentError, match="ids"):
                model.forward(ids, step, [0])
            step.rollback()
        step = cache.step([seq], [1025])
        with pytest.raises(ArgumentError, match="position 1024"):
            model.forward(np.zeros(1025, int), step, [0])
    for batch_idx in (-1, 8, None, 0.0):
        with pytest.raises(ArgumentError, match="batch_idx"):
            model.generate_sequence(1, batch_idx)
    with pytest.raises(ArgumentError, match="num_tokens"):
        model.generate_sequence(-1, 0)
    with pytest.raises(ArgumentError, match="vocab_size"):
        DecoderConfig.from_json("{}")
