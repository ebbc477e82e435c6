"""Windows and sinks: a ring of pages, and rows that see the newest tokens and the first.

Pages that a window has released are filled with NaN after every step: nothing may read them again.
"""

import itertools

import numpy as np
import pytest
from conftest import make_cache, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tolerances

from paged_kv import ArgumentError, OutOfPages, reference


def poison_free_pages(cache):
    pool, layout = cache._store.pool, cache._store.layout
    blocks = pool.data().reshape(layout.num_layers, pool.num_pages, layout.page_share_bytes)
    tables = cache._store.tables
    used = {page for seq_pages in used_pages(tables) for page in seq_pages}
    free = [page for page in range(pool.num_pages) if page not in used]
    blocks[:, free] = 0xFF


def used_pages(tables):
    for row in np.flatnonzero(tables.rows.seq_lens):
        yield tables.held_pages(row)[1].tolist()


def serve(cache, chunks, rng, num_q_heads=4, window=None, sinks=0):
    """Feed one sequence in chunks and hold every step against the reference; returns what it holds."""
    seq = cache.sequence()
    shape = (sum(chunks), cache._store.layout.num_kv_heads, cache._store.layout.head_dim)
    q, k, v = rows(rng, shape[0], num_q_heads, shape[2]), rows(rng, *shape), rows(rng, *shape)
    done = 0
    for chunk in chunks:
        new = slice(done, done + chunk)
        with cache.step([seq], [chunk]) as step:
            out = step.attend(0, q[new], k[new], v[new])
        done += chunk
        expected = reference.attend(q[new], k[:done], v[:done], window=window, num_sink_tokens=sinks)
        np.testing.assert_allclose(out, expected, rtol=0, atol=tolerances(q[new], k[:done], v[:done])[0])
        poison_free_pages(cache)
        cache.check()
    held = seq.held_positions
    positions = np.arange(done)
    seen = (positions >= done - window) | (positions < sinks) if window else positions >= 0
    assert held.dtype == np.int32
    np.testing.assert_array_equal(held, positions[seen])
    np.testing.assert_array_equal(seq.gather(0)[0], k[held])
    np.testing.assert_array_equal(seq.gather(0)[1], v[held])
    return seq


@pytest.mark.parametrize("page_size", [16, 64, 80, 272])
@pytest.mark.parametrize("window", [1, 15, 16, 17, 64, 100, 300])
@pytest.mark.parametrize("sinks", [0, 1, 4, 16, 90])
def test_a_row_sees_its_window_and_the_sinks(kernel, page_size, window, sinks, rng):
    shape = {"num_layers": 1, "page_size": page_size, "num_pages": 1000 // page_size + 8}
    with make_cache(**shape, window=window, num_sink_tokens=sinks, max_step_tokens=200) as cache:
        serve(cache, [1, 14, 1, 1, 47, 1, 199, 1, 100, 1, 1, 200, 33, 1], rng, window=window, sinks=sinks)


def test_sinks_without_a_window_change_nothing(rng):
    with make_cache(num_layers=1, num_pages=30, num_sink_tokens=5) as cache:
        serve(cache, [100, 1, 200], rng)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    window=st.integers(1, 500),
    sinks=st.sampled_from([0, 3, 70]),
    page_size=st.sampled_from([16, 64, 80]),
    num_threads=st.integers(1, 3),
    cuts=st.lists(st.integers(1, 599), max_size=8),
)
def test_bits_do_not_depend_on_chunks_or_threads(seed, window, sinks, page_size, num_threads, cuts):
    rng = np.random.default_rng(seed)
    q, k, v = rows(rng, 600, 4, 32), rows(rng, 600, 2, 32), rows(rng, 600, 2, 32)
    shape = {"num_layers": 1, "page_size": page_size, "num_pages": 700 // page_size + 20}
    shape |= {"window": window, "num_sink_tokens": sinks, "max_step_tokens": 600}
    results = []
    for edges, threads in (([0, 600], 1), ([0, *sorted(set(cuts)), 600], num_threads)):
        with make_cache(**shape, num_threads=threads) as cache:
            seq, parts = cache.sequence(), []
            for begin, end in itertools.pairwise(edges):
                with cache.step([seq], [end - begin]) as step:
                    parts.append(step.attend(0, q[begin:end], k[begin:end], v[begin:end]))
                poison_free_pages(cache)
            results.append(np.concatenate(parts))
    np.testing.assert_array_equal(*results)


def test_a_window_that_holds_everything_gives_the_bits_of_none(rng):
    q, k, v = rows(rng, 500, 4, 32), rows(rng, 500, 2, 32), rows(rng, 500, 2, 32)
    results = []
    for window in (None, 500, 10**6):
        cache = make_cache(num_layers=1, num_pages=40, window=window)
        with cache.step([cache.sequence()], [500]) as step:
            results.append(step.attend(0, q, k, v))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_a_million_tokens_take_a_constant_number_of_pages():
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "num_pages": 160, "num_sink_tokens": 4}
    with make_cache(**shape, window=256, max_step_tokens=2048) as cache:
        seq, zeros = cache.sequence(), np.zeros((2048, 1, 8), np.float32)
        sizes = []
        for _ in range(490):
            with cache.step([seq], [2048]) as step:
                step.write(0, zeros, zeros)
            step = cache.step([seq], [1])
            sizes.append((cache.stats().num_used_pages, step._plan.num_pages))
            step.rollback()
        assert len(seq) == 490 * 2048 > 10**6
        assert set(sizes) == {(1 + 16 + 1, 1 + 16 + 1)}  # sinks, window, and the page that is begun
        assert cache.stats().num_tokens == 17 * 16
        cache.check()


def test_rollback_brings_the_window_back(rng):
    with make_cache(num_layers=1, num_pages=20, window=32, max_step_tokens=100) as cache:
        seq = serve(cache, [100, 1], rng, window=32)
        before = seq.gather(0)
        k = rows(rng, 90, 2, 32)
        with pytest.raises(ZeroDivisionError), cache.step([seq], [90]) as step:
            step.write(0, k, k)
            raise ZeroDivisionError
        assert len(seq) == 101
        np.testing.assert_array_equal(seq.gather(0), before)
        cache.check()


def test_the_block_table_begins_at_the_first_page_that_is_seen(rng):
    with make_cache(num_layers=1, num_pages=20, window=32) as cache:
        seq, short = serve(cache, [100], rng, window=32), cache.sequence()
        step = cache.step([seq, short], [1, 1])
        assert step.first_page.tolist() == [69 // 16, 0]
        assert (step.block_table >= 0).tolist() == [[True] * 3, [True, False, False]]
        assert step.slot_mapping[0] == step.block_table[0, 100 // 16 - 69 // 16] * 16 + 100 % 16
        step.rollback()
    with make_cache(num_layers=1, num_pages=20, window=32, num_sink_tokens=20) as cache:
        seq = serve(cache, [100], rng, window=32, sinks=20)
        step = cache.step([seq], [1])
        assert step.first_page.tolist() == [0]
        assert (step.block_table >= 0).tolist() == [[True, True, False, False, True, True, True]]
        step.rollback()


def test_truncate_is_refused_when_the_window_has_let_go_of_what_it_would_hold(rng):
    with make_cache(num_layers=1, num_pages=20, window=32, num_sink_tokens=3) as cache:
        seq = serve(cache, [100], rng, window=32, sinks=3)
        stats = cache.stats()
        with pytest.raises(ArgumentError, match="pages were released"):
            seq.truncate(90)
        assert cache.stats() == stats and len(seq) == 100
        seq.truncate(97)  # the page of token 97 - 32 is held
        assert seq.held_positions.tolist() == [0, 1, 2, *range(65, 97)]
        cache.check()
        seq.truncate(2)  # within the sinks' page
        assert len(seq) == 2 and cache.stats().num_used_pages == 1
        seq.reset()
        assert cache.stats().num_used_pages == 0
        cache.check()


@given(
    window=st.integers(1, 70),
    slack=st.integers(1, 50),
    sinks=st.sampled_from([0, 3, 16, 30]),
    walk=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 50)), min_size=1, max_size=8),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60)
def test_tokens_can_be_forgotten_as_far_as_the_slack_goes_below_the_greatest_length(
    window, slack, sinks, walk, seed
):
    rng = np.random.default_rng(seed)
    options = {"window": window, "num_sink_tokens": sinks, "window_slack": slack, "max_step_tokens": 40}
    with make_cache(num_layers=1, num_pages=40, max_seq_len=400, **options) as cache:
        seq, keys, values = cache.sequence(), *(np.empty((0, 2, 32), np.float32) for _ in range(2))
        longest = 0
        for count, forgotten in walk:
            q, k, v = rows(rng, count, 4, 32), rows(rng, count, 2, 32), rows(rng, count, 2, 32)
            keys, values = np.concatenate([keys, k]), np.concatenate([values, v])
            with cache.step([seq], [count]) as step:
                out = step.attend(0, q, k, v)
            expected = reference.attend(q, keys, values, window=window, num_sink_tokens=sinks)
            np.testing.assert_allclose(out, expected, rtol=0, atol=tolerances(q, keys, values)[0])
            poison_free_pages(cache)
            longest = max(longest, len(seq))
            length = min(len(seq), max(longest - slack, len(seq) - forgotten, 0))
            for end in ((len(seq) + length) // 2, length):
                seq.truncate(end)
                cache.check()
            keys, values = keys[:length], values[:length]
            fork = seq.fork()
            assert cache.check() is None
            np.testing.assert_array_equal(fork.gather(0)[0], keys[seq.held_positions])
            np.testing.assert_array_equal(seq.gather(0)[1], values[seq.held_positions])
            fork.free()
        most = window + slack + cache.max_step_tokens + sinks + 4 * 16
        assert cache.stats().num_used_pages * 16 <= most


def test_forks_share_a_window_and_part(rng):
    with make_cache(num_layers=1, num_pages=40, window=40, num_sink_tokens=5) as cache:
        a = serve(cache, [100], rng, window=40, sinks=5)
        b = a.fork()
        used = cache.stats().num_used_pages
        k, v = rows(rng, 80, 2, 32), rows(rng, 80, 2, 32)
        of_a = a.gather(0)
        with cache.step([b], [80]) as step:
            step.write(0, k, v)
        np.testing.assert_array_equal(a.gather(0), of_a)
        np.testing.assert_array_equal(b.gather(0)[0], np.concatenate([of_a[0][:5], k[-40:]]))
        assert cache.stats().num_used_pages == used + 4  # b's own window; the sinks' page is shared
        cache.check()
        a.free()
        np.testing.assert_array_equal(b.gather(0)[1], np.concatenate([of_a[1][:5], v[-40:]]))
        cache.check()


def test_what_cannot_be_is_refused(rng):
    for options in (
        *({"window": bad} for bad in (0, -1, 2**31, True, 1.0, "3")),
        *({"num_sink_tokens": bad, "window": 3} for bad in (-1, 2**31, True, 1.0)),
        *({"window_slack": bad, "window": 3} for bad in (-1, 2**31, True, 1.0)),
        {"window_slack": 3},
        *({"max_step_tokens": bad, "window": 3} for bad in (0, -1, True, None)),
    ):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            make_cache(**options)
    with make_cache(window=30, max_step_tokens=50) as cache:
        seq = cache.sequence()
        with pytest.raises(ArgumentError, match=r"new\[0\] is 51 tokens, outside 0 to 50"):
            cache.step([seq], [51])


def test_pages_needed_tells_what_a_step_would_take(rng):
    with make_cache(num_layers=1, num_pages=4) as cache:
        a = serve(cache, [20], rng)
        assert cache.pages_needed([a], [12]) == 0
        assert cache.pages_needed([a], [13]) == 1
        b = a.fork()
        assert cache.pages_needed([b], [1]) == 0  # in place
        assert cache.pages_needed([a, b], [1, 1]) == 1  # of one of them
        assert cache.pages_needed([a, b], [30, 30]) == 5
        with pytest.raises(OutOfPages):
            cache.step([a, b], [30, 30])
        with pytest.raises(ArgumentError, match="in this step twice"):
            cache.pages_needed([a, a], [1, 1])
        assert cache.stats().num_used_pages == 2


# ---- a window of one call, in a cache without one


@given(
    window=st.integers(1, 120),
    sinks=st.sampled_from([0, 1, 5, 16, 40]),
    chunks=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40)
def test_a_window_of_a_call_is_that_of_a_cache(window, sinks, chunks, seed):
    """Layers with windows of their own, beside one that sees everything."""
    rng = np.random.default_rng(seed)
    total = sum(chunks)
    q, k, v = rows(rng, total, 4, 32), rows(rng, total, 2, 32), rows(rng, total, 2, 32)
    options = {"num_sink_tokens": sinks, "max_seq_len": 300}
    with (
        make_cache(num_layers=3, num_kv_heads=2, head_dim=32, num_pages=20) as cache,
        make_cache(num_layers=1, num_kv_heads=2, head_dim=32, num_pages=20, window=window, **options) as ring,
    ):
        seq, in_ring, done = cache.sequence(), ring.sequence(), 0
        for chunk in chunks:
            new, held = slice(done, done + chunk), slice(done + chunk)
            with cache.step([seq], [chunk]) as step, ring.step([in_ring], [chunk]) as own:
                whole = step.attend(0, q[new], k[new], v[new])
                seen = step.attend(1, q[new], k[new], v[new], window=window, num_sink_tokens=sinks)
                again = step.attend(2, q[new], k[new], v[new])
                expected = own.attend(0, q[new], k[new], v[new])
            np.testing.assert_array_equal(seen, expected)
            np.testing.assert_array_equal(whole, again)
            plain = reference.attend(q[new], k[held], v[held])
            np.testing.assert_allclose(whole, plain, rtol=0, atol=tolerances(q[new], k[held], v[held])[0])
            done += chunk


def test_a_window_of_a_call_leaves_shared_pages_shared(rng):
    """A layer that sees everything reads shared pages once, whatever the layer before it saw."""
    k = rows(rng, 600, 2, 64)
    with make_cache(num_layers=2, num_kv_heads=2, head_dim=64, num_pages=40, page_size=64) as cache:
        first = cache.sequence()
        with cache.step([first], [600]) as step:
            for layer in range(2):
                step.write(layer, k, k)
        seqs = [first, *(first.fork() for _ in range(7))]
        q, new = rows(rng, 8, 4, 64), rows(rng, 8, 2, 64)
        with cache.step(seqs, [1] * 8) as step:
            step._handle.batch.may_share = 2  # also where it takes longer
            step.attend(0, q, new, new, window=50)
            assert step.bytes_not_read == 0
            step.attend(1, q, new, new)
            assert step.bytes_not_read > 0


def test_windows_that_cannot_be_are_refused(rng):
    q = rows(rng, 3, 2, 16)
    with make_cache(num_layers=1, num_kv_heads=2, head_dim=16) as cache:
        step = cache.step([cache.sequence()], [3])
        for window in (0, -1, 1.5, True, "x"):
            with pytest.raises(ArgumentError, match="window"):
                step.attend(0, q, q, q, window=window)
        with pytest.raises(ArgumentError, match="num_sink_tokens"):
            step.attend(0, q, q, q, window=2, num_sink_tokens=-1)
        with pytest.raises(ArgumentError, match="goes with a window"):
            step.attend(0, q, q, q, num_sink_tokens=2)
        assert not any(step._plan.is_written)
        step.attend(0, q, q, q, window=2)
        for window in (0, "x"):  # also of a call that repeats another
            with pytest.raises(ArgumentError, match="window"):
                step.attend(0, q, q, q, window=window)
        step.rollback()
    with make_cache(num_layers=1, num_kv_heads=2, head_dim=16, window=20) as cache:
        step = cache.step([cache.sequence()], [3])
        with pytest.raises(ArgumentError, match="the cache has a window of 20"):
            step.attend(0, q, q, q, window=2)
        step.rollback()
