"""Beam search: the texts that a search over whole sequences finds, in any pool and beside any others."""

import numpy as np
import pytest
from conftest import SEED
from hypothesis import given, settings
from hypothesis import strategies as st
from pure_model import PureModel

from paged_kv import ArgumentError, OutOfSequences, RequestCancelled
from paged_kv.serving import Engine, Sampling
from paged_kv.serving.generate import Admission, Batch

MODEL = PureModel(vocab_size=20)


def logits_after(model, ids):
    """Of all ids, computed by themselves."""
    with model.new_cache(num_pages=40, prefix_caching=False) as cache:
        seq = cache.sequence()
        with cache.step([seq], [ids]) as step:
            return model.forward(np.array(ids), step, np.array([len(ids) - 1]))[0]


def searched(model, prompt, num_beams, max_new, stop_ids, length_penalty=1.0):
    """The same search, plainly: every beam is computed again from its first token on."""
    beams, ended = [(0.0, [])], []
    for length in range(1, max_new + 1):
        extended = []
        for place, (score, new_ids) in enumerate(beams):
            logits = logits_after(model, [*prompt, *new_ids]).astype(np.float64)
            values = logits - logits.max()
            values -= np.log(np.exp(values).sum())
            extended += [(score + values[id], place, id, new_ids) for id in range(len(values))]
        extended.sort(key=lambda one: (-one[0], one[1], one[2]))
        beams = []
        for rank, (score, _, id, new_ids) in enumerate(extended[: num_beams * (1 + len(stop_ids))]):
            if id in stop_ids:
                if rank < num_beams:
                    ended.append((score / length**length_penalty, [*new_ids, id]))
            elif len(beams) < num_beams:
                beams.append((score, [*new_ids, id]))
        ended = sorted(ended, key=lambda one: -one[0])[:num_beams]
        full = len(ended) == num_beams and ended[-1][0] >= beams[0][0] / length**length_penalty
        if full:
            break
        if length == max_new:
            ended += [(score / length**length_penalty, new_ids) for score, new_ids in beams]
            ended = sorted(ended, key=lambda one: -one[0])[:num_beams]
    return [ids for _, ids in ended]


def serve(batch, limit=3000):
    for _ in range(limit):
        if batch.is_idle:
            return
        batch.step()
    raise AssertionError(f"{len(batch.running)} run and {len(batch.waiting)} wait after {limit} steps")


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 19), min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(1, 25),
    st.sets(st.integers(0, 19), max_size=2),
    st.sampled_from([0.0, 1.0, 2.0]),
)
def test_the_texts_are_those_of_a_plain_search(prompt, num_beams, max_new, stop_ids, length_penalty):
    with MODEL.new_cache(num_pages=80) as cache:
        batch = Batch(MODEL, cache, Admission.pages_of(cache))
        options = {"stop_ids": tuple(stop_ids), "length_penalty": length_penalty}
        beams = batch.queue(batch.prepare_beams(prompt, max_new, num_beams, **options))
        serve(batch)
        cache.check()
        assert cache.stats().num_used_pages == cache.stats().num_sequences == 0
    expected = searched(MODEL, prompt, num_beams, max_new, stop_ids, length_penalty)
    assert [beam.new_ids for beam in beams][: len(expected)] == expected
    assert all(beam.new_ids == [] for beam in beams[len(expected) :])
    assert [beam.score for beam in beams] == sorted((beam.score for beam in beams), reverse=True)


def test_one_beam_is_greedy():
    with MODEL.new_cache(num_pages=40) as cache:
        batch = Batch(MODEL, cache, Admission.pages_of(cache))
        (beam,) = batch.queue(batch.prepare_beams([1, 2, 3], 30, 1))
        greedy = batch.add([1, 2, 3], 30)
        serve(batch)
        assert beam.new_ids == greedy.new_ids


def test_searches_in_a_pool_that_is_too_small_find_the_same_texts():
    """Beams are preempted one by one, and those that run wait for them."""
    rng = np.random.default_rng(SEED)
    jobs = [(rng.integers(0, 20, rng.integers(15, 30)).tolist(), int(rng.integers(2, 5))) for _ in range(5)]
    expected = [searched(MODEL, prompt, num_beams, 40, ()) for prompt, num_beams in jobs]
    with MODEL.new_cache(num_pages=20, max_sequences=24, prefix_caching=False) as cache:
        admission = Admission.pages_of(cache)
        admission.mean_new_tokens, admission.num_ended = 0.0, 10**9  # too many are admitted
        admission.count_ended = lambda num_new_tokens: None
        batch = Batch(MODEL, cache, admission)
        groups = [batch.queue(batch.prepare_beams(prompt, 40, num)) for prompt, num in jobs]
        plain = [batch.add([i], 30) for i in range(3)]
        serve(batch)
        cache.check()
        assert batch.report.num_preemptions > 0
        assert cache.stats().num_used_pages == cache.stats().num_sequences == 0
    for beams, texts in zip(groups, expected, strict=True):
        assert [beam.error for beam in beams] == [None] * len(beams)
        assert [beam.new_ids for beam in beams][: len(texts)] == texts
    assert all(len(request.new_ids) == 30 for request in plain)


def test_beams_of_one_search_end_together():
    with MODEL.new_cache(num_pages=40) as cache:
        batch = Batch(MODEL, cache, Admission.pages_of(cache), step_tokens=8)
        for num_steps in (0, 1, 2, 4, 9):
            beams = batch.queue(batch.prepare_beams([1] * 20, 30, 3))
            for _ in range(num_steps):
                batch.step()
            assert batch.cancel(beams[num_steps % 3])
            serve(batch)
            assert all(isinstance(beam.error, RequestCancelled) for beam in beams)
            assert cache.stats().num_used_pages == cache.stats().num_sequences == 0


def test_an_engine_gives_the_best_texts_when_they_are_whole():
    with MODEL.new_cache(num_pages=64) as cache, Engine(MODEL, cache) as engine:
        sampling = Sampling(max_tokens=12, num_beams=4, n=2, stop_ids=[3])
        handle = engine.submit([5, 6], sampling)
        pieces = list(handle)
        expected = searched(MODEL, [5, 6], 4, 12, {3})
        assert [sample.ids for sample in handle.samples] == expected[:2]
        for i in range(2):
            assert [piece.id for piece in pieces if piece.index == i] == expected[i]
        assert handle.usage.new_tokens == sum(map(len, expected[:2]))
        assert engine.counters.finished.total() == 2


def test_beams_that_the_cache_has_no_sequences_for_are_refused():
    with MODEL.new_cache(num_pages=64, max_sequences=3) as cache:
        batch = Batch(MODEL, cache, Admission.pages_of(cache))
        with pytest.raises(OutOfSequences, match="4"):
            batch.prepare_beams([1], 1, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 0},
        {"num_beams": 2, "n": 3},
        {"num_beams": 2, "temperature": 1.0},
        {"num_beams": 2, "logprobs": 1},
        {"length_penalty": float("nan")},
    ],
    ids=str,
)
def test_options_that_exclude_each_other_are_refused(options):
    with pytest.raises(ArgumentError, match=r"num_beams|length_penalty"):
        Sampling(**options)
