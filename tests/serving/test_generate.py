import numpy as np
import pytest

from paged_kv import ArgumentError, OutOfPages, Step
from paged_kv.models.bitnet import TINY_BITNET, BitNetModel
from paged_kv.models.sampling import Sampler, log_probability, seed_of
from paged_kv.serving.generate import Admission, Batch, generate, generate_stream
from paged_kv.text.tokenizer import ModelTokenizer, open_tokenizer


@pytest.fixture(scope="module")
def model():
    return BitNetModel.tiny()


def prompts_of(seed, lengths):
    rng = np.random.default_rng(seed)
    return [np.concatenate([[0], rng.integers(2, 2048, n - 1)]) for n in lengths]


LENGTHS = (5, 300, 1, 70, 64, 128, 33)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_prompt_gets_the_same_tokens_alone_and_among_others(model, temperature):
    prompts = prompts_of(1, LENGTHS)
    options = {"max_new_tokens": 12, "temperature": temperature, "top_p": 0.95, "stop_ids": ()}
    together = generate(model, prompts, seed=4, **options)
    assert [len(ids) for ids in together.ids] == [12] * len(prompts)
    assert together.report.num_new_tokens == 12 * len(prompts)
    assert together.report.num_prompt_tokens == sum(LENGTHS)
    for i, prompt in enumerate(prompts):
        with model.new_cache(num_pages=8) as cache:
            batch = Batch(model, cache, Admission.pages_of(cache), step_tokens=50)
            request = batch.add(prompt, 12, Sampler(temperature, 0.95, seed_of(4, i)))
            while batch.waiting or batch.running:
                batch.step()
        np.testing.assert_array_equal(request.new_ids, together.ids[i])


def test_a_pool_too_small_for_all_serves_them_one_after_the_other(model):
    prompts = prompts_of(2, LENGTHS)
    at_once, utilization = [], []
    with model.new_cache(num_pages=7, page_size=64) as cache:

        def watch(batch):
            cache.check()
            at_once.append(len(batch.running))
            utilization.append(cache.stats().utilization)

        small = generate(model, prompts, max_new_tokens=10, cache=cache, stop_ids=(), progress=watch)
        assert cache.stats().num_used_pages == 0 and cache.stats().num_sequences == 0
    assert 1 < max(at_once) < len(prompts)
    large = generate(model, prompts, max_new_tokens=10, stop_ids=())
    for a, b in zip(small.ids, large.ids, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_end_token_ends_a_text(model):
    first = generate(model, [[0, 5, 9]], max_new_tokens=8, stop_ids=()).ids[0]
    stop = int(first[3])
    stopped = generate(model, [[0, 5, 9]], max_new_tokens=8, stop_ids=[stop]).ids[0]
    assert stopped.tolist() == first.tolist()[: first.tolist().index(stop) + 1]


def test_what_can_never_be_served_is_refused_at_once(model):
    with model.new_cache(num_pages=2) as cache:
        with pytest.raises(OutOfPages, match="build a larger one"):
            generate(model, [[0], [0] * 120], max_new_tokens=10, cache=cache)
        assert cache.stats().num_used_pages == 0
    for prompts in ([[]], [[-1]], [[0.5]]):
        with pytest.raises(ArgumentError, match="prompt"):
            generate(model, prompts)
    with pytest.raises(ArgumentError, match="max_new_tokens"):
        generate(model, [[0]], max_new_tokens=0)
    assert generate(model, []).ids == []


def test_an_interruption_gives_everything_back(model):
    with model.new_cache(num_pages=20) as cache:

        def interrupt(batch):
            if batch.report.num_steps == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            generate(model, prompts_of(3, LENGTHS), cache=cache, progress=interrupt)
        assert cache.stats().num_used_pages == 0
        cache.check()


@pytest.mark.parametrize("method", ["__enter__", "__exit__"])
def test_an_interruption_that_leaves_a_step_open_does_too(model, monkeypatch, method):
    with model.new_cache(num_pages=20) as cache:
        usual, calls = getattr(Step, method), []

        def interrupted(step, *arguments):
            calls.append(step._plan.is_open)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return usual(step, *arguments)

        monkeypatch.setattr(Step, method, interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            generate(model, prompts_of(3, LENGTHS), cache=cache)
        # At once, though the exception that is kept holds the step.
        assert len(calls) == 3 and caught.value is not None
        assert cache.stats().num_used_pages == cache.stats().num_sequences == 0
        cache.check()


def test_samples_share_their_prompt_and_are_those_of_single_runs(model):
    """n samples take the prompt's pages once, and each draws what it would draw by itself."""
    (prompt,) = prompts_of(5, [300])
    used = []
    with model.new_cache(num_pages=40, page_size=64) as cache:
        together = generate(
            model,
            [prompt, [0, 7]],
            max_new_tokens=6,
            temperature=0.9,
            seed=3,
            n=4,
            stop_ids=(),
            cache=cache,
            progress=lambda batch: used.append(cache.stats().num_used_pages),
        )
        cache.check()
        assert cache.stats().num_used_pages == 0 and cache.stats().num_sequences == 0
    assert len(together.ids) == 8 and together.report.num_new_tokens == 48
    assert len({tuple(ids) for ids in together.ids[:4]}) > 1
    # Four full pages of the prompt once, and of each sample the page that it appends to.
    assert max(used) <= 4 + 4 + 4
    for j in range(4):
        with model.new_cache(num_pages=8) as cache:
            batch = Batch(model, cache, Admission.pages_of(cache))
            request = batch.add(prompt, 6, Sampler(0.9, 1.0, seed_of(3, 0, j)))
            while batch.waiting or batch.running:
                batch.step()
        np.testing.assert_array_equal(together.ids[j], request.new_ids)


def test_samples_that_wait_for_their_prompt_can_be_cancelled(model):
    with model.new_cache(num_pages=40) as cache:
        batch = Batch(model, cache, Admission.pages_of(cache), step_tokens=10)
        batch.add_samples([0] * 50, 5, [Sampler(), Sampler()])
        batch.step()
        assert len(batch.running) == 2
        batch.close()
        assert cache.stats().num_used_pages == 0 and not batch.running
    with pytest.raises(ArgumentError, match="n is 0"):
        generate(model, [[0]], n=0)


def test_a_stream_yields_each_token_as_it_comes(model):
    prompts = prompts_of(7, (5, 70, 33))
    options = {"max_new_tokens": 6, "temperature": 0.9, "seed": 4, "n": 2}
    whole = generate(model, prompts, **options).ids
    came = list(generate_stream(model, prompts, **options))
    for index, ids in enumerate(whole):
        assert [id for place, id in came if place == index] == ids.tolist()
    # Not one text after the other.
    assert sorted(place for place, _ in came) != [place for place, _ in came]


def test_a_stream_that_is_closed_gives_its_pages_back(model):
    prompts = prompts_of(7, (5, 70, 33))
    with model.new_cache(num_pages=20, page_size=64) as cache:
        stream = generate_stream(model, prompts, max_new_tokens=6, cache=cache)
        next(stream)
        assert cache.stats().num_used_pages > 0
        stream.close()
        assert cache.stats().num_used_pages == 0


def test_any_of_several_stop_ids_ends_a_text(model):
    prompts = prompts_of(7, (5, 70, 33))
    free = generate(model, prompts, max_new_tokens=12, stop_ids=()).ids
    stops = {int(free[0][3]), int(free[1][5])}
    for got, ids in zip(generate(model, prompts, max_new_tokens=12, stop_ids=stops).ids, free, strict=True):
        ends = [i for i, id in enumerate(ids.tolist()) if id in stops]
        np.testing.assert_array_equal(got, ids[: ends[0] + 1] if ends else ids)


# ---- texts, stop strings, log probabilities


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("tokenizers")
    return ModelTokenizer(open_tokenizer(TINY_BITNET / "tokenizer.json"), [0])


def test_a_text_ends_before_its_stop_string(model, tokenizer):
    prompts = [tokenizer.encode(text) for text in ("import os", "def f(x):", "class A")]
    options = {"max_new_tokens": 24, "stop_ids": (), "tokenizer": tokenizer}
    whole = generate(model, prompts, **options)
    assert whole.texts == [tokenizer.decode(ids) for ids in whole.ids] and whole.logprobs is None
    stop = whole.texts[0][5:8]
    cut = generate(model, prompts, stop=["never there", stop], **options)
    for text, shorter, ids in zip(whole.texts, cut.texts, cut.ids, strict=True):
        assert shorter == text.split(stop)[0]
        if stop in text:  # no token more than it takes
            assert stop in tokenizer.decode(ids) and stop not in tokenizer.decode(ids[:-1])
    assert len(cut.ids[0]) < 24


def test_log_probabilities_are_those_of_each_step(model, tokenizer):
    prompt = tokenizer.encode("import os")
    options = {"max_new_tokens": 6, "stop_ids": (), "temperature": 0.9}
    done = generate(model, [prompt, prompt], n=2, logprobs=3, **options)
    for ids, logprobs in zip(done.ids, done.logprobs, strict=True):
        text = [*prompt, *ids.tolist()]
        with model.new_cache(num_pages=2) as cache, cache.step([cache.sequence()], [len(text)]) as step:
            logits = model.forward(text, step, np.arange(len(prompt) - 1, len(text) - 1))
        expected = [log_probability(row, id, 3) for row, id in zip(logits, ids.tolist(), strict=True)]
        assert logprobs == expected


def test_a_repetition_penalty_sees_prompt_and_new_tokens(model):
    """Of every token once: with a penalty beyond all logits, no token comes twice."""
    prompt = [0, *range(5, 60)]
    new = generate(model, [prompt], max_new_tokens=20, repetition_penalty=1e6, stop_ids=()).ids[0].tolist()
    assert len({*prompt, *new}) == len(prompt) + len(new)


def test_what_ends_a_text_may_fail_alone(model):
    def fails(new_ids):
        raise ValueError("on purpose")

    with model.new_cache(num_pages=4) as cache:
        batch = Batch(model, cache, Admission.pages_of(cache))
        failing, other = (
            batch.add([0, 5], 4, ends=[fails]),
            batch.add([0, 5], 4, ends=[lambda ids: len(ids) == 2]),
        )
        while batch.waiting or batch.running:
            batch.step()
        assert isinstance(failing.error, ValueError) and other.error is None and len(other.new_ids) == 2
        with pytest.raises(ArgumentError, match="ends"):
            batch.add([0, 5], 4, ends=[None])
        with pytest.raises(ArgumentError, match="logprobs"):
            batch.add([0, 5], 4, logprobs=-1)


def test_stop_strings_need_a_tokenizer(model, tokenizer):
    with pytest.raises(ArgumentError, match="tokenizer"):
        generate(model, [[0]], stop=["x"])
    with pytest.raises(ArgumentError, match="stop is"):
        generate(model, [[0]], stop="x", tokenizer=tokenizer)
