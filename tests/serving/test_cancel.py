"""Cancelled requests: their pages are free at once, and no other request is affected."""

import numpy as np
import pytest
from conftest import Tripwire
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_kv import ArgumentError, RequestCancelled
from paged_kv.models.bitnet import BitNetModel, DecoderConfig
from paged_kv.models.sampling import Sampler
from paged_kv.serving.generate import Admission, Batch

SHAPE = DecoderConfig(256, 32, 32, 1, 2, 1, 16, 128, 10000.0, 1e-5, 1, 2)
MODEL = BitNetModel.random(SHAPE)


def new_batch(cache, **options):
    return Batch(MODEL, cache, Admission.pages_of(cache), **options)


def drain(batch):
    done = []
    for _ in range(300):
        if not (batch.running or batch.waiting):
            return done + batch.step()
        done += batch.step()
    raise AssertionError("requests are left after 300 steps")


def alone(prompt, num_new, seed):
    """The ids that a request gets by itself."""
    with MODEL.new_cache(num_pages=8, page_size=16) as cache:
        batch = new_batch(cache, step_tokens=7)
        request = batch.add(prompt, num_new, Sampler(0.9, 0.95, seed))
        drain(batch)
        return request.new_ids


jobs = st.lists(
    st.tuples(
        st.integers(1, 30),  # ids of the prompt
        st.integers(1, 6),  # new tokens
        st.integers(1, 3),  # samples
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60)
@given(jobs, st.data())
def test_others_get_the_ids_that_they_get_alone(drawn, data):
    with MODEL.new_cache(num_pages=12, page_size=16) as cache:
        batch = new_batch(cache, step_tokens=7)
        requests, expected, cancelled, done = [], {}, set(), []
        for place, (length, num_new, num_samples) in enumerate(drawn):
            prompt = np.arange(3, 3 + length)
            samplers = [Sampler(0.9, 0.95, 10 * place + i) for i in range(num_samples)]
            requests += batch.add_samples(prompt, num_new, samplers)
            for i, request in enumerate(requests[-num_samples:]):
                expected[request] = (prompt, num_new, 10 * place + i)
        while batch.running or batch.waiting:
            if data.draw(st.booleans()):
                request = data.draw(st.sampled_from(requests))
                was_done = request in done or request in cancelled
                assert batch.cancel(request) is not was_done
                if not was_done:
                    cancelled.add(request)
                    assert request.seq is None
            done += batch.step()
            cache.check()
        done += batch.step()
        assert sorted(map(id, done)) == sorted(map(id, requests))  # each is returned once
        assert cache.stats().num_used_pages == cache.stats().num_sequences == 0
        for request in requests:
            ids = alone(*expected[request])
            if request in cancelled:
                assert isinstance(request.error, RequestCancelled)
                assert request.new_ids == ids[: len(request.new_ids)]
            else:
                assert request.error is None and request.new_ids == ids


def test_pages_are_free_as_soon_as_a_request_is_cancelled():
    with MODEL.new_cache(num_pages=4, page_size=16) as cache:
        batch = new_batch(cache)
        running, waiting = batch.add([5] * 40, 9), batch.add([6] * 40, 9)
        batch.step()
        assert cache.stats().num_used_pages == 3 and len(batch.waiting) == 1
        assert batch.cancel(running) and not batch.cancel(running)
        assert cache.stats().num_used_pages == 0 and not batch.running
        assert batch.step() == [running]
        assert waiting in batch.running
        drain(batch)
        assert waiting.error is None and len(waiting.new_ids) == 9 and not batch.cancel(waiting)


def test_the_next_sample_goes_on_with_the_prompt_where_the_first_one_left_it():
    with MODEL.new_cache(num_pages=16, page_size=16) as cache:
        batch = new_batch(cache, step_tokens=10)
        first, second, third = batch.add_samples([7] * 35, 4, [Sampler(0.9, 0.95, i) for i in range(3)])
        batch.step()
        assert first.num_fed == 10
        batch.cancel(first)
        batch.cancel(third)
        assert second.num_fed == 10
        assert set(drain(batch)) == {first, second, third}
        assert second.new_ids == alone([7] * 35, 4, 1) and not third.new_ids


def test_a_sampler_may_cancel_its_own_request_and_others():
    class Cancelling(Sampler):
        def sample(self, logits):
            assert batch.cancel(own) and batch.cancel(other)
            return super().sample(logits)

    with MODEL.new_cache(num_pages=16, page_size=16) as cache:
        batch = new_batch(cache)
        own = batch.add([5, 6], 4, Cancelling())
        other, kept = batch.add([8, 9], 4), batch.add([11], 4)
        assert batch.step() == [own, other]
        assert cache.stats().num_sequences == 1
        drain(batch)
        assert kept.error is None and kept.new_ids == alone([11], 4, 0)[: len(kept.new_ids)]


@pytest.mark.parametrize("bad", [None, 3, [5, 6]])
def test_what_is_no_request_is_refused(bad):
    with MODEL.new_cache(num_pages=4, page_size=16) as cache, pytest.raises(ArgumentError, match="request"):
        new_batch(cache).cancel(bad)


def test_a_request_of_another_batch_is_not_cancelled():
    with MODEL.new_cache(num_pages=4, page_size=16) as cache:
        theirs = new_batch(cache).add([5], 2)
        assert not new_batch(cache).cancel(theirs) and theirs.error is None


@pytest.mark.parametrize("at", range(1, 40, 3))
def test_an_interrupted_cancel_is_completed_by_the_next_step(at):
    with MODEL.new_cache(num_pages=16, page_size=16) as cache:
        batch = new_batch(cache, step_tokens=10)
        first, second = batch.add_samples([7] * 25, 4, [Sampler(0.9, 0.95, i) for i in range(2)])
        waiting = batch.add_samples([9] * 30, 3, [Sampler(), Sampler()])
        batch.step()
        with Tripwire(at):
            batch.cancel(first)
            batch.cancel(waiting[0])
        was_cancelled = [request for request in (first, waiting[0]) if request.error is not None]
        done = drain(batch)
        assert set(done) == {first, second, *waiting} and len(done) == 4
        assert second.error is None and waiting[1].error is None
        assert all(isinstance(request.error, RequestCancelled) for request in was_cancelled)
        assert second.new_ids == alone([7] * 25, 4, 1)
        assert cache.stats().num_used_pages == 0
