"""Attention mass: what each page gets of its sequence's rows, held against probabilities in float64."""

import numpy as np
import pytest
from conftest import SEED, make_cache, rows

from paged_kv import ArgumentError, reference

HEADS, GROUP, HEAD_DIM = 2, 3, 32
#: Probabilities are added up in units of 2^-30, each rounded.
UNIT = 2.0**-30


def sequences(rng, lengths):
    return [[rows(rng, length, HEADS, HEAD_DIM) for _ in range(2)] for length in lengths]


def page_mass(q, k, v, positions, page_size, options):
    """The mass of each page that the sequence holds, [pages, num_kv_heads], of float64."""
    *_, probabilities = reference.attend(q, k, v, positions, return_probabilities=True, **options)
    numbers = np.unique(positions // page_size)
    by_head = probabilities.sum(axis=0).reshape(HEADS, GROUP, -1).mean(axis=1)
    return np.stack([by_head[:, positions // page_size == number].sum(axis=1) for number in numbers])


def attended(cache, seqs, counts, rng, held, **options):
    """One step with its mass, and what the reference says."""
    k, v = (rows(rng, sum(counts), HEADS, HEAD_DIM) for _ in range(2))
    q = 3 * rows(rng, sum(counts), HEADS * GROUP, HEAD_DIM)
    with cache.step(seqs, counts) as step:
        *_, mass = step.attend(0, q, k, v, return_mass=True, **options)
        plain = step.attend(0, q, **options)
        out = step.attend(0, q, return_mass=True, **options)[0]
        np.testing.assert_array_equal(plain, out)  # bits do not depend on it
        indptr = step.qo_indptr
    expected = []
    for i, (seq, count) in enumerate(zip(seqs, counts, strict=True)):
        own = slice(indptr[i], indptr[i + 1])
        held[i] = [np.concatenate([old, new[own]]) for old, new in zip(held[i], (k, v), strict=True)]
        if count:
            expected.append(page_mass(q[own], *held[i], np.arange(len(seq)), cache.page_size, options))
    return mass, np.concatenate(expected)


@pytest.mark.parametrize("page_size", [16, 48, 64, 80, 128, 320])
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 70, "num_sink_tokens": 20},
        {"alibi_slopes": np.linspace(0.1, 0.7, HEADS * GROUP), "logits_soft_cap": 3.0},
        {"sinks": np.linspace(-1, 9, HEADS * GROUP)},
    ],
    ids=["all", "window", "slopes and cap", "sinks"],
)
def test_the_mass_of_a_page_is_the_sum_of_its_probabilities(page_size, num_threads, options):
    rng = np.random.default_rng(SEED)
    with make_cache(num_layers=1, num_pages=160, page_size=page_size, num_threads=num_threads) as cache:
        seqs, held = [cache.sequence() for _ in range(3)], sequences(rng, [0, 0, 0])
        for counts in ([700, 1, 65], [1, 1, 1], [3, 0, 200], [1, 64, 1], [130, 1, 0]):
            mass, expected = attended(cache, seqs, counts, rng, held, **options)
            np.testing.assert_allclose(mass, expected, rtol=2e-5, atol=sum(counts) * UNIT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", ("int8", "int4")], ids=str)
def test_every_kernel_and_dtype_gives_it(kernel, dtype):
    rng = np.random.default_rng(SEED)
    options = {"num_layers": 1, "num_pages": 40, "page_size": 64, "dtype": dtype, "num_threads": 2}
    with make_cache(**options) as cache:
        seqs = [cache.sequence(), cache.sequence()]
        for counts in ([300, 70], [1, 1]):
            k, v = (rows(rng, sum(counts), HEADS, HEAD_DIM) for _ in range(2))
            q = rows(rng, sum(counts), HEADS * GROUP, HEAD_DIM)
            with cache.step(seqs, counts) as step:
                _, mass = step.attend(0, q, k, v, return_mass=True)
                own = step.kv_indptr
        for i, seq in enumerate(seqs):
            stored = seq.gather(0)
            expected = page_mass(q[i : i + 1], *stored, np.arange(len(seq)), 64, {})
            np.testing.assert_allclose(mass[own[i] : own[i + 1]], expected, rtol=2e-3, atol=2e-4)


def test_it_sums_to_the_rows_that_looked_and_does_not_depend_on_threads_or_the_batch():
    rng = np.random.default_rng(SEED)
    masses = []
    q, k, v = (rows(rng, 900, heads, HEAD_DIM) for heads in (HEADS * GROUP, HEADS, HEADS))
    for num_threads, num_seqs in ((1, 1), (2, 1), (2, 3)):
        with make_cache(num_layers=1, num_pages=200, num_threads=num_threads) as cache:
            seqs = [cache.sequence() for _ in range(num_seqs)]
            with cache.step(seqs, [900] * num_seqs) as step:
                inputs = [np.concatenate([side] * num_seqs) for side in (q, k, v)]
                _, mass = step.attend(0, *inputs, return_mass=True)
            np.testing.assert_allclose(mass.sum(axis=0), 900 * num_seqs, rtol=1e-5)
            masses.append(mass[: len(mass) // num_seqs])
    np.testing.assert_array_equal(masses[0], masses[1])
    np.testing.assert_array_equal(masses[0], masses[2])


def test_a_row_of_nan_counts_as_nothing_and_reaches_no_other_sequence():
    rng = np.random.default_rng(SEED)
    with make_cache(num_layers=1) as cache:
        seqs = [cache.sequence(), cache.sequence()]
        q, k, v = (rows(rng, 40, heads, HEAD_DIM) for heads in (HEADS * GROUP, HEADS, HEADS))
        q[3] = np.nan
        with cache.step(seqs, [20, 20]) as step:
            _, mass = step.attend(0, q, k, v, return_mass=True)
        sums = [mass[:2].sum(axis=0), mass[2:].sum(axis=0)]
        np.testing.assert_allclose(sums, [[19, 19], [20, 20]], rtol=1e-5)


def test_it_comes_after_lse_and_is_of_the_kind_of_q():
    torch = pytest.importorskip("torch")
    with make_cache(num_layers=1) as cache:
        q, k, v = (torch.zeros(5, heads, HEAD_DIM) for heads in (HEADS * GROUP, HEADS, HEADS))
        with cache.step([cache.sequence()], [5]) as step:
            _, lse, mass = step.attend(0, q, k, v, return_lse=True, return_mass=True)
        assert lse.shape == (5, HEADS * GROUP) and mass.shape == (1, HEADS)
        assert isinstance(mass, torch.Tensor) and mass.dtype == torch.float32
        np.testing.assert_allclose(mass, 5)


def test_what_is_no_bool_is_refused():
    with make_cache() as cache, cache.step([cache.sequence()], [1]) as step:
        q, k = np.zeros((1, 2, 32), np.float32), np.zeros((1, 2, 32), np.float32)
        with pytest.raises(ArgumentError, match="return_mass must be True or False, not 1"):
            step.attend(0, q, k, k, return_mass=1)
        step.write(0, k, k)
        step.write(1, k, k)


@pytest.mark.parametrize("page_size", [16, 64, 80])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_pages_that_are_read_once_for_several_sequences_get_the_mass_of_each(page_size, num_threads, kernel):
    """A tree of forks, whose shared spans are folded level by level."""
    rng = np.random.default_rng(SEED)
    with make_cache(num_layers=1, num_pages=400, page_size=page_size, num_threads=num_threads) as cache:

        def grow(seq, count):
            k = rows(rng, count, HEADS, HEAD_DIM)
            with cache.step([seq], [count]) as step:
                step.write(0, k, -k)

        root = cache.sequence()
        grow(root, 1100)
        branches = [root.fork(), root.fork()]
        for branch, count in zip(branches, (700, 400), strict=True):
            grow(branch, count)
        seqs = [*branches[0].fork(3), *branches[1].fork(2), root.fork(), cache.sequence()]
        counts = [1, 2, 1, 1, 1, 3, 40]
        q, k, v = (rows(rng, sum(counts), heads, HEAD_DIM) for heads in (HEADS * GROUP, HEADS, HEADS))
        step, found = cache.step(seqs, counts), []
        for may_share in (0, 2):  # PKV_SHARE_NONE, PKV_SHARE_ALL
            step._handle.batch.may_share = may_share
            found.append(step.attend(0, q, k, v, return_mass=True))
        assert step.bytes_not_read > 0
        step.rollback()
        for alone, together in zip(*found, strict=True):
            np.testing.assert_array_equal(alone, together)
