"""The engine: requests from threads and from asyncio, each alone in what it draws and in how it fails."""

import asyncio
import gc
import threading
import time

import numpy as np
import pytest
from pure_model import PureModel

from paged_kv import (
    ArgumentError,
    DeadlineExceeded,
    EngineClosed,
    OutOfPages,
    QueueFull,
    RequestCancelled,
    SequenceTooLong,
)
from paged_kv.serving import Engine, Sampling
from paged_kv.serving.generate import generate
from paged_kv.text.tokenizer import TextStream

MODEL = PureModel()


class Letters:
    """A tokenizer whose ids are characters."""

    def encode(self, text):
        return [ord(letter) - 32 for letter in text]

    def decode(self, ids):
        return "".join(chr(32 + id) for id in ids)

    def stream(self, stop=()):
        return TextStream(self, stop)


class Gate(PureModel):
    """A model that waits before each pass until it is opened, and can be made to raise."""

    def __init__(self):
        super().__init__()
        self.is_open, self.arrived, self.fails = threading.Event(), threading.Event(), None

    def forward(self, ids, step, rows):
        self.arrived.set()
        assert self.is_open.wait(30)
        if self.fails is not None and self.fails(ids, step):
            raise ZeroDivisionError("of the model")
        return super().forward(ids, step, rows)


@pytest.fixture
def engine():
    with MODEL.new_cache(num_pages=64) as cache, Engine(MODEL, cache, tokenizer=Letters()) as engine:
        yield engine
        engine.close(drain=30)
        cache.check()
        assert cache.stats().num_used_pages == cache.stats().num_sequences == 0


@pytest.fixture
def gated():
    model = Gate()
    with model.new_cache(num_pages=64) as cache, Engine(model, cache, max_waiting=3) as engine:
        yield engine
        model.is_open.set()
        engine.close(drain=30)
        assert cache.stats().num_used_pages == cache.stats().num_sequences == 0


def alone(prompt, **options):
    return generate(MODEL, [prompt], cache=None, **options).ids[0].tolist()


def prompts(count):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 64, rng.integers(1, 60)).tolist() for _ in range(count)]


# ---- what comes


def test_a_request_has_the_tokens_that_generate_draws(engine):
    for prompt in prompts(4):
        options = {"temperature": 0.9, "seed": 7, "top_p": 0.9}
        handle = engine.submit(prompt, Sampling(max_tokens=20, **options))
        pieces = list(handle)
        ids = [piece.id for piece in pieces]
        assert ids == alone(prompt, max_new_tokens=20, **options) == handle.samples[0].ids
        assert [piece.finish_reason for piece in pieces] == [None] * 19 + ["length"]
        assert "".join(piece.text for piece in pieces) == handle.samples[0].text == Letters().decode(ids)


def test_requests_of_many_threads_have_the_tokens_that_they_have_alone(engine):
    given, results = prompts(40), {}

    def ask(i):
        sampling = Sampling(max_tokens=5 + i % 7, temperature=i % 2, seed=i)
        results[i] = engine.submit(given[i], sampling).result(timeout=60)[0].ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, ids in results.items():
        assert ids == alone(given[i], max_new_tokens=5 + i % 7, temperature=i % 2, seed=i)


def test_coroutines_read_pieces_as_they_come(engine):
    async def ask(i, prompt):
        handle = engine.submit(prompt, Sampling(max_tokens=10, seed=i))
        return [piece.id async for piece in handle]

    async def ask_all(given):
        return await asyncio.gather(*(ask(i, prompt) for i, prompt in enumerate(given)))

    given = prompts(20)
    for prompt, ids in zip(given, asyncio.run(ask_all(given)), strict=True):
        assert ids == alone(prompt, max_new_tokens=10)


def test_samples_share_a_prompt_and_draw_by_themselves(engine):
    handle = engine.submit([1, 2, 3], Sampling(max_tokens=12, n=3, temperature=1.0, seed=5))
    pieces = list(handle)
    texts = [sample.text for sample in handle.samples]
    assert len(set(texts)) == 3 and handle.usage.new_tokens == 36
    for i, sample in enumerate(handle.samples):
        assert [piece.id for piece in pieces if piece.index == i] == sample.ids
    again = engine.submit([1, 2, 3], Sampling(max_tokens=12, n=3, temperature=1.0, seed=5)).result()
    assert [sample.text for sample in again] == texts


def test_without_a_seed_two_requests_differ(engine):
    sampling = Sampling(max_tokens=20, temperature=2.0)
    assert engine.submit([1], sampling).result()[0].ids != engine.submit([1], sampling).result()[0].ids


def test_stop_strings_and_stop_ids_end_a_sample(engine):
    whole = engine.submit([9, 8], Sampling(max_tokens=30)).result()[0]
    stop = whole.text[10:13]
    cut = engine.submit([9, 8], Sampling(max_tokens=30, stop=(stop,))).result()[0]
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
    last = whole.ids[5]
    ended = engine.submit([9, 8], Sampling(max_tokens=30, stop_ids=[last])).result()[0]
    assert ended.ids == whole.ids[: whole.ids.index(last) + 1] and ended.finish_reason == "stop"
    assert ended.text == Letters().decode(ended.ids[:-1])


def test_text_is_tokenized_and_log_probabilities_come_with_the_ids(engine):
    handle = engine.submit("HELLO", Sampling(max_tokens=6, logprobs=3))
    pieces = list(handle)
    assert handle.samples[0].ids == alone(Letters().encode("HELLO"), max_new_tokens=6)
    for piece, logprob in zip(pieces, handle.samples[0].logprobs, strict=True):
        assert piece.logprob == logprob and logprob.id == piece.id == logprob.top[0][0]
        assert len(logprob.top) == 3 and logprob.value == logprob.top[0][1] <= 0


def test_usage_counts_as_the_cache_does(engine):
    prompt = list(range(40))
    first = engine.submit(prompt, Sampling(max_tokens=4))
    first.result()
    second = engine.submit([*prompt, 5], Sampling(max_tokens=4))
    second.result()
    assert (first.usage.cached_tokens, first.usage.written_tokens) == (0, 40)
    assert first.usage.miss_reason == "first"
    assert (second.usage.prompt_tokens, second.usage.new_tokens) == (41, 4)
    assert second.usage.cached_tokens + second.usage.written_tokens == 41
    assert second.usage.cached_tokens == 40
    other = engine.submit([*prompt, 5], Sampling(max_tokens=4), salt=b"another")
    other.result()
    assert other.usage.cached_tokens == 0


def test_counters_add_up(engine):
    handles = [engine.submit(prompt, Sampling(max_tokens=5)) for prompt in prompts(10)]
    for handle in handles:
        handle.result()
    engine.close(drain=10)
    counters = engine.counters
    assert counters.num_requests == 10 and counters.finished == {"length": 10}
    assert counters.num_new_tokens == 50 == counters.token_seconds.count + 10
    assert counters.first_token_seconds.count == counters.queue_seconds.count == 10
    assert counters.num_prompt_tokens == sum(handle.usage.prompt_tokens for handle in handles)
    for handle in handles:
        assert handle.submitted_at <= handle.first_token_at <= handle.done_at


def test_beginnings_that_are_retained_outlive_others(engine):
    """Pages of 16; the pool holds 64."""
    system = list(range(32))
    engine.submit([*system, 1], Sampling(max_tokens=2), retained=[(32, 7, None)]).result()
    for i in range(40):
        engine.submit([i, 40, *range(20, 60)], Sampling(max_tokens=2)).result()
    assert engine.cache.stats().num_evictions > 0
    assert engine.cache.match([*system, 2, 3]).num_tokens >= 32
    assert engine.cache.match([0, 40, *range(20, 60)]).num_tokens < 32


# ---- what is refused

REFUSED = {
    "an empty prompt": (([],), {}, ArgumentError, "empty"),
    "an id that is none": (([64],), {}, ArgumentError, "64"),
    "too long for the model": (([1] * 600,), {}, SequenceTooLong, "512"),
    "more than the pool": (([1] * 400, Sampling(n=4, max_tokens=100)), {}, OutOfPages, "64"),
    "no Sampling": (([1], {"max_tokens": 3}), {}, ArgumentError, "Sampling"),
    "no priority": (([1],), {"priority": "high"}, ArgumentError, "priority"),
    "no time": (([1],), {"timeout": 0}, ArgumentError, "timeout"),
    "time before now": (([1],), {"timeout": -1}, ArgumentError, "timeout"),
    "a salt that is text": (([1],), {"salt": "x"}, ArgumentError, "salt"),
}


@pytest.mark.parametrize(("given", "options", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_can_never_be_served_is_refused_at_once(engine, given, options, error, words):
    with pytest.raises(error, match=words):
        engine.submit(*given, **options)
    assert engine.num_waiting == engine.num_running == 0


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"n": 0},
        {"n": 1000},
        {"temperature": -1},
        {"top_p": 2},
        {"seed": -1},
        {"stop": "text"},
        {"stop": [""]},
        {"stop_ids": 5},
        {"grammar": "x"},
    ],
    ids=str,
)
def test_options_that_are_none_are_refused(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        Sampling(**options)


def test_text_and_stop_strings_need_a_tokenizer(gated):
    for given in (("text",), ([1], Sampling(stop=("x",)))):
        with pytest.raises(ArgumentError, match="tokenizer"):
            gated.submit(*given)


def test_a_full_queue_refuses_and_takes_requests_again(gated):
    running = [gated.submit([1], Sampling(max_tokens=3))]
    assert gated.model.arrived.wait(10)
    waiting = [gated.submit([1], Sampling(max_tokens=3)) for _ in range(3)]
    for _ in range(3):
        with pytest.raises(QueueFull, match="3 requests wait"):
            gated.submit([1])
    assert gated.counters.num_refused == 3
    gated.model.is_open.set()
    for handle in running + waiting:
        handle.result(timeout=30)
    gated.submit([1], Sampling(max_tokens=3)).result(timeout=30)


# ---- what ends a request early


def test_a_cancelled_request_ends_and_others_do_not(engine):
    first, second = (engine.submit([i], Sampling(max_tokens=400)) for i in range(2))
    for count, _ in enumerate(first):
        if count == 3:
            first.cancel()
    assert first.samples[0].finish_reason == "cancelled"
    assert isinstance(first.samples[0].error, RequestCancelled)
    with pytest.raises(RequestCancelled):
        first.result()
    assert second.result(timeout=60)[0].ids == alone([1], max_new_tokens=400)
    first.cancel()  # a second time does nothing


def test_a_coroutine_that_goes_away_cancels_its_request(gated):
    async def main():
        handle = gated.submit([1], Sampling(max_tokens=400))
        task = asyncio.create_task(handle.wait())
        await asyncio.sleep(0.05)
        gated.model.is_open.set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return handle

    handle = asyncio.run(main())
    gated.close(drain=30)
    assert handle.samples[0].finish_reason == "cancelled" and len(handle.samples[0].ids) < 400


def test_a_loop_that_was_closed_stops_nothing(gated):
    async def main():
        handle = gated.submit([1], Sampling(max_tokens=5))
        handle.loop = asyncio.get_running_loop()
        return handle

    handle = asyncio.run(main())
    gated.model.is_open.set()
    gated.submit([2], Sampling(max_tokens=5)).result(timeout=30)
    assert handle.result()[0].finish_reason == "length"


def test_a_deadline_ends_what_runs_and_what_waits():
    now = [0.0]

    class Slow(PureModel):
        def forward(self, ids, step, rows):
            now[0] += 1.0
            return super().forward(ids, step, rows)

    model = Slow()
    with model.new_cache(num_pages=4) as cache, Engine(model, cache, clock=lambda: now[0]) as engine:
        late, waits, patient = (
            engine.submit([1] * 40, Sampling(max_tokens=20), timeout=timeout) for timeout in (8.5, 5, None)
        )
        for handle in (late, waits):
            with pytest.raises(DeadlineExceeded):
                handle.result(timeout=30)
            assert handle.samples[0].finish_reason == "timeout"
        assert 0 < len(late.samples[0].ids) < 20
        assert len(patient.result(timeout=30)[0].ids) == 20


def test_a_request_that_fails_ends_alone(engine):
    def angry(piece):
        raise KeyError("of the callback")

    bad = engine.submit([1], Sampling(max_tokens=30), on_piece=angry)
    good = [engine.submit([2, i], Sampling(max_tokens=30)) for i in range(4)]
    with pytest.raises(KeyError):
        bad.result(timeout=30)
    assert bad.samples[0].finish_reason == "error"
    for i, handle in enumerate(good):
        assert handle.result(timeout=30)[0].ids == alone([2, i], max_new_tokens=30)


def test_a_model_that_raises_ends_the_requests_that_make_it_raise(gated):
    gated.model.fails = lambda ids, step: 63 in ids
    gated.model.is_open.set()
    good = [gated.submit([1, 2, i], Sampling(max_tokens=4, stop_ids=[63])) for i in range(2)]
    bad = gated.submit([1, 63], Sampling(max_tokens=4))
    with pytest.raises(ZeroDivisionError):
        bad.result(timeout=30)
    for handle in good:
        handle.result(timeout=30)
    gated.submit([1], Sampling(max_tokens=2)).result(timeout=30)


def test_a_model_that_raises_once_ends_nothing(gated):
    times = iter([True])
    gated.model.fails = lambda ids, step: next(times, False)
    gated.model.is_open.set()
    handles = [gated.submit([1, i], Sampling(max_tokens=4)) for i in range(3)]
    for i, handle in enumerate(handles):
        assert handle.result(timeout=30)[0].ids == alone([1, i], max_new_tokens=4)


# ---- its end


def test_close_lets_what_is_there_end(gated):
    handles = [gated.submit([i], Sampling(max_tokens=9)) for i in range(3)]
    gated.model.is_open.set()
    gated.close(drain=30)
    assert [len(handle.result()[0].ids) for handle in handles] == [9] * 3
    with pytest.raises(EngineClosed):
        gated.submit([1])
    assert not gated.is_open
    gated.close()


def test_close_cuts_off_what_does_not_end_in_time(gated):
    handles = [gated.submit([i], Sampling(max_tokens=400)) for i in range(3)]
    assert gated.model.arrived.wait(10)
    threading.Timer(0.05, gated.model.is_open.set).start()
    gated.close()
    for handle in handles:
        with pytest.raises(RequestCancelled, match="engine was closed"):
            handle.result()


def test_a_cache_that_is_closed_below_it_ends_every_request():
    model = Gate()
    cache = model.new_cache(num_pages=64)
    with Engine(model, cache) as engine:
        handle = engine.submit([1], Sampling(max_tokens=400))
        assert model.arrived.wait(10)
        threading.Timer(0.2, model.is_open.set).start()
        cache.close()
        with pytest.raises(EngineClosed, match="failed"):
            handle.result(timeout=30)
        with pytest.raises(EngineClosed):
            engine.submit([1])


def test_engines_that_come_and_go_leave_no_thread_and_no_object():
    gc.collect()
    before, num_objects = threading.active_count(), sum(type(one) is Engine for one in gc.get_objects())
    for _ in range(3):
        with MODEL.new_cache(num_pages=8) as cache, Engine(MODEL, cache) as engine:
            engine.submit([1], Sampling(max_tokens=2)).result()
    assert threading.active_count() == before
    gc.collect()
    assert sum(type(one) is Engine for one in gc.get_objects()) <= num_objects + 1  # `engine`


def test_an_idle_engine_takes_no_time():
    with MODEL.new_cache(num_pages=8) as cache, Engine(MODEL, cache) as engine:
        engine.submit([1], Sampling(max_tokens=2)).result()
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.15
