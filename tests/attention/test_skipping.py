"""Reading less: the pages that a row chooses, and values that hardly count."""

import numpy as np
import pytest
from conftest import KERNELS, SEED, make_cache, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, tolerances

from paged_kv import Ageing, ArgumentError, _binding, kernels, reference

HEADS, GROUP, HEAD_DIM = 2, 3, 32


def filled(cache, lengths, rng):
    """Sequences of these lengths, and their keys and values."""
    seqs, held = [cache.sequence() for _ in lengths], []
    for seq, length in zip(seqs, lengths, strict=True):
        k, v = (rows(rng, length, HEADS, HEAD_DIM) for _ in range(2))
        with cache.step([seq], [length]) as step:
            for layer in range(cache.num_layers):
                step.write(layer, k, v)
        held.append([k, v])
    return seqs, held


def chosen_pages(q, keys, num_tokens, page_size, top_pages, num_fixed=1):
    """The pages that each kv head reads of a sequence: [num_kv_heads] sets, by the definition, in float64.

    keys : those of the page means, [pages, heads, dim]
    """
    num_pages = -(-num_tokens // page_size)
    newest = max(0, num_tokens - 64) // page_size
    candidates = np.arange(num_fixed, max(newest, num_fixed))
    wanted = top_pages - (num_pages - len(candidates))
    chosen = []
    for head in range(HEADS):
        scores = q[head * GROUP : (head + 1) * GROUP] @ keys[candidates, head].T / HEAD_DIM**0.5
        weights = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-np.inf))
        total = (weights / weights.sum(axis=1, keepdims=True)).sum(axis=0)
        best = candidates[np.argsort(-total, kind="stable")[: max(0, wanted)]]
        chosen.append(set(range(num_pages)) - set(candidates.tolist()) | set(best.tolist()))
    return chosen


def means_of(k, page_size):
    """As they are kept: of full pages, summed in order in float32, rounded to bfloat16."""
    num_full = len(k) // page_size
    pages = k[: num_full * page_size].reshape(num_full, page_size, HEADS, HEAD_DIM)
    sums = np.zeros((num_full, HEADS, HEAD_DIM), np.float32)
    for t in range(page_size):
        sums += pages[:, t]
    return (sums / np.float32(page_size)).astype(DTYPES["bfloat16"]).astype(np.float64)


def expected_of(q, k, v, page_size, top_pages):
    """Attention of one row to the pages it chooses, of all in float64."""
    out, num_tokens = np.zeros(q.shape[1:]), len(k)
    chosen = chosen_pages(q[0], means_of(k, page_size), num_tokens, page_size, top_pages)
    for head, pages in enumerate(chosen):
        there = np.flatnonzero(np.isin(np.arange(num_tokens) // page_size, list(pages)))
        own = slice(head * GROUP, (head + 1) * GROUP)
        of_head = slice(head, head + 1)
        out[own] = reference.attend(q[:, own], k[there, of_head], v[there, of_head], there)[0]
    return out, chosen


@settings(max_examples=40, deadline=None)
@given(
    page_size=st.sampled_from([16, 48, 64, 80, 128, 320]),
    lengths=st.lists(st.integers(1, 900), min_size=1, max_size=3),
    top_pages=st.integers(1, 30),
    num_threads=st.sampled_from([1, 2]),
    kernel=st.sampled_from(KERNELS),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_row_reads_the_pages_whose_mean_keys_score_highest(
    page_size, lengths, top_pages, num_threads, kernel, seed
):
    rng, before = np.random.default_rng(seed), kernels().active
    _binding.select_kernel(kernel)
    try:
        options = {"num_layers": 1, "num_pages": 200, "page_size": page_size, "num_threads": num_threads}
        with make_cache(**options) as cache:
            seqs, held = filled(cache, lengths, rng)
            q = 2 * rows(rng, len(lengths), HEADS * GROUP, HEAD_DIM)
            k, v = (rows(rng, len(lengths), HEADS, HEAD_DIM) for _ in range(2))
            with cache.step(seqs, [1] * len(seqs)) as step:
                out = step.attend(0, q, k, v, top_pages=top_pages, out=np.full_like(q, np.nan))
            for i, (old_k, old_v) in enumerate(held):
                all_k, all_v = np.concatenate([old_k, k[i : i + 1]]), np.concatenate([old_v, v[i : i + 1]])
                expected, _ = expected_of(q[i : i + 1], all_k, all_v, page_size, top_pages)
                atol = tolerances(q, all_k, all_v)[0]
                np.testing.assert_allclose(out[i], expected, rtol=0, atol=atol)
    finally:
        _binding.select_kernel(before)


@pytest.mark.parametrize("sinks", [0, 3, 40])
@pytest.mark.parametrize("is_of_cache", [True, False])
@pytest.mark.parametrize("length", [30, 255, 256, 700])
def test_a_row_with_a_window_chooses_among_what_it_sees(sinks, is_of_cache, length):
    rng, top_pages = np.random.default_rng(SEED), 9
    window = {"window": 250, "num_sink_tokens": sinks}
    with make_cache(num_layers=1, num_pages=60, **(window if is_of_cache else {})) as cache:
        (seq,), ((k, v),) = filled(cache, [length], rng)
        q, one = 2 * rows(rng, 1, HEADS * GROUP, HEAD_DIM), rows(rng, 1, HEADS, HEAD_DIM)
        k, v = np.concatenate([k, one]), np.concatenate([v, one])
        with cache.step([seq], [1]) as step:
            options = {} if is_of_cache else window
            out = step.attend(0, q, one, one, top_pages=top_pages, **options)
        positions = np.arange(length + 1)
        sees = (positions > length - 250) | (positions < sinks)
        fixed, means = set(range(-(-sinks // 16))), means_of(k, 16)
        first, newest = max(max(0, length - 249) // 16, len(fixed)), max(0, length + 1 - 64) // 16
        fixed |= set(range(max(newest, max(0, length - 249) // 16), length // 16 + 1))
        candidates = np.arange(first, max(first, newest))
        for head in range(HEADS):
            own = slice(head * GROUP, (head + 1) * GROUP)
            scores = q[0, own] @ means[candidates, head].T / HEAD_DIM**0.5
            weights = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-np.inf))
            total = (weights / weights.sum(axis=1, keepdims=True)).sum(axis=0)
            best = candidates[np.argsort(-total, kind="stable")[: max(0, top_pages - len(fixed))]]
            there = np.flatnonzero(sees & np.isin(positions // 16, [*fixed, *best.tolist()]))
            expected = reference.attend(
                q[:, own], k[there, head : head + 1], v[there, head : head + 1], there
            )
            atol = tolerances(q, k, v)[0]
            np.testing.assert_allclose(out[0, own], expected[0], rtol=0, atol=atol)


def test_as_many_pages_as_there_are_change_no_bit(kernel):
    rng = np.random.default_rng(SEED)
    with make_cache(num_layers=1, num_pages=100) as cache:
        seqs, _ = filled(cache, [700, 300], rng)
        q, k, v = (rows(rng, 2, heads, HEAD_DIM) for heads in (HEADS * GROUP, HEADS, HEADS))
        with cache.step(seqs, [1, 1]) as step:
            all_pages = step.attend(0, q, k, v)
            np.testing.assert_array_equal(step.attend(0, q, top_pages=44), all_pages)
            assert np.abs(step.attend(0, q, top_pages=20) - all_pages).max() > 0
            # What each sequence reads depends on itself.
            some = step.attend(0, q, top_pages=20)
            few = step.attend(0, q, top_pages=6)
        for i, seq in enumerate(seqs):
            seq.truncate(len(seq) - 1)
            with cache.step([seq], [1]) as step:
                own = slice(i, i + 1)
                np.testing.assert_array_equal(step.attend(0, q[own], k[own], v[own], top_pages=20), some[own])
                np.testing.assert_array_equal(step.attend(0, q[own], top_pages=6), few[own])


def test_a_page_that_is_written_again_has_another_mean():
    rng = np.random.default_rng(SEED)
    with make_cache(num_layers=1, num_pages=60) as cache:
        (seq,), ((k, v),) = filled(cache, [400], rng)
        q = 2 * rows(rng, 1, HEADS * GROUP, HEAD_DIM)
        for length in (400, 390, 133, 16):
            seq.truncate(length)
            new = [rows(rng, 400 - length, HEADS, HEAD_DIM) for _ in range(2)]
            k, v = (np.concatenate([old[:length], add]) for old, add in zip((k, v), new, strict=True))
            if length < 400:
                with cache.step([seq], [400 - length]) as step:
                    step.write(0, *new)
            one = [rows(rng, 1, HEADS, HEAD_DIM) for _ in range(2)]
            step = cache.step([seq], [1])
            out = step.attend(0, q, *one, top_pages=8)
            step.rollback()
            expected, _ = expected_of(q, np.concatenate([k, one[0]]), np.concatenate([v, one[1]]), 16, 8)
            np.testing.assert_allclose(out[0], expected, rtol=0, atol=tolerances(q, k, v)[0])


def test_forks_and_found_prefixes_have_the_means_of_their_pages():
    rng = np.random.default_rng(SEED)
    with make_cache(num_layers=1, num_pages=60) as cache:
        ids = list(range(320))
        seq, k = cache.sequence(), rows(rng, 320, HEADS, HEAD_DIM)
        with cache.step([seq], [ids]) as step:
            step.write(0, k, -k)
        q, one = 2 * rows(rng, 1, HEADS * GROUP, HEAD_DIM), rows(rng, 1, HEADS, HEAD_DIM)
        outs = []
        for other in (seq.fork(), seq, cache.sequence([*ids, 3])):
            step = cache.step([other], [1])
            outs.append(step.attend(0, q, one, one, top_pages=8))
            step.rollback()
        np.testing.assert_array_equal(outs[0], outs[1])
        np.testing.assert_array_equal(outs[0], outs[2])


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "int8"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "precision_policy": Ageing(), "num_sink_tokens": 0},
        {"dtype": "int4"},
    ],
    ids=str,
)
def test_pages_of_any_format_are_chosen(options):
    rng = np.random.default_rng(SEED)
    with make_cache(num_layers=1, num_pages=60, page_size=64, **options) as cache:
        (seq,), _ = filled(cache, [1000], rng)
        k, v = seq.gather(0)
        q, one = 2 * rows(rng, 1, HEADS * GROUP, HEAD_DIM), rows(rng, 1, HEADS, HEAD_DIM)
        with cache.step([seq], [1]) as step:
            out = step.attend(0, q, one, one, top_pages=9)
        k, v = (np.concatenate([old, one]) for old in (k, v))
        expected, chosen = expected_of(q, k, v, 64, 9)
        assert all(len(pages) == 9 for pages in chosen)
        np.testing.assert_allclose(out[0], expected, rtol=0, atol=2e-2)


def test_a_step_of_several_tokens_reads_all():
    rng = np.random.default_rng(SEED)
    with make_cache(num_layers=1, num_pages=60) as cache:
        seqs, _ = filled(cache, [300], rng)
        q, k = rows(rng, 2, HEADS * GROUP, HEAD_DIM), rows(rng, 2, HEADS, HEAD_DIM)
        with cache.step(seqs, [2]) as step:
            plain = step.attend(0, q, k, k)
            np.testing.assert_array_equal(step.attend(0, q, top_pages=4, skip_values_below=0.5), plain)
            assert step.values_not_read == 0


# ---- values


@settings(max_examples=60, deadline=None)
@given(
    page_size=st.sampled_from([16, 64, 80, 128]),
    lengths=st.lists(st.integers(1, 1500), min_size=1, max_size=3),
    share=st.sampled_from([1e-4, 1e-2, 0.3, 1.0]),
    sharpness=st.sampled_from([0.5, 4.0, 20.0]),
    num_threads=st.sampled_from([1, 2]),
    kernel=st.sampled_from(KERNELS),
    dtype=st.sampled_from(["float32", "bfloat16", "int8"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_left_out_is_at_most_the_share_of_the_largest_value(
    page_size, lengths, share, sharpness, num_threads, kernel, dtype, seed
):
    rng, before = np.random.default_rng(seed), kernels().active
    _binding.select_kernel(kernel)
    try:
        options = {"num_layers": 1, "num_pages": 300, "page_size": page_size, "num_threads": num_threads}
        with make_cache(**options, dtype=dtype) as cache:
            seqs, held = filled(cache, lengths, rng)
            q = sharpness * rows(rng, len(lengths), HEADS * GROUP, HEAD_DIM)
            k, v = (rows(rng, len(lengths), HEADS, HEAD_DIM) for _ in range(2))
            with cache.step(seqs, [1] * len(seqs)) as step:
                exact = step.attend(0, q, k, v)
                out, lse = step.attend(0, q, skip_values_below=share, return_lse=True)
                _, exact_lse = step.attend(0, q, return_lse=True)
                assert 0 <= step.values_not_read < 1
            np.testing.assert_array_equal(lse, exact_lse)  # the denominator is whole
            for i, (_, old_v) in enumerate(held):
                largest = np.abs(np.concatenate([old_v, v[i : i + 1]])).max()
                assert np.abs(out[i] - exact[i]).max() <= share * largest * 1.01 + 1e-4
    finally:
        _binding.select_kernel(before)


def test_runs_that_get_next_to_nothing_are_left_out_by_any_number_of_threads():
    """A sink that gets nearly all attention; the bits do not depend on the threads, nor on the batch."""
    outs = []
    for num_threads, num_seqs in ((1, 1), (2, 1), (2, 3)):
        with make_cache(num_layers=1, num_pages=800, num_threads=num_threads) as cache:
            own = np.random.default_rng(SEED)
            k, v = (rows(own, 4000, HEADS, HEAD_DIM) for _ in range(2))
            q = np.repeat(rows(own, 1, HEADS, HEAD_DIM), GROUP, axis=1)
            k[0] = 5 * q[0, ::GROUP]
            seqs = [cache.sequence() for _ in range(num_seqs)]
            with cache.step(seqs, [4000] * num_seqs) as step:
                step.write(0, *(np.concatenate([side] * num_seqs) for side in (k, v)))
            one = rows(own, 1, HEADS, HEAD_DIM)
            with cache.step(seqs, [1] * num_seqs) as step:
                sides = [np.concatenate([side] * num_seqs) for side in (q, one, one)]
                out = step.attend(0, *sides, skip_values_below=1e-2)
                assert step.values_not_read > 0.5
            outs.append(out[0])
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


def test_nan_stays_where_it_is():
    rng = np.random.default_rng(SEED)
    with make_cache(num_layers=1, num_pages=100) as cache:
        seqs, _ = filled(cache, [500, 500], rng)
        q, k = rows(rng, 2, HEADS * GROUP, HEAD_DIM), rows(rng, 2, HEADS, HEAD_DIM)
        q[0, 0] = np.nan
        with cache.step(seqs, [1, 1]) as step:
            out = step.attend(0, q, k, k, skip_values_below=0.5, top_pages=8)
        assert np.isnan(out[0, 0]).all() and np.isfinite(out[0, GROUP:]).all() and np.isfinite(out[1]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_pages": 0}, "top_pages is 0, outside 1"),
        ({"top_pages": 1.5}, "top_pages"),
        ({"skip_values_below": -0.1}, "skip_values_below"),
        ({"skip_values_below": "much"}, "skip_values_below"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with make_cache() as cache, cache.step([cache.sequence()], [1]) as step:
        q = np.zeros((1, 2, 32), np.float32)
        step.write(0, q, q)
        step.write(1, q, q)
        with pytest.raises(ArgumentError, match=message):
            step.attend(0, q, **options)
