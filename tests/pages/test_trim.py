"""Trimming: memory of free pages goes back to the system, and comes again when a step needs it."""

import numpy as np
import pytest
from conftest import fill, make_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from support import resident_bytes
from test_prefix_index import PROMPT, extend, start

from paged_kv import ArgumentError, CacheClosed, OutOfPages, machine
from paged_kv.pages.pool import PagePool

MIB = 1 << 20


def large_cache(**changes):
    """128 MiB: two layers, pages of 64 KiB."""
    shape = {"num_layers": 2, "num_kv_heads": 4, "head_dim": 64, "page_size": 16, "num_pages": 2048}
    return make_cache(**shape | {"max_sequences": 8} | changes)


def test_free_memory_is_given_back_and_taken_again(rng):
    with large_cache() as cache:
        stats = cache.stats()
        assert stats.resident_bytes == stats.pool_bytes == 128 * MIB
        seq = cache.sequence()
        written = fill(cache, [seq], [100], rng)
        before = resident_bytes()
        given_back = cache.trim()
        assert given_back >= 120 * MIB
        assert resident_bytes() <= before - 0.9 * given_back
        stats = cache.stats()
        assert stats.resident_bytes == 128 * MIB - given_back
        assert stats.num_free_pages == 2048 - stats.num_used_pages
        cache.check()
        np.testing.assert_array_equal(seq.gather(1)[0], written[1][0])
        assert cache.trim() == 0
        other = cache.sequence()
        more = fill(cache, [other], [20000], rng)
        assert cache.stats().resident_bytes > 128 * MIB - given_back
        np.testing.assert_array_equal(other.gather(1)[1], more[1][1])
        with pytest.raises(OutOfPages, match="of 2048 are free"):
            cache.step([other], [2048 * 16 - 20000])
        cache.check()


def test_kept_pages_stay_unless_they_are_to_go():
    with large_cache(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", num_pages=65536) as cache:
        start(cache, PROMPT)[0].free()
        assert cache.trim() > 50 * MIB
        assert cache.match([*PROMPT, 1, 2]).num_tokens == len(PROMPT)
        assert cache.trim(cached=True) > 0
        match = cache.match([*PROMPT, 1, 2])
        assert (match.num_tokens, match.cause) == (0, "limit")
        assert cache.stats().evictions == {"limit": 3} and cache.stats().resident_bytes == 0
        seq, _ = start(cache, PROMPT)
        extend(cache, seq, PROMPT, [3] * 100).commit()
        cache.check()


def test_memory_that_is_not_there_any_more_is_refused(rng, monkeypatch):
    with large_cache() as cache:
        seq = cache.sequence()
        fill(cache, [seq], [100], rng)
        cache.trim()
        before = cache.stats()
        monkeypatch.setattr(machine, "available_memory", lambda: 1 * MIB)
        with pytest.raises(OutOfPages, match=r"trimmed and take [0-9.]+ MiB again, 1.0 MiB are"):
            cache.step([seq], [3000])
        assert cache.stats() == before
        monkeypatch.undo()
        fill(cache, [seq], [3000], rng)
        cache.check()


def test_what_is_refused_for_want_of_memory_is_taken_from_kept_pages(monkeypatch):
    with large_cache(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", num_pages=8192) as cache:
        for first in range(40):
            start(cache, [first] * 1600)[0].free()
        num_kept = cache.stats().num_kept_pages
        assert cache.trim() > 0
        monkeypatch.setattr(machine, "available_memory", lambda: 0)
        seq = cache.sequence()
        num_free = cache._store.pool.num_free
        extend(cache, seq, [], [99] * (16 * (num_free + 10))).commit()
        assert cache.stats().num_kept_pages == num_kept - 10
        with pytest.raises(OutOfPages, match="were trimmed"):
            extend(cache, cache.sequence(), [], [98] * (16 * (num_kept + 50)))
        cache.check()


@settings(max_examples=40)
@given(
    num_parts=st.sampled_from([1, 2, 3, 7]),
    kib=st.sampled_from([8, 96, 1024, 3000]),
    rounds=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 2**32 - 1)), min_size=1, max_size=5),
)
def test_whatever_is_free_each_page_holds_what_was_written(num_parts, kib, rounds):
    """Pages of any size and any number of parts: what is owned is never touched."""
    part_bytes = kib * 1024 // num_parts // 64 * 64
    num_pages = max(2, 40 * MIB // (part_bytes * num_parts))
    pool = PagePool(num_pages, part_bytes * num_parts, num_parts)
    data = pool.data().reshape(num_parts, num_pages, part_bytes)
    owned = []
    for share, seed in rounds:
        rng = np.random.default_rng(seed)
        wanted = int(share * num_pages)
        if wanted > len(owned):
            short = wanted - len(owned) - pool.num_free
            if short > 0:
                pool.restore(short)
            for page in pool.acquire(wanted - len(owned)).tolist():
                data[:, page] = page % 251 + 1
                owned.append(page)
        else:
            order = rng.permutation(owned).astype(np.int32)
            pool.release(order[wanted:])
            owned = order[:wanted].tolist()
        pool.trim()
        pool.check()
        assert pool.num_free + pool.num_trimmed == num_pages - len(owned)
        for page in owned:
            assert (data[:, page] == page % 251 + 1).all()
    assert 0 <= pool.resident_bytes <= pool.num_bytes
    pool.restore(pool.num_trimmed)
    assert pool.resident_bytes == pool.num_bytes
    pool.check()
    pool.close()


def test_bad_input_is_refused():
    with make_cache() as cache:
        for cached in (1, None, "yes"):
            with pytest.raises(ArgumentError, match="cached"):
                cache.trim(cached=cached)
        assert cache.trim() >= 0
    with pytest.raises(CacheClosed):
        cache.trim()
