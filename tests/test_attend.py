"""Attention in place, against the float64 reference, and bit for bit against itself."""

import threading

import numpy as np
import pytest
from conftest import fill, make_cache, pages_come_from, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tolerances

from paged_kv import ArgumentError, CacheClosed, LayerNotWritten, StepClosed, reference


@pytest.fixture(params=["memory", "cache"], autouse=True)
def place(request, monkeypatch):
    """Everything holds for the kernel that reads pages of memory and for the one beside it."""
    pages_come_from(request.param, monkeypatch)


def attend_step(cache, seqs, counts, rng, num_q_heads, **options):
    """One step through every layer; (q, out) of the last layer, out poisoned before."""
    layout = cache._store.layout
    n = sum(counts)
    with cache.step(seqs, counts) as step:
        for layer in range(layout.num_layers):
            q = rows(rng, n, num_q_heads, layout.head_dim)
            k, v = (rows(rng, n, layout.num_kv_heads, layout.head_dim) for _ in range(2))
            out = np.full_like(q, np.nan)
            assert step.attend(layer, q, k, v, out=out, **options) is out
        return q, out, step.qo_indptr


def assert_matches_reference(cache, seqs, q, out, indptr, **options):
    layer = cache._store.layout.num_layers - 1
    assert not np.isnan(out).any()
    for i, seq in enumerate(seqs):
        own = slice(indptr[i], indptr[i + 1])
        k, v = seq.gather(layer)
        expected = reference.attend(q[own], k, v, **options)
        np.testing.assert_allclose(out[own], expected, rtol=0, atol=tolerances(q[own], k, v, **options)[0])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [8, 32, 40, 64, 96, 128, 256])
@pytest.mark.parametrize(("num_kv_heads", "group"), [(1, 1), (3, 1), (2, 5), (1, 8)])
def test_every_kernel_gives_what_the_reference_gives(kernel, dtype, head_dim, num_kv_heads, group, rng):
    shape = {"num_layers": 1, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "dtype": dtype}
    cache = make_cache(**shape, num_pages=40)
    seqs = [cache.sequence() for _ in range(4)]
    for counts in ([15, 16, 17, 1], [1, 1, 1, 48], [3, 30, 2, 1], [1, 1, 1, 1]):
        q, out, indptr = attend_step(cache, seqs, counts, rng, num_kv_heads * group)
        assert_matches_reference(cache, seqs, q, out, indptr)


@pytest.mark.parametrize("page_size", [16, 32, 48, 64, 80, 128, 272, 1024])
def test_lengths_round_the_edges_of_runs_pages_and_spans(kernel, page_size, rng):
    cache = make_cache(num_layers=1, page_size=page_size, num_pages=-(-2200 // page_size) + 8)
    edges = sorted({edge + off for edge in (64, page_size, 240, 256, 512) for off in (-1, 0, 1)})
    for length in edges:
        with cache.sequence() as seq:
            fill(cache, [seq], [length], rng)
            q, out, indptr = attend_step(cache, [seq], [2], rng, 4)
            assert_matches_reference(cache, [seq], q, out, indptr)


@pytest.mark.parametrize("sm_scale", [0, 0.5, -1.0, np.float32(2), 3])
def test_the_scale_of_scores_can_be_given(kernel, sm_scale, rng):
    cache = make_cache()
    seq = cache.sequence()
    q, out, indptr = attend_step(cache, [seq], [40], rng, 2, sm_scale=sm_scale)
    assert_matches_reference(cache, [seq], q, out, indptr, sm_scale=float(sm_scale))


def test_scores_that_would_overflow_an_exponential_do_not(kernel, rng):
    cache = make_cache(num_layers=1, num_pages=30)
    seq = cache.sequence()
    k = 40 * rows(rng, 300, 2, 32)
    q, v = 40 * rows(rng, 300, 2, 32), rows(rng, 300, 2, 32)
    with cache.step([seq], [300]) as step:
        out = step.attend(0, q, k, v)
    expected = reference.attend(q, k, v)
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerances(q, k, v)[0])


def test_a_nan_touches_its_own_sequence_only(kernel, rng):
    cache = make_cache(num_layers=1)
    a, b = cache.sequence(), cache.sequence()
    q, k, v = (rows(rng, 40, 2, 32) for _ in range(3))
    k[3, 0, 5] = np.nan  # of a, head 0
    v[30, 1, 2] = np.inf  # of b, head 1
    with cache.step([a, b], [20, 20]) as step:
        out = step.attend(0, q, k, v)
    assert np.isnan(out[3:20, 0]).all()
    assert np.isfinite(out[:3]).all() and np.isfinite(out[:20, 1]).all()
    assert np.isposinf(out[30:, 1, 2]).all()
    out[30:, 1, 2] = 0
    assert np.isfinite(out[20:]).all()


# ---- bits


def rows_of(cache, seq_rows, chunks, rng_order, num_q_heads=4):
    """Feed one sequence's fixed q, k, v in the given chunks, beside others; the bits of all its rows."""
    q, k, v = seq_rows
    target, companions = cache.sequence(), []
    results, done = [], 0
    for i, chunk in enumerate(chunks):
        others = [cache.sequence() for _ in range(rng_order.integers(0, 3))]
        companions += others
        counts = [int(rng_order.integers(1, 20)) for _ in others]
        place = int(rng_order.integers(0, len(others) + 1))
        seqs = [*others[:place], target, *others[place:]]
        news = [*counts[:place], chunk, *counts[place:]]
        n, start = sum(news), sum(news[:place])
        full = [rows(rng_order, n, array.shape[1], array.shape[2]) for array in (q, k, v)]
        for array, source in zip(full, (q, k, v), strict=True):
            array[start : start + chunk] = source[done : done + chunk]
        with cache.step(seqs, news) as step:
            results.append(step.attend(0, *full)[start : start + chunk])
        done += chunk
        if i % 2 and companions:
            companions.pop(0).free()
    return np.concatenate(results)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    page_size=st.sampled_from([16, 48, 64, 80, 128]),
    num_threads=st.integers(1, 4),
    cuts=st.lists(st.integers(1, 899), max_size=6),
)
def test_bits_depend_on_neither_batch_nor_chunks_nor_threads(seed, dtype, page_size, num_threads, cuts):
    rng = np.random.default_rng(seed)
    seq_rows = rows(rng, 900, 4, 40), rows(rng, 900, 2, 40), rows(rng, 900, 2, 40)
    shape = {"num_layers": 1, "head_dim": 40, "dtype": dtype, "page_size": page_size}
    shape["num_pages"] = 1300 // page_size + 30
    with make_cache(**shape) as whole, make_cache(**shape, num_threads=num_threads) as parts:
        with whole.step([whole.sequence()], [900]) as step:
            expected = step.attend(0, *seq_rows)
        edges = [0, *sorted(set(cuts)), 900]
        got = rows_of(parts, seq_rows, np.diff(edges).tolist(), rng)
        parts.check()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group", [1, 2, 7])
def test_bits_do_not_depend_on_where_pages_lie(kernel, dtype, group, monkeypatch):
    results = []
    for place in ("memory", "cache"):
        pages_come_from(place, monkeypatch)
        cache = make_cache(num_layers=1, head_dim=128, dtype=dtype, num_pages=40, num_threads=2)
        seqs, rng = [cache.sequence(), cache.sequence()], np.random.default_rng(group)
        results.append([attend_step(cache, seqs, counts, rng, 2 * group)[1] for counts in ([300, 9], [1, 1])])
    for of_memory, of_cache in zip(*results, strict=True):
        np.testing.assert_array_equal(of_memory, of_cache)


def test_one_long_sequence_beside_short_ones_keeps_its_bits(kernel, rng):
    """With several threads its spans are computed apart and merged; with one they are not."""
    results = []
    seed = rng.integers(2**32)
    for num_threads in (1, 2, 3, 8):
        again = np.random.default_rng(seed)
        shape = {"num_layers": 1, "num_kv_heads": 4, "head_dim": 64, "page_size": 64, "num_pages": 60}
        with make_cache(**shape, num_threads=num_threads) as cache:
            seqs = [cache.sequence() for _ in range(3)]
            fill(cache, seqs, [3000, 20, 130], again)
            q, out, indptr = attend_step(cache, seqs, [1, 1, 2], again, 8)
            assert_matches_reference(cache, seqs, q, out, indptr)
            results.append(out)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


# ---- arguments


def test_q_itself_may_take_the_result(rng):
    cache = make_cache(num_layers=1)
    seqs = [cache.sequence(), cache.sequence()]
    q, k, v = rows(rng, 40, 4, 32), rows(rng, 40, 2, 32), rows(rng, 40, 2, 32)
    step = cache.step(seqs, [30, 10])
    expected = step.attend(0, q, k, v)
    assert step.attend(0, q, k, v, out=q) is q
    np.testing.assert_array_equal(q, expected)


def test_arguments_that_do_not_fit_are_refused_and_nothing_is_written(rng):
    cache = make_cache(num_layers=1)
    seq = cache.sequence()
    fill(cache, [seq], [20], rng)
    step = cache.step([seq], [3])
    before = cache._store.pool.data().tobytes()
    q, k = rows(rng, 3, 4, 32), rows(rng, 3, 2, 32)
    wide = rows(rng, 3, 8, 32)
    gaps = rows(rng, 3, 4, 64)[..., ::2]
    bad_q = [q[:2], q[:, :3], q[:, :0], q.astype("f8"), q.astype(">f4"), gaps, q[0], q.tolist(), None]
    bad_q += [rows(rng, 3, 4, 64), q[None], q.view(np.int32), q.astype(complex), q.astype(object)]
    bad_out = [q[:2], q.astype("f8"), q.astype("f2"), q.tolist(), gaps, wide, 3]
    bad_out += [np.broadcast_to(q[:1], q.shape), np.lib.stride_tricks.as_strided(wide, q.shape, (128, 4, 4))]
    bad_out += [wide[:, 1:5].view()[::-1][:2], k.repeat(2, 1)[:, ::-1].copy()[:2]]
    overlap = np.empty(500, np.float32)
    for arguments, options in [
        *(((0, bad, k, k), {}) for bad in bad_q),
        *(((0, q, bad, k), {}) for bad in (None, k[:2], q, k.astype("f8"), k[0], 1)),
        *(((0, q, k, bad), {}) for bad in (None, k[:2], q, k.astype("f8"), k[0], 1)),
        *(((bad, q, k, k), {}) for bad in (1, -1, None, 0.0)),
        *(((0, q, k, k), {"out": bad}) for bad in bad_out),
        *(((0, q, k, k), {"sm_scale": bad}) for bad in ("1", np.nan, np.inf, True, 1e300, [1], 1j)),
        *(((0, q, k, k), {"logits_soft_cap": bad}) for bad in ("1", np.nan, np.inf, True, -1.0, None)),
        *(((0, q, k, k), {"return_lse": bad}) for bad in (1, None, "yes")),
        *(
            ((0, q, k, k), {name: bad})
            for name in ("sinks", "alibi_slopes")
            for bad in ([1.0] * 3, 1.0, [np.nan] * 4, [np.inf] * 4, "1234", [True] * 4, [1j] * 4, [[1.0] * 4])
        ),
        ((0, q, k, k), {"alibi_slopes": [-np.inf] * 4}),
        ((0, overlap[:384].reshape(3, 4, 32), k, k), {"out": overlap[8:392].reshape(3, 4, 32)}),
        ((0, q, overlap[:192].reshape(3, 2, 32), k), {"out": overlap[100:484].reshape(3, 4, 32)}),
        ((0, q, k, overlap[:192].reshape(3, 2, 32)), {"out": overlap[100:484].reshape(3, 4, 32)}),
    ]:
        given = dict(zip(("layer", "q", "k", "v"), arguments, strict=True))
        wrong = [name for name, value in given.items() if value is not {"layer": 0, "q": q}.get(name, k)]
        reason = next(iter(options), "") or f"^{wrong[0]} |give k and v"
        with pytest.raises(ArgumentError, match=reason):
            step.attend(*arguments, **options)
    for name in ("windows", "causal", "num_sinks", "softcap"):
        with pytest.raises(TypeError):
            step.attend(0, q, k, k, **{name: 1})
    with pytest.raises(LayerNotWritten):
        step.attend(0, q)
    assert cache._store.pool.data().tobytes() == before
    cache.check()
    step.rollback()
    with pytest.raises(StepClosed):
        step.attend(0, q, k, k)


# ---- several callers


def test_two_threads_attend_at_once_with_the_bits_of_one():
    results = {}

    def serve(name, cache):
        rng = np.random.default_rng(3)
        seqs = [cache.sequence() for _ in range(3)]
        fill(cache, seqs, [700, 200, 100], rng)
        results[name] = [attend_step(cache, seqs, [1, 1, 1], rng, 4)[1] for _ in range(100)]

    with make_cache(page_size=64, num_pages=100, num_threads=2) as cache:
        workers = [threading.Thread(target=serve, args=(name, cache)) for name in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=60)
        serve("alone", cache)
        cache.check()
    np.testing.assert_array_equal(results[0], results["alone"])
    np.testing.assert_array_equal(results[1], results["alone"])


def test_close_waits_for_a_call_that_runs(rng):
    for _ in range(10):
        shape = {"num_layers": 1, "num_kv_heads": 8, "head_dim": 128, "page_size": 64, "num_pages": 64}
        cache = make_cache(**shape, num_threads=2)
        seq = cache.sequence()
        fill(cache, [seq], [4000], rng)
        step = cache.step([seq], [1])
        q, k = rows(rng, 1, 32, 128), rows(rng, 1, 8, 128)
        expected = step.attend(0, q, k, k)
        is_running, outcomes = threading.Event(), []

        def attend_until_closed(step=step, q=q, k=k, is_running=is_running, outcomes=outcomes):
            try:
                while True:
                    outcomes.append(step.attend(0, q, k, k))
                    is_running.set()
            except CacheClosed as closed:
                outcomes.append(closed)

        worker = threading.Thread(target=attend_until_closed)
        worker.start()
        is_running.wait(timeout=30)
        cache.close()
        worker.join(timeout=30)
        assert isinstance(outcomes.pop(), CacheClosed)
        assert all(np.array_equal(out, expected) for out in outcomes)
