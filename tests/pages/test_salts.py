"""Salts: sequences of different salts share nothing, and no page shows what another salt has written."""

import os

import numpy as np
import pytest
from conftest import make_cache

from paged_kv import ArgumentError, OutOfPages, OutOfSequences
from paged_kv.pages.salts import MAX_UNUSED, NO_SALT, Salts

PAGE_SIZE, NUM_LAYERS = 16, 2
PROMPT = list(range(1, 41))


def salted_cache(**changes):
    size = {"num_layers": NUM_LAYERS, "num_kv_heads": 1, "head_dim": 8, "page_size": PAGE_SIZE}
    options = {"dtype": "float32", "prefix_caching": True, "num_pages": 6, "max_sequences": 6}
    return make_cache(**size | options | changes)


def write(cache, seq, ids, value, layers=range(NUM_LAYERS)):
    """An open step in which these layers have the value for each token."""
    step = cache.step([seq], [ids])
    rows = np.full((len(ids), 1, 8), value, np.float32)
    for layer in layers:
        step.write(layer, rows, rows)
    return step


def values_in_pages(cache, seq):
    """Whatever is in the bytes of a sequence's pages, in all layers."""
    store = cache._store
    step_bytes = store.layout.page_share_bytes
    num_pages = store.pool.num_pages
    data = store.pool.data().view(np.float32).reshape(NUM_LAYERS, num_pages, step_bytes // 4)
    row = store.tables.rows.row(seq._seq_id)
    pages = store.tables.page_ids[row, : -(-len(seq) // PAGE_SIZE)]
    found = data[:, pages]
    return set(found[~np.isnan(found)].tolist())  # NaN: nothing was ever written there


@pytest.mark.parametrize("first", [b"", b"a", b"0" * 100])
def test_only_the_same_salt_finds_a_prompt(first):
    with salted_cache() as cache:
        seq = cache.sequence(PROMPT, salt=first)
        write(cache, seq, PROMPT, 1).commit()
        for salt in (b"", b"a", b"b", b"0" * 100, b"0" * 99):
            expected = len(PROMPT) - 1 if salt == first else 0
            with cache.sequence(PROMPT, salt=salt) as other:
                assert other.num_cached_tokens == expected, salt
        seq.free()
        for salt in (b"", b"a", b"b"):
            with cache.sequence(PROMPT, salt=salt) as other:
                assert (other.num_cached_tokens > 0) == (salt == first)


def test_a_fork_and_a_reset_sequence_keep_their_salt():
    with salted_cache() as cache:
        seq = cache.sequence(salt=b"a")
        fork = seq.fork()
        write(cache, fork, PROMPT, 1).commit()
        assert cache.sequence(PROMPT).num_cached_tokens == 0
        assert cache.sequence(PROMPT, salt=b"a").num_cached_tokens == 39
        fork.reset()
        write(cache, fork, [7] * 20, 1).commit()
        assert cache.sequence([7] * 21).num_cached_tokens == 0
        assert cache.sequence([7] * 21, salt=b"a").num_cached_tokens == 20


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_a_page_is_cleared_when_it_changes_salt(prefix_caching):
    with salted_cache(num_pages=3, prefix_caching=prefix_caching) as cache:
        seq = cache.sequence(salt=b"a")
        write(cache, seq, PROMPT, 5).commit()
        seq.free()
        with cache.sequence(salt=b"b") as other:
            write(cache, other, PROMPT[:33], 6).commit()
            assert values_in_pages(cache, other) == {0, 6}
            cache.check()
        with cache.sequence(salt=b"b") as again:  # its own salt's values stay where it has no token
            write(cache, again, [1], 7).commit()
            assert values_in_pages(cache, again) == ({0, 7} if prefix_caching else {6, 7})


@pytest.mark.parametrize("layers", [(), (0,), (0, 1)])
def test_pages_of_a_step_that_rolled_back_are_cleared_again(layers):
    with salted_cache(num_pages=3) as cache:
        seq = cache.sequence(salt=b"a")
        write(cache, seq, PROMPT, 5).commit()
        seq.reset()
        with cache.sequence([3], salt=b"b") as other:
            write(cache, other, [9] * 33, 6, layers).rollback()
        for salt, value in ((b"a", 7), (b"b", 8)):
            with cache.sequence([4], salt=salt) as last:
                write(cache, last, [8] * 33, value).commit()
                assert values_in_pages(cache, last) == {0, value}


def test_a_second_write_of_a_layer_clears_nothing():
    with salted_cache(num_pages=1) as cache:
        seq = cache.sequence(salt=b"a")
        write(cache, seq, PROMPT[:16], 5).commit()
        seq.free()
        with cache.sequence(salt=b"b") as other:
            step = write(cache, other, [1, 2], 6)
            rows = np.full((2, 1, 8), 7, np.float32)
            step.write(1, rows, rows)
            step.commit()
            assert values_in_pages(cache, other) == {0, 6, 7}


def test_attend_clears_as_write_does():
    with salted_cache(num_pages=2) as cache:
        seq = cache.sequence(salt=b"a")
        write(cache, seq, PROMPT[:32], 5).commit()
        seq.free()
        with cache.sequence(salt=b"b") as other, cache.step([other], [20]) as step:
            rows = np.full((20, 1, 8), 6, np.float32)
            for layer in range(NUM_LAYERS):
                out = step.attend(layer, rows, rows, rows)
                np.testing.assert_array_equal(out, rows)
            step.commit()
            assert values_in_pages(cache, other) == {0, 6}


@pytest.mark.parametrize("salt", ["a", 5, None, bytearray(b"a"), [b"a"]])
def test_what_is_not_bytes_is_refused(salt):
    with salted_cache() as cache:
        with pytest.raises(ArgumentError, match="; give bytes"):
            cache.sequence(salt=salt)
        assert cache.stats().num_sequences == 0


def test_salts_that_no_row_and_no_page_has_are_forgotten():
    salts = Salts()
    held = salts.number(b"held")
    indexed = salts.number(b"indexed")
    for i in range(5 * MAX_UNUSED):
        salts.number(b"%d" % i)
        salts.forget_unused(lambda: [held], lambda number: number == indexed)
        assert len(salts.numbers) <= 2 * MAX_UNUSED + 10
    assert (salts.number(b""), salts.number(b"held"), salts.number(b"indexed")) == (NO_SALT, held, indexed)
    assert len(set(salts.numbers.values())) == len(salts.numbers)


def test_no_salt_reads_what_another_has_written():
    """Tenants come and go on few pages; `make test-long` has 10^5 sequences."""
    num_sequences = int(os.environ.get("PAGED_KV_NUM_RULES", "6000")) // 2
    rng = np.random.default_rng(num_sequences)
    live = {}
    with salted_cache(num_pages=9) as cache:
        for _ in range(num_sequences):
            tenant = int(rng.integers(1, 4))
            tokens = rng.integers(0, 2, int(rng.integers(1, 50))).tolist()
            try:
                seq = cache.sequence(tokens, salt=b"%d" % tenant)
                live[seq] = tenant
                step = write(cache, seq, tokens[len(seq) :], tenant, range(int(rng.integers(1, 3))))
                if all(step._plan.is_written) and rng.random() < 0.8:
                    step.commit()
                    fork = seq.fork(at=int(rng.integers(0, len(seq) + 1)))
                    live[fork] = tenant
                    write(cache, fork, [1] * int(rng.integers(1, 20)), tenant).commit()
                else:
                    step.rollback()
            except (OutOfPages, OutOfSequences):
                pass
            for seq, tenant in live.items():
                assert values_in_pages(cache, seq) <= {0, tenant}
            for seq in list(live):
                if rng.random() < 0.5:
                    del live[seq]
                    seq.free()
        cache.check()
