"""What owns pages gives them back exactly once, whatever is done to the handle."""

import contextlib
import copy
import gc
import os
import pickle
import signal
import sys
import threading

import numpy as np
import pytest
from conftest import SEED, STRIDE, Tripwire, fill, make_cache, rows

import paged_kv
from paged_kv import NotCopyable, OutOfPages, PagedKVError, StaleSequence, lifetime, machine
from paged_kv._binding import ffi, lib
from paged_kv.attention import prepared
from paged_kv.models import bitnet, decoder, matrix
from paged_kv.serving import Engine, generate

DUPLICATIONS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy of a list": lambda owner: copy.deepcopy([owner]),
    "pickle": pickle.dumps,
    "pickle, the oldest protocol": lambda owner: pickle.dumps(owner, 0),
    "reduce": lambda owner: owner.__reduce__(),
    "reduce_ex": lambda owner: owner.__reduce_ex__(4),
}


def subclasses(kind):
    return {kind, *(inner for child in kind.__subclasses__() for inner in subclasses(child))}


def owners():
    """One of each class that owns something."""
    cache = make_cache(num_layers=1, prefix_caching=True)
    seq, held = cache.sequence(), cache.sequence()
    step = cache.step([held], [3])
    manager = paged_kv.KVCacheManager()
    manager.allocate(8, 1, 16, 2)
    model = bitnet.BitNetModel.tiny()
    plain = decoder.DecoderModel(model.config, model.blocks, model.embedding, model.final_norm)
    weights = matrix.ternary_matrix(np.zeros((16, 16), np.int8), np.ones(1, np.float32))
    batch = generate.Batch(model, cache, generate.Admission.pages_of(cache))
    engine = Engine(plain, cache)
    engine.close()
    recording = cache.record("/dev/null", every=3600.0)
    recording.close()
    store = cache._store
    lists = {"qo_indptr": [0], "kv_indptr": [0], "kv_indices": [], "kv_last_page_len": []}
    inner = [
        paged_kv.PagedBatch(num_pages=0, page_size=16, **lists),
        cache.pin(cache.match([1])),
        store,
        store.pool,
        store.tables,
        store.rows,
        store.index,
        store.salts,
        step._plan,
        manager._ring,
        model._entry(0),
        make_cache(eviction="window", budget_tokens=96, num_sink_tokens=0)._store.budgets,
        make_cache(eviction="window")._store.idle_pages,
    ]
    return [cache, seq, step, manager, model, plain, weights, batch, engine, recording, *inner]


def test_every_class_that_owns_something_is_tried_below():
    kinds = {type(owner) for owner in owners()}
    ours = {kind for kind in subclasses(lifetime.Uncopyable) if kind.__module__.startswith("paged_kv")}
    untried = {kind for kind in ours if not any(issubclass(kind, tried) for tried in kinds)}
    assert untried == {lifetime.Uncopyable}


@pytest.mark.parametrize("duplicate", DUPLICATIONS.values(), ids=DUPLICATIONS)
def test_what_owns_something_is_not_copied(duplicate):
    for owner in owners():
        with pytest.raises(NotCopyable, match=type(owner).__name__):
            duplicate(owner)


def test_a_copy_that_fails_takes_nothing_with_it(rng):
    """pybind11 #1214, xgboost #2533: a copied handle freed in its finaliser what the original still used."""
    cache = make_cache(num_layers=1)
    alice = cache.sequence()
    (written,) = fill(cache, [alice], [3], rng)
    for duplicate in DUPLICATIONS.values():
        with pytest.raises(NotCopyable, match="fork"):
            duplicate(alice)
        gc.collect()
    bob = cache.sequence()
    fill(cache, [bob], [3], rng)
    np.testing.assert_array_equal(alice.gather(0)[0], written[0])
    cache.check()


@pytest.mark.parametrize("kind", [paged_kv.Sequence, paged_kv.Step, paged_kv.PagedKVCache])
def test_a_handle_that_is_half_built_ends_silently(kind, recwarn):
    kind.__new__(kind)
    gc.collect()
    assert not [warning for warning in recwarn if "__del__" in str(warning.message)]


def test_a_key_names_one_sequence_for_ever(rng):
    """Rows are reused; a handle of an earlier owner raises StaleSequence and shows nothing of the new one."""
    cache = make_cache(max_sequences=2)
    stale = []
    for _ in range(20):
        seq = cache.sequence()
        fill(cache, [seq], [5], rng)
        stale.append(seq._seq_id)
        seq.free()
    assert len(set(stale)) == 20 and len({key & 0xFFFFFF for key in stale}) == 1
    live = cache.sequence()
    fill(cache, [live], [7], rng)
    forged = cache.sequence()
    for key in stale:
        forged._seq_id = key
        for call in (
            lambda: len(forged),
            lambda: forged.gather(0),
            lambda: forged.held_positions,
            forged.fork,
            forged.reset,
            lambda: forged.truncate(0),
            lambda: cache.step([forged], [1]),
            lambda: cache.pages_needed([forged], [1]),
        ):
            with pytest.raises(StaleSequence):
                call()
    assert len(live) == 7
    cache.check()


def test_a_key_of_another_cache_names_nothing_here():
    mine, other = make_cache(), make_cache()
    seqs = [mine.sequence() for _ in range(3)]
    theirs = other.sequence()
    for call in (lambda: mine.step([theirs], [1]), lambda: mine.pages_needed([theirs], [1])):
        with pytest.raises(StaleSequence):
            call()
    assert len({seq._seq_id for seq in (*seqs, theirs)}) == 4


def test_rows_are_handed_out_and_taken_back_in_any_order(rng):
    cache = make_cache(num_pages=64, max_sequences=20)
    live = []
    for _ in range(400):
        if live and rng.random() < 0.5:
            live.pop(rng.integers(len(live))).free()
        elif live and rng.random() < 0.3 and len(live) < 18:
            live += live[rng.integers(len(live))].fork(2)
        elif len(live) < 20:
            live.append(cache.sequence())
            fill(cache, live[-1:], [int(rng.integers(1, 20))], rng)
        assert cache.stats().num_sequences == len(live)
        cache.check()


class Request:
    """In a cycle, as callbacks make them, so that the collector ends it, whenever it runs."""

    def __init__(self, seq):
        self.seq, self.me = seq, self

    def __del__(self):
        self.seq.free()


@pytest.mark.parametrize("order", ["the request first", "the sequence first"])
def test_a_finaliser_that_frees_its_sequence_is_silent(order, recwarn):
    """loguru PR #720.  Finalisers of a cycle run in the order of creation: the sequence may be
    gone already.
    """
    cache = make_cache(num_pages=64)
    for _ in range(50):
        if order == "the request first":
            request = Request.__new__(Request)
            request.__init__(cache.sequence())
        else:
            seq = cache.sequence()
            request = Request(seq)
            del seq
        del request
    gc.collect()
    assert cache.stats().num_sequences == 0
    assert not [warning for warning in recwarn if "exception" in str(warning.message).lower()]


def test_a_second_free_is_still_refused():
    cache = make_cache()
    seq = cache.sequence()
    seq.free()
    with pytest.raises(StaleSequence):
        seq.free()


def test_a_lost_handle_that_stands_in_an_open_step_waits_for_it(rng):
    cache = make_cache(num_layers=1)
    seq = cache.sequence()
    step = cache.step([seq], [5])
    with cache._store.lock:
        seq.free()  # as from a finaliser: it cannot be done now
    assert cache.stats().num_sequences == 1
    k = rows(rng, 5, 2, 32)
    step.write(0, k, k)
    step.commit()
    assert cache.stats().num_sequences == 0 and cache.stats().num_used_pages == 0
    cache.check()


def test_errors_of_lifetimes_are_typed():
    for error, builtin in ((NotCopyable, TypeError), (paged_kv.ReentrantCall, RuntimeError)):
        assert issubclass(error, PagedKVError) and issubclass(error, builtin)


# ---- called again in the middle of a call, by a signal handler or a finaliser


def hang(*_):
    raise AssertionError("it hangs")


@pytest.fixture
def watchdog():
    """Waiting for a lock is interrupted by a signal, so a call that hangs fails the test."""
    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, 20)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def entry_points(cache, seq, step, other):
    """Every public call on a cache and its handles: (name, call, whether it works inside another one)."""
    k = np.zeros((3, 2, 32), np.float32)
    return {
        "stats": (cache.stats, True),
        "check": (cache.check, True),
        "len": (lambda: len(seq), True),
        "held_positions": (lambda: seq.held_positions, True),
        "gather": (lambda: seq.gather(0), True),
        "positions": (lambda: step.positions, True),
        "write": (lambda: step.write(0, k, k), True),
        "attend": (lambda: step.attend(0, k, k, k), True),
        "free": (other.free, True),
        "rollback": (step.rollback, True),
        "sequence": (cache.sequence, False),
        "fork": (seq.fork, False),
        "forks": (lambda: seq.fork(2), False),
        "truncate": (lambda: seq.truncate(1), False),
        "reset": (seq.reset, False),
        "step": (lambda: cache.step([seq], [1]), False),
        "pages_needed": (lambda: cache.pages_needed([seq], [1]), False),
        "commit": (step.commit, False),
        "close": (cache.close, False),
    }


NAMES = [
    *(
        "stats",
        "check",
        "len",
        "held_positions",
        "gather",
        "positions",
        "write",
        "attend",
        "free",
        "rollback",
    ),
    *("sequence", "fork", "forks", "truncate", "reset", "step", "pages_needed", "commit", "close"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_call_inside_another_one_works_or_raises(name, watchdog, rng):
    cache = make_cache(num_layers=1)
    seq, other, third = (cache.sequence() for _ in range(3))
    fill(cache, [seq, other], [5, 20], rng)
    step = cache.step([third], [3])
    calls = entry_points(cache, seq, step, other)
    assert list(calls) == NAMES
    call, works = calls[name]
    with cache._store.lock:
        if works:
            call()
        else:
            with pytest.raises(paged_kv.ReentrantCall, match="signal handler or a finaliser"):
                call()
    assert len(seq) == 5
    assert cache.stats().num_sequences == (2 if name == "free" else 3)
    assert cache.stats().num_used_pages == 1 + 2 * (name != "free") + (name != "rollback")
    cache.check()


def test_closing_waits_for_calls_on_pages_and_lets_nobody_in(watchdog, rng):
    cache = make_cache(num_layers=1)
    seq, held = cache.sequence(), cache.sequence()
    fill(cache, [seq], [5], rng)
    step = cache.step([held], [3])
    cache._store.gate.running += 1  # as a call of another thread, in C
    is_closed = threading.Event()
    closer = threading.Thread(target=lambda: (cache.close(), is_closed.set()))
    closer.start()
    assert not is_closed.wait(0.2)
    k = np.zeros((3, 2, 32), np.float32)
    calls = [
        cache.sequence,
        lambda: seq.gather(0),
        lambda: step.write(0, k, k),
        lambda: step.attend(0, k, k, k),
    ]
    for call in calls:
        with pytest.raises(paged_kv.CacheClosed):
            call()
    # Behind the check of the handle, C checks again.
    pages, slots = cache._store.pages(0), step._handle.slot_mapping
    assert lib.pkv_step_write(pages, step._handle, ffi.NULL, ffi.NULL) == lib.PKV_CLOSED
    assert lib.pkv_gather(pages, 3, slots, ffi.NULL, ffi.NULL) == lib.PKV_CLOSED
    assert not is_closed.is_set() and cache._store.gate.running == 1
    cache._store.gate.running -= 1
    assert is_closed.wait(10)
    closer.join(10)


def test_a_cache_may_be_closed_in_the_middle_of_a_call(watchdog, rng, monkeypatch):
    """By a handler, between Python's checks and C: C refuses, and reads nothing."""
    cache = make_cache(num_layers=1)
    seq = cache.sequence()
    step = cache.step([seq], [3])
    k = np.zeros((3, 2, 32), np.float32)
    usual = prepared.rows_of

    def closing(*given):
        cache.close()
        return usual(*given)

    monkeypatch.setattr(prepared, "rows_of", closing)
    for call in (lambda: step.attend(0, k, k, k), lambda: step.write(0, k, k)):
        with pytest.raises(paged_kv.CacheClosed):
            call()


@pytest.mark.parametrize("ending", ["rollback", "commit"])
@pytest.mark.parametrize("call", ["attend", "write", "repeated attend", "repeated write"])
def test_a_step_that_a_handler_ends_in_the_middle_of_a_call_writes_nothing(
    ending, call, watchdog, rng, monkeypatch
):
    """Its pages may be another sequence's by the time that C is called."""
    cache = make_cache(num_layers=1, num_pages=1)
    seq, other = cache.sequence(), cache.sequence()
    step = cache.step([seq], [3])
    k, theirs = rows(rng, 3, 2, 32), rows(rng, 3, 2, 32)
    if "repeated" in call or ending == "commit":
        step.attend(0, k, k, k)
        step.write(0, k, k)
    written = []

    def handler():
        """Ends the step, and gives its only page to another sequence."""
        if not step._plan.is_open:
            return
        getattr(step, ending)()
        seq.reset()
        with cache.step([other], [3]) as mine:
            mine.write(0, theirs, theirs)
        written.append(other.gather(0)[0])

    def strike(frame, event, argument):
        if event == "call" and frame.f_code.co_name in ("pages", "run", "repeat", "rows_of", "new_rows"):
            sys.setprofile(None)
            handler()

    run = step.attend if "attend" in call else step.write
    given = (0, k, k, k) if "attend" in call else (0, k, k)
    sys.setprofile(strike)
    try:
        with pytest.raises(paged_kv.StepClosed):
            run(*given)
    finally:
        sys.setprofile(None)
    assert written
    np.testing.assert_array_equal(other.gather(0)[0], theirs)


def test_a_child_of_a_fork_does_not_wait_for_calls_of_its_parent(watchdog):
    cache = make_cache(num_layers=1)
    cache._store.gate.running += 1  # as a call of another thread
    child = os.fork()
    if child == 0:
        cache.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    cache._store.gate.running -= 1
    cache.close()


def test_a_close_that_was_interrupted_is_ended_by_the_next_one(monkeypatch):
    cache = make_cache(num_layers=1)
    seq = cache.sequence()
    cache.step([seq], [5])
    step = cache.step([cache.sequence()], [5])

    def interrupt(plan):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache._store, "roll_back", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.close()
    cache.close()
    cache.close()
    assert not step._plan.is_open


def test_finalisers_in_the_middle_of_calls_free_their_sequences(watchdog):
    """dask/distributed PR #1229, wandb PR #11402: the collector ran a finaliser that wanted the lock held."""
    cache = make_cache(num_layers=1, num_pages=64)
    kept = cache.sequence()
    threshold = gc.get_threshold()
    gc.set_threshold(50)
    try:
        for _ in range(3000):
            with contextlib.suppress(paged_kv.OutOfSequences):
                Request(cache.sequence())
            cache.step([kept], [1]).rollback()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert cache.stats().num_sequences == 1 and cache.stats().num_used_pages == 0
    cache.check()


# ---- an interrupt at every call


def every_call(cache, rng, tripwire, live):
    """A life of two sequences, each call by itself; `live` maps handles to the lengths that they may have."""

    def values(count):
        return rows(rng, count, 2, 32)

    def grow(seqs, counts, ending):
        for seq, count in zip(seqs, counts, strict=True):
            live[seq] = {len(seq), len(seq) + count}
        with tripwire, cache.step(seqs, counts) as step:
            k = values(sum(counts))
            step.attend(0, k, k, k)
            step.write(0, k, k)
            step.attend(0, k)
            if ending == "rollback":
                step.rollback()
            elif ending == "commit":
                step.commit()
            elif ending == "raise":
                raise ZeroDivisionError

    with tripwire:
        a = None
        a = cache.sequence()
    if a is None:
        return
    live[a] = {0}
    grow([a], [20], "leave")
    with tripwire:
        forks = a.fork(2)
        live.update((fork, {len(a)}) for fork in forks)
    seqs = list(live)
    for ending in ("commit", "rollback", "leave"):
        grow(seqs, [3] * len(seqs), ending)
    with contextlib.suppress(ZeroDivisionError):
        grow(seqs[:1], [5], "raise")
    with tripwire:
        a.gather(0), a.held_positions, cache.stats(), cache.pages_needed([a], [7])
    live[a] = {len(a), min(len(a), 4)}
    with tripwire:
        a.truncate(min(len(a), 4))
    for seq in seqs[1:]:
        with tripwire:
            del live[seq]
            seq.free()


@pytest.mark.parametrize("window", [None, 10])
def test_an_interrupt_at_any_call_loses_nothing(window, rng):
    """The library's own calls, one after the other; with whatever was raised kept alive, and then gone."""

    def run(at):
        cache = make_cache(num_layers=1, num_pages=20, max_sequences=4, window=window)
        tripwire, live = Tripwire(at), {}
        with contextlib.suppress(PagedKVError):  # a step that was left open keeps its sequences busy
            every_call(cache, rng, tripwire, live)
        assert len(tripwire.raised) == (0 < at <= tripwire.count)
        cache.check()
        for seq, lengths in live.items():
            assert len(seq) in lengths, at
            assert not np.isnan(seq.gather(0)[0]).any(), at
        tripwire.raised.clear()  # and with it the frames
        assert not any(cache.stats().num_used_pages == 0 for seq in live if len(seq))
        for seq in live:
            cache.step([seq], [1]).rollback()  # nothing is busy any more
        seq = None
        live.clear()
        gc.collect()
        stats = cache.stats()
        assert seq is None and stats.num_used_pages == stats.num_sequences == 0, at
        assert not cache._store.open_plans and not cache._store.handles, at
        cache.check()
        cache.close()
        return tripwire.count

    num_calls = run(0)
    assert num_calls > 200
    for at in range(1 + SEED % STRIDE, num_calls + 1, STRIDE):
        run(at)


@pytest.mark.parametrize("how", ["plain", "pinned", "trimmed", "no prefix caching"])
def test_a_refused_step_keeps_no_sequence_alive(how, monkeypatch):
    """An error that is kept in a frame of its own traceback is garbage that only the collector frees."""
    options = {"num_layers": 1, "num_kv_heads": 8, "head_dim": 128, "num_pages": 64}
    with make_cache(**options, prefix_caching=how != "no prefix caching") as cache:
        if how == "pinned":
            with cache.sequence() as other, cache.step([other], [[1] * 20]) as step:
                step.write(0, *(np.zeros((20, 8, 128), np.float32) for _ in range(2)))
                step.commit()
            pin = cache.pin(cache.match([1] * 20))
            assert pin.outcome == "accepted"
        if how == "trimmed":
            assert cache.trim() > 0
            monkeypatch.setattr(machine, "available_memory", lambda: 0)
        seqs = [cache.sequence(), cache.sequence()]
        gc.collect()
        gc.disable()
        try:
            with contextlib.suppress(OutOfPages):
                cache.step(seqs, [600, 10 if how == "trimmed" else 600])
            del seqs
            assert cache.stats().num_sequences == 0
        finally:
            gc.enable()


def test_a_refused_fork_keeps_no_sequence_alive():
    with make_cache(num_layers=1) as cache:
        seq = cache.sequence()
        gc.collect()
        gc.disable()
        try:
            with contextlib.suppress(PagedKVError):
                seq.fork(at=5)
            del seq
            assert cache.stats().num_sequences == 0
        finally:
            gc.enable()
