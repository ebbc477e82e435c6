"""Failures that others had in the field: exhaustion, atomicity, liveness, cancelling.

Each test names the row of the catalogue in docs/testing.md, and where it happened.
"""

import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import fill, make_cache, rows
from support import digest

from paged_kv import ArgumentError, OutOfPages, OutOfSequences, PagedKVCache
from paged_kv.models.bitnet import BitNetModel
from paged_kv.serving.generate import Admission, Batch


@pytest.mark.parametrize("num_free", range(6))
def test_row_23_a_step_that_fails_at_the_nth_page_takes_none(num_free, rng):
    """kvcached #364: pages were not given back when the k-th failed."""
    cache = make_cache(num_pages=num_free + 2)
    seqs = [cache.sequence(), cache.sequence()]
    fill(cache, seqs, [16, 16], rng)
    before = digest(cache)
    with pytest.raises(OutOfPages):
        cache.step(seqs, [16 * (num_free // 2) + 1, 16 * (num_free - num_free // 2) + 1])
    assert digest(cache) == before
    cache.check()


def test_row_24_nobody_waits_for_pages_that_are_reserved():
    """kvcached #371: pages in no list while mapped, and another thread waited for ever."""
    cache = make_cache(num_pages=2)
    step, other = cache.step([cache.sequence()], [32]), cache.sequence()
    results = []

    def try_to_step():
        try:
            cache.step([other], [1])
        except OutOfPages:
            results.append("refused")

    thread = threading.Thread(target=try_to_step)
    thread.start()
    thread.join(timeout=30)
    assert results == ["refused"]
    step.rollback()


@pytest.mark.parametrize("num_free", range(4))
def test_row_25_a_fork_is_whole_or_not_at_any_number_of_free_rows(num_free, rng):
    """transformers PR #46117: a fork without enough blocks crashed the server."""
    cache = make_cache(max_sequences=1 + num_free)
    seq = cache.sequence()
    fill(cache, [seq], [20], rng)
    before = digest(cache)
    with pytest.raises(OutOfSequences):
        seq.fork(num_free + 1)
    assert digest(cache) == before
    assert len(seq.fork(num_free)) == num_free


def test_row_26_a_failed_forward_pass_restores_everything(rng):
    """llama.cpp PR #12695: a failed decode did not restore the cache's state."""
    cache = make_cache()
    seqs = [cache.sequence(), cache.sequence()]
    fill(cache, seqs, [20, 5], rng)
    contents = [seq.gather(layer) for seq in seqs for layer in range(2)]
    stats = cache.stats()
    for num_layers_done in range(3):
        k = rows(rng, 8, 2, 32)
        with pytest.raises(ZeroDivisionError), cache.step(seqs, [4, 4]) as step:
            for layer in range(num_layers_done):
                step.attend(layer, k, k, k)
            raise ZeroDivisionError
        assert cache.stats() == stats
        for before, after in zip(contents, (seq.gather(i) for seq in seqs for i in range(2)), strict=True):
            np.testing.assert_array_equal(after, before)
    cache.check()


def test_row_27_foresight_and_reservation_agree(rng):
    """vllm-metal PR #128: two allocators disagreed, and the second one crashed."""
    cache = make_cache(num_pages=30)
    seqs = [cache.sequence()]
    for _ in range(60):
        seqs = seqs[-6:]
        if rng.random() < 0.3:
            seqs.append(seqs[int(rng.integers(len(seqs)))].fork())
        counts = rng.integers(1, 12, len(seqs)).tolist()
        needed, free = cache.pages_needed(seqs, counts), cache.stats().num_free_pages
        if needed > free:
            with pytest.raises(OutOfPages, match=f"needs {needed} new pages"):
                cache.step(seqs, counts)
            seqs[0].reset()
            continue
        step = cache.step(seqs, counts)
        assert cache.stats().num_free_pages == free - needed
        k = rows(rng, sum(counts), 2, 32)
        for layer in range(2):
            step.write(layer, k, k)
        step.commit()
        del step  # it holds its handles, also those that are dropped above


def test_row_28_a_full_pool_is_a_typed_error_each_time_and_at_once(rng):
    """llama.cpp #4185: a full cache led to endless retries and a log of 73 GB."""
    cache = make_cache(num_pages=2)
    seq = cache.sequence()
    fill(cache, [seq], [32], rng)
    other = cache.sequence()
    before = digest(cache)
    for _ in range(100):
        with pytest.raises(OutOfPages):
            cache.step([other], [1])
    assert digest(cache) == before


def test_row_29_a_request_larger_than_the_pool_is_refused_at_once():
    """vLLM #39734: it waited for ever and blocked all behind it."""
    model = BitNetModel.tiny()
    with model.new_cache(num_pages=2) as cache:
        batch = Batch(model, cache, Admission.pages_of(cache))
        with pytest.raises(OutOfPages):
            batch.add([0] * 200, 10)
        request = batch.add([0, 5], 3)
        while batch.running or batch.waiting:
            batch.step()
        assert len(request.new_ids) == 3


@pytest.mark.parametrize("seed", range(5))
def test_row_30_admission_never_deadlocks(seed):
    """vLLM #45387: partial reservations blocked each other."""
    rng, model = np.random.default_rng(seed), BitNetModel.tiny()
    with model.new_cache(num_pages=5, page_size=16) as cache:
        batch = Batch(model, cache, Admission.pages_of(cache), step_tokens=9)
        requests = [
            batch.add(rng.integers(2, 2000, rng.integers(1, 40)), int(rng.integers(1, 20))) for _ in range(12)
        ]
        for _ in range(600):
            batch.step()
            if not batch.running and not batch.waiting:
                break
        assert all(len(request.new_ids) == request.max_new_tokens for request in requests)
        assert cache.stats().num_used_pages == 0


def test_row_31_cancelling_at_every_step_of_a_full_pool_is_safe():
    """openvino model_server #4428: a crash when the cache ran full or a client went away."""
    model = BitNetModel.tiny()
    for cancelled_at in range(1, 12):
        with model.new_cache(num_pages=4, page_size=16) as cache:
            batch = Batch(model, cache, Admission.pages_of(cache), step_tokens=7)
            for _ in range(3):
                batch.add([0] * 20, 8)
            for _ in range(cancelled_at):
                batch.step()
            batch.close()
            assert cache.stats().num_used_pages == 0 and cache.stats().num_sequences == 0
            cache.check()


def test_row_32_limits_are_checked_before_anything_is_copied(rng):
    """CVE-2026-34756: an unbounded n copied the request before any limit."""
    cache = make_cache()
    seq = cache.sequence()
    fill(cache, [seq], [20], rng)
    before = digest(cache)
    for count in (10**6, 2**31 - 1):
        with pytest.raises(OutOfSequences):
            seq.fork(count)
    with pytest.raises(ArgumentError, match=r"count is \d+, outside"):
        seq.fork(2**40)
    assert digest(cache) == before


def test_row_33_too_much_memory_is_an_error_in_a_process_that_lives_on():
    """A mapping of 1 TiB succeeds without a reservation; the process died later, on touch."""
    code = (
        "import paged_kv\n"
        "try: paged_kv.PagedKVCache(32, 32, 128, memory='1024GiB')\n"
        "except MemoryError as error: print('refused', 'MiB' in str(error))\n"
        "paged_kv.PagedKVCache(1, 1, 32, num_pages=1).close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "refused True\n"


def test_row_36_a_step_that_is_taken_back_poisons_no_later_one(rng):
    """SGLang #38319: a prefill that was inserted midway and retracted left freed pages in the tree."""
    cache = make_cache(num_layers=1, num_pages=8)
    seq = cache.sequence()
    whole = [rows(rng, 60, 2, 32) for _ in range(3)]
    for chunk in (1, 15, 16, 17, 40):
        step = cache.step([seq], [chunk])
        step.attend(0, *(np.full((chunk, 2, 32), np.nan, np.float32) for _ in range(3)))
        step.rollback()
    with cache.step([seq], [60]) as step:
        got = step.attend(0, *whole)
    fresh = make_cache(num_layers=1, num_pages=8)
    with fresh.step([fresh.sequence()], [60]) as step:
        np.testing.assert_array_equal(got, step.attend(0, *whole))


def test_row_38_a_page_is_not_reused_while_a_copy_of_it_is_due(rng):
    """LMCache PR #5248: preemption freed blocks that a copier still read."""
    cache = make_cache(num_layers=2, num_pages=12)
    a = cache.sequence()
    fill(cache, [a], [20], rng)
    b = a.fork()
    before = [b.gather(layer)[0] for layer in range(2)]
    step = cache.step([b], [1])  # its copy is due at each layer's first write
    a.reset()
    with cache.sequence() as other:
        fill(cache, [other], [100], rng)
        k = rows(rng, 1, 2, 32)
        for layer in range(2):
            step.write(layer, k, k)
        step.commit()
    for layer in range(2):
        np.testing.assert_array_equal(b.gather(layer)[0], np.concatenate([before[layer], k]))
    cache.check()


def test_row_39_at_rest_nothing_is_held(rng):
    """dynamo #3730: requests were kept for ever."""
    with PagedKVCache(2, 2, 32, num_pages=40, page_size=16) as cache:
        for _ in range(10):
            seqs = [cache.sequence() for _ in range(4)]
            fill(cache, seqs, [5, 20, 33, 64], rng)
            forks = seqs[1].fork(2)
            fill(cache, forks, [1, 1], rng)
            for seq in (*seqs, *forks):
                seq.free()
        stats = cache.stats()
        assert (stats.num_used_pages, stats.num_sequences, stats.num_tokens) == (0, 0, 0)
        assert not cache._store.open_plans and not cache._store.handles
