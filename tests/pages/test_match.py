"""Matches: how much of a prompt is there, and the reason when it is not all."""

import gc

import numpy as np
import pytest
from test_prefix_index import PAGE_SIZE, PROMPT, extend, prefix_cache, start

from paged_kv import ArgumentError, CacheClosed, Match


def test_a_match_says_what_a_sequence_would_find_and_takes_nothing():
    with prefix_cache() as cache:
        start(cache, PROMPT)[0].free()
        before = cache.stats()
        for length in (0, 1, 15, 16, 17, 32, 33, 39, 40):
            for tokens in (PROMPT[:length], np.array(PROMPT[:length], np.int64), tuple(PROMPT[:length])):
                expected = max(0, length - 1)
                assert cache.match(tokens) == Match(expected, "full", expected)
        assert cache.stats() == before


@pytest.mark.parametrize("is_freed", [False, True])
@pytest.mark.parametrize("at", [1, 15, 16, 17, 31, 32, 39])
def test_the_first_token_that_differs_is_named(at, is_freed):
    with prefix_cache() as cache:
        seq, _ = start(cache, PROMPT)
        if is_freed:
            seq.free()
        match = cache.match([*PROMPT[:at], 99, 98])
        assert match == Match(at, "diverged", at, at=at, page=at // PAGE_SIZE)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 40])
@pytest.mark.parametrize("is_freed", [False, True])
def test_a_prompt_that_goes_on_is_longer(length, is_freed):
    with prefix_cache() as cache:
        seq, _ = start(cache, PROMPT[:length])
        if is_freed:
            seq.free()
        assert cache.match([*PROMPT[:length], 99, 98]) == Match(length, "longer", length)


def test_the_first_prompt_of_its_kind():
    with prefix_cache() as cache:
        assert cache.match(PROMPT) == Match(0, "first", 0)
        start(cache, PROMPT)
        assert cache.match(PROMPT[1:]).reason == "first"
        assert cache.match([], b"x").reason == "full"


def test_without_prefix_caching_it_is_disabled():
    with prefix_cache(prefix_caching=False) as cache:
        start(cache, PROMPT)
        assert cache.match(PROMPT) == Match(0, "disabled", 0)


@pytest.mark.parametrize("held", [0, 10, 16, 20])
@pytest.mark.parametrize("new", [1, 5, 30])
def test_tokens_of_an_open_step_are_in_flight(held, new):
    with prefix_cache() as cache:
        seq = start(cache, PROMPT[:held])[0] if held else cache.sequence()
        total = min(len(PROMPT), held + new)
        step = extend(cache, seq, PROMPT[:held], PROMPT[held:total])
        match = cache.match([*PROMPT[:total], 99])
        assert match == Match(held, "in_flight", total)
        assert match.num_lost == total - held
        assert cache.match([*PROMPT[:total], 99], b"other").reason == "first"
        if total > held + 1:
            part = cache.match([*PROMPT[: total - 1], 98, 97])
            assert (part.reason, part.would_have_hit) == ("in_flight", total - 1)
        step.rollback()
        assert cache.match([*PROMPT[:total], 99]).reason == ("longer" if held else "first")
        extend(cache, seq, PROMPT[:held], PROMPT[held:total]).commit()
        assert cache.match([*PROMPT[:total], 99]) == Match(total, "full", total)


def test_a_step_with_a_count_is_not_in_flight():
    with prefix_cache() as cache:
        a, b = cache.sequence(), cache.sequence()
        with cache.step([a, b], [3, PROMPT[:4]]) as step:
            assert cache.match(PROMPT).would_have_hit == 4
            step.rollback()
        start(cache, [1, 2, 3])[0].free()  # the ids of an old step are still in the slots
        with cache.step([a], [3]) as step:
            assert cache.match([1, 2, 3, 4, 5]).num_lost == 0
            step.rollback()


def test_what_was_evicted_is_remembered_with_its_cause_and_age():
    now = [100.0]
    with prefix_cache(num_pages=4, clock=lambda: now[0]) as cache:
        start(cache, PROMPT)[0].free()
        now[0] = 105.0
        other, _ = start(cache, [99] * 60)
        now[0] = 107.5
        match = cache.match([*PROMPT, 77, 78])
        assert match == Match(0, "evicted", 40, cause="pressure", age=2.5)
        assert cache.match([*PROMPT[:20], 77]).would_have_hit == 20
        assert cache.match([77, *PROMPT]).reason == "first"
        # What is computed again is found again, and its successors are remembered still.
        other.free()
        start(cache, PROMPT[:17])
        match = cache.match([*PROMPT, 77, 78])
        assert (match.num_tokens, match.reason, match.would_have_hit) == (17, "evicted", 40)


def test_the_memory_of_evictions_is_bounded():
    with prefix_cache(num_pages=2) as cache:
        for first in range(50):
            start(cache, [first, *PROMPT[:30]])[0].free()
            assert len(cache._store.index.evicted) <= 8
        assert cache.match([0, *PROMPT]).reason == "first"
        assert cache.match([48, *PROMPT]).reason == "evicted"


def test_other_salts_are_named_only_when_they_are_given():
    with prefix_cache() as cache:
        seq = cache.sequence(salt=b"a")
        extend(cache, seq, [], PROMPT).commit()
        assert cache.match(PROMPT).reason == "first"
        assert cache.match(PROMPT, also=[b"b"]).reason == "first"
        assert cache.match(PROMPT, b"c", also=(b"b", b"a", b"")) == Match(0, "other_salt", 39)
        assert cache.match(PROMPT, b"a", also=[b""]).reason == "full"
        start(cache, PROMPT[:5])
        assert cache.match(PROMPT, also=[b"a"]) == Match(5, "other_salt", 39)


@pytest.mark.parametrize("change", [{"tokens": 5}, {"salt": "a"}, {"also": ["a"]}, {"tokens": [-1]}])
def test_bad_input_is_refused(change):
    with prefix_cache() as cache, pytest.raises(ArgumentError, match=r"tokens|salt"):
        cache.match(**({"tokens": PROMPT} | change))


def test_a_closed_cache_is_refused():
    cache = prefix_cache()
    cache.close()
    with pytest.raises(CacheClosed):
        cache.match(PROMPT)


def test_a_match_keeps_no_cache_alive():
    with prefix_cache() as cache:
        match = cache.match(PROMPT)
    del cache
    gc.collect()
    assert match.reason == "first"
