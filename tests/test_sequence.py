"""Fork and truncate: several sequences own a page, and one that would change it for others gets a copy."""

import numpy as np
import pytest
from conftest import fill, make_cache, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_kv import ArgumentError, OutOfPages, OutOfSequences, SequenceBusy, StaleSequence


def contents(seq):
    return [array.copy() for layer in range(2) for array in seq.gather(layer)]


def assert_same(seq, expected):
    for got, want in zip(contents(seq), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_fork_takes_no_page_and_holds_the_same(rng):
    cache = make_cache()
    a = cache.sequence()
    fill(cache, [a], [40], rng)
    used = cache.stats().num_used_pages
    b = a.fork()
    c, d = a.fork(2)
    assert a.fork(0) == []
    assert cache.stats().num_used_pages == used == 3
    assert cache.stats().num_sequences == 4 and cache.stats().num_tokens == 40
    for fork in (b, c, d):
        assert len(fork) == 40
        assert_same(fork, contents(a))
    a.free()
    assert_same(b, contents(c))
    cache.check()


@pytest.mark.parametrize("length", range(14, 19))
@pytest.mark.parametrize("who", ["parent", "fork", "both", "both, the fork first"])
def test_a_write_is_never_seen_by_a_sibling(length, who, rng):
    """Forked at each offset round a page's edge, then one or both go on."""
    cache = make_cache()
    a = cache.sequence()
    fill(cache, [a], [length], rng)
    b = a.fork()
    before = contents(a)
    seqs = {"parent": [a], "fork": [b], "both": [a, b], "both, the fork first": [b, a]}[who]
    new = fill(cache, seqs, [5] * len(seqs), rng)
    for i, seq in enumerate(seqs):
        added = [array[5 * i : 5 * i + 5] for layer in new for array in layer]
        assert_same(seq, [np.concatenate(pair) for pair in zip(before, added, strict=True)])
    for seq in {a, b} - set(seqs):
        assert_same(seq, before)
    cache.check()


def test_a_truncated_fork_copies_the_page_it_appends_to(rng):
    """A has 100 tokens, B is its fork of 40: B's next token lies in A's first page, A's own does not."""
    cache = make_cache(page_size=64)
    a = cache.sequence()
    fill(cache, [a], [100], rng)
    b = a.fork()
    b.truncate(40)
    of_a, of_b = contents(a), contents(b)
    new = fill(cache, [a, b], [1, 1], rng)
    assert_same(a, [np.concatenate([old, x[:1]]) for old, x in zip(of_a, sum(new, ()), strict=True)])
    assert_same(b, [np.concatenate([old, x[1:]]) for old, x in zip(of_b, sum(new, ()), strict=True)])
    assert cache.stats().num_used_pages == 3
    cache.check()


def test_the_longest_of_all_holders_writes_in_place(rng):
    cache = make_cache(page_size=64)
    a = cache.sequence()
    fill(cache, [a], [50], rng)
    b, c = a.fork(2)
    b.truncate(20)
    step = cache.step([b, a, c], [1, 1, 1])
    first_pages = step.block_table[:, 0].tolist()
    assert len(set(first_pages)) == 3
    assert first_pages[1] == cache._store.tables.page_ids[0, 0]  # a, the first of the two longest
    step.rollback()
    assert cache.stats().num_used_pages == 1
    # Also with a holder outside the step, which does not see the slot.
    step = cache.step([b, a], [1, 1])
    first_pages = step.block_table[:, 0].tolist()
    assert first_pages[1] == cache._store.tables.page_ids[0, 0] != first_pages[0]
    step.rollback()
    cache.check()


def test_rollback_gives_copies_back(rng):
    cache = make_cache()
    a = cache.sequence()
    fill(cache, [a], [20], rng)
    b = a.fork()
    before = contents(a)
    for _ in range(3):
        step = cache.step([b, a], [1, 1])
        k = rows(rng, 2, 2, 32)
        step.write(0, k, k)
        assert cache.stats().num_used_pages == 3
        step.rollback()
        assert cache.stats().num_used_pages == 2
        assert_same(a, before)
        assert_same(b, before)
        cache.check()


def test_a_copy_counts_as_a_page_that_must_be_free(rng):
    cache = make_cache(num_pages=2)
    a = cache.sequence()
    fill(cache, [a], [20], rng)
    b = a.fork()
    fill(cache, [a], [1], rng)  # in place: no other sequence sees that slot
    with pytest.raises(OutOfPages, match="needs 1 new pages, 0 of 2"):
        cache.step([b], [1])
    a.free()
    fill(cache, [b], [1], rng)  # alone with its pages
    cache.check()


def test_of_those_who_end_at_the_same_token_the_first_to_step_writes_in_place(rng):
    cache = make_cache()
    a = cache.sequence()
    fill(cache, [a], [20], rng)
    b, c = a.fork(2)
    before = contents(a)
    assert cache.pages_needed([b], [3]) == 0 and cache.pages_needed([b, a, c], [3, 3, 3]) == 2
    first = cache.step([b], [3])
    assert cache.pages_needed([a], [3]) == 1  # the slots are reserved
    second = cache.step([a], [3])
    first.rollback()
    assert cache.pages_needed([c], [3]) == 0  # and free again
    second.rollback()
    fill(cache, [c, a, b], [5, 6, 7], rng)
    assert cache.stats().num_copies == 2
    for seq, count in ((a, 6), (b, 7), (c, 5)):
        assert len(seq) == 20 + count
        for got, want in zip(contents(seq), before, strict=True):
            np.testing.assert_array_equal(got[:20], want)
    cache.check()


@pytest.mark.parametrize("at", [0, 1, 15, 16, 17, 33, 40])
@pytest.mark.parametrize("is_open", [False, True], ids=["idle", "in an open step"])
def test_a_fork_at_a_position_holds_the_tokens_before_it(at, is_open, rng):
    cache = make_cache()
    a = cache.sequence()
    fill(cache, [a], [40], rng)
    before = contents(a)
    step = cache.step([a], [5]) if is_open else None
    b, c = a.fork(at=at), a.fork(2, at=at)[1]
    assert len(b) == len(c) == at
    assert_same(b, [array[:at] for array in before])
    new = fill(cache, [b], [7], rng)
    assert_same(b, [np.concatenate([old[:at], x]) for old, x in zip(before, sum(new, ()), strict=True)])
    assert_same(a, before)
    assert_same(c, [array[:at] for array in before])
    if step is not None:
        step.rollback()
    cache.check()
    for seq in (b, c, a):
        seq.free()
    assert cache.stats().num_used_pages == 0


def test_a_copy_holds_no_token_that_its_row_does_not_see(rng):
    """What a sibling wrote behind them stays the sibling's."""
    cache = make_cache(num_layers=1)
    a = cache.sequence()
    fill(cache, [a], [12], rng)
    b = a.fork(at=5)
    with cache.step([b], [2]) as step:
        page = int(step.slot_mapping[0]) // 16
        step.write(0, *(rows(rng, 2, 2, 32) for _ in "kv"))
    pages = cache._store.pool.data().view(np.float32).reshape(16, 2, 2, 16, 32)  # [page][head][k or v][slot]
    assert np.isfinite(pages[page, :, :, :7]).all() and np.isnan(pages[page, :, :, 7:]).all()


def test_a_second_write_of_a_layer_keeps_the_copy(rng):
    cache = make_cache(num_layers=1)
    a = cache.sequence()
    fill(cache, [a], [5], rng)
    b = a.fork(at=4)
    before = b.gather(0)[0]
    k, v = rows(rng, 3, 2, 32), rows(rng, 3, 2, 32)
    with cache.step([b], [3]) as step:
        step.write(0, v, k)
        step.attend(0, k, k, v)
        assert cache.stats().num_copies == 0
    np.testing.assert_array_equal(b.gather(0)[0], np.concatenate([before, k]))
    assert cache.stats().num_copies == 1
    cache.step([b], [1]).rollback()
    assert cache.stats().num_copies == 1


def test_truncate_gives_pages_back_and_the_next_token_follows(rng):
    cache = make_cache()
    seq = cache.sequence()
    fill(cache, [seq], [50], rng)
    before = contents(seq)
    seq.truncate(50)
    seq.truncate(np.int64(17))
    assert len(seq) == 17 and cache.stats().num_used_pages == 2
    assert_same(seq, [array[:17] for array in before])
    new = fill(cache, [seq], [2], rng)
    assert_same(seq, [np.concatenate([old[:17], x]) for old, x in zip(before, sum(new, ()), strict=True)])
    seq.truncate(0)
    assert cache.stats().num_used_pages == 0
    cache.check()


def test_what_cannot_be_forked_or_truncated_is_refused(rng):
    cache = make_cache(max_sequences=3)
    a, freed = cache.sequence(), cache.sequence()
    fill(cache, [a], [20], rng)
    freed.free()
    before, stats = contents(a), cache.stats()
    for bad in (-1, 21, 2**31, 2**63, True, 3.0, None, "3"):
        with pytest.raises(ArgumentError, match="length"):
            a.truncate(bad)
    for bad in (-1, 2**31, True, 3.0, "3"):
        with pytest.raises(ArgumentError, match="count"):
            a.fork(bad)
    with pytest.raises(OutOfSequences, match="requested 3 forks, 2 of 3"):
        a.fork(3)
    for bad in (-1, 21, 2**63, True, 3.0, "3"):
        with pytest.raises(ArgumentError, match=r"at is|at must"):
            a.fork(at=bad)
    for call in (freed.fork, lambda: freed.truncate(0)):
        with pytest.raises(StaleSequence):
            call()
    step = cache.step([a], [1])
    with pytest.raises(SequenceBusy):
        a.truncate(3)
    step.rollback()
    assert_same(a, before)
    assert cache.stats() == stats
    cache.check()


# ---- a batch that goes on from some of its sequences


@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    picks=st.lists(st.integers(0, 4), max_size=8),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=30)
def test_a_selection_goes_on_from_the_sequences_it_names(lengths, picks, seed):
    rng, picks = np.random.default_rng(seed), [pick % len(lengths) for pick in picks]
    with make_cache(num_layers=1, num_kv_heads=2, head_dim=16, num_pages=60, max_sequences=16) as cache:
        seqs = [cache.sequence() for _ in lengths]
        held = [rows(rng, length, 2, 16) for length in lengths]
        for seq, k in zip(seqs, held, strict=True):
            if len(k):
                with cache.step([seq], [len(k)]) as step:
                    step.write(0, k, k)
        selected = cache.select(seqs, picks)
        assert len(selected) == len({id(seq) for seq in selected}) == len(picks)
        assert cache.stats().num_sequences == len(picks)
        for place, pick in enumerate(picks):
            assert (selected[place] is seqs[pick]) is (picks.index(pick) == place)
            np.testing.assert_array_equal(selected[place].gather(0)[0], held[pick])
        cache.check()
        if picks:  # each grows by itself
            new = rows(rng, len(picks), 2, 16)
            with cache.step(selected, [1] * len(picks)) as step:
                step.write(0, new, new)
            for seq, pick, row in zip(selected, picks, new, strict=True):
                np.testing.assert_array_equal(seq.gather(0)[0], np.concatenate([held[pick], row[None]]))
        cache.check()


def test_a_selection_that_cannot_be_changes_nothing(rng):
    with make_cache(num_layers=1, num_kv_heads=2, head_dim=16, num_pages=9, max_sequences=3) as cache:
        seqs = [cache.sequence() for _ in range(3)]
        for bad, words in (
            ([3], r"indices\[0\]"),
            ([0, -1], r"indices\[1\]"),
            (5, "indices"),
            ([0.5], "indices"),
        ):
            with pytest.raises(ArgumentError, match=words):
                cache.select(seqs, bad)
        for bad in (None, [5], seqs[0]):
            with pytest.raises(ArgumentError, match="seqs"):
                cache.select(bad, [0])
        with pytest.raises(OutOfSequences):
            cache.select(seqs, [0, 1, 1])  # the third is freed last
        step = cache.step(seqs[2:], [1])
        with pytest.raises(SequenceBusy):
            cache.select(seqs, [0, 1])
        step.rollback()
        assert cache.stats().num_sequences == 3 and [len(seq) for seq in seqs] == [0, 0, 0]
        assert cache.select(seqs, [1, 0]) == [seqs[1], seqs[0]]
        with pytest.raises(StaleSequence):
            cache.select(seqs, [2])
        assert cache.stats().num_sequences == 2
