"""Failures that others had in the field: reference counts, free lists, tables.

Each test names the row of the catalogue in docs/testing.md, and where it happened.
"""

import threading

import numpy as np
import pytest
from conftest import fill, make_cache, rows
from support import digest

from paged_kv import ArgumentError, OutOfPages, PagedKVError, StaleSequence
from paged_kv.pages.pool import PagePool


def test_row_1_a_fork_of_a_windowed_sequence_frees_each_page_once(rng):
    """vLLM #1556: a sliding window repeated a block in a table; fork and free counted it differently."""
    cache = make_cache(window=20, num_sink_tokens=2, num_pages=30)
    a = cache.sequence()
    for _ in range(30):
        fill(cache, [a], [7], rng)
        with a.fork() as b:
            fill(cache, [b], [9], rng)
        cache.check()
    a.free()
    assert cache.stats().num_used_pages == 0


def test_row_2_a_double_free_raises_and_changes_nothing(rng):
    """vLLM #1584: the double free of beam search was answered by returning silently."""
    cache = make_cache()
    a = cache.sequence()
    b = a.fork()
    fill(cache, [a], [20], rng)
    b.free()
    before = digest(cache)
    with pytest.raises(StaleSequence):
        b.free()
    assert digest(cache) == before


def test_row_3_a_page_named_twice_is_not_freed_twice():
    """vLLM #42571: free_blocks([b, b]) put a block on the free list twice."""
    pool = PagePool(4, 4096)
    page = pool.acquire(1)
    with pytest.raises(PagedKVError, match="release"):
        pool.release(np.repeat(page, 2))
    assert pool.num_free == 3
    pool.check()
    ids = pool.acquire(3).tolist()
    assert len({*ids, *page.tolist()}) == 4


def test_row_4_a_broken_table_is_found_at_once(rng):
    """unified-cache-mgmt PR #1053: corruption showed later, elsewhere."""
    cache = make_cache()
    a, b = cache.sequence(), cache.sequence()
    fill(cache, [a, b], [20, 20], rng)
    tables = cache._store.tables
    kept = int(tables.page_ids[0, 0])
    tables.page_ids[0, 0] = tables.page_ids[1, 0]
    with pytest.raises(PagedKVError, match="invariant"):
        cache.check()
    tables.page_ids[0, 0] = kept
    cache.check()


def test_row_5_no_write_is_seen_through_a_sibling(rng):
    """vLLM #417: a wrong condition decided whether a block is copied."""
    cache = make_cache(num_pages=40)
    family = [cache.sequence()]
    fill(cache, family, [25], rng)
    family += family[0].fork(4)
    expected = {seq: seq.gather(0)[0] for seq in family}
    for _ in range(6):
        for seq in rng.permutation(np.array(family, object)):
            new = fill(cache, [seq], [3], rng)
            expected[seq] = np.concatenate([expected[seq], new[0][0]])
            for other in family:
                np.testing.assert_array_equal(other.gather(0)[0], expected[other])
    cache.check()


@pytest.mark.parametrize("offset", range(17))
def test_row_6_forks_diverge_at_every_offset_of_a_page(kernel, offset, rng):
    """xLLM PR #1984: one backend lacked copy-on-write, and diverging beams read stale blocks."""
    cache = make_cache(num_layers=1)
    a = cache.sequence()
    if offset:
        fill(cache, [a], [offset], rng)
    b = a.fork()
    k, v, q = rows(rng, 2, 2, 32), rows(rng, 2, 2, 32), rows(rng, 2, 2, 32)
    with cache.step([a, b], [1, 1]) as step:
        out = step.attend(0, q, k, v)
    alone = make_cache(num_layers=1)
    for i, seq in enumerate((a, b)):
        all_k, all_v = seq.gather(0)
        with alone.sequence() as copy, alone.step([copy], [offset + 1]) as step:
            q_all = np.concatenate([np.zeros((offset, 2, 32), np.float32), q[i : i + 1]])
            np.testing.assert_array_equal(step.attend(0, q_all, all_k, all_v)[-1], out[i])
            step.rollback()


def test_row_8_a_sequence_is_sent_back_while_its_forks_go_on(rng):
    """vLLM #8844: preemption by recomputation failed with more than one sample."""
    cache = make_cache()
    parent = cache.sequence()
    fill(cache, [parent], [30], rng)
    samples = parent.fork(3)
    samples[1].reset()
    fill(cache, [samples[0], samples[2]], [5, 5], rng)
    fill(cache, [samples[1]], [35], rng)
    assert [len(seq) for seq in samples] == [35, 35, 35]
    cache.check()


def test_row_10_pages_are_conserved_in_both_directions(rng):
    """SGLang #6888 and others: more free pages than there are, often with pages of several tokens."""
    for page_size in (16, 48, 64):
        cache = make_cache(page_size=page_size, num_pages=44)  # of 16: 4 sequences of 20 x 8 tokens
        seqs = [cache.sequence() for _ in range(4)]
        for _ in range(20):
            fill(cache, seqs, rng.integers(1, 9, 4).tolist(), rng)
            seqs[0].truncate(len(seqs[0]) // 2)
            stats = cache.stats()
            assert stats.num_used_pages + stats.num_free_pages == stats.num_pages
        for seq in seqs:
            seq.free()
        assert cache.stats().num_free_pages == 44


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33])
def test_row_11_truncating_round_a_page_edge_leaks_no_tail(length, rng):
    """sglang-jax #70: pages of several tokens leaked their tails."""
    cache = make_cache()
    seq = cache.sequence()
    for _ in range(20):
        fill(cache, [seq], [length], rng)
        seq.truncate(1)
        assert cache.stats().num_used_pages == 1
        seq.truncate(0)
    assert cache.stats().num_used_pages == 0


def test_row_12_pages_of_a_held_sequence_are_not_given_away(rng):
    """mini-sglang PR #52: the node in use was not locked, and evicted."""
    cache = make_cache(num_pages=4)
    held = cache.sequence()
    fill(cache, [held], [30], rng)
    before = held.gather(0)
    other = cache.sequence()
    while True:
        try:
            fill(cache, [other], [16], rng)
        except OutOfPages:
            break
    np.testing.assert_array_equal(held.gather(0), before)


def test_row_14_counters_are_what_counting_from_scratch_gives(rng):
    """mllm PR #656: a counter went negative, and a test had frozen it there."""
    cache = make_cache(num_pages=30)
    seqs = [cache.sequence() for _ in range(3)]
    for i in range(15):
        fill(cache, seqs, [1 + i % 7, 5, 2], rng)
        if i % 4 == 3:
            seqs[1].free()
            seqs[1] = seqs[0].fork()
        tables = cache._store.tables
        pages = {
            int(page)
            for row, length in enumerate(tables.rows.seq_lens)
            for page in tables.page_ids[row, : -(-int(length) // 16)]
        }
        assert cache.stats().num_used_pages == len(pages) >= 0


def test_row_15_a_reference_count_does_not_go_below_zero():
    """SGLang #24153: a count went below zero after hours."""
    pool = PagePool(2, 4096)
    page = pool.acquire(1)
    pool.share(page)
    pool.release(page)
    pool.release(page)
    with pytest.raises(PagedKVError, match="release"):
        pool.release(page)
    assert pool.num_free == 2
    pool.check()


def test_row_17_a_slot_is_not_lost_when_a_step_fails_on_the_way(rng):
    """SGLang PR #16067: a slot leaked when scheduling failed midway."""
    cache = make_cache(num_pages=6, max_sequences=4)
    seqs = [cache.sequence() for _ in range(3)]
    fill(cache, seqs, [10, 10, 10], rng)
    before = digest(cache)
    reasons = {"6 new pages": [10, 10, 60], "is -5 tokens": [10, 10, -5]}
    for reason, new in reasons.items():
        with pytest.raises(PagedKVError, match=reason):
            cache.step(seqs, new)
        assert digest(cache) == before
    seqs[2].free()
    before = digest(cache)
    with pytest.raises(StaleSequence):
        cache.step(seqs, [10, 10, 1])
    assert digest(cache) == before


def test_row_18_freeing_during_a_step_is_refused_and_after_it_safe(rng):
    """TRT-LLM #12933: a sequence was removed before its blocks were registered."""
    cache = make_cache()
    seq = cache.sequence()
    step = cache.step([seq], [20])
    with pytest.raises(PagedKVError, match="open step"):
        seq.free()
    k = rows(rng, 20, 2, 32)
    for layer in range(2):
        step.write(layer, k, k)
    step.commit()
    seq.free()
    assert cache.stats().num_used_pages == 0
    cache.check()


def test_row_20_readers_run_while_others_are_freed(rng):
    """TRT-LLM PR #12251: locks were let go before a reference was returned, in five places."""
    cache = make_cache(num_layers=1, num_pages=64, num_threads=2)
    kept = cache.sequence()
    fill(cache, [kept], [200], rng)
    expected, failures, is_done = kept.gather(0), [], threading.Event()

    def read():
        while not is_done.is_set():
            if not np.array_equal(kept.gather(0), expected):
                failures.append("changed")

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(200):
        with cache.sequence() as other:
            fill(cache, [other], [50], rng)
    is_done.set()
    reader.join(timeout=30)
    assert not failures


def test_row_21_an_open_step_keeps_its_own_tables(rng):
    """TRT-LLM PR #15546: a page table was overwritten while a reader still used it."""
    cache = make_cache(num_layers=1, num_pages=40)
    a, b = cache.sequence(), cache.sequence()
    fill(cache, [a], [40], rng)
    step = cache.step([a], [1])
    table = step.block_table.copy()
    q, k = rows(rng, 1, 2, 32), rows(rng, 1, 2, 32)
    expected = step.attend(0, q, k, k)
    for _ in range(5):
        fill(cache, [b], [30], rng)
        b.reset()
    np.testing.assert_array_equal(step.block_table, table)
    np.testing.assert_array_equal(step.attend(0, q, k, k), expected)
    step.rollback()


def test_row_13_a_partial_truncation_gives_back_just_what_it_dropped(rng):
    """bytedance-iaas/sglang PR #508: a partial match locked more than it matched."""
    cache = make_cache()
    a = cache.sequence()
    fill(cache, [a], [64], rng)
    b = a.fork()
    b.truncate(33)
    assert cache.stats().num_used_pages == 4
    a.free()
    assert cache.stats().num_used_pages == 3
    with pytest.raises(ArgumentError, match="length is 34, outside 0 to 33"):
        b.truncate(34)
    b.free()
    assert cache.stats().num_used_pages == 0
