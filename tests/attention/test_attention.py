"""Every option of attention, alone and together, against the float64 reference; and the merging of parts."""

import itertools

import numpy as np
import pytest
from conftest import KERNELS, fill, make_cache, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, EPS, STORED, pair_of, stored, tolerances

import paged_kv
from paged_kv import ArgumentError, _binding, reference

BFLOAT16 = DTYPES["bfloat16"]


@st.composite
def cases(draw):
    """A cache's shape, the options of one call, and the lengths of the sequences."""
    shape = {
        "num_kv_heads": draw(st.sampled_from([1, 2, 3])),
        "head_dim": draw(st.sampled_from([8, 16, 40, 64, 72, 128, 256])),
        "dtype": draw(st.sampled_from(STORED)),
        "page_size": draw(st.sampled_from([16, 48, 64, 80, 272])),
    }
    if draw(st.booleans()):
        shape["head_dim_v"] = draw(st.sampled_from([8, 24, 64, 136]))
    if draw(st.booleans()):
        shape["window"] = draw(st.sampled_from([1, 2, 63, 64, 100, 255, 300]))
        shape["num_sink_tokens"] = draw(st.sampled_from([0, 1, 4, 65]))
    group = draw(st.sampled_from([1, 2, 3, 4, 5, 8]))
    num_q_heads = group * shape["num_kv_heads"]
    numbers = st.floats(-3, 3, width=32)
    options = {}
    if draw(st.booleans()):
        options["sm_scale"] = draw(st.sampled_from([0.0, 0.1, 1.0, -0.5]))
    if draw(st.booleans()):
        options["logits_soft_cap"] = draw(st.sampled_from([0.0, 0.5, 5.0, 30.0, 1e6]))
    if draw(st.booleans()):
        some = numbers | st.just(-np.inf)
        options["sinks"] = np.array(draw(st.lists(some, min_size=num_q_heads, max_size=num_q_heads)))
    if draw(st.booleans()):
        some = st.floats(-0.5, 0.5, width=32)
        options["alibi_slopes"] = np.array(draw(st.lists(some, min_size=num_q_heads, max_size=num_q_heads)))
    edges = sorted({e + off for e in (1, 16, 64, 240, 256, 272, 512) for off in (-1, 0, 1)} - {0})
    lengths = draw(st.lists(st.sampled_from(edges), min_size=1, max_size=3))
    news = [draw(st.sampled_from([n for n in (1, 2, 7, 70, length) if n <= length])) for length in lengths]
    q_dtype, kv_dtype = (draw(st.sampled_from(list(DTYPES))) for _ in range(2))
    return shape, num_q_heads, options, lengths, news, q_dtype, kv_dtype, draw(st.integers(0, 2**32 - 1))


@settings(max_examples=60)
@given(cases())
def test_options_together_give_what_the_reference_gives(case):
    shape, num_q_heads, options, lengths, news, q_dtype, kv_dtype, seed = case
    rng = np.random.default_rng(seed)
    dims = shape["head_dim"], shape.get("head_dim_v", shape["head_dim"])
    seen = {name: shape[name] for name in ("window", "num_sink_tokens") if name in shape}
    pages = sum(-(-length // shape["page_size"]) + 1 for length in lengths)
    before = paged_kv.kernels().active
    num_kv_heads, dtype = shape["num_kv_heads"], shape["dtype"]
    # What is appended is representable in the arrays' dtype.
    given = [[stored(rows(rng, n, num_kv_heads, dim), kv_dtype) for dim in dims] for n in lengths]
    kept = [[stored(side, kind) for side, kind in zip(pair, pair_of(dtype), strict=True)] for pair in given]
    new = np.concatenate([np.arange(length) >= length - n for length, n in zip(lengths, news, strict=True)])
    k, v = (np.concatenate([pair[i] for pair in given]) for i in range(2))
    given_k, given_v = (array[new].astype(DTYPES[kv_dtype]) for array in (k, v))
    q = rows(rng, sum(news), num_q_heads, dims[0]).astype(DTYPES[q_dtype])
    try:
        for kernel in KERNELS:
            _binding.select_kernel(kernel)
            with make_cache(num_layers=1, num_pages=pages, num_threads=2, **shape) as cache:
                seqs = [cache.sequence() for _ in lengths]
                for seq, pair, length, n in zip(seqs, given, lengths, news, strict=True):
                    if length > n:
                        with cache.step([seq], [length - n]) as step:
                            step.write(0, *(array[: length - n] for array in pair))
                with cache.step(seqs, news) as step:
                    out = np.full((len(q), num_q_heads, dims[1]), np.nan, q.dtype)
                    result, lse = step.attend(0, q, given_k, given_v, out=out, return_lse=True, **options)
                    again = step.attend(0, q, **options)
                assert result is out and lse.dtype == np.float32
                np.testing.assert_array_equal(again.view(np.uint8), out.view(np.uint8))
                cache.check()
            ends = np.cumsum(news)
            for pair, end, n in zip(kept, ends, news, strict=True):
                own = slice(end - n, end)
                wide_q = q[own].astype(np.float64)
                expected, expected_lse = reference.attend(wide_q, *pair, **seen, **options, return_lse=True)
                atol, lse_atol = tolerances(wide_q, *pair, dtype=q_dtype, stored=dtype, **options)
                np.testing.assert_allclose(out[own].astype(np.float64), expected, rtol=0, atol=atol)
                np.testing.assert_allclose(lse[own], expected_lse, rtol=4 * EPS["float32"], atol=lse_atol)
    finally:
        _binding.select_kernel(before)


@pytest.mark.parametrize("head_dim", [8, 40, 128])
@pytest.mark.parametrize("cap", [1e-3, 0.5, 30.0, 50.0, 1e4, 1e20, 3e38])
def test_a_soft_cap_keeps_relative_accuracy(kernel, head_dim, cap):
    """One token: its lse is its score.  Scores far below the cap must come through as they are."""
    scores = np.geomspace(1e-6, 1e4, 200).astype(np.float32)
    scores = np.concatenate([scores, -scores])
    q = np.zeros((len(scores), 1, head_dim), np.float32)
    q[:, 0, 0] = scores
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": head_dim, "num_pages": len(scores)}
    with make_cache(**shape, max_sequences=len(scores)) as cache:
        k = np.zeros((len(scores), 1, head_dim), np.float32)
        k[:, 0, 0] = 1
        step = cache.step([cache.sequence() for _ in scores], [1] * len(scores))
        _, lse = step.attend(0, q, k, k, sm_scale=1.0, logits_soft_cap=cap, return_lse=True)
    expected = cap * np.tanh(scores.astype(np.float64) / cap)
    np.testing.assert_allclose(lse[:, 0], expected, rtol=6 * EPS["float32"])


OPTIONS = {
    "logits_soft_cap": 2.0,
    "sinks": np.array([0.5, -np.inf, 1.0, -2.0], np.float32),
    "alibi_slopes": np.array([0.25, 0.0, 0.01, -0.003], np.float32),
    "return_lse": True,
}


@settings(max_examples=20)
@given(
    chosen=st.sets(st.sampled_from(list(OPTIONS))),
    window=st.sampled_from([None, 70, 300]),
    head_dim=st.sampled_from([40, 64]),
    head_dim_v=st.sampled_from([None, 24]),
    q_dtype=st.sampled_from(["float32", "bfloat16"]),
    dtype=st.sampled_from(["bfloat16", "int8", ("int8", "int4"), ("bfloat16", "int8")]),
    num_threads=st.integers(1, 4),
    cuts=st.sets(st.integers(1, 599), max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_bits_are_the_same_for_any_chunks_and_threads(
    chosen, window, head_dim, head_dim_v, q_dtype, dtype, num_threads, cuts, seed
):
    rng = np.random.default_rng(seed)
    shape = {"num_layers": 1, "head_dim": head_dim, "head_dim_v": head_dim_v, "num_pages": 60}
    shape |= {"window": window, "num_sink_tokens": 3, "dtype": dtype, "page_size": 16}
    options = {name: OPTIONS[name] for name in chosen}
    dims = (4, head_dim), (2, head_dim), (2, head_dim_v or head_dim)
    q, k, v = (rows(rng, 600, *heads_and_dim) for heads_and_dim in dims)
    q = q.astype(DTYPES[q_dtype])
    with make_cache(**shape) as whole, make_cache(**shape, num_threads=num_threads) as parts:
        with whole.step([whole.sequence()], [600]) as step:
            expected = step.attend(0, q, k, v, **options)
        seq, got = parts.sequence(), []
        for begin, end in itertools.pairwise([0, *sorted(cuts), 600]):
            with parts.step([parts.sequence(), seq], [1, end - begin]) as step:
                here = [np.concatenate([a[:1], a[begin:end]]) for a in (q, k, v)]
                result = step.attend(0, *here, **options)
                got.append(tuple(part[1:] for part in result) if "return_lse" in chosen else result[1:])
    if "return_lse" in chosen:
        for i in range(2):
            np.testing.assert_array_equal(np.concatenate([pair[i] for pair in got]), expected[i])
    else:
        np.testing.assert_array_equal(np.concatenate(got), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", ("int8", "int4")], ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 72, 96, 128])
def test_many_rows_at_once_have_the_bits_of_one(kernel, head_dim, dtype, rng):
    """Many rows have loops of their own: another order of steps, not of sums."""
    q, k, v = (rows(rng, 150, heads, head_dim) for heads in (6, 2, 2))
    q = q.astype(DTYPES.get(dtype, "f4"))
    shape = {"num_layers": 1, "head_dim": head_dim, "dtype": dtype, "num_threads": 1}
    with make_cache(**shape) as cache:
        with cache.step([cache.sequence()], [150]) as step:
            expected = step.attend(0, q, k, v, return_lse=True)
        seq = cache.sequence()
        for begin, end in itertools.pairwise([0, 3, 100, *range(101, 151)]):
            with cache.step([seq], [end - begin]) as step:
                got = step.attend(0, q[begin:end], k[begin:end], v[begin:end], return_lse=True)
            for part, whole in zip(got, expected, strict=True):
                np.testing.assert_array_equal(part, whole[begin:end])


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("what", ["k", "v"])
@pytest.mark.parametrize("dtype", ["float32", "int8", ("int8", "int4")], ids=str)
def test_a_nan_touches_the_rows_that_see_it_and_no_other(kernel, dtype, what, group, rng):
    """Rows of a prompt are folded together, also those that see less of a run."""
    q, k, v = rows(rng, 130, 2 * group, 32), rows(rng, 130, 2, 32), rows(rng, 130, 2, 32)
    with make_cache(num_layers=1, num_pages=32, dtype=dtype) as cache:
        with cache.step([cache.sequence()], [130]) as step:
            expected = step.attend(0, q, k, v)
        (k if what == "k" else v)[100, 0, 5] = np.nan
        with cache.step([cache.sequence()], [130]) as step:
            got = step.attend(0, q, k, v)
    np.testing.assert_array_equal(got[:100], expected[:100])
    np.testing.assert_array_equal(got[:, group:], expected[:, group:])
    assert np.isnan(got[100:, :group, 5]).all()


def test_what_was_written_is_attended_to_with_the_same_bits(kernel, rng):
    q, k, v = rows(rng, 30, 4, 32), rows(rng, 30, 2, 32), rows(rng, 30, 2, 32)
    with make_cache(num_layers=2) as cache:
        step = cache.step([cache.sequence()], [30])
        expected = step.attend(0, q, k, v)
        step.write(1, k, v)
        np.testing.assert_array_equal(step.attend(1, q), expected)
        np.testing.assert_array_equal(step.attend(0, q), expected)
        step.commit()


def test_scores_of_minus_infinity_alone_give_nothing(kernel, rng):
    """As a row that sees nothing: so its part counts for nothing when parts are merged."""
    q, k, v = np.ones((1, 2, 32), np.float32), np.zeros((1, 2, 32), np.float32), rows(rng, 1, 2, 32)
    k[..., 0] = -np.inf
    v[0, 0, 3] = np.inf
    with make_cache(num_layers=1) as cache:
        step = cache.step([cache.sequence()], [1])
        out, lse = step.attend(0, q, k, v, return_lse=True)
        assert (out == 0).all() and np.isneginf(lse).all()
        v[0, 0, 3] = 1
        out, lse = step.attend(0, q, k, v, sinks=[1.0, 2.0], return_lse=True)
        assert (out == 0).all()
        np.testing.assert_allclose(lse[0], [1.0, 2.0], rtol=1e-6)


def test_a_nan_in_one_head_of_k_touches_no_other_with_every_option(kernel, rng):
    q, k, v = rows(rng, 40, 4, 32), rows(rng, 40, 2, 32), rows(rng, 40, 2, 32)
    k[3, 0, 5] = np.nan
    with make_cache(num_layers=1) as cache:
        step = cache.step([cache.sequence()], [40])
        out, lse = step.attend(0, q, k, v, **OPTIONS)
    assert np.isnan(out[3:, :2]).all() and np.isnan(lse[3:, :2]).all()
    assert np.isfinite(out[:3]).all() and np.isfinite(out[:, 2:]).all() and np.isfinite(lse[:, 2:]).all()


# ---- parts


@pytest.mark.parametrize("as_list", [False, True])
def test_merged_parts_are_the_whole(kernel, as_list, rng):
    cache = make_cache(num_layers=1, num_pages=40, page_size=16)
    seqs = [cache.sequence() for _ in range(3)]
    written = [fill(cache, [seq], [n], rng)[0] for seq, n in zip(seqs, (40, 100, 70), strict=True)]
    q = rows(rng, 1, 4, 32)
    states = []
    for k, v in written:
        lists = {"qo_indptr": [0, 1], "kv_indptr": [0, len(k)], "kv_indices": np.arange(len(k))}
        pages = k[:, None], v[:, None]
        states.append(
            paged_kv.paged_attention(q, *pages, **lists, kv_last_page_len=[1], causal=False, return_lse=True)
        )
    states.append((np.full_like(q, np.nan), np.full((1, 4), -np.inf, np.float32)))  # counts for nothing
    outputs, lses = zip(*states, strict=True)
    out, lse = paged_kv.merge_states(*((outputs, lses) if as_list else (np.stack(outputs), np.stack(lses))))
    k, v = (np.concatenate([pair[i] for pair in written]) for i in range(2))
    expected, expected_lse = reference.attend(q, k, v, return_lse=True)
    atol, lse_atol = tolerances(q, k, v)
    np.testing.assert_allclose(out, expected, rtol=0, atol=atol)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=lse_atol)


def test_parts_without_anything_merge_to_nothing():
    nothing = np.full((2, 3, 1, 8), np.nan, np.float32), np.full((2, 3, 1), -np.inf, np.float32)
    out, lse = paged_kv.merge_states(*nothing)
    assert (out == 0).all() and np.isneginf(lse).all()


def test_parts_of_16_bits_keep_their_dtype(rng):
    outputs = rows(rng, 2, 5, 3, 16).astype(BFLOAT16)
    lses = rows(rng, 2, 5, 3)
    out, lse = paged_kv.merge_states(outputs, lses)
    weights = np.exp(lses.astype(np.float64))
    expected = (weights[..., None] * outputs.astype(np.float64)).sum(0) / weights.sum(0)[..., None]
    assert out.dtype == BFLOAT16 and lse.dtype == np.float32
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=2.0**-8, atol=1e-6)
    np.testing.assert_allclose(lse, np.log(weights.sum(0)), rtol=1e-6, atol=1e-6)


def test_parts_that_do_not_fit_are_refused(rng):
    outputs, lses = rows(rng, 2, 5, 3, 16), rows(rng, 2, 5, 3)
    for bad_outputs, bad_lses, reason in (
        (outputs, lses[:1], "2 outputs and 1 lses"),
        ([], [], "0 outputs"),
        (1, lses, "must be lists"),
        (outputs, None, "must be lists"),
        (outputs[..., :12], lses, r"outputs\[0\] has the shape"),
        (outputs[0], lses[0], "5 outputs|shape"),
        ([outputs[0], outputs[1][:4]], lses, r"outputs\[1\] has the shape"),
        (outputs, lses.astype("f8"), r"lses\[0\] is float64"),
        (outputs, lses[:, :4], r"lses\[0\] is float32 \[4, 3\]"),
        (outputs.astype("f8"), lses, r"outputs\[0\] is float64"),
        (outputs.tolist(), lses, r"outputs\[0\] must be"),
    ):
        with pytest.raises(ArgumentError, match=reason):
            paged_kv.merge_states(bad_outputs, bad_lses)
