"""Prefix caching with a window: a match needs the window's pages, and no others."""

import numpy as np
import pytest
from test_prefix_index import PAGE_SIZE, extend, holds, prefix_cache, start

from paged_kv import Match
from paged_kv.pages import windowed_index

LONG = [int(id) for id in np.random.default_rng(3).integers(0, 1000, 200)]  # twelve pages and a half


def windowed(**changes):
    return prefix_cache(**{"window": 40, "num_pages": 40} | changes)


def hollow(cache):
    return [entry for entry in cache._store.index.entries.values() if entry.page_id < 0]


@pytest.mark.parametrize("sinks", [0, 3, 16, 20])
@pytest.mark.parametrize("is_freed", [False, True])
def test_a_prompt_longer_than_the_window_is_found(sinks, is_freed):
    with windowed(num_sink_tokens=sinks) as cache:
        seq, _ = start(cache, LONG)
        if is_freed:
            seq.free()
        again, num_cached = start(cache, [*LONG, 1, 2])
        assert num_cached == len(LONG)
        holds(again, [*LONG, 1, 2])
        # Any length of it: pages that one step has passed are there, too.
        for length in (1, 16, 40, 41, 100, 160, 199):
            with cache.sequence([*LONG[:length], 1001]) as part:
                assert part.num_cached_tokens == length
                holds(part, LONG[:length])
        cache.check()


def test_a_match_takes_the_pages_of_the_window_only():
    with windowed() as cache:
        start(cache, LONG)[0].free()
        assert cache.stats().num_kept_pages == 13
        with cache.sequence([*LONG, 1]) as seq:
            assert len(seq) == len(LONG) and cache.stats().num_used_pages == 3
            assert list(seq.held_positions) == list(range(160, 200))


def test_all_pages_of_a_match_are_used_by_it():
    now = [0.0]
    with windowed(clock=lambda: now[0]) as cache:
        start(cache, LONG)[0].free()
        now[0] = 10.0
        seq = cache.sequence([*LONG, 1])
        pages = cache._store.tables.held_pages(cache._store.tables.rows.row(seq._seq_id))[1]
        retention = cache._store.index.retention
        assert len(pages) == 3 and (retention._last_used[pages] == 10.0).all()
        assert (retention._num_hits[pages] == 1).all() and retention._num_hits.sum() == 3


def test_early_pages_may_go_and_the_match_stays():
    with windowed(num_pages=13) as cache:
        seq = cache.sequence()
        for begin in range(0, 200, 10):  # so that early pages are older than late ones
            extend(cache, seq, LONG[:begin], LONG[begin : begin + 10]).commit()
        seq.free()
        extend(cache, cache.sequence(), [], [7] * (9 * PAGE_SIZE)).rollback()
        assert cache.stats().num_evictions == 9 and len(hollow(cache)) == 9
        assert cache.match([*LONG, 1, 2]).num_tokens == len(LONG)
        match = cache.match([*LONG[:100], 1, 2])
        assert (match.num_tokens, match.reason, match.would_have_hit) == (0, "window_passed", 100)
        again, num_cached = start(cache, [*LONG, 1, 2])
        assert num_cached == len(LONG)
        holds(again, [*LONG, 1, 2])
        cache.check()


def test_a_page_that_comes_back_fills_its_entry_again():
    with windowed(num_pages=13) as cache:
        start(cache, LONG)[0].free()
        seq = cache.sequence([*LONG, 1])
        extend(cache, cache.sequence(), [], [7] * (10 * PAGE_SIZE)).rollback()
        assert len(hollow(cache)) == 10
        seq.free()
        with cache.sequence([*LONG[:50], 1]) as other:
            assert other.num_cached_tokens == 0
            extend(cache, other, [], LONG[:50]).commit()
        assert len(hollow(cache)) == 7
        assert cache.match([*LONG[:50], 1001]) == Match(50, "full", 50)
        cache.check()


def test_an_entry_without_a_page_goes_with_the_last_that_follows_it():
    with windowed(num_pages=13) as cache:
        start(cache, LONG)[0].free()
        extend(cache, cache.sequence(), [], [7] * (13 * PAGE_SIZE)).rollback()
        assert not cache._store.index.entries
        match = cache.match([*LONG, 1, 2])
        assert (match.num_tokens, match.reason, match.would_have_hit) == (0, "evicted", len(LONG))
        cache.check()


def test_a_step_that_rolls_back_or_cannot_commit_publishes_nothing():
    with windowed() as cache:
        seq = cache.sequence()
        extend(cache, seq, [], LONG).rollback()
        step = cache.step([seq], [LONG])
        with pytest.raises(Exception, match="layer 0"):
            step.commit()
        assert not cache._store.index.entries and cache.match(LONG).reason == "first"


def test_an_endless_sequence_takes_bounded_memory(monkeypatch):
    monkeypatch.setattr(windowed_index, "MAX_PATH", 20)
    monkeypatch.setattr(windowed_index, "MAX_HOLLOW", 5)
    with windowed(num_pages=8) as cache:
        seq, held = cache.sequence(), []
        for turn in range(100):
            ids = [turn] * 10
            extend(cache, seq, held, ids).commit()
            held += ids
            index = cache._store.index
            assert len(index.entries) <= 8 + 5 and len(index.paths[0]) <= 20 and len(index._hollow) <= 5
            cache.check()
        holds(seq, held)
        extend(cache, seq, held, [6] * 8).commit()
        seq.truncate(1001)
        extend(cache, seq, [*held, 6], [5] * 30).commit()
        holds(seq, [*held, 6, *[5] * 30])
        cache.check()


def test_a_pin_of_a_window_is_whole_or_not_at_all():
    with windowed(num_pages=13, pin_budget=0.25) as cache:
        start(cache, LONG)[0].free()
        match = cache.match([*LONG, 1, 2])
        with cache.pin(match) as pin:
            assert (pin.num_tokens, pin.outcome) == (len(LONG), "accepted")
            assert cache.stats().num_pinned_pages == 3
            extend(cache, cache.sequence(), [], [7] * (10 * PAGE_SIZE)).rollback()
            assert cache.match([*LONG, 1, 2]).num_tokens == len(LONG)
        assert cache.pin(cache.match([*LONG[:41], 1, 2])).outcome == "rejected"
        cache.check()
    with windowed(num_pages=13, pin_budget=0.2) as cache:
        start(cache, LONG)[0].free()
        assert cache.pin(cache.match([*LONG, 1, 2])).outcome == "rejected"
