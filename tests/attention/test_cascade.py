"""Cascade: pages that several sequences begin with are read once for all of them, and no bit differs."""

import numpy as np
import pytest
from conftest import KERNELS, fill, make_cache, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES

import paged_kv
from paged_kv import _binding, reference

SHARE_NONE, SHARE_WHAT_PAYS, SHARE_ALL = range(3)


def grow(cache, forest, rng):
    """Sequences from (parent, share of its tokens, own tokens); the first has no parent."""
    seqs = []
    for parent, share, own in forest:
        if not seqs:
            seq = cache.sequence()
        else:
            of = seqs[parent % len(seqs)]
            seq = of.fork(at=int(share * len(of)))
        if own:
            fill(cache, [seq], [own], rng)
        seqs.append(seq)
    return seqs


def attended(step, may_share, layer, q, k, v, **options):
    """Output and lse with or without sharing; the arrays are poisoned before."""
    step._plan.handle.batch.may_share = may_share
    before = step.bytes_not_read
    poisoned = np.full((*q.shape[:2], v.shape[2]), np.nan, q.dtype)
    out, lse = step.attend(layer, q, k, v, out=poisoned, return_lse=True, **options)
    return out, lse, step.bytes_not_read - before


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


FORESTS = st.lists(
    st.tuples(
        st.integers(0, 50), st.sampled_from([1.0, 1.0, 0.97, 0.6, 0.3]), st.sampled_from([0, 1, 60, 256, 400])
    ),
    min_size=2,
    max_size=9,
)


@st.composite
def cases(draw):
    shape = {
        "num_kv_heads": draw(st.sampled_from([1, 2, 3, 6])),
        "head_dim": draw(st.sampled_from([8, 32, 64, 128])),
        "dtype": draw(st.sampled_from(list(DTYPES))),
        "page_size": draw(st.sampled_from([16, 48, 64, 80, 272])),
        "num_threads": draw(st.sampled_from([1, 2, 3])),
    }
    if draw(st.booleans()):
        shape["head_dim_v"] = draw(st.sampled_from([8, 24, 64]))
    group = draw(st.sampled_from([1, 2, 3, 4, 8]))
    num_q_heads, options = group * shape["num_kv_heads"], {}
    if draw(st.booleans()):
        options["logits_soft_cap"] = draw(st.sampled_from([0.5, 30.0]))
    if draw(st.booleans()):
        options["sinks"] = np.linspace(-1, 1, num_q_heads, dtype=np.float32)
    if draw(st.booleans()):
        options["alibi_slopes"] = np.linspace(-0.3, 0.3, num_q_heads, dtype=np.float32)
    forest = [(0, 1.0, draw(st.sampled_from([1, 300, 512, 900]))), *draw(FORESTS)]
    counts = draw(st.lists(st.sampled_from([1, 1, 1, 2, 5, 40]), min_size=len(forest), max_size=len(forest)))
    return shape, num_q_heads, options, forest, counts, draw(st.integers(0, 2**32 - 1))


@settings(max_examples=60)
@given(cases())
def test_random_forests_give_the_same_bits_on_every_kernel(case):
    shape, num_q_heads, options, forest, counts, seed = case
    before = paged_kv.kernels().active
    dims = shape["head_dim"], shape.get("head_dim_v", shape["head_dim"])
    num_pages = sum(own // shape["page_size"] + 4 for _, _, own in forest) + 4
    try:
        for kernel in KERNELS:
            _binding.select_kernel(kernel)
            rng = np.random.default_rng(seed)
            with make_cache(num_layers=1, num_pages=num_pages, max_sequences=16, **shape) as cache:
                seqs = grow(cache, forest, rng)
                step = cache.step(seqs, counts)
                q = rows(rng, sum(counts), num_q_heads, dims[0]).astype(DTYPES[shape["dtype"]])
                k, v = (rows(rng, sum(counts), shape["num_kv_heads"], dim) for dim in dims)
                plain = attended(step, SHARE_NONE, 0, q, k, v, **options)
                assert plain[2] == 0
                for may_share in (SHARE_ALL, SHARE_WHAT_PAYS):
                    shared = attended(step, may_share, 0, q, k, v, **options)
                    for mine, other in zip(shared[:2], plain[:2], strict=True):
                        assert not np.isnan(mine.astype(np.float32)).any()
                        np.testing.assert_array_equal(bits(mine), bits(other))
                step.commit()
                cache.check()
    finally:
        _binding.select_kernel(before)


def shared_cache(num_sharers, num_shared, num_own, rng, **changes):
    shape = {"num_kv_heads": 8, "head_dim": 64, "page_size": 64, "num_pages": 200, "max_sequences": 40}
    cache = make_cache(**shape | changes)
    first = cache.sequence()
    fill(cache, [first], [num_shared], rng)
    seqs = [first, *first.fork(num_sharers - 1)]
    if num_own:
        fill(cache, seqs, [num_own] * num_sharers, rng)
    return cache, seqs


def test_it_is_on_by_itself_and_says_what_was_not_read(rng):
    cache, seqs = shared_cache(5, 1024, 3, rng)
    token_bytes = cache.stats().pool_bytes // (200 * 64)
    with cache.step(seqs, [1] * 5) as step:
        for layer in range(cache.num_layers):
            q, k, v = (rows(rng, 5, heads, 64) for heads in (16, 8, 8))
            out = step.attend(layer, q, k, v)
        assert step.bytes_not_read == 4 * 1024 * token_bytes
        step.commit()
    assert cache.stats().bytes_not_read == 4 * 1024 * token_bytes
    keys, values = seqs[2].gather(1)
    expected = reference.attend(q[2:3], keys, values)
    np.testing.assert_allclose(out[2], expected[0], rtol=0, atol=1e-5)
    step = cache.step(seqs, [1] * 5)
    step.attend(0, q, k, v)
    assert step.bytes_not_read == 4 * 1024 * token_bytes // cache.num_layers
    step.rollback()
    assert cache.stats().bytes_not_read == 4 * 1024 * token_bytes
    cache.close()


@pytest.mark.parametrize(
    ("num_sharers", "num_shared", "counts", "num_q_heads"),
    [(5, 100, 1, 16), (2, 256, 1, 16), (5, 1024, 100, 16), (5, 1024, 1, 128)],
    ids=["less than a span", "one span", "prompts", "many queries each"],
)
def test_what_does_not_pay_is_read_as_ever(rng, num_sharers, num_shared, counts, num_q_heads):
    cache, seqs = shared_cache(num_sharers, num_shared, 3, rng)
    with cache.step(seqs, [counts] * num_sharers) as step:
        for layer in range(cache.num_layers):
            num_rows = counts * num_sharers
            step.attend(layer, *(rows(rng, num_rows, heads, 64) for heads in (num_q_heads, 8, 8)))
        assert step.bytes_not_read == 0


def test_prompts_of_the_prefix_cache_are_read_once(rng):
    """Sequences share by matching, at two depths, and others are beside them."""
    cache = make_cache(
        num_layers=1, num_kv_heads=8, head_dim=64, page_size=64, num_pages=200, max_sequences=12
    )
    system, few_shot = list(range(1024)), list(range(2000, 2512))
    prompts = [[*system, *few_shot, 1], [*system, *few_shot, 2], [*system, 3], [9, 8, 7], [*system, 4]]
    seqs = []
    for prompt in prompts:
        seq = cache.sequence(prompt)
        new = prompt[len(seq) :]
        with cache.step([seq], [new]) as step:
            step.write(0, *(rows(rng, len(new), 8, 64) for _ in range(2)))
        seqs.append(seq)
    step = cache.step(seqs, [[5]] * 5)
    q, k, v = (rows(rng, 5, heads, 64) for heads in (16, 8, 8))
    outs = [attended(step, may_share, 0, q, k, v) for may_share in (SHARE_NONE, SHARE_WHAT_PAYS)]
    np.testing.assert_array_equal(bits(outs[0][0]), bits(outs[1][0]))
    token_bytes = cache.stats().pool_bytes // (200 * 64)
    assert outs[1][2] == (3 * 1024 + 512) * token_bytes
    step.rollback()
    cache.close()


def test_pages_of_the_caller_are_shared_too(rng):
    num_pages, page_size = 40, 64
    k_pages, v_pages = (rows(rng, num_pages, page_size, 8, 64) for _ in range(2))
    shared = rng.permutation(num_pages)[:16]
    lists = [[*shared, *rng.permutation(num_pages)[:3]] for _ in range(4)]
    q = rows(rng, 4, 16, 64)

    def attend(lists):
        return paged_kv.paged_attention(
            q[-len(lists) :] if len(lists) == 1 else q,
            k_pages,
            v_pages,
            qo_indptr=np.arange(len(lists) + 1),
            kv_indptr=np.cumsum([0, *map(len, lists)]),
            kv_indices=np.concatenate(lists),
            kv_last_page_len=np.full(len(lists), 5),
        )

    np.testing.assert_array_equal(bits(attend(lists)[3:]), bits(attend(lists[3:])))


@pytest.mark.parametrize("causal", [True, False])
def test_lists_that_are_all_the_same_are_read_once(rng, causal):
    """Nothing is left for a row's own item, when it sees whole spans only."""
    k_pages, v_pages = (rows(rng, 16, 64, 8, 64) for _ in range(2))
    q, ids = rows(rng, 5, 16, 64), rng.permutation(16)

    def attend(q):
        return paged_kv.paged_attention(
            q,
            k_pages,
            v_pages,
            qo_indptr=np.arange(len(q) + 1),
            kv_indptr=np.arange(len(q) + 1) * 16,
            kv_indices=np.tile(ids, len(q)),
            kv_last_page_len=np.full(len(q), 64),
            causal=causal,
        )

    alone = np.concatenate([attend(q[i : i + 1]) for i in range(5)])
    np.testing.assert_array_equal(bits(attend(q)), bits(alone))


def test_a_token_that_is_no_number_reaches_only_those_who_share_it(rng):
    cache, seqs = shared_cache(3, 1024, 0, rng, num_layers=1)
    other = cache.sequence()
    fill(cache, [other], [1024], rng)
    bad = rows(rng, 1, 8, 64)
    bad[:] = np.nan
    with cache.step([seqs[0]], [1]) as step:
        step.write(0, bad, bad)
    step = cache.step([*seqs, other], [1] * 4)
    out, _, saved = attended(step, SHARE_WHAT_PAYS, 0, *(rows(rng, 4, heads, 64) for heads in (16, 8, 8)))
    assert saved and np.isnan(out[0]).all() and not np.isnan(out[1:]).any()
    step.rollback()
    cache.close()
