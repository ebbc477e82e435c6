"""Pages of the caller: any size, order and mix, compared with the reference; and invalid lists."""

import ml_dtypes
import numpy as np
import pytest
from conftest import rows
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, EPS, stored, tolerances

import paged_kv
from paged_kv import ArgumentError, reference

KINDS = [*DTYPES, "int8"]


def unwritten(dtype):
    """What fills pages where no token lies, and their dtype."""
    return (255, np.uint8) if dtype == "int8" else (np.nan, DTYPES[dtype])


class Batch:
    """Random sequences over shuffled pages, NaN wherever no token lies; all arguments of one call."""

    def __init__(self, rng, lengths, news, page_size, num_kv_heads, dims, dtypes=("float32", "float32")):
        counts = [-(-length // page_size) for length in lengths]
        num_pages = sum(counts) + 3
        self.dtypes, self.scales = dtypes, {}
        shape = (num_pages, page_size, num_kv_heads)
        self.pages = [
            np.full((*shape, dim), *unwritten(kind)) for dim, kind in zip(dims, dtypes, strict=True)
        ]
        for name, dtype in zip(("k_scales", "v_scales"), dtypes, strict=True):
            if dtype == "int8":
                self.scales[name] = np.full(shape, np.nan, DTYPES["bfloat16"])
        #: As they are given, and as pages hold them.
        self.given = [
            [
                rows(rng, n, num_kv_heads, dim).astype(DTYPES.get(kind, "f4"))
                for dim, kind in zip(dims, dtypes, strict=True)
            ]
            for n in lengths
        ]
        self.tokens = [
            [stored(side, kind) for side, kind in zip(pair, dtypes, strict=True)] for pair in self.given
        ]
        ids = rng.permutation(num_pages)[: sum(counts)]
        self.lists = {
            "qo_indptr": np.cumsum([0, *news]),
            "kv_indptr": np.cumsum([0, *counts]),
            "kv_indices": ids,
            "kv_last_page_len": np.array([(n - 1) % page_size + 1 if n else 0 for n in lengths], np.int64),
        }
        for pair, begin, count in zip(self.given, self.lists["kv_indptr"], counts, strict=False):
            for side, name, tokens in zip(range(2), ("k_scales", "v_scales"), pair, strict=True):
                for i in range(count):
                    self._place(side, name, ids[begin + i], tokens[i * page_size : (i + 1) * page_size])

    def _place(self, side, name, page, tokens):
        if name in self.scales:
            codes, scales = reference.quantise_int8(tokens)
            self.scales[name][page, : len(tokens)] = scales
            tokens = codes.astype(np.int16) + 128
        self.pages[side][page, : len(tokens)] = tokens

    def move_to(self, lists):
        """Put the pages where another batch of the same lengths has them."""
        own, ids = self.lists["kv_indices"], lists["kv_indices"]
        for array in (*self.pages, *self.scales.values()):
            moved = np.full_like(array, 255 if array.dtype == np.uint8 else np.nan)
            moved[ids] = array[own]
            array[:] = moved
        self.lists = self.lists | {"kv_indices": ids}

    def check(self, q, out, lse, **options):
        """Hold out and lse against the reference, sequence by sequence."""
        indptr = self.lists["qo_indptr"]
        for pair, begin, end in zip(self.tokens, indptr, indptr[1:], strict=False):
            k, v = (array.astype(np.float64) for array in pair)
            own = q[begin:end].astype(np.float64)
            expected, expected_lse = reference.attend(own, k, v, **options, return_lse=True)
            atol, lse_atol = tolerances(own, k, v, stored=self.dtypes, **options)
            np.testing.assert_allclose(out[begin:end], expected, rtol=0, atol=atol)
            np.testing.assert_allclose(lse[begin:end], expected_lse, rtol=4 * EPS["float32"], atol=lse_atol)


@settings(max_examples=60)
@given(
    page_size=st.sampled_from([1, 2, 3, 7, 16, 63, 64, 65, 100, 256, 300]),
    order=st.sampled_from(["NHD", "HND", "gaps"]),
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 7]),
    dims=st.tuples(st.sampled_from([8, 40, 64, 128]), st.sampled_from([8, 24, 64, 128])),
    dtypes=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    sequences=st.lists(st.tuples(st.integers(1, 600), st.integers(1, 80)), max_size=4),
    window=st.sampled_from([None, 1, 50, 200]),
    causal=st.booleans(),
    index_dtype=st.sampled_from([np.int32, np.int64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_foreign_pages_give_what_the_reference_gives(
    page_size, order, num_kv_heads, group, dims, dtypes, sequences, window, causal, index_dtype, seed
):
    rng = np.random.default_rng(seed)
    lengths, news = [n for n, _ in sequences], [min(pair) for pair in sequences]
    if not causal:
        # More rows than tokens, and a sequence without any.
        lengths, news = [*lengths, 0], [new + 3 for new in (*news, 0)]
    batch = Batch(rng, lengths, news, page_size, num_kv_heads, dims, dtypes)
    pages = batch.pages
    if order == "HND":
        pages = [np.ascontiguousarray(p.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for p in pages]
    elif order == "gaps":
        wide = [
            np.full((*p.shape[:2], 2 * num_kv_heads, 2 * p.shape[3]), *unwritten(kind))
            for p, kind in zip(pages, dtypes, strict=True)
        ]
        for w, p in zip(wide, pages, strict=True):
            w[:, :, ::2, : p.shape[3]] = p
        pages = [w[:, :, ::2, : p.shape[3]] for w, p in zip(wide, pages, strict=True)]
    options = {"causal": causal}
    if causal and window:
        options |= {"window": window, "num_sink_tokens": 3}
    lists = {name: array.astype(index_dtype) for name, array in batch.lists.items()}
    q = rows(rng, sum(news), num_kv_heads * group, dims[0])
    out = np.full((*q.shape[:2], dims[1]), np.nan, np.float32)
    scales = batch.scales
    if order == "HND":
        scales = {
            name: np.ascontiguousarray(s.transpose(0, 2, 1)).transpose(0, 2, 1) for name, s in scales.items()
        }
    result, lse = paged_kv.paged_attention(q, *pages, **scales, **lists, **options, out=out, return_lse=True)
    assert result is out
    batch.check(q, out, lse, **options)
    alone = paged_kv.paged_attention(q, *pages, **scales, **lists, **options, num_threads=1)
    np.testing.assert_array_equal(alone, out)


def test_scales_belong_to_pages_of_uint8(rng):
    batch = Batch(rng, [20, 5], [2, 1], 4, 2, (16, 16), ("int8", "float32"))
    q, (k, v), lists = rows(rng, 3, 4, 16), batch.pages, batch.lists
    scales = batch.scales["k_scales"]
    paged_kv.paged_attention(q, k, v, k_scales=scales, **lists)
    for options, reason in (
        ({}, "k_pages is uint8; give k_scales"),
        ({"k_scales": scales.astype("f4")}, r"k_scales is float32 \[.*it must be bfloat16"),
        ({"k_scales": scales[:, :3]}, "it must be bfloat16"),
        ({"k_scales": scales, "v_scales": scales}, "v_pages is not uint8"),
    ):
        with pytest.raises(ArgumentError, match=reason):
            paged_kv.paged_attention(q, k, v, **options, **lists)
    with pytest.raises(ArgumentError, match="gaps along its last axis"):
        paged_kv.paged_attention(rows(rng, 3, 4, 8), k[..., ::2], v, k_scales=scales, **lists)
    with pytest.raises(ArgumentError, match="q is uint8"):
        paged_kv.paged_attention(np.zeros((3, 4, 16), np.uint8), k, v, k_scales=scales, **lists)


def test_pages_of_a_cache_and_of_somebody_else_give_the_same_bits(kernel, rng):
    k, v, q = rows(rng, 700, 2, 64), rows(rng, 700, 2, 64), rows(rng, 700, 4, 64)
    cache = paged_kv.PagedKVCache(1, 2, 64, dtype="float32", num_pages=20)
    with cache, cache.step([cache.sequence()], [700]) as step:
        expected = step.attend(0, q, k, v)
    for page_size in (1, 16, 64):
        num_pages = -(-700 // page_size)
        lists = {"qo_indptr": [0, 700], "kv_indptr": [0, num_pages], "kv_indices": np.arange(num_pages)}
        lists["kv_last_page_len"] = [(700 - 1) % page_size + 1]
        pages = [np.zeros((num_pages, page_size, 2, 64), np.float32) for _ in range(2)]
        for mine, tokens in zip(pages, (k, v), strict=True):
            mine.reshape(-1, 2, 64)[:700] = tokens
        out = paged_kv.paged_attention(q, *pages, **lists)
        np.testing.assert_array_equal(out, expected)


def test_sequences_may_share_pages_and_lists_may_be_longer_than_needed(rng):
    pages = [rows(rng, 4, 16, 1, 8) for _ in range(2)]
    lists = {"qo_indptr": [0, 1, 1, 2], "kv_indptr": [0, 2, 3, 5], "kv_last_page_len": [16, 1, 3]}
    lists["kv_indices"] = [3, 1, 0, 3, 1, 99, -5]  # behind the last sequence's
    q = rows(rng, 2, 1, 8)
    out = paged_kv.paged_attention(q, *pages, **lists)
    k, v = (np.concatenate([p[3], p[1]]) for p in pages)
    atol, _ = tolerances(q, k, v)
    np.testing.assert_allclose(out[:1], reference.attend(q[:1], k, v), rtol=0, atol=atol)
    np.testing.assert_allclose(out[1:], reference.attend(q[1:], k[:19], v[:19]), rtol=0, atol=atol)


def test_no_sequences_and_no_pages_give_nothing():
    pages = np.empty((0, 16, 1, 8), np.float32)
    lists = {"qo_indptr": [0], "kv_indptr": [0], "kv_indices": [], "kv_last_page_len": []}
    out, lse = paged_kv.paged_attention(np.empty((0, 2, 8), "f4"), pages, pages, **lists, return_lse=True)
    assert out.shape == (0, 2, 8) and lse.shape == (0, 2)
    lists = {"qo_indptr": [0, 2], "kv_indptr": [0, 0], "kv_indices": [], "kv_last_page_len": [0]}
    q = np.ones((2, 2, 8), np.float32)
    out, lse = paged_kv.paged_attention(q, pages, pages, **lists, causal=False, return_lse=True)
    assert (out == 0).all() and np.isneginf(lse).all()


@given(
    page_size=st.sampled_from([1, 3, 16, 64, 100]),
    group=st.sampled_from([1, 3]),
    dims=st.tuples(st.sampled_from([8, 64]), st.sampled_from([8, 24])),
    dtypes=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    sequences=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 80)), min_size=1, max_size=4),
    window=st.sampled_from([None, 50]),
    gives_slots=st.booleans(),
    order=st.sampled_from(["NHD", "HND"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_layers_of_a_batch_write_their_rows_and_attend_as_one_call_does(
    page_size, group, dims, dtypes, sequences, window, gives_slots, order, seed
):
    rng = np.random.default_rng(seed)
    lengths, news = [n for n, _ in sequences], [min(pair) for pair in sequences]
    made = first = None
    for _ in range(3):  # layers, whose lists are alike
        batch = Batch(rng, lengths, news, page_size, 2, dims, dtypes)
        if made is not None:
            batch.move_to(first)
        q = rows(rng, sum(news), 2 * group, dims[0])
        expected = paged_kv.paged_attention(q, *batch.pages, **batch.scales, **batch.lists, window=window)
        new = [
            np.concatenate(
                [pair[side][n - count :] for pair, n, count in zip(batch.given, lengths, news, strict=True)]
            )
            for side in range(2)
        ]
        slots = slots_of(batch, lengths, news, page_size)
        pages = [p.copy() for p in batch.pages]
        scales = {name: s.copy() for name, s in batch.scales.items()}
        for p in (*pages, *scales.values()):
            p.reshape(-1, *p.shape[2:])[slots] = 255 if p.dtype == np.uint8 else np.nan
        if order == "HND":
            pages = [np.ascontiguousarray(p.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for p in pages]
        lists = batch.lists | ({"slots": slots} if gives_slots else {})
        if made is None:
            first = batch.lists
            made = paged_kv.PagedBatch(num_pages=len(pages[0]), page_size=page_size, **lists)
        copies = [p.copy() for p in pages]
        other_scales = {name: s.copy() for name, s in scales.items()}
        once = paged_kv.paged_attention(
            q, *copies, **other_scales, **lists, k=new[0], v=new[1], window=window
        )
        out = made.attend(q, *pages, *new, **scales, window=window)
        for result in (once, out):
            np.testing.assert_array_equal(result, expected)
        for p, copy, whole in zip(pages, copies, batch.pages, strict=True):
            np.testing.assert_array_equal(p.astype("f4"), whole.astype("f4"))
            np.testing.assert_array_equal(copy.astype("f4"), whole.astype("f4"))
        for name, whole in batch.scales.items():
            for s in (scales, other_scales):
                np.testing.assert_array_equal(s[name].astype("f4"), whole.astype("f4"))
        np.testing.assert_array_equal(made.attend(q, *pages, **scales, window=window), expected)


def slots_of(batch, lengths, news, page_size):
    """Of the last tokens of each sequence."""
    slots = []
    for i, (length, new) in enumerate(zip(lengths, news, strict=True)):
        pages = batch.lists["kv_indices"][batch.lists["kv_indptr"][i] :]
        slots += [pages[p // page_size] * page_size + p % page_size for p in range(length - new, length)]
    return np.array(slots, np.int64)


def test_what_cannot_be_is_refused_and_writes_nothing(rng):
    batch = Batch(rng, [20, 5], [2, 1], 4, 2, (16, 16))
    q, (k, v), lists = rows(rng, 3, 4, 16), batch.pages, batch.lists
    out = np.full_like(q, 7)
    good = {"q": q, "k_pages": k, "v_pages": v, "out": out, **lists}

    def last(name, value):
        array = lists[name].copy()
        array[-1] = value
        return array

    cases = [
        *(("q", bad) for bad in (q[:2], q[0], q[:, :3], q[..., :8], q.astype("f8"), None)),
        *(("k_pages", bad) for bad in (k[0], k[:, :3], k[..., :12], k.astype("f8"), k[..., ::2], None)),
        *(("v_pages", bad) for bad in (v[0], v[:2], v[:, :, :1], v[..., :4], v.tolist())),
        *(("qo_indptr", bad) for bad in ([0, 2], [0, 2, 4], [1, 2, 3], [0, 4, 3], [0.0, 2.0, 3.0], [[0, 2]])),
        *(("kv_indptr", bad) for bad in (last("kv_indptr", 99), last("kv_indptr", 0), [0, 2**40, 2**40 + 1])),
        *(("kv_indices", bad) for bad in (last("kv_indices", len(k)), last("kv_indices", -1))),
        *(("kv_last_page_len", last("kv_last_page_len", bad)) for bad in (0, 5, -1)),
        *(("kv_last_page_len", bad) for bad in ([1], [1, 1, 1])),
        *(("kv_last_page_len", bad) for bad in (lists["kv_last_page_len"].astype("u4"), "x", None, {1: 2})),
        *(("window", bad) for bad in (0, -1, 2**31, 1.0, True, "1")),
        *(("num_sink_tokens", bad) for bad in (-1, 2**31, None, 1.5)),
        *(("causal", bad) for bad in (0, None, "no")),
        *(("return_lse", bad) for bad in (1, None)),
        *(("num_threads", bad) for bad in (0, -1, 1.0, 2**20)),
        *(("out", bad) for bad in (out[:2], out.astype("f2"), k[:3, :, :, :], q[:, ::-1])),
        *(("sinks", bad) for bad in ([1.0], np.ones((4, 1)), "abcd")),
    ]
    for name, bad in cases:
        with pytest.raises(ArgumentError, match=name):
            paged_kv.paged_attention(**{**good, name: bad})
    with pytest.raises(ArgumentError, match="kv_indptr must begin with 0, never fall and end at 1 at most"):
        paged_kv.paged_attention(**{**good, "kv_indices": [0]})
    for more in ({"window": 3}, {"alibi_slopes": [0.1] * 4}):
        with pytest.raises(ArgumentError, match="causal=False"):
            paged_kv.paged_attention(**good, causal=False, **more)
    with pytest.raises(TypeError, match="softcap"):
        paged_kv.paged_attention(**good, softcap=1.0)
    with pytest.raises(ArgumentError, match="sequence 1 has 6 rows of q and 5 tokens"):
        paged_kv.paged_attention(**{**good, "q": rows(rng, 8, 4, 16), "qo_indptr": [0, 2, 8], "out": None})
    assert (out == 7).all()


def test_out_may_lie_between_the_rows_of_its_inputs(rng):
    """Slices of one fused array: their extents overlap, their bytes do not."""
    pages = [rows(rng, 2, 16, 2, 8) for _ in range(2)]
    lists = {"qo_indptr": [0, 9], "kv_indptr": [0, 2], "kv_indices": [0, 1], "kv_last_page_len": [4]}
    fused = rows(rng, 9, 8, 8)
    q, out = fused[:, :4], fused[:, 4:]
    expected = paged_kv.paged_attention(q.copy(), *pages, **lists)
    assert paged_kv.paged_attention(q, *pages, **lists, out=out) is out
    np.testing.assert_array_equal(out, expected)
    assert paged_kv.paged_attention(q, *pages, **lists, out=q) is q
    np.testing.assert_array_equal(q, expected)
    with pytest.raises(ArgumentError, match="out overlaps q"):
        paged_kv.paged_attention(q, *pages, **lists, out=fused[:, 2:6])


def test_bfloat16_of_ml_dtypes_comes_and_goes(kernel, rng):
    pages = [rows(rng, 2, 16, 2, 8).astype(ml_dtypes.bfloat16) for _ in range(2)]
    lists = {"qo_indptr": [0, 9], "kv_indptr": [0, 2], "kv_indices": [0, 1], "kv_last_page_len": [4]}
    q = rows(rng, 9, 6, 8).astype(ml_dtypes.bfloat16)[:, ::3]
    out = paged_kv.paged_attention(q, *pages, **lists)
    wide = paged_kv.paged_attention(q.astype(np.float32), *pages, **lists)
    assert out.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(out.astype(np.float32), wide.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_batch_refuses_what_does_not_belong_to_it(rng):
    batch = Batch(rng, [20, 5], [2, 1], 4, 2, (16, 16))
    q, new, (k, v) = rows(rng, 3, 4, 16), rows(rng, 3, 2, 16), batch.pages
    made = paged_kv.PagedBatch(num_pages=len(k), page_size=4, **batch.lists)
    before = k.copy(), v.copy()
    in_one_place = np.lib.stride_tricks.as_strided(v, strides=(0, *v.strides[1:]))
    read_only = v.copy()
    read_only.flags.writeable = False
    for _ in range(2):  # at first, and where a call is repeated
        made.attend(q, k, v)
        for match, arguments in {
            "give k and v": (q, k, v, new),
            "give k and v, or": (q, k, v, None, new),
            "pages": (q, k[1:], v[1:]),
            "k has the shape": (q, k, v, new[:2], new),
            "v_pages is read-only": (q, k, read_only, new, new),
            "v_pages has several": (q, k, in_one_place, new, new),
            "q has": (q[:2], k, v),
        }.items():
            with pytest.raises(ArgumentError, match=match):
                made.attend(*arguments)
        for options in ({"window": 0}, {"num_sink_tokens": -1}, {"sinks": [1.0]}, {"return_lse": 1}):
            with pytest.raises(ArgumentError, match=next(iter(options))):
                made.attend(q, k, v, **options)
    everything = paged_kv.PagedBatch(num_pages=len(k), page_size=4, **batch.lists, causal=False)
    everything.attend(q, k, v)
    for options in ({"window": 3}, {"alibi_slopes": [0.1] * 4}):
        with pytest.raises(ArgumentError, match="causal=False"):
            everything.attend(q, k, v, **options)
    for slots in ([0, 1], [0, 1, len(k) * 4], [-1, 0, 1], [0.0, 1.0, 2.0], "abc"):
        with pytest.raises(ArgumentError, match="slots"):
            paged_kv.PagedBatch(num_pages=len(k), page_size=4, **batch.lists, slots=slots)
    lists = {"qo_indptr": [0, 3], "kv_indptr": [0, 1], "kv_indices": [0], "kv_last_page_len": [2]}
    in_one = {"qo_indptr": [0, 1, 3], "kv_indptr": [0, 1, 2], "kv_indices": [0, 0]}
    for shared in (lists | {"slots": [3, 4, 3]}, in_one | {"kv_last_page_len": [2, 3]}):
        made = paged_kv.PagedBatch(num_pages=len(k), page_size=4, causal=False, **shared)
        with pytest.raises(ArgumentError, match="two rows of k have one slot"):
            made.attend(q, k, v, new, new)
    with pytest.raises(ArgumentError, match="give slots"):
        more_rows = paged_kv.PagedBatch(num_pages=len(k), page_size=4, **lists, causal=False)
        more_rows.attend(q, k, v, new, new)
    for pages, old in zip((k, v), before, strict=True):
        np.testing.assert_array_equal(pages, old)
