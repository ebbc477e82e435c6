"""The ring cache: the ten tests that the request names, its layout in bytes, rings compared with lists."""

import threading
import time

import numpy as np
import pytest
from conftest import rows
from hypothesis import given
from hypothesis import strategies as st

from paged_kv import (
    ArgumentError,
    BatchKVStorage,
    CacheClosed,
    CacheState,
    KVCacheManager,
    ReentrantCall,
    align_up,
    is_aligned,
)


def manager(max_seq_len=8, batch_size=2, hidden_dim=12, num_heads=3):
    m = KVCacheManager()
    m.allocate(max_seq_len, batch_size, hidden_dim, num_heads)
    return m


def append_random(m, rng, count, batch_idx=0):
    """Append tokens; returns them, [count, num_heads, head_dim] of K and of V."""
    _, num_heads, _, _, head_dim = m.storage.shape
    k, v = rows(rng, count, num_heads, head_dim), rows(rng, count, num_heads, head_dim)
    start = m.state(batch_idx).seq_len
    for i in range(count):
        m.append(k[i], v[i], start + i, batch_idx)
    return k, v


# ---- the ten


def test_basic_allocation():
    m = KVCacheManager()
    m.allocate(2048, 8, 4096, 32)
    assert m.storage.num_bytes == 536_870_912
    assert m.metrics().storage_bytes == 536_870_912
    assert m.storage.shape == (8, 32, 2, 2048, 128)
    assert all(m.state(i) == CacheState(0, 0, 0) for i in range(8))
    k, v, cached_len = m.get_cache(7)
    assert k.shape == v.shape == (32, 0, 128) and cached_len == 0


def test_single_append(rng):
    m = manager()
    k, v = append_random(m, rng, 1)
    K, V, cached_len = m.get_cache(0)
    assert cached_len == 1
    np.testing.assert_array_equal(K[:, 0], k[0])
    np.testing.assert_array_equal(V[:, 0], v[0])


def test_multiple_append(rng):
    m = manager()
    k, v = append_random(m, rng, 5)
    K, V, cached_len = m.get_cache(0)
    assert cached_len == 5
    np.testing.assert_array_equal(K, k.swapaxes(0, 1))
    np.testing.assert_array_equal(V, v.swapaxes(0, 1))


def test_ring_wrapping(rng):
    m = manager(max_seq_len=8)
    k, v = append_random(m, rng, 21)
    assert m.state(0) == CacheState(seq_len=21, ring_pos=5, full_count=2)
    K, V, cached_len = m.get_cache(0)
    assert cached_len == 8
    np.testing.assert_array_equal(K, k[-8:].swapaxes(0, 1))
    np.testing.assert_array_equal(V, v[-8:].swapaxes(0, 1))


def test_multi_batch_independence(rng):
    m = manager(batch_size=3)
    k0, _ = append_random(m, rng, 6, batch_idx=0)
    k2, _ = append_random(m, rng, 11, batch_idx=2)
    assert [m.state(i).seq_len for i in range(3)] == [6, 0, 11]
    np.testing.assert_array_equal(m.get_cache(0)[0], k0.swapaxes(0, 1))
    np.testing.assert_array_equal(m.get_cache(2)[0], k2[-8:].swapaxes(0, 1))


def test_reset(rng):
    m = manager()
    append_random(m, rng, 11)
    other, _ = append_random(m, rng, 3, batch_idx=1)
    m.reset(0)
    assert m.state(0) == CacheState(0, 0, 0) and m.get_cache(0)[2] == 0
    k, _ = append_random(m, rng, 2)
    np.testing.assert_array_equal(m.get_cache(0)[0], k.swapaxes(0, 1))
    np.testing.assert_array_equal(m.get_cache(1)[0], other.swapaxes(0, 1))


def test_memory_layout(rng):
    """Byte by byte: entry, head, K or V, slot, dim, each head's K and V on a cache line of its own."""
    m = manager(max_seq_len=5, batch_size=2, hidden_dim=9, num_heads=3)
    expected = np.zeros((2, 3, 2, 5, 3), np.float32)
    for batch_idx, count in enumerate((3, 7)):
        k, v = append_random(m, rng, count, batch_idx)
        for i in range(count):
            expected[batch_idx, :, 0, i % 5] = k[i]
            expected[batch_idx, :, 1, i % 5] = v[i]
    side = 64  # 5 * 3 * 4 bytes, rounded up
    assert m.storage.strides == (3 * 2 * side, 2 * side, side, 12, 4)
    memory = m._ring.pool.data().tobytes()
    assert len(memory) == m.storage.num_bytes == 2 * 3 * 2 * side
    for index in np.ndindex(expected.shape):
        at = sum(i * stride for i, stride in zip(index, m.storage.strides, strict=True))
        assert memory[at : at + 4] == expected[index].tobytes()
    K, V, _ = m.get_cache(0)
    assert all(is_aligned(side[head]) for side in (K, V) for head in range(3))
    assert K.strides == m.storage.strides[1:2] + m.storage.strides[3:]


def test_error_handling(rng):
    m = manager()
    k, _ = append_random(m, rng, 3)
    token = k[0]
    read_only_buffer = m._ring.pool.data().tobytes()
    bad_tokens = [token[:2], token.T, token.astype("f8"), token.tolist(), None, rows(rng, 3, 8)[:, ::2]]
    bad_tokens += [token.reshape(1, 3, 4), np.zeros(13, "f4"), rows(rng, 24)[::2]]
    bad_integers = (-1, 2**31, 2**63, 2**70, True, 1.0, "1", None)
    calls = [("K", lambda bad=bad: m.append(bad, token, 3, 0)) for bad in bad_tokens]
    calls += [("V", lambda bad=bad: m.append(token, bad, 3, 0)) for bad in bad_tokens]
    calls += [("seq_pos", lambda bad=bad: m.append(token, token, bad, 0)) for bad in (*bad_integers, 2, 4)]
    for call in (m.get_cache, m.get_segments, m.reset, m.state, lambda bad: m.append(token, token, 3, bad)):
        calls += [("batch_idx", lambda bad=bad, call=call: call(bad)) for bad in (*bad_integers, 2)]
    sizes = {"max_seq_len": 8, "batch_size": 2, "hidden_dim": 12, "num_heads": 3}
    for i, name in enumerate(sizes):
        for bad in (*bad_integers, 0):
            before, after = [*sizes.values()][:i], [*sizes.values()][i + 1 :]
            calls.append((name, lambda bad=bad, b=before, a=after: m.allocate(*b, bad, *a)))
    calls.append(("hidden_dim", lambda: m.allocate(8, 2, 13, 3)))
    for name, call in calls:
        with pytest.raises(ArgumentError, match=name):
            call()
    with pytest.raises(MemoryError, match="MiB"):
        m.allocate(2**24, 1024, 4096, 32)
    assert m._ring.pool.data().tobytes() == read_only_buffer
    assert m.state(0).seq_len == 3 and m.metrics().num_appends == 3
    np.testing.assert_array_equal(m.get_cache(0)[0], k.swapaxes(0, 1))
    empty = KVCacheManager()
    for call in (
        lambda: empty.append(token, token, 0, 0),
        lambda: empty.get_cache(0),
        lambda: empty.get_segments(0),
        lambda: empty.reset(0),
        lambda: empty.state(0),
        empty.metrics,
        lambda: empty.storage,
    ):
        with pytest.raises(CacheClosed, match="allocate"):
            call()


def test_append_performance(rng):
    """Late appends cost what early ones do: copying the cache would make them a thousand times dearer."""
    m = manager(max_seq_len=4096, batch_size=1, hidden_dim=1024, num_heads=8)
    token = rows(rng, 8, 128)

    def median_of(positions):
        times = []
        for position in positions:
            begin = time.perf_counter()
            m.append(token, token, position, 0)
            times.append(time.perf_counter() - begin)
        return np.median(times)

    early, _, late = median_of(range(500)), median_of(range(500, 7500)), median_of(range(7500, 8000))
    # Copying 32 MiB takes milliseconds; an append takes microseconds.
    assert late < 20 * early and late < 1e-3


def test_throughput(rng):
    """256 tokens of 8 entries, in less time than one copy of the cache for each would take."""
    m = manager(max_seq_len=2048, batch_size=8, hidden_dim=4096, num_heads=32)
    token = rows(rng, 32, 128)
    begin = time.perf_counter()
    for position in range(256):
        for batch_idx in range(8):
            m.append(token, token, position, batch_idx)
    elapsed = time.perf_counter() - begin
    assert m.metrics().num_appends == 2048
    # A copy of an entry's 64 MiB at 20 GB/s takes 3 ms; 2048 of them 6 s.
    assert elapsed < 3


# ---- what else holds


@given(
    max_seq_len=st.integers(1, 20),
    num_heads=st.integers(1, 3),
    head_dim=st.integers(1, 20),
    counts=st.lists(st.integers(0, 45), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_the_ring_keeps_what_a_list_keeps(max_seq_len, num_heads, head_dim, counts, seed):
    rng = np.random.default_rng(seed)
    m = manager(max_seq_len, 1, num_heads * head_dim, num_heads)
    tokens = []
    for count in counts:
        k, v = append_random(m, rng, count)
        tokens += list(zip(k, v, strict=True))
        kept = tokens[-max_seq_len:]
        K, V, cached_len = m.get_cache(0)
        assert cached_len == len(kept) == K.shape[1]
        older, newer = m.get_segments(0)
        for i, (k, v) in enumerate(kept):
            np.testing.assert_array_equal(K[:, i], k)
            np.testing.assert_array_equal(V[:, i], v)
        np.testing.assert_array_equal(np.concatenate([older[0], newer[0]], axis=1), K)
        np.testing.assert_array_equal(np.concatenate([older[1], newer[1]], axis=1), V)
        is_view = len(tokens) <= max_seq_len or len(tokens) % max_seq_len == 0
        assert np.shares_memory(K, m._ring.pool.data()) == (is_view and cached_len > 0)
        total = len(tokens)
        assert m.state(0) == CacheState(total, total % max_seq_len, total // max_seq_len)


@pytest.mark.parametrize("count", [3, 8, 11])
def test_what_is_returned_can_never_be_written(count, rng):
    m = manager()
    append_random(m, rng, count)
    for array in (*m.get_cache(0)[:2], *(side for pair in m.get_segments(0) for side in pair)):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
        with pytest.raises(ValueError, match="WRITEABLE"):
            array[:1].flags.writeable = True


def test_a_view_outlives_its_manager(rng):
    m = manager(max_seq_len=4096, hidden_dim=384)
    k, _ = append_random(m, rng, 40)
    view = m.get_cache(0)[0]
    m.allocate(8, 2, 12, 3)
    del m
    np.testing.assert_array_equal(view, k.swapaxes(0, 1))


def test_a_second_allocate_replaces_the_first(rng):
    m = manager()
    append_random(m, rng, 3)
    m.allocate(4, 1, 6, 1)
    assert m.storage.shape == (1, 1, 2, 4, 6)
    assert m.state(0).seq_len == 0 and m.metrics().num_appends == 0


def test_flat_tokens_are_the_same(rng):
    m = manager()
    k = rows(rng, 12)
    m.append(k, -k, 0, np.int64(0))
    K, V, _ = m.get_cache(0)
    np.testing.assert_array_equal(K[:, 0], k.reshape(3, 4))
    np.testing.assert_array_equal(V[:, 0], -k.reshape(3, 4))


def test_metrics_count_what_was_done(rng):
    m = manager(max_seq_len=4)
    append_random(m, rng, 6)
    m.get_cache(0)
    m.get_cache(1)
    m.reset(1)
    metrics = m.metrics()
    assert (metrics.num_appends, metrics.num_resets) == (6, 1)
    assert (metrics.num_views, metrics.num_reconstructions) == (1, 1)
    assert metrics.appended_bytes == 6 * 2 * 12 * 4 and metrics.copied_bytes == 4 * 2 * 12 * 4
    assert metrics.append_ns_per_token > 0 and metrics.get_cache_ns > 0 and metrics.allocate_ns > 0


def test_alignment_helpers():
    assert [align_up(n) for n in (0, 1, 64, 65)] == [0, 64, 64, 128]
    assert align_up(5, 4) == 8
    assert is_aligned(128) and not is_aligned(129) and is_aligned(4, 4)
    for bad in (-1, 1.0, True, None):
        with pytest.raises(ArgumentError, match="num_bytes"):
            align_up(bad)
    for bad in (0, 3, -64):
        with pytest.raises(ArgumentError, match="alignment"):
            align_up(64, bad)
        with pytest.raises(ArgumentError, match="alignment"):
            is_aligned(64, bad)
    assert BatchKVStorage.of(2048, 8, 4096, 32).alignment == 64


def test_threads_fill_entries_of_one_manager_each_its_own():
    """llama-cpp-python #471, ctransformers #52: one object, two threads, and each other's data."""
    num_tokens, num_entries = 3000, 3
    manager = KVCacheManager()
    manager.allocate(num_tokens, num_entries, 512, 8)

    def fill(entry):
        row = np.full((8, 64), entry + 1, np.float32)
        for i in range(num_tokens):
            manager.append(row, -row, i, entry)

    threads = [threading.Thread(target=fill, args=(entry,)) for entry in range(num_entries)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for entry in range(num_entries):
        k, v, cached_len = manager.get_cache(entry)
        assert cached_len == num_tokens and (k == entry + 1).all() and (v == -entry - 1).all()
    metrics = manager.metrics()
    assert metrics.num_appends == num_entries * num_tokens
    assert metrics.appended_bytes == metrics.num_appends * 2 * 512 * 4


def test_threads_that_append_to_one_entry_lose_no_token_and_write_none_twice():
    manager = KVCacheManager()
    manager.allocate(64, 1, 16, 2)
    appended = []

    def fill(number):
        row = np.full(16, number, np.float32)
        while (position := manager.state(0).seq_len) < 2000:
            try:
                manager.append(row, row, position, 0)
            except ArgumentError:
                continue  # another thread was first
            appended.append(position)

    threads = [threading.Thread(target=fill, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(appended) == list(range(len(appended))) and len(appended) >= 2000
    assert manager.state(0).seq_len == len(appended)


def test_a_manager_is_not_entered_again_in_the_middle_of_a_call():
    manager = KVCacheManager()
    manager.allocate(4, 1, 16, 2)
    row = np.zeros(16, np.float32)
    with manager._lock.taken():  # as in a signal handler or a finaliser
        for call in (
            lambda: manager.append(row, row, 0, 0),
            lambda: manager.get_cache(0),
            lambda: manager.get_segments(0),
            lambda: manager.reset(0),
            lambda: manager.metrics(),
            lambda: manager.allocate(4, 1, 16, 2),
        ):
            with pytest.raises(ReentrantCall):
                call()
    manager.append(row, row, 0, 0)
