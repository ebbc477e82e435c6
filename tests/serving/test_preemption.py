"""A pool that runs full: the newest request is sent back, and draws the same tokens as undisturbed."""

import os

import numpy as np
import pytest
from conftest import SEED
from pure_model import VOCAB, PureModel

from paged_kv import ArgumentError, OutOfPages, RequestCancelled
from paged_kv.models.sampling import Sampler
from paged_kv.serving.generate import Admission, Batch

NUM_SCHEDULES = int(os.environ.get("PAGED_KV_NUM_SCHEDULES", 60))
MODEL = PureModel()


def new_batch(cache, is_bold=False, **options):
    """A Batch; is_bold: it expects that requests end with their first token, so that it admits too many."""
    admission = Admission.pages_of(cache)
    if is_bold:
        admission.mean_new_tokens, admission.num_ended = 0.0, 10**9
        admission.count_ended = lambda num_new_tokens: None
    return Batch(MODEL, cache, admission, **options)


def serve(batch, limit=5000):
    done = []
    for _ in range(limit):
        done += batch.step()
        if not (batch.running or batch.waiting):
            return done
    raise AssertionError(f"{len(batch.running)} run and {len(batch.waiting)} wait after {limit} steps")


class Schedule:
    """Requests with random prompts, some of which share a beginning, that arrive at random steps."""

    def __init__(self, rng):
        self.page_size = 16
        shared = rng.integers(0, VOCAB, 40).tolist()
        self.jobs = []
        for i in range(int(rng.integers(2, 9))):
            own = rng.integers(0, VOCAB, rng.integers(1, 30)).tolist()
            prompt = shared[: int(rng.integers(0, 40))] + own if rng.random() < 0.5 else own
            self.jobs.append(
                {
                    "prompt": prompt,
                    "max_new_tokens": int(rng.integers(1, 60)),
                    "seeds": [int(rng.integers(2**32)) for _ in range(rng.choice([1, 1, 1, 2, 3]))],
                    "temperature": float(rng.choice([0.0, 1.0])),
                    "priority": int(rng.choice([-1, 0, 0, 0, 2])),
                    "salt": rng.choice([b"", b"", b"x"]),
                    "arrival": int(rng.integers(0, 40)),
                    "cancelled_at": int(rng.integers(60)) if rng.random() < 0.1 else None,
                    "place": i,
                }
            )
        most = max(
            len(job["seeds"]) * -(-(len(job["prompt"]) + job["max_new_tokens"]) // 16) for job in self.jobs
        )
        self.num_pages = most + int(rng.integers(0, 4))
        self.stop_ids = tuple(rng.integers(0, VOCAB, 1).tolist()) if rng.random() < 0.5 else ()
        self.options = {"step_tokens": int(rng.choice([8, 32, 256])), "stop_ids": self.stop_ids}

    def add(self, batch, job):
        samplers = [Sampler(job["temperature"], 0.95, seed) for seed in job["seeds"]]
        kept = {"priority": job["priority"], "salt": bytes(job["salt"])}
        return batch.add_samples(job["prompt"], job["max_new_tokens"], samplers, **kept)

    def undisturbed(self):
        with MODEL.new_cache(num_pages=400, prefix_caching=False) as cache:
            batch = new_batch(cache, stop_ids=self.stop_ids)
            requests = [request for job in self.jobs for request in self.add(batch, job)]
            serve(batch)
            assert batch.report.num_preemptions == 0
            return [request.new_ids for request in requests]

    def run(self, is_bold, prefix_caching):
        with MODEL.new_cache(num_pages=self.num_pages, prefix_caching=prefix_caching) as cache:
            batch = new_batch(cache, is_bold, **self.options)
            requests, done = {}, []
            for now in range(5000):
                for job in self.jobs:
                    if job["arrival"] == now:
                        requests[job["place"]] = self.add(batch, job)
                    if job["cancelled_at"] == now and job["place"] in requests:
                        batch.cancel(requests[job["place"]][0])
                done += batch.step()
                if now >= 60 and not (batch.running or batch.waiting):
                    break
            else:
                raise AssertionError("it never ends")
            cache.check()
            assert cache.stats().num_used_pages == cache.stats().num_sequences == 0
            flat = [request for place in range(len(self.jobs)) for request in requests[place]]
            assert sorted(map(id, done)) == sorted(map(id, flat))  # each is returned once
            return flat, batch.report.num_preemptions


def test_tokens_are_those_of_an_undisturbed_run_whatever_the_schedule():
    rng = np.random.default_rng(SEED)
    num_preemptions = 0
    for _ in range(NUM_SCHEDULES):
        schedule = Schedule(rng)
        expected = schedule.undisturbed()
        got, count = schedule.run(bool(rng.random() < 0.7), bool(rng.random() < 0.7))
        num_preemptions += count
        for request, ids in zip(got, expected, strict=True):
            if isinstance(request.error, RequestCancelled):
                assert request.new_ids == ids[: len(request.new_ids)]
            else:
                assert request.error is None and request.new_ids == ids
    assert num_preemptions > NUM_SCHEDULES / 10


def test_the_newest_of_the_lowest_priority_is_sent_back():
    with MODEL.new_cache(num_pages=9, prefix_caching=False) as cache:
        batch = new_batch(cache, is_bold=True)
        first, low, urgent = (batch.add([1] * 16, 60, priority=i) for i in (0, -1, 5))
        done = serve(batch)
        assert low.num_preemptions > 0 and urgent.num_preemptions == 0
        assert done[-1] is low and batch.report.num_preemptions >= low.num_preemptions
        assert [len(request.new_ids) for request in (first, low, urgent)] == [60] * 3


def test_a_request_that_was_sent_back_draws_nothing_twice_and_keeps_its_logprobs():
    class Counting(Sampler):
        num_calls = 0

        def sample(self, logits):
            self.num_calls += 1
            return super().sample(logits)

    with MODEL.new_cache(num_pages=7) as cache:
        batch = new_batch(cache, is_bold=True)
        samplers = [Counting(1.0, seed=i) for i in range(3)]
        requests = [batch.add([i] * 20, 50, sampler, logprobs=2) for i, sampler in enumerate(samplers)]
        serve(batch)
        assert batch.report.num_preemptions > 0
        for request, sampler in zip(requests, samplers, strict=True):
            assert sampler.num_calls == len(request.new_ids) == len(request.logprobs) == 50
            assert [logprob.id for logprob in request.logprobs] == request.new_ids


def test_early_ends_and_hits_let_more_requests_run_at_once():
    """Counted by what they take at most, three would run at a time."""
    prompt, at_once = list(range(40)), 0
    with MODEL.new_cache(num_pages=24) as cache:
        batch, ends = new_batch(cache), [lambda new_ids: len(new_ids) == 3]
        requests = [batch.add_samples([*prompt, i], 80, [Sampler()], ends=ends)[0] for i in range(60)]
        while batch.running or batch.waiting:
            batch.step()
            at_once = max(at_once, len(batch.running))
        assert all(request.error is None for request in requests)
    assert at_once >= 8


def test_others_overtake_a_request_that_does_not_fit_yet_but_not_for_ever():
    with MODEL.new_cache(num_pages=8) as cache:
        batch = new_batch(cache)
        running = batch.add([1] * 20, 40)  # 4 pages
        batch.step()
        large = batch.add([2] * 60, 60)  # all of them
        small = [batch.add([3, i], 10) for i in range(40)]
        order = serve(batch)
        assert [request.error for request in order] == [None] * 42
        place = order.index(large)
        assert order.index(small[0]) < place < 30 and running in order


def test_what_others_outside_hold_is_an_error_and_no_endless_wait():
    with MODEL.new_cache(num_pages=4) as cache:
        outside = cache.sequence()
        step = cache.step([outside], [40])
        batch = new_batch(cache)
        request = batch.add([1] * 20, 20)
        serve(batch)
        assert isinstance(request.error, OutOfPages)
        step.rollback()
        again = batch.add([1] * 20, 20)
        serve(batch)
        assert again.error is None


@pytest.mark.parametrize("options", [{"priority": 0.5}, {"priority": 2**40}, {"ttl": -1}, {"salt": "text"}])
def test_bad_options_are_refused_when_a_request_is_added(options):
    with MODEL.new_cache(num_pages=4) as cache:
        batch = new_batch(cache)
        with pytest.raises(ArgumentError, match=next(iter(options))):
            batch.add([1], 2, **options)
        assert not batch.waiting


def test_a_long_prompt_holds_others_up_by_a_step_and_no_more():
    with MODEL.new_cache(num_pages=64) as cache:
        batch = new_batch(cache, step_tokens=32)
        running = [batch.add([i], 60) for i in range(4)]
        batch.step()
        batch.add([9] * 400, 2)
        for num_steps in range(2, 20):
            batch.step()
            assert [len(request.new_ids) for request in running] == [num_steps] * 4


def test_prompts_go_on_when_more_requests_run_than_a_step_has_tokens():
    with MODEL.new_cache(num_pages=200) as cache:
        batch = new_batch(cache, step_tokens=8)
        for i in range(20):
            batch.add([i], 100)
        late = batch.add([9] * 30, 1)
        for _ in range(40):
            batch.step()
        assert len(late.new_ids) == 1
