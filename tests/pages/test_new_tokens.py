"""New tokens of a step: counts and ids, however they are given, and the ids that tables keep."""

import numpy as np
import pytest
from conftest import fill, make_cache, rows
from hypothesis import given
from hypothesis import strategies as st

from paged_kv import ArgumentError
from paged_kv.pages.new_tokens import new_tokens_of

ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)
array = st.tuples(ids, st.sampled_from(["i4", "i8", "u4", "u8"])).map(lambda drawn: np.array(*drawn))
entry = st.one_of(
    ids, ids.map(tuple), array, st.integers(-3, 2**40), st.just([]), st.integers(1, 9).map(np.int16)
)


@given(st.one_of(st.lists(entry, max_size=6), st.lists(ids, max_size=6), st.lists(array, max_size=6)))
def test_counts_and_ids_are_what_was_given(new):
    tokens = new_tokens_of(new, len(new))
    counts = [entry if isinstance(entry, (int, np.integer)) else len(entry) for entry in new]
    assert list(tokens.counts) == counts
    given_ids = [int(id) for entry in new if not isinstance(entry, (int, np.integer)) for id in entry]
    if tokens.ids is None:
        assert not given_ids
    else:
        assert tokens.ids.dtype == np.int32 and tokens.ids.tolist() == given_ids
        flagged = sum(count for count, flag in zip(counts, tokens.has_ids, strict=True) if flag)
        assert flagged == len(given_ids) and len(tokens.has_ids) == len(new)


@pytest.mark.parametrize(
    "new",
    [[[1, -1]], [[2**31]], [np.array([1, -1])], [np.array([2**31])], [np.array([2**63], "u8")], [[2**70]]],
    ids=repr,
)
def test_ids_beyond_31_bits_are_refused_by_the_name_of_their_entry(new):
    with make_cache() as cache:
        seqs = [cache.sequence(), cache.sequence()]
        before = cache.stats()
        with pytest.raises(ArgumentError, match=r"new\[1\]"):
            cache.step(seqs, [[5], *new])
        assert cache.stats() == before
        cache.check()


@pytest.mark.parametrize("bad", [[True], [1.5], ["1"], [[1]], [None]], ids=repr)
def test_what_are_no_ids_is_refused(bad):
    with pytest.raises(ArgumentError, match=r"new\[0\]"):
        new_tokens_of([bad], 1)
    with pytest.raises(ArgumentError, match=r"new\[1\]"):
        new_tokens_of([[3], np.array(bad, object)], 2)


def known(seq):
    tables = seq._store.tables
    return tables.known_ids(tables.rows.row(seq._seq_id)).tolist()


def step(cache, seqs, new, rng, *, commits=True):
    with_ids = [entry if isinstance(entry, int) else len(entry) for entry in new]
    k = rows(rng, sum(with_ids), 2, 32)
    taken = cache.step(seqs, new)
    for layer in range(2):
        taken.write(layer, k, k)
    taken.commit() if commits else taken.rollback()


def test_ids_follow_forks_copies_and_truncation(rng):
    with make_cache() as cache:
        a = cache.sequence()
        text = list(range(100, 120))
        step(cache, [a], [text], rng)
        assert known(a) == text
        b, c = a.fork(at=18), a.fork()
        step(cache, [b, a], [[7, 8, 9], [5]], rng)
        assert known(b) == [*text[:18], 7, 8, 9] and known(a) == [*text, 5] and known(c) == text
        step(cache, [c], [[1, 2]], rng, commits=False)
        assert known(c) == text
        a.truncate(3)
        step(cache, [a], [np.array([4])], rng)
        assert known(a) == [*text[:3], 4] and known(c) == text
        a.reset()
        assert known(a) == []


def test_a_bare_count_ends_what_is_known(rng):
    with make_cache() as cache:
        a, b = cache.sequence(), cache.sequence()
        step(cache, [a, b], [[1, 2], 3], rng)
        step(cache, [a, b], [2, [4]], rng)
        step(cache, [a, b], [[9], [9]], rng)
        assert known(a) == [1, 2] and known(b) == [] and len(a) == 5
        a.truncate(2)  # the tokens without ids are gone
        step(cache, [a], [[3]], rng)
        assert known(a) == [1, 2, 3]
        fill(cache, [b], [1], rng)
        assert known(b) == []
        cache.check()
