"""What handles leave behind when they are collected, and locks in a forked child."""

import gc
import os
import threading

import pytest
from conftest import fill, make_cache, rows

from paged_kv import StepClosed


def test_a_collected_sequence_gives_its_pages_back(rng):
    cache = make_cache(max_sequences=2)
    for _ in range(10):
        seq = cache.sequence()
        fill(cache, [seq], [100], rng)
        fork = seq.fork()
        del seq
        assert len(fork) == 100
        del fork
        gc.collect()
    assert cache.stats().num_used_pages == 0 and cache.stats().num_sequences == 0
    cache.check()


def test_a_step_that_is_collected_open_is_rolled_back_before_its_sequences_go(rng):
    cache = make_cache()
    kept = cache.sequence()
    fill(cache, [kept], [20], rng)
    cache.step([kept, cache.sequence()], [30, 40])  # not referenced
    gc.collect()
    assert cache.stats().num_used_pages == 2 and cache.stats().num_sequences == 1
    cache.check()
    fill(cache, [kept], [1], rng)


def test_a_finaliser_that_runs_inside_the_lock_does_not_wait_for_it(rng):
    cache = make_cache()
    seq = cache.sequence()
    fill(cache, [seq], [20], rng)
    with cache._store.lock:
        del seq
        gc.collect()
    assert cache.stats().num_sequences == 0


def test_handles_that_outlive_their_cache_are_silent(rng):
    cache = make_cache(num_layers=1)
    seq = cache.sequence()
    step = cache.step([seq], [1])
    cache.close()
    del seq, step, cache
    gc.collect()


def test_a_child_that_was_forked_inside_the_lock_does_not_hang(rng):
    cache = make_cache(num_layers=1)
    seq = cache.sequence()
    fill(cache, [seq], [20], rng)
    is_held, is_forked = threading.Event(), threading.Event()

    def hold():
        with cache._store.lock:
            is_held.set()
            is_forked.wait(timeout=30)

    holder = threading.Thread(target=hold)
    holder.start()
    is_held.wait(timeout=30)
    child = os.fork()
    if child == 0:
        fill(cache, [seq], [3], rng)
        os._exit(0 if len(seq) == 23 else 1)
    is_forked.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(seq) == 20


def test_two_threads_step_disjoint_sequences(rng):
    cache = make_cache(num_layers=1, num_pages=64, num_threads=2)
    failures = []

    def serve(count):
        try:
            for i in range(200):
                with cache.sequence() as seq, cache.step([seq], [1 + i % 40]) as step:
                    k = rows(rng_of[count], 1 + i % 40, 2, 32)
                    step.attend(0, k, k, k)
                    if i % 3 == 0:
                        step.rollback()
                    else:
                        step.commit()
        except Exception as error:
            failures.append(error)

    rng_of = rng.spawn(4)
    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures
    cache.check()
    assert cache.stats().num_used_pages == 0


def test_a_closed_step_that_is_collected_does_nothing(rng):
    cache = make_cache()
    seq = cache.sequence()
    step = cache.step([seq], [5])
    step.rollback()
    with pytest.raises(StepClosed):
        step.rollback()
    del step
    gc.collect()
    fill(cache, [seq], [5], rng)
    cache.check()
