"""The model's own sequences: they go on where they stand, after errors, in threads, and grow as they go."""

import threading

import numpy as np
import pytest

from paged_kv import ArgumentError, ReentrantCall, SequenceTooLong
from paged_kv.models import session
from paged_kv.models.bitnet import BitNetModel
from paged_kv.models.sampling import Sampler

PROMPT = [0, 100, 200]


@pytest.fixture
def model():
    return BitNetModel.tiny()


@pytest.fixture(scope="module")
def undisturbed():
    """Twelve tokens after the prompt."""
    return BitNetModel.tiny().generate_sequence(12, 0, PROMPT).tolist()


class Failing(Sampler):
    """Raises, or draws something that is no id, at one of its calls."""

    def __init__(self, at, how):
        super().__init__()
        self.calls, self.at, self.how = 0, at, how

    def sample(self, logits):
        self.calls += 1
        if self.calls != self.at:
            return super().sample(logits)
        if isinstance(self.how, type):
            raise self.how("no")
        return self.how


@pytest.mark.parametrize("how", [RuntimeError, KeyboardInterrupt, -1, 5000, 1.5, None], ids=str)
@pytest.mark.parametrize("at", [2, 3, 7])
def test_a_sampler_that_fails_feeds_no_token_twice(model, undisturbed, at, how):
    sampler = Failing(at, how)
    error = (how, "no") if isinstance(how, type) else (ArgumentError, "sample|token")
    with pytest.raises(error[0], match=error[1]):
        model.generate_sequence(12, 0, PROMPT, sampler=sampler)
    assert len(model._entry(0).seq) == len(PROMPT) + at - 2
    rest = model.generate_sequence(13 - at, 0, sampler=sampler).tolist()
    assert rest == undisturbed[at - 1 :]
    assert len(model._entry(0).seq) == len(PROMPT) + 11


def test_a_sampler_that_fails_at_the_first_token_takes_the_prompt_back(model, undisturbed):
    sampler = Failing(1, RuntimeError)
    with pytest.raises(RuntimeError):
        model.generate_sequence(12, 0, PROMPT, sampler=sampler)
    assert len(model._entry(0).seq) == 0
    assert model.generate_sequence(12, 0, PROMPT, sampler=sampler).tolist() == undisturbed


def test_logits_that_are_no_numbers_and_a_callback_that_raises_do_no_harm(model, undisturbed, monkeypatch):
    def progress(num_tokens):
        if num_tokens == 4:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        model.generate_sequence(12, 0, PROMPT, progress=progress)
    usual = BitNetModel.forward
    monkeypatch.setattr(BitNetModel, "forward", lambda *given: usual(*given) * np.float32(np.nan))
    with pytest.raises(ArgumentError, match="no finite maximum"):
        model.generate_sequence(1, 0)
    monkeypatch.setattr(BitNetModel, "forward", usual)
    assert model.generate_sequence(8, 0).tolist() == undisturbed[4:]


@pytest.mark.parametrize("prompt", [[5000], [-1], [[1, 2]], [1.5], "hello", None, [None]], ids=str)
def test_a_prompt_that_is_none_is_refused_and_changes_nothing(model, undisturbed, prompt):
    first = model.generate_sequence(4, 0, PROMPT).tolist()
    if prompt is not None:
        with pytest.raises(ArgumentError, match="prompt"):
            model.generate_sequence(4, 0, prompt)
    assert first + model.generate_sequence(8, 0).tolist() == undisturbed


def test_a_prompt_without_new_tokens_waits_for_the_next_call(model, undisturbed):
    assert model.generate_sequence(0, 0, PROMPT).tolist() == []
    assert model.generate_sequence(12, 0).tolist() == undisturbed


def in_threads(count, work):
    """What work(i) returns in each of `count` threads that begin together."""
    barrier, results = threading.Barrier(count), [None] * count

    def run(i):
        barrier.wait()
        try:
            results[i] = work(i)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


def test_the_first_calls_may_come_from_many_threads(undisturbed):
    for _ in range(5):
        model = BitNetModel.tiny()
        results = in_threads(8, lambda i, model=model: model.generate_sequence(12, i, PROMPT).tolist())
        assert results == [undisturbed] * 8
        assert model.report.num_new_tokens == 96


def test_threads_that_want_one_sequence_take_turns(model):
    results = in_threads(4, lambda i: model.generate_sequence(10, 0).tolist())
    assert sorted(id for ids in results for id in ids) == sorted(
        BitNetModel.tiny().generate_sequence(40, 0).tolist()
    )
    assert len(model._entry(0).seq) == 40


def test_a_callback_that_goes_on_with_its_own_sequence_is_refused(model):
    def progress(num_tokens):
        model.generate_sequence(1, 1)  # another one is fine
        model.generate_sequence(1, 0)

    with pytest.raises(ReentrantCall):
        model.generate_sequence(3, 0, progress=progress)


def test_a_session_grows_with_its_text_and_not_before(undisturbed, monkeypatch):
    taken = []
    usual = BitNetModel.new_cache
    monkeypatch.setattr(
        BitNetModel, "new_cache", lambda self, **options: taken.append(options) or usual(self, **options)
    )
    monkeypatch.setattr(session, "PAGE_SIZE", 16)
    monkeypatch.setattr(session, "FIRST_PAGES", 1)
    model = BitNetModel.tiny()
    assert taken == []
    model.generate_sequence(12, 0, PROMPT)
    assert [options["num_pages"] for options in taken] == [1]
    model.generate_sequence(100, 0)
    pages = [options["num_pages"] for options in taken]
    assert pages == [1, 2, 4, 8] and all(options["max_sequences"] == 1 for options in taken)
    whole = BitNetModel.tiny().generate_sequence(12, 0, PROMPT).tolist()
    assert whole == undisturbed
    grown = BitNetModel.tiny()
    at_once = grown.generate_sequence(112, 0, PROMPT).tolist()
    monkeypatch.setattr(session, "FIRST_PAGES", 64)
    assert BitNetModel.tiny().generate_sequence(112, 0, PROMPT).tolist() == at_once


def test_a_sequence_ends_with_the_models_positions(model):
    positions = model.config.max_position_embeddings
    model.generate_sequence(1, 0, [5] * (positions - 1))
    model.generate_sequence(1, 0)
    for _ in range(2):
        with pytest.raises(SequenceTooLong, match=str(positions)):
            model.generate_sequence(1, 0)
    assert len(model._entry(0).seq) == positions
    model.reset_sequence(0)
    assert len(model.generate_sequence(2, 0)) == 2
