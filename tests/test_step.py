import numpy as np
import pytest
from conftest import fill, make_cache, rows

import paged_kv
from paged_kv import (
    ArgumentError,
    CacheClosed,
    LayerNotWritten,
    OutOfPages,
    SequenceBusy,
    SequenceTooLong,
    StaleSequence,
    StepClosed,
)


def state_of(cache):
    """Everything that a refused call must leave alone."""
    tables = cache._store.tables
    return (
        cache.stats(),
        tables.rows.seq_lens.tolist(),
        tables.rows.reserved_lens.tolist(),
        cache._store.pool.data().tobytes(),
    )


def refused(cache, error, match, call, *args):
    before = state_of(cache)
    with pytest.raises(error, match=match):
        call(*args)
    assert state_of(cache) == before
    cache.check()


def test_a_step_says_where_each_new_token_goes(rng):
    cache = make_cache()
    a, b = cache.sequence(), cache.sequence()
    fill(cache, [a, b], [15, 1], rng)
    with cache.step([b, a], [16, 2]) as step:
        assert step.positions.tolist() == [*range(1, 17), 15, 16]
        assert step.qo_indptr.tolist() == [0, 16, 18]
        assert step.seq_lens.tolist() == [17, 17]
        assert step.block_table.shape == (2, 2)
        assert step.first_page.tolist() == [0, 0]
        for row, seq in enumerate(step.qo_indptr[:-1]):
            pages = step.block_table[row][step.positions // 16]
            own = slice(seq, step.qo_indptr[row + 1])
            assert (step.slot_mapping[own] == (pages * 16 + step.positions % 16)[own]).all()
        assert step.slot_mapping.dtype == np.int64
        assert step.positions.dtype == step.qo_indptr.dtype == step.seq_lens.dtype == np.int32
        with pytest.raises(ValueError, match="read-only"):
            step.positions[0] = 3
        assert len(a) == 15
        k = rows(rng, 18, 2, 32)
        step.write(0, k, k)
        step.write(1, k, k)
    assert (len(a), len(b)) == (17, 17)
    cache.check()


def test_the_block_table_is_minus_one_beyond_the_end(rng):
    cache = make_cache()
    seqs = [cache.sequence() for _ in range(3)]
    step = cache.step(seqs, [1, 33, 16])
    assert (step.block_table >= 0).sum(axis=1).tolist() == [1, 3, 1]
    assert (step.block_table[0, 1:] == -1).all()
    step.rollback()


def test_new_may_be_ids_counts_or_an_array():
    cache = make_cache()
    seqs = [cache.sequence() for _ in range(3)]
    for new in ([[5, 6], 1, np.array([7, 8, 9])], (2, np.int64(1), 3), np.array([2, 1, 3], np.uint64)):
        step = cache.step(iter(seqs), new)
        assert step.seq_lens.tolist() == [2, 1, 3]
        step.rollback()
    cache.check()


def test_a_count_of_zero_skips_a_sequence(rng):
    cache = make_cache()
    a, b, c = (cache.sequence() for _ in range(3))
    fill(cache, [a, b, c], [20, 5, 3], rng)
    before = a.gather(0)
    step = cache.step([a, b, c], [0, 2, []])
    assert step.qo_indptr.tolist() == [0, 0, 2, 2]
    assert step.seq_lens.tolist() == [20, 7, 3]
    assert (step.block_table >= 0).sum(axis=1).tolist() == [0, 1, 0]
    other = cache.step([a], [4])  # a skipped sequence is not busy
    refused(cache, ArgumentError, r"seqs\[1\] is in this step twice", cache.step, [c, c], [0, 1])
    refused(cache, ArgumentError, r"seqs\[1\] is in this step twice", cache.step, [c, c], [1, 0])
    refused(cache, SequenceBusy, r"seqs\[0\]", cache.step, [b, c], [0, 1])
    c.free()
    other.rollback()
    q, k = rows(rng, 2, 4, 32), rows(rng, 2, 2, 32)
    alone = cache.sequence()
    for layer in range(2):
        out = step.attend(layer, q, k, k, out=np.full_like(q, np.nan))
        keys, values = (np.concatenate([side, k]) for side in b.gather(layer))
        expected = paged_kv.reference.attend(q, keys, values)
        np.testing.assert_allclose(out, expected, atol=1e-5)
    step.commit()
    assert (len(a), len(b), len(alone)) == (20, 7, 0)
    np.testing.assert_array_equal(a.gather(0), before)
    with cache.step([a, b], [0, 0]) as step:  # nothing to write
        assert step.attend(0, q[:0], k[:0], k[:0]).shape == (0, 4, 32)
    assert cache.pages_needed([a, b], [0, 0]) == 0
    cache.check()


def test_a_commit_may_keep_the_first_tokens_only(rng):
    cache = make_cache()
    a, b, c = (cache.sequence() for _ in range(3))
    fill(cache, [a, b, c], [14, 16, 1], rng)
    fork = a.fork()
    num_free = cache.stats().num_free_pages
    step = cache.step([a, b, c], [20, 5, 0])
    k = rows(rng, 25, 2, 32)
    for layer in range(2):
        step.write(layer, k, k)
    for counts in ([21, 0, 0], [-1, 0, 0], [1, 1], [1.0, 0, 0], 3, [2**70, 0, 0], [[1], [1], [1]], [0, 0, 1]):
        refused(cache, ArgumentError, "counts", step.commit, counts)
    step.commit(np.array([3, 0, 0]))
    assert (len(a), len(b), len(c), len(fork)) == (17, 16, 1, 14)
    np.testing.assert_array_equal(a.gather(1)[0][14:], k[:3])
    assert cache.stats().num_free_pages == num_free - 1  # the page of position 16
    with pytest.raises(StepClosed):
        step.commit([0, 0, 0])
    fill(cache, [a, b, fork], [1, 1, 1], rng)
    cache.check()


def test_ids_that_a_commit_leaves_out_are_not_matched(rng):
    for window in (None, 24):
        cache = make_cache(prefix_caching=True, window=window, max_seq_len=200, max_step_tokens=64)
        seq = cache.sequence()
        ids = rng.integers(0, 1000, 60).tolist()
        step = cache.step([seq], [ids])
        for layer in range(2):
            k = rows(rng, 60, 2, 32)
            step.write(layer, k, k)
        step.commit([37])
        assert len(seq) == 37
        assert len(cache.sequence(ids)) == 37
        fill(cache, [seq], [5], rng)
        cache.check()


@pytest.mark.parametrize(
    "new",
    [
        [-1],
        [2**31],
        [2**63],
        [2**70],
        [True],
        [1.0],
        ["abc"],
        [None],
        [[-1]],
        [[2**31]],
        [[0.5]],
        [[[1]]],
        [1, 1],
        [],
        5,
        None,
        np.array([1.0]),
        np.array([True]),
        np.array([[1]]),
        np.array([2**63], np.uint64),
        np.array([-1]),
    ],
)
def test_new_tokens_that_cannot_be_are_refused(new):
    cache = make_cache()
    seq = cache.sequence()
    refused(cache, ArgumentError, "new", cache.step, [seq], new)


def test_sequences_that_cannot_step_are_refused(rng):
    cache, other = make_cache(max_seq_len=40), make_cache()
    a, b, stranger, freed = cache.sequence(), cache.sequence(), other.sequence(), cache.sequence()
    freed.free()
    fill(cache, [a], [30], rng)
    refused(cache, StaleSequence, r"seqs\[1\]", cache.step, [a, freed], [1, 1])
    refused(cache, StaleSequence, r"seqs\[1\]", cache.step, [a, stranger], [1, 1])
    refused(cache, ArgumentError, r"seqs\[2\] is in this step twice", cache.step, [a, b, a], [1, 1, 1])
    too_long = r"seqs\[1\] would hold 41 tokens, max_seq_len is 40"
    refused(cache, SequenceTooLong, too_long, cache.step, [b, a], [1, 11])
    for seqs in ([None], [3], 5, None, ["a"]):
        refused(cache, ArgumentError, "seqs", cache.step, seqs, [1])
    step = cache.step([a], [1])
    refused(cache, SequenceBusy, r"seqs\[1\]", cache.step, [b, a], [1, 1])
    refused(cache, SequenceBusy, "open step", a.reset)
    refused(cache, SequenceBusy, "open step", a.free)
    step.rollback()


def test_out_of_pages_takes_nothing(rng):
    cache = make_cache(num_pages=4)
    a, b = cache.sequence(), cache.sequence()
    fill(cache, [a], [17], rng)
    refused(cache, OutOfPages, "needs 3 new pages, 2 of 4 are free", cache.step, [a, b], [15, 48])
    assert len(a) == 17


def test_rollback_leaves_no_trace(rng):
    cache = make_cache()
    a, b = cache.sequence(), cache.sequence()
    fill(cache, [a], [20], rng)
    before = a.gather(0)
    expected = cache.step([a, b], [30, 5])
    pages = expected.block_table.tolist()
    k = rows(rng, 35, 2, 32)
    expected.write(0, k, k)
    expected.rollback()
    assert cache.stats().num_tokens == 20
    np.testing.assert_array_equal(a.gather(0), before)
    again = cache.step([a, b], [30, 5])
    assert again.block_table.tolist() == pages  # also the free list is as it was
    again.rollback()
    cache.check()


def test_an_exception_rolls_back_and_leaving_commits(rng):
    cache = make_cache(num_layers=1)
    seq = cache.sequence()
    with pytest.raises(KeyError), cache.step([seq], [3]):
        raise KeyError
    assert len(seq) == 0
    with cache.step([seq], [3]) as step:
        step.write(0, rows(rng, 3, 2, 32), rows(rng, 3, 2, 32))
    assert len(seq) == 3


def test_commit_with_a_layer_unwritten_rolls_back_and_names_it(rng):
    cache = make_cache(num_layers=3)
    seq = cache.sequence()
    step = cache.step([seq], [1])
    step.write(0, rows(rng, 1, 2, 32), rows(rng, 1, 2, 32))
    step.write(2, rows(rng, 1, 2, 32), rows(rng, 1, 2, 32))
    with pytest.raises(LayerNotWritten, match="layer 1"):
        step.commit()
    assert len(seq) == 0 and cache.stats().num_used_pages == 0
    cache.check()


def test_a_closed_step_stays_closed_and_leaving_it_is_silent(rng):
    cache = make_cache(num_layers=1)
    seq = cache.sequence()
    with cache.step([seq], [1]) as step:
        step.rollback()
    k = rows(rng, 1, 2, 32)
    for call in (step.commit, step.rollback, lambda: step.write(0, k, k)):
        with pytest.raises(StepClosed):
            call()
    with cache.step([seq], [1]) as step:
        step.write(0, k, k)
        step.commit()
    with pytest.raises(StepClosed):
        step.commit()
    assert len(seq) == 1


def test_a_second_write_replaces_the_first(rng):
    cache = make_cache(num_layers=1)
    seq = cache.sequence()
    k, v = rows(rng, 5, 2, 32), rows(rng, 5, 2, 32)
    with cache.step([seq], [5]) as step:
        step.write(0, v, k)
        step.write(0, k, v)
    np.testing.assert_array_equal(seq.gather(0), (k, v))


def test_rows_that_do_not_fit_are_refused(rng):
    cache = make_cache(num_layers=1)
    seq = cache.sequence()
    step = cache.step([seq], [3])
    good = rows(rng, 3, 2, 32)
    for bad in (
        good[:2],
        good[:, :1],
        good.reshape(3, 64),
        good.astype(np.float64),
        good.astype(">f4"),
        good.transpose(1, 0, 2),
        rows(rng, 3, 2, 64)[:, :, ::2],
        good.tolist(),
        None,
    ):
        refused(cache, ArgumentError, "k .*must be|k has gaps", step.write, 0, bad, good)
        refused(cache, ArgumentError, "v .*must be|v has gaps", step.write, 0, good, bad)
    for layer in (-1, 1, 2**31, 2**63, True, 0.0, "0", None):
        refused(cache, ArgumentError, "layer", step.write, layer, good, good)
    step.write(np.int64(0), good, good)
    step.commit()


def test_steps_over_disjoint_sequences_may_be_open_together(rng):
    cache = make_cache(num_layers=1)
    a, b = cache.sequence(), cache.sequence()
    one, two = cache.step([a], [20]), cache.step([b], [20])
    k = rows(rng, 20, 2, 32)
    one.write(0, k, k)
    two.write(0, -k, -k)
    two.rollback()
    one.commit()
    np.testing.assert_array_equal(a.gather(0)[0], k)
    assert len(b) == 0
    cache.check()


def test_an_empty_step_is_one():
    cache = make_cache()
    with cache.step([], []) as step:
        assert step.positions.shape == (0,) and step.block_table.shape == (0, 0)


def test_close_rolls_open_steps_back_and_then_nothing_works(rng):
    cache = make_cache()
    seq = cache.sequence()
    with cache.step([seq], [1]) as step:
        cache.close()
    cache.close()
    k = rows(rng, 1, 2, 32)
    for call in (
        step.commit,
        step.rollback,
        lambda: step.write(0, k, k),
        lambda: len(seq),
        lambda: seq.gather(0),
        seq.reset,
        seq.free,
        cache.sequence,
        cache.stats,
        cache.check,
        lambda: cache.step([seq], [1]),
    ):
        with pytest.raises(CacheClosed):
            call()


def test_every_error_is_a_paged_kv_error():
    errors = [getattr(paged_kv, name) for name in paged_kv.__all__]
    errors = [error for error in errors if isinstance(error, type) and issubclass(error, Exception)]
    assert len(errors) == 17
    assert all(issubclass(error, paged_kv.PagedKVError) for error in errors)
    assert issubclass(ArgumentError, ValueError)


READ_ONLY = ["positions", "qo_indptr", "seq_lens", "slot_mapping", "first_page", "block_table"]


def ways_to_write(array):
    """Attempts to change an array that numpy offers."""
    yield lambda: array.__setitem__(..., 7)
    yield lambda: array.setflags(write=True)
    yield lambda: setattr(array.flags, "writeable", True)
    yield lambda: array.view().setflags(write=True)
    yield lambda: array[:].setflags(write=True)
    yield lambda: array.view(np.uint8).setflags(write=True)
    yield lambda: array.base.setflags(write=True)
    yield lambda: memoryview(array).__setitem__(0, 7)
    yield lambda: np.copyto(array, 7)
    yield lambda: np.add(array, 1, out=array)
    yield lambda: array.sort()
    yield lambda: array.resize(100)


@pytest.mark.parametrize("name", READ_ONLY)
@pytest.mark.parametrize("sinks", [0, 3])
def test_arrays_of_a_step_cannot_be_made_writeable(name, sinks, rng):
    """C follows them; a slot that was written there let it write anywhere."""
    window = {"window": 20, "num_sink_tokens": sinks} if sinks else {}
    cache = make_cache(num_layers=1, **window)
    seqs = [cache.sequence(), cache.sequence()]
    fill(cache, seqs, [40, 3], rng)
    step = cache.step(seqs, [2, 17])
    array = getattr(step, name)
    expected = array.copy()
    for write in ways_to_write(array):
        with pytest.raises((ValueError, TypeError, AttributeError, NotImplementedError)):
            write()
        np.testing.assert_array_equal(getattr(step, name), expected)
    k = rows(rng, 19, 2, 32)
    step.write(0, k, k)
    step.commit()
    cache.check()
