"""A serving loop that no request can stop, and steps that can be repeated after anything
that raises in them.
"""

import contextlib

import numpy as np
import pytest
from conftest import SEED, STRIDE, Tripwire

from paged_kv import ArgumentError, OutOfPages, OutOfSequences, PagedKVCache, SequenceTooLong, StaleSequence
from paged_kv.commands.baselines import ConcatenatedCache, ConcatenatedStep
from paged_kv.models.bitnet import BitNetModel, DecoderConfig
from paged_kv.models.sampling import Sampler
from paged_kv.serving import batch as batch_module
from paged_kv.serving.generate import Admission, Batch, generate, generate_stream

GOOD = ([5, 6, 7], [9, 10, 11, 12], [3] * 70)
NUM_NEW = 6


class Model(BitNetModel):
    """The small model; `ill` prompts, which begin with that id, get logits that are no numbers."""

    ill = 77
    calls = 0

    def forward(self, ids, step, rows):
        self.calls += 1
        logits = super().forward(ids, step, rows)
        ends = np.asarray(rows)
        starts = np.flatnonzero(step.positions == 0)
        for start in starts[np.asarray(ids)[starts] == self.ill]:
            after = ends[ends >= start]
            logits[np.flatnonzero(ends == after[0])] = np.nan
        return logits


@pytest.fixture(scope="module")
def model():
    return Model.tiny()


def serve(batch, limit=300):
    """Step until nothing is left; how many steps it took."""
    for count in range(limit):
        if not (batch.running or batch.waiting):
            return count
        batch.step()
    raise AssertionError(f"{len(batch.running)} run and {len(batch.waiting)} wait after {limit} steps")


def new_batch(model, cache, **options):
    return Batch(model, cache, Admission.pages_of(cache), **options)


def add_good(batch, temperature=0.8):
    return [batch.add(ids, NUM_NEW, Sampler(temperature, 0.95, i)) for i, ids in enumerate(GOOD)]


@pytest.fixture(scope="module")
def small_model():
    """One layer of random weights, for tests that serve some hundred times."""
    return Model.random(DecoderConfig(256, 32, 32, 1, 2, 1, 16, 128, 10000.0, 1e-5, 1, 2))


@pytest.fixture(scope="module")
def undisturbed(model):
    with model.new_cache(num_pages=64) as cache:
        batch = new_batch(model, cache)
        requests = add_good(batch)
        serve(batch)
        return [request.new_ids for request in requests]


class Raising(Sampler):
    def __init__(self, at, error=RuntimeError):
        super().__init__()
        self.left, self.error = at, error

    def sample(self, logits):
        self.left -= 1
        if self.left < 0:
            raise self.error("no")
        return super().sample(logits)


class Drawing(Sampler):
    def __init__(self, id):
        super().__init__()
        self.id = id

    def sample(self, logits):
        return self.id


# ---- what can be known is refused in add

REFUSED = {
    "beyond the vocabulary": (([5000], 4), ArgumentError, "5000"),
    "below it": (([5, -1], 4), ArgumentError, r"\[1\] is -1"),
    "floats": (([1.5], 4), ArgumentError, "float"),
    "a matrix": (([[1, 2], [3, 4]], 4), ArgumentError, "vector"),
    "text": (("hello", 4), ArgumentError, "vector"),
    "nothing": (([], 4), ArgumentError, "empty"),
    "None": ((None, 4), ArgumentError, "vector"),
    "ragged": (([[1], [2, 3]], 4), ArgumentError, "vector"),
    "beyond 64 bits": (([2**70], 4), ArgumentError, "vector"),
    "longer than the model": (([5] * 1000, 30), SequenceTooLong, "1029 positions, the model has 1024"),
    "no new token": (([5], 0), ArgumentError, "max_new_tokens"),
    "how many is not said": (([5], None), ArgumentError, "max_new_tokens"),
    "more than the pool": (([5] * 400, 30), OutOfPages, "cache has 6"),
}


@pytest.mark.parametrize(("request_", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_can_be_known_is_refused_when_it_is_added(model, undisturbed, request_, error, words):
    with model.new_cache(num_pages=6) as cache:
        batch = new_batch(model, cache)
        requests = add_good(batch)
        with pytest.raises(error, match=words):
            batch.add(*request_)
        assert list(batch.waiting) == requests
        serve(batch)
        assert [request.new_ids for request in requests] == undisturbed


def test_samples_that_the_cache_has_no_sequences_for_are_refused(model):
    with model.new_cache(num_pages=20, max_sequences=2) as cache:
        batch = new_batch(model, cache)
        with pytest.raises(OutOfSequences, match="3 samples"):
            batch.add_samples([5], 2, [Sampler()] * 3)
        for samplers in ([], [None], [Sampler(), 5]):
            with pytest.raises(ArgumentError, match="samplers"):
                batch.add_samples([5], 2, samplers)


def test_a_cache_shorter_than_the_model_counts(model):
    with model.new_cache(num_pages=20, max_seq_len=100) as cache:
        batch = new_batch(model, cache)
        with pytest.raises(SequenceTooLong, match="101 positions, the cache has 100"):
            batch.add([5] * 91, 11)
        request = batch.add([5] * 91, 10)
        serve(batch)
        assert request.error is None and len(request.new_ids) == 10


@pytest.mark.parametrize("stop_ids", [5, "12", [1.5], [None], None], ids=str)
def test_stop_ids_that_are_none_are_refused(model, stop_ids):
    with model.new_cache(num_pages=2) as cache, pytest.raises(ArgumentError, match="stop"):
        new_batch(model, cache, stop_ids=stop_ids)


# ---- what cannot be known ends the request that it is about


def test_a_request_that_fails_takes_nobody_with_it(model, undisturbed):
    """vLLM PR #9634, flashinfer #2402: one request's bad logits or sampler stopped the engine
    for all others.
    """
    with model.new_cache(num_pages=64) as cache:
        batch = new_batch(model, cache)
        requests = add_good(batch)
        bad = [
            batch.add([77, 5], 4),
            batch.add([8], 4, Raising(0)),
            batch.add([8], 4, Raising(2, ZeroDivisionError)),
            batch.add([8], 4, Drawing(2048)),
            batch.add([8], 4, Drawing(None)),
        ]
        done = []
        while batch.running or batch.waiting:
            done += batch.step()
        cache.check()
        assert cache.stats().num_used_pages == cache.stats().num_sequences == 0
    assert [request.new_ids for request in requests] == undisturbed
    assert sorted(map(id, done)) == sorted(map(id, requests + bad))
    errors = [ArgumentError, RuntimeError, ZeroDivisionError, ArgumentError, ArgumentError]
    assert [type(request.error) for request in bad] == errors
    assert [len(request.new_ids) for request in bad] == [0, 0, 2, 0, 0]
    assert [request.error for request in requests] == [None] * 3


def test_samples_of_one_prompt_fail_each_by_itself(model):
    with model.new_cache(num_pages=64) as cache:
        batch = new_batch(model, cache)
        samplers = [Raising(0), Sampler(), Raising(1), Sampler()]
        first, second, third, fourth = batch.add_samples([5] * 70, 4, samplers)
        serve(batch)
        assert cache.stats().num_sequences == 0
    assert [type(request.error) for request in (first, third)] == [RuntimeError] * 2
    assert second.new_ids == fourth.new_ids and len(second.new_ids) == 4
    assert third.new_ids == second.new_ids[:1]


def test_samples_of_a_prompt_that_fails_end_with_it(model):
    with model.new_cache(num_pages=64) as cache:
        batch = new_batch(model, cache)
        samples = batch.add_samples([77] + [5] * 70, 4, [Sampler(), Sampler()])
        serve(batch)
        assert all(isinstance(request.error, ArgumentError) for request in samples)
        assert cache.stats().num_sequences == 0


def test_pages_that_others_hold_end_the_newest_and_not_everybody(model, undisturbed):
    with model.new_cache(num_pages=8) as cache:
        other = cache.sequence()
        step = cache.step([other], [4 * 64])  # four pages that admission does not know of
        batch = new_batch(model, cache)
        requests = add_good(batch)
        late = batch.add([4] * 130, 6)
        serve(batch)
        step.rollback()
        cache.check()
    assert [request.new_ids for request in requests] == undisturbed
    assert late.error is None or (isinstance(late.error, OutOfPages) and not late.new_ids)


def test_no_page_at_all_ends_each_request_with_its_error(model):
    with model.new_cache(num_pages=3) as cache:
        other = cache.sequence()
        step = cache.step([other], [3 * 64])
        batch = new_batch(model, cache)
        requests = [batch.add([5], 3) for _ in range(3)]
        assert serve(batch) <= 4
        assert [type(request.error) for request in requests] == [OutOfPages] * 3
        step.rollback()
        request = batch.add([5], 3)
        serve(batch)
        assert len(request.new_ids) == 3


def test_sequences_that_others_hold_make_requests_wait_or_end(model, undisturbed):
    with model.new_cache(num_pages=64, max_sequences=2) as cache:
        batch = new_batch(model, cache)
        other = cache.sequence()
        requests = add_good(batch)
        serve(batch)  # one after the other
        assert [request.new_ids for request in requests] == undisturbed
        another = cache.sequence()
        requests = add_good(batch)
        assert serve(batch) <= 4
        assert [type(request.error) for request in requests] == [OutOfSequences] * 3
        other.free()
        another.free()


def test_more_prompts_than_sequences_are_served_in_turn(model):
    """vLLM #53130: the limit on sequences was full, and no request was admitted any more."""
    with model.new_cache(memory="64MiB", max_sequences=4) as cache:
        result = generate(model, [[5 + i] for i in range(30)], max_new_tokens=3, cache=cache, stop_ids=())
        assert [len(ids) for ids in result.ids] == [3] * 30


def test_a_request_whose_sequence_was_freed_ends_alone(model, undisturbed):
    with model.new_cache(num_pages=64) as cache:
        batch = new_batch(model, cache)
        requests, bad = add_good(batch), batch.add([5] * 20, 9)
        batch.step()
        bad.seq.free()
        serve(batch)
        assert isinstance(bad.error, StaleSequence)
    assert [request.new_ids for request in requests] == undisturbed


def test_a_window_is_fed_in_steps_that_it_takes_and_costs_what_it_holds(model):
    with model.new_cache(num_pages=4, page_size=16, window=16, max_step_tokens=10) as cache:
        batch = new_batch(model, cache)
        request = batch.add([5] * 200, 30)
        serve(batch)
        assert request.error is None and len(request.new_ids) == 30


@pytest.mark.parametrize("policy", ["attention", "window"])
def test_requests_longer_than_their_budget_cost_what_they_hold(model, policy):
    options = {"eviction": policy, "budget_tokens": 128, "page_size": 16, "max_step_tokens": 40}
    with model.new_cache(num_pages=36, max_sequences=4, **options) as cache:
        batch = new_batch(model, cache)
        requests = [batch.add([5 + i] * length, 40) for i, length in enumerate((300, 20, 129, 250, 400))]
        serve(batch)
        assert [len(request.new_ids) for request in requests] == [40] * 5
        assert all(request.error is None for request in requests)
        assert cache.stats().num_dropped_pages > 20 and cache.stats().num_used_pages == 0
        cache.check()


def test_as_many_requests_run_as_the_pool_has_budgets(model):
    """A step's tokens come on top once, not for each request; none is preempted."""
    options = {"eviction": "window", "budget_tokens": 128, "page_size": 16, "max_step_tokens": 128}
    # A budget and its margin are 13 pages, and a step of 64 tokens 4.
    with model.new_cache(num_pages=4 * 13 + 4, max_sequences=8, **options) as cache:
        batch, most = new_batch(model, cache, step_tokens=64), 0
        requests = [batch.add([5 + i] * 300, 60) for i in range(8)]
        while batch.running or batch.waiting:
            batch.step()
            most = max(most, len(batch.running))
        assert most >= 4
        assert [len(request.new_ids) for request in requests] == [60] * 8
        assert sum(request.num_preemptions for request in requests) == 0
        cache.check()
    with model.new_cache(num_pages=16, **options) as cache:
        batch = new_batch(model, cache, step_tokens=64)
        with pytest.raises(OutOfPages, match="take 17, the cache has 16"):
            batch.add([5] * 300, 60)


# ---- a step is all or nothing

#: Whose calls are counted, and made to raise: (class, method).
CALLS = [
    (PagedKVCache, "sequence"),
    (PagedKVCache, "step"),
    ("Step", "commit"),
    ("Step", "__enter__"),
    ("Step", "__exit__"),
    ("Sequence", "fork"),
    ("Sequence", "free"),
    ("Sequence", "__len__"),
    (Model, "forward"),
    (Sampler, "sample"),
    (batch_module.Request, "draw"),
    (batch_module.Request, "take_drawn"),
    (batch_module.Request, "next_ids"),
    (Batch, "_settle"),
    (Batch, "_admit"),
    (Batch, "_choose"),
    (Batch, "_open"),
    (Batch, "_retire"),
    (Batch, "_fork_siblings"),
    (batch_module.GenerationReport, "count_step"),
]


class Disturbance(BaseException):
    """What no handler of errors takes for a request's own."""


class Faults:
    """Raises at the n-th call of all CALLS, before or after it did its work; each call of a
    class is counted.
    """

    def __init__(self, monkeypatch, at, when, error):
        self.count, self.at, self.when, self.error = 0, at, when, error
        for owner, name in CALLS:
            owner = __import__("paged_kv").__dict__[owner] if isinstance(owner, str) else owner
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, usual):
        def call(*given, **named):
            self.count += 1
            is_mine = self.count == self.at
            if is_mine and self.when == "before":
                raise self.error("on purpose")
            result = usual(*given, **named)
            if is_mine and self.when == "after":
                raise self.error("on purpose")
            return result

        return call


def run_with(model, monkeypatch, at, when, error):
    """Serve three prompts, one of them thrice, one call raising; (tokens, errors, calls made)."""
    with model.new_cache(num_pages=12, max_sequences=4) as cache, monkeypatch.context() as patch:
        batch = new_batch(model, cache, step_tokens=40)
        requests = [batch.add(GOOD[0], 3, Sampler(0.8, 0.95, 1))]
        requests += batch.add_samples(GOOD[2], 3, [Sampler(0.8, 0.95, 10 + i) for i in range(3)])
        requests += [batch.add(GOOD[1], 2, Sampler())]
        faults, done = Faults(patch, at, when, error), []
        for _ in range(60):
            try:
                done += (now := batch.step())
            except (Disturbance, RuntimeError):
                continue
            if not (now or batch.running or batch.waiting):
                break
        else:
            raise AssertionError("it never ends")
        cache.check()
        assert cache.stats().num_used_pages == cache.stats().num_sequences == 0
        assert sorted(map(id, done)) == sorted(map(id, requests))
        return (
            [request.new_ids for request in requests],
            [request.error for request in requests],
            faults.count,
        )


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_that_raises_anywhere_can_be_repeated(small_model, monkeypatch, when):
    """At every call inside it: the tokens are those of an undisturbed run, each request is returned once."""
    expected, errors, num_calls = run_with(small_model, monkeypatch, 0, when, Disturbance)
    assert errors == [None] * 5 and [len(ids) for ids in expected] == [3, 3, 3, 3, 2]
    for at in range(1, num_calls + 1):
        got, errors, _ = run_with(small_model, monkeypatch, at, when, Disturbance)
        if when == "after" and got != expected:
            # What a sampler drew was thrown away with the exception: it alone may go on otherwise.
            assert sum(a != b for a, b in zip(got, expected, strict=True)) == 1, at
            continue
        assert got == expected and errors == [None] * 5, at


def test_an_error_anywhere_ends_at_most_the_request_that_it_is_about(small_model, monkeypatch):
    expected, _, num_calls = run_with(small_model, monkeypatch, 0, "before", RuntimeError)
    for at in range(1, num_calls + 1):
        got, errors, _ = run_with(small_model, monkeypatch, at, "before", RuntimeError)
        assert sum(error is not None for error in errors) <= 1, at
        for ids, wanted, error in zip(got, expected, errors, strict=True):
            assert ids == wanted if error is None else ids == wanted[: len(ids)], at


@pytest.mark.parametrize("at", [3, 4, 9, 11])
def test_the_baseline_can_repeat_a_step_too(model, undisturbed, monkeypatch, at):
    config = model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    batch = Batch(model, ConcatenatedCache(*shape, num_threads=1), Admission(10**9, lambda n: n))
    requests, calls, usual = add_good(batch), [], ConcatenatedStep.attend

    def failing(*given, **named):
        calls.append(None)
        if len(calls) == at:
            raise RuntimeError
        return usual(*given, **named)

    monkeypatch.setattr(ConcatenatedStep, "attend", failing)
    while batch.running or batch.waiting:
        with contextlib.suppress(RuntimeError):
            batch.step()
    assert [request.new_ids for request in requests] == undisturbed


# ---- generate


def test_generate_keeps_the_results_of_the_others(model, undisturbed):
    result = generate(model, [GOOD[0], [77, 5], GOOD[2]], max_new_tokens=NUM_NEW, stop_ids=())
    good = generate(model, [GOOD[0], GOOD[2]], max_new_tokens=NUM_NEW, stop_ids=())
    assert isinstance(result.ids[1], ArgumentError) and result.errors == [None, result.ids[1], None]
    for got, expected in zip((result.ids[0], result.ids[2]), good.ids, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_stream_says_what_failed(model):
    came = list(generate_stream(model, [[77, 5], [5]], max_new_tokens=2, stop_ids=()))
    (error,) = [item for index, item in came if index == 0]
    assert isinstance(error, ArgumentError) and len(came) == 3


UNSERVABLE = {
    "a bad id among good prompts": ({"prompts": [[5], [5000]]}, r"prompts\[1\]\[0\] is 5000"),
    "too many positions": ({"prompts": [[5], [5] * 1000], "max_new_tokens": 30}, "positions"),
    "too many new tokens": ({"max_new_tokens": 10**6}, "positions"),
    "how many is not said": ({"max_new_tokens": None}, "max_new_tokens"),
    "a seed below zero": ({"seed": -1}, "seed"),
    "no seed": ({"seed": None}, "seed"),
    "one stop id": ({"stop_ids": 5}, "stop_ids"),
    "a prompt that is text": ({"prompts": "hello"}, "prompts"),
    "ids and no prompts": ({"prompts": [1, 2, 3]}, "prompts"),
    "no list": ({"prompts": 5}, "prompts"),
}


@pytest.mark.parametrize(("options", "words"), UNSERVABLE.values(), ids=UNSERVABLE)
def test_generate_refuses_what_can_be_known_before_any_work(model, options, words):
    before = model.calls
    with pytest.raises((ArgumentError, SequenceTooLong), match=words):
        generate(model, **({"prompts": [[5]]} | options))
    assert model.calls == before


def run_with_a_tripwire(model, at):
    """Serve as `run_with` does; exceptions, and with them every frame, stay alive until the end."""
    with model.new_cache(num_pages=12, max_sequences=4) as cache:
        batch, tripwire = new_batch(model, cache, step_tokens=40), Tripwire(at, Disturbance)
        requests = [batch.add(GOOD[0], 2, Sampler(0.8, 0.95, 1))]
        requests += batch.add_samples(GOOD[2], 2, [Sampler(0.8, 0.95, 10 + i) for i in range(2)])
        done = []
        for _ in range(30):
            with tripwire:
                now = None
                done += (now := batch.step())
            if now is None:
                continue
            if not (now or batch.running or batch.waiting):
                break
        else:
            raise AssertionError("it never ends")
        cache.check()
        assert cache.stats().num_used_pages == cache.stats().num_sequences == 0
        assert sorted(map(id, done)) == sorted(map(id, requests))
        assert [request.error for request in requests] == [None] * 3
        return [request.new_ids for request in requests], tripwire.count


def test_a_step_that_raises_at_any_call_of_the_library_can_be_repeated(small_model):
    """Not only where the batch calls: at every call below it, too, while the exceptions are kept."""
    expected, num_calls = run_with_a_tripwire(small_model, 0)
    assert num_calls > 300
    for at in range(1 + SEED % STRIDE, num_calls + 1, STRIDE):
        got, _ = run_with_a_tripwire(small_model, at)
        # What a sampler was drawing when it was interrupted, it may draw otherwise.
        differ = sum(mine != other for mine, other in zip(got, expected, strict=True))
        assert differ <= 1, (at, got, expected)


# ---- prompts that share their beginning

SYSTEM = [int(id) for id in np.random.default_rng(0).integers(1, 200, 90)]


def shared_prompts(count=6):
    return [[*SYSTEM, 201 + i, *SYSTEM[: 3 * i]] for i in range(count)]


@pytest.mark.parametrize("step_tokens", [16, 64, 256])
def test_prompts_with_the_same_beginning_compute_it_once(small_model, step_tokens):
    prompts, results = shared_prompts(), []
    for prefix_caching in (False, True):
        with small_model.new_cache(num_pages=64, page_size=16, prefix_caching=prefix_caching) as cache:
            batch = new_batch(small_model, cache, step_tokens=step_tokens)
            requests = [batch.add(prompt, NUM_NEW) for prompt in prompts]
            serve(batch)
            cache.check()
            results.append([request.new_ids for request in requests])
    assert results[0] == results[1]
    given = sum(map(len, prompts))
    assert batch.report.num_prompt_tokens + batch.report.num_cached_tokens == given
    # Each of the others finds the beginning, or begins when few tokens of it are still to be computed.
    num_found = len(SYSTEM) - batch_module.MIN_SHARED_TOKENS + 1
    assert batch.report.num_prompt_tokens <= given - num_found * (len(prompts) - 1)


def test_a_later_turn_computes_what_is_new_in_it(small_model):
    with small_model.new_cache(num_pages=16, page_size=16) as cache:
        batch = new_batch(small_model, cache)
        first = batch.add(SYSTEM[:90], NUM_NEW)
        serve(batch)
        second = [*SYSTEM[:90], *first.new_ids, 7, 8, 9]
        before = batch.report.num_prompt_tokens
        request = batch.add(second, NUM_NEW)
        serve(batch)
        # The last new token of the first turn was never fed.
        assert batch.report.num_prompt_tokens - before == 4
    with small_model.new_cache(num_pages=16, page_size=16, prefix_caching=False) as cache:
        batch = new_batch(small_model, cache)
        alone = batch.add(second, NUM_NEW)
        serve(batch)
        assert alone.new_ids == request.new_ids


def test_others_overtake_a_prompt_that_waits_for_its_beginning(small_model):
    with small_model.new_cache(num_pages=64, page_size=16) as cache:
        batch = new_batch(small_model, cache, step_tokens=32)
        leader, follower = (batch.add(prompt, NUM_NEW) for prompt in shared_prompts(2))
        other = batch.add([250, 251], NUM_NEW)
        batch.step()
        assert batch.running == [leader, other] and list(batch.waiting) == [follower]
        # When the leader is gone, the next one computes the rest of what they share.
        batch.cancel(leader)
        batch.step()
        assert follower in batch.running
        serve(batch)
        assert follower.error is None and len(follower.new_ids) == NUM_NEW
        assert batch.report.num_cached_tokens == 32


def test_few_shared_tokens_hold_no_prompt_up(small_model):
    with small_model.new_cache(num_pages=64, page_size=16) as cache:
        batch = new_batch(small_model, cache, step_tokens=8)
        requests = [batch.add([1, 2, 3, 4, 100 + i, *SYSTEM[i:60]], NUM_NEW) for i in range(4)]
        batch.step()
        assert batch.running == requests
        serve(batch)


def test_what_is_kept_makes_room_for_requests(small_model):
    """Kept pages count as free, so a full pool of them admits as an empty one does."""
    with small_model.new_cache(num_pages=8, page_size=16, max_sequences=4) as cache:
        batch = new_batch(small_model, cache)
        for i in range(12):
            requests = [batch.add([10 * i + j, *SYSTEM[:40]], NUM_NEW) for j in range(2)]
            serve(batch)
            assert [request.error for request in requests] == [None] * 2
        stats = cache.stats()
        assert stats.num_kept_pages > 0 and stats.num_evictions > 0
        cache.check()
