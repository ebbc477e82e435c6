"""Pins: what they hold is not evicted, within the budget, and goes back when they end."""

import contextlib
import gc

import pytest
from conftest import SEED, STRIDE, Tripwire
from pages.test_prefix_index import PAGE_SIZE, PROMPT, extend, holds, prefix_cache, start

from paged_kv import ArgumentError, CacheClosed, NotCopyable, OutOfPages

LONG = list(range(100, 164))  # four pages


def kept_prompt(cache, tokens):
    start(cache, tokens)[0].free()
    return cache.match([*tokens, 1, 2])


def fill_the_pool(cache, num_pages):
    """Take so many pages and give them back, so that what was kept in them goes."""
    with cache.sequence() as seq:
        extend(cache, seq, [], [7] * (num_pages * PAGE_SIZE)).rollback()


def test_pinned_pages_stay_until_the_pin_is_released():
    with prefix_cache(num_pages=8) as cache:
        pin = cache.pin(kept_prompt(cache, PROMPT))
        assert (pin.num_tokens, pin.outcome) == (len(PROMPT), "accepted")
        stats = cache.stats()
        assert (stats.num_pinned_pages, stats.num_used_pages, stats.num_kept_pages) == (3, 3, 0)
        assert stats.num_sequences == 0
        fill_the_pool(cache, 5)
        assert cache.match([*PROMPT, 1, 2]).num_tokens == len(PROMPT)
        with pytest.raises(OutOfPages, match="larger pool; 3 are pinned"):
            fill_the_pool(cache, 6)
        pin.release()
        pin.release()
        assert cache.stats().num_kept_pages == 3
        fill_the_pool(cache, 8)
        assert cache.match([*PROMPT, 1, 2]).num_tokens == 0
        cache.check()


def test_a_pin_of_a_running_sequence_does_not_disturb_it():
    with prefix_cache() as cache:
        seq, _ = start(cache, PROMPT)
        with cache.pin(cache.match(PROMPT)) as pin:
            assert pin.num_tokens == len(PROMPT) - 1
            extend(cache, seq, PROMPT, [5] * 20).commit()
            holds(seq, [*PROMPT, *[5] * 20])
            assert cache.stats().num_copies == 0
        cache.check()


def test_a_pin_is_clipped_to_the_budget():
    with prefix_cache(num_pages=8, pin_budget=0.5) as cache:
        first = cache.pin(kept_prompt(cache, PROMPT))
        match = kept_prompt(cache, LONG)
        second = cache.pin(match)
        assert (second.num_tokens, second.outcome) == (PAGE_SIZE, "clipped")
        assert cache.pin(match).outcome == "clipped"  # of what is pinned already: no page more
        assert cache.stats().num_pinned_pages == 4
        third = cache.pin(kept_prompt(cache, [9] * 16))
        assert (third.num_tokens, third.outcome) == (0, "rejected")
        again = cache.pin(cache.match([*PROMPT, 1, 2]))
        assert again.outcome == "accepted"  # its pages count once
        first.release()
        assert cache.stats().num_pinned_pages == 4
        again.release()
        assert cache.stats().num_pinned_pages == 1
        del second


def test_a_pin_is_clipped_to_what_is_still_there():
    with prefix_cache(num_pages=4) as cache:
        match = kept_prompt(cache, PROMPT)
        fill_the_pool(cache, 2)
        pin = cache.pin(match)
        assert (pin.num_tokens, pin.outcome) == (2 * PAGE_SIZE, "clipped")
        pin.release()
        fill_the_pool(cache, 4)
        assert cache.pin(match).outcome == "rejected"


def test_a_pin_holds_no_more_than_its_match():
    with prefix_cache() as cache:
        start(cache, PROMPT[:20])
        match = cache.match(PROMPT)
        start(cache, PROMPT)
        assert cache.pin(match).num_tokens == 20


def test_a_pin_ends_when_its_time_is_over():
    now = [0.0]
    with prefix_cache(num_pages=4, clock=lambda: now[0]) as cache:
        pin = cache.pin(kept_prompt(cache, PROMPT), ttl=10)
        now[0] = 9.0
        with pytest.raises(OutOfPages):
            fill_the_pool(cache, 4)
        now[0] = 10.0
        fill_the_pool(cache, 4)
        assert cache.stats().num_pinned_pages == 0
        pin.release()
        cache.check()


def test_a_pin_that_is_collected_is_released():
    with prefix_cache() as cache:
        pin = cache.pin(kept_prompt(cache, PROMPT))
        assert cache.stats().num_pinned_pages == 3
        del pin
        gc.collect()
        assert cache.stats().num_pinned_pages == 0 and cache.stats().num_kept_pages == 3


def test_other_salts_and_rows_that_are_lacking():
    with prefix_cache(max_sequences=1) as cache:
        seq = cache.sequence(salt=b"a")
        extend(cache, seq, [], PROMPT).commit()
        assert cache.pin(cache.match(PROMPT)).outcome == "rejected"
        assert cache.pin(cache.match(PROMPT, b"a")).outcome == "rejected"  # no row is free
        seq.free()
        assert cache.pin(cache.match(PROMPT, b"a")).outcome == "accepted"
    with prefix_cache(prefix_caching=False) as cache:
        assert cache.pin(cache.match(PROMPT)).outcome == "rejected"


def test_bad_input_is_refused():
    with prefix_cache() as cache:
        match = kept_prompt(cache, PROMPT)
        with pytest.raises(ArgumentError, match="match is"):
            cache.pin(PROMPT)
        for ttl in (0, -1, "5", float("nan"), True):
            with pytest.raises(ArgumentError, match="ttl"):
                cache.pin(match, ttl)
        pin = cache.pin(match)
        with pytest.raises(NotCopyable):
            pin.__reduce__()
    with pytest.raises(CacheClosed):
        cache.pin(match)
    pin.release()
    for budget in (-0.1, 1.1, "1", None, True, float("nan")):
        with pytest.raises(ArgumentError, match="pin_budget"):
            prefix_cache(pin_budget=budget)


def test_an_interrupt_at_any_call_loses_no_page():
    def run(at):
        with prefix_cache(num_pages=8) as cache:
            match = kept_prompt(cache, PROMPT)
            tripwire, pin = Tripwire(at), None
            with tripwire:
                pin = cache.pin(match, ttl=100)
                pin.release()
            cache.check()
            del pin
            tripwire.raised.clear()
            gc.collect()
            with contextlib.suppress(OutOfPages):
                fill_the_pool(cache, 8)
            assert cache.stats().num_pinned_pages == cache.stats().num_used_pages == 0, at
            cache.check()
        return tripwire.count

    num_calls = run(0)
    assert num_calls > 20
    for at in range(1 + SEED % STRIDE, num_calls + 1, STRIDE):
        run(at)
