"""Sequences with a budget: what they drop, what they hold, and what their rows see.

tests/test_state_machine.py walks over such caches at random; here are single cases.
"""

import numpy as np
import pytest
from conftest import SEED, Tripwire, make_cache, rows
from hypothesis import given
from hypothesis import strategies as st
from support import directions, held_pages, looking_at, tolerances

from paged_kv import Ageing, ArgumentError, SequenceTooLong, reference
from paged_kv.pages.eviction import KeepNewest, PagesOfSequence, choose

HEADS, HEAD_DIM = 2, 32


def evicting_cache(page_size=16, budget=None, **options):
    sinks = options.setdefault("num_sink_tokens", 4)
    budget = budget or -(-sinks // page_size) * page_size + 64 + 2 * page_size
    options = {"eviction": "window", "num_pages": 64, "max_step_tokens": 128} | options
    return make_cache(page_size=page_size, budget_tokens=budget, num_layers=1, **options)


class Choice:
    """A policy that drops what a test says, else the oldest."""

    needs_mass = False

    def __init__(self, drops=None):
        self.drops, self.seen = drops or [], []

    def drop(self, pages, excess_tokens):
        self.seen.append((pages, excess_tokens))
        return self.drops.pop(0) if self.drops else KeepNewest().drop(pages, excess_tokens)


def grow(cache, seq, count, rng, history=None, **options):
    """One step; checks attention against the tokens that the sequence held, and its new ones."""
    k, v = (rows(rng, count, HEADS, HEAD_DIM) for _ in range(2))
    q = rows(rng, count, 2 * HEADS, HEAD_DIM)
    before = seq.held_positions
    with cache.step([seq], [count]) as step:
        out = step.attend(0, q, k, v, out=np.full_like(q, np.nan), **options)
    if history is None:
        return
    history[0], history[1] = np.concatenate([history[0], k]), np.concatenate([history[1], v])
    held = np.concatenate([before, np.arange(len(seq) - count, len(seq))])
    all_k, all_v = history[0][held], history[1][held]
    expected = reference.attend(q, all_k, all_v, held, **options)
    atol = tolerances(q, all_k, all_v, **options)[0]
    np.testing.assert_allclose(out, expected, rtol=0, atol=atol)


def no_tokens():
    return [np.empty((0, HEADS, HEAD_DIM), np.float32) for _ in range(2)]


@pytest.mark.parametrize("page_size", [16, 48, 64, 80, 128, 320])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 70},
        {"window": 40, "num_sink_tokens": 20},
        {"alibi_slopes": np.linspace(0.1, 0.7, 2 * HEADS), "logits_soft_cap": 3.0},
    ],
    ids=["all", "window", "window and sinks", "slopes and cap"],
)
def test_rows_see_what_is_held_and_no_more(page_size, options):
    rng = np.random.default_rng(SEED)
    drops = Choice()
    with evicting_cache(page_size, eviction=drops, max_step_tokens=700, num_threads=2) as cache:
        seq, history = cache.sequence(), no_tokens()
        for count in (300, 1, 1, 400, 70, 1, 3, 650, 1):
            grow(cache, seq, count, rng, history, **options)
            cache.check()
    assert drops.seen


def test_holes_are_in_between():
    rng = np.random.default_rng(SEED)
    with evicting_cache(budget=160, eviction=Choice([[2, 5], [3], [8]])) as cache:
        seq, history = cache.sequence(), no_tokens()
        for count in (127, 64, 16, 16):
            grow(cache, seq, count, rng, history)
        assert seq.held_positions.tolist() == [p for p in range(223) if p // 16 not in (2, 3, 5, 8)]
        with cache.step([seq], [1]) as step:
            step.write(0, *(rows(rng, 1, HEADS, HEAD_DIM) for _ in range(2)))
            table = step.block_table[0]
            assert np.flatnonzero(table < 0).tolist() == [2, 3, 5, 8]
            assert step.first_page.tolist() == [0]
            assert step.positions.tolist() == [223]


def test_a_fork_and_a_truncated_sequence_lack_the_same_pages():
    rng = np.random.default_rng(SEED)
    with evicting_cache(budget=160, eviction=Choice([[2, 5]])) as cache:
        seq, history = cache.sequence(), no_tokens()
        grow(cache, seq, 127, rng, history)
        grow(cache, seq, 64, rng, history)
        fork = seq.fork(at=100)
        assert set(range(100)) - set(fork.held_positions.tolist()) == {*range(32, 48), *range(80, 96)}
        grow(cache, fork, 20, rng, [side[:100] for side in history])
        for length in (33, 47, 95):
            with pytest.raises(ArgumentError, match=f"length is {length}, within page {length // 16}, which"):
                seq.truncate(length)
            with pytest.raises(ArgumentError, match="at is"):
                seq.fork(at=length)
        seq.truncate(96)
        grow(cache, seq, 3, rng, [side[:96] for side in history])
        seq.truncate(32)
        assert seq.held_positions.tolist() == list(range(32))
        cache.check()


def test_a_long_sequence_holds_its_budget_and_its_table_does_not_grow():
    rng = np.random.default_rng(SEED)
    with evicting_cache(num_pages=32) as cache:
        seq = cache.sequence()
        for _ in range(60):
            grow(cache, seq, 128, rng)
            assert cache.stats().num_used_pages <= 112 // 16
        assert len(seq) == 7680 and len(seq.held_positions) == 112
        assert cache._store.tables.page_ids.shape[1] == 7 + 4 + 8 + 8 + 1
        assert cache.stats().num_dropped_pages == 7680 // 16 - 7


@given(
    budget=st.integers(112, 300),
    counts=st.lists(st.integers(1, 128), max_size=30),
    seed=st.integers(0, 2**32),
)
def test_neither_sinks_nor_the_newest_tokens_are_ever_dropped(budget, counts, seed):
    rng = np.random.default_rng(seed)

    class Any:
        needs_mass = False

        def drop(self, pages, excess_tokens):
            count = -(-excess_tokens // 16)
            return rng.permutation(pages.numbers[pages.can_be_dropped])[:count].tolist()

    with evicting_cache(budget=budget, eviction=Any()) as cache:
        seq = cache.sequence()
        for count in counts:
            grow(cache, seq, count, rng)
            held = set(seq.held_positions.tolist())
            assert held >= {*range(min(4, len(seq))), *range(max(0, len(seq) - 64), len(seq))}
            assert len(held) <= -(-budget // 16) * 16
        cache.check()


# ---- sharing


def test_what_was_published_before_the_first_drop_is_found_and_what_comes_after_is_not():
    rng, ids = np.random.default_rng(SEED), list(range(400))
    with evicting_cache(num_pages=40) as cache:
        seq = cache.sequence()
        for begin in range(0, 400, 100):
            k, v = (rows(rng, 100, HEADS, HEAD_DIM) for _ in range(2))
            with cache.step([seq], [ids[begin : begin + 100]]) as step:
                step.write(0, k, v)
        # The second step began without a drop, and ended with one: its 12 full pages are there.
        assert len(cache._store.index.by_page) == 12
        # A match is what a sequence may hold.
        assert cache.match(ids).num_tokens == 112
        other = cache.sequence(ids)
        assert other.held_positions.tolist() == list(range(112))
        grow(cache, other, 60, rng)
        seq.free()
        other.free()
        cache.check()
        assert cache.match(ids).num_tokens == 112


def test_pages_that_were_dropped_are_shared_with_those_who_have_not():
    rng, ids = np.random.default_rng(SEED), list(range(100))
    with evicting_cache() as cache:
        seq, history = cache.sequence(), no_tokens()
        k, v = (rows(rng, 100, HEADS, HEAD_DIM) for _ in range(2))
        with cache.step([seq], [ids]) as step:
            step.write(0, k, v)
        history = [k, v]
        fork = seq.fork()
        grow(cache, seq, 60, rng, [*history])
        assert len(seq.held_positions) < 160
        grow(cache, fork, 1, rng, [*history])
        assert fork.held_positions.tolist() == list(range(101))
        cache.check()


def test_a_kept_page_that_gives_way_takes_the_rest_of_its_chain():
    rng = np.random.default_rng(SEED)
    with evicting_cache(num_pages=14, max_step_tokens=32) as cache:
        seq = cache.sequence()
        for begin in range(0, 320, 32):
            k, v = (rows(rng, 32, HEADS, HEAD_DIM) for _ in range(2))
            with cache.step([seq], [list(range(begin, begin + 32))]) as step:
                step.write(0, k, v)
            cache.check()
        other = cache.sequence()
        grow(cache, other, 32, rng)
        grow(cache, other, 32, rng)
        grow(cache, other, 32, rng)
        seq.reset()
        other.free()
        cache.check()


# ---- refusals


def test_a_policy_that_raises_leaves_the_step_open():
    class Raises:
        needs_mass = False

        def drop(self, pages, excess_tokens):
            raise ZeroDivisionError

    rng = np.random.default_rng(SEED)
    with evicting_cache(eviction=Raises()) as cache:
        seq = cache.sequence()
        grow(cache, seq, 100, rng)
        step = cache.step([seq], [50])
        step.write(0, *(rows(rng, 50, HEADS, HEAD_DIM) for _ in range(2)))
        with pytest.raises(ZeroDivisionError):
            step.commit()
        assert len(seq) == 100 and len(seq.held_positions) == 100
        step.commit([12])
        assert len(seq) == 112


@pytest.mark.parametrize(
    ("drops", "message"),
    [
        ([0, 1], "names page 0, which it cannot drop"),
        ([4, 8], "names page 8, which it cannot drop"),
        ([1, 70], "names page 70, which it cannot drop"),
        ([1, 1], "names a page twice"),
        ([1], "names 1 pages, 2 have to go: the sequence holds 32 tokens too many"),
        (["a"], "give page numbers"),
    ],
)
def test_what_a_policy_may_not_name_is_refused(drops, message):
    rng = np.random.default_rng(SEED)
    with evicting_cache(eviction=Choice([drops])) as cache:
        seq = cache.sequence()
        grow(cache, seq, 100, rng)
        step = cache.step([seq], [44])
        step.write(0, *(rows(rng, 44, HEADS, HEAD_DIM) for _ in range(2)))
        with pytest.raises(ArgumentError, match=message):
            step.commit()
        assert len(seq) == 100
        step.commit()
        assert len(seq) == 144 and len(seq.held_positions) == 112


def test_more_pages_may_be_dropped_than_have_to():
    pages = PagesOfSequence(np.arange(9, dtype=np.int32), np.arange(9) < 5, 140, 1, 16)
    assert choose(Choice([[4, 1, 3]]), pages, 16).tolist() == [1, 3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_tokens": 512}, "without eviction"),
        ({"eviction": "h2o", "budget_tokens": 512}, 'give "window" or "attention", or an object with drop'),
        ({"eviction": object(), "budget_tokens": 512}, "an object with drop"),
        ({"eviction": KeepNewest()}, "a policy of your own needs budget_tokens"),
        ({"eviction": "window", "budget_tokens": 111}, "111"),
        ({"eviction": "window", "budget_tokens": 512, "window": 64}, "give eviction or window"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        make_cache(**options)


def test_a_step_is_limited():
    with evicting_cache() as cache:
        with pytest.raises(ArgumentError, match="outside 0 to 128"):
            cache.step([cache.sequence()], [129])
        assert cache.max_step_tokens == 128 and cache.budget_tokens == 112


def test_a_sequence_that_was_never_cut_is_refused_at_the_end_of_its_cells():
    """As after interrupts between commits and cuts, which no policy can repair."""
    rng = np.random.default_rng(SEED)
    with evicting_cache(num_pages=100) as cache:
        seq = cache.sequence()
        cache._store.budgets.num_tokens[:] = 10**6
        for _ in range(3):
            grow(cache, seq, 128, rng)
        with pytest.raises(SequenceTooLong, match="would hold 512 tokens"):
            cache.step([seq], [128])
        cache._store.budgets.num_tokens[:] = 112
        grow(cache, seq, 64, rng)
        assert len(seq.held_positions) == 112


# ---- attention


def test_what_gets_attention_stays():
    rng = np.random.default_rng(SEED)
    with evicting_cache(eviction="attention") as cache:
        seq = cache.sequence()
        looking_at(cache, seq, 96, 0, rng)
        # The last rows of a prompt decide: they look at page 3, and the first 32 rows at others.
        looking_at(cache, seq, 64, 3, rng)
        assert held_pages(seq) == [0, 3, 5, 6, 7, 8, 9]
        # Single tokens go by the mean of all rows; pages from 6 on hold the newest 64 tokens.
        for _ in range(16):
            looking_at(cache, seq, 1, 5, rng)
        assert held_pages(seq) == [0, 3, 6, 7, 8, 9, 10]
        for _ in range(64):
            looking_at(cache, seq, 1, 3, rng)
        assert 3 in held_pages(seq)


def test_a_new_page_is_not_starved_by_the_sums_of_old_ones():
    """As in VeloxQuant 137: with sums, the newest pages are the least, and the prompt stays for ever."""
    rng = np.random.default_rng(SEED)
    with evicting_cache(eviction="attention") as cache:
        seq = cache.sequence()
        looking_at(cache, seq, 100, 2, rng)
        for _ in range(400):
            looking_at(cache, seq, 1, len(seq) // 16, rng)
        assert min(held_pages(seq)[2:]) > 6


def test_a_prefix_hit_is_cut_when_64_rows_have_seen_it():
    rng, ids = np.random.default_rng(SEED), list(range(112))
    with evicting_cache(eviction="attention") as cache:
        seq = cache.sequence()
        k = directions(0, 112, 16)
        with cache.step([seq], [ids]) as step:
            step.write(0, k, k)
        seq.free()
        seq = cache.sequence([*ids, 7])
        assert len(seq) == 112
        for i in range(64):
            assert len(seq.held_positions) == 112 + i
            looking_at(cache, seq, 1, 2, rng)
        assert len(seq) == 176 and len(seq.held_positions) == 112
        assert 2 in held_pages(seq)


def test_mass_is_the_forks_too():
    rng = np.random.default_rng(SEED)
    with evicting_cache(eviction="attention", budget=160) as cache:
        seq = cache.sequence()
        looking_at(cache, seq, 128, 4, rng)
        looking_at(cache, seq, 31, 4, rng)
        fork, early = seq.fork(), seq.fork(at=100)
        for one in (seq, fork):
            looking_at(cache, one, 1, 0, rng)
            looking_at(cache, one, 1, 0, rng)
            assert 4 in held_pages(one) and 5 not in held_pages(one)
        looking_at(cache, early, 64, 5, rng)
        cache.check()


def test_the_attention_that_dropped_pages_got_is_known():
    class Oldest(KeepNewest):
        needs_mass = True

    rng = np.random.default_rng(SEED)
    with evicting_cache(eviction=Oldest()) as cache:
        seq = cache.sequence()
        looking_at(cache, seq, 112, 1, rng)
        assert seq.attention_lost == 0
        looking_at(cache, seq, 1, 4, rng)
        # Page 1 had all attention of the 96 tokens that could see it, and none of the last one.
        assert 1 not in held_pages(seq)
        np.testing.assert_allclose(seq.attention_lost, 96 / 97, rtol=1e-3)
        fork = seq.fork()
        assert fork.attention_lost == seq.attention_lost
        seq.reset()
        assert seq.attention_lost == 0 and fork.attention_lost > 0


def test_a_sequence_has_a_budget_of_its_own():
    rng = np.random.default_rng(SEED)
    with evicting_cache(budget=200, num_pages=60) as cache:
        small, usual = cache.sequence(budget_tokens=112), cache.sequence()
        for seq in (small, usual):
            grow(cache, seq, 128, rng)
            grow(cache, seq, 128, rng)
        assert [len(seq.held_positions) for seq in (small, usual)] == [112, 208]
        fork = small.fork()
        grow(cache, fork, 60, rng)
        assert len(fork.held_positions) == 108
        for budget in (111, 201):
            with pytest.raises(ArgumentError, match=f"budget_tokens is {budget}, outside 112 to 200"):
                cache.sequence(budget_tokens=budget)
        ids = list(range(250))
        k = rows(rng, 125, HEADS, HEAD_DIM)
        seq = cache.sequence()
        with cache.step([seq], [ids[:125]]) as step:
            step.write(0, k, k)
        assert len(cache.sequence(ids)) == 125 and len(cache.sequence(ids, budget_tokens=112)) == 112
    with make_cache() as cache, pytest.raises(ArgumentError, match="build the cache with eviction="):
        cache.sequence(budget_tokens=512)


@pytest.mark.parametrize("policy", ["window", "attention"])
def test_pages_that_age_are_dropped_too(policy):
    """Rounding is a page's own, whatever is dropped between; forks go on from what they share."""
    rng = np.random.default_rng(SEED)
    ageing = Ageing(recent_tokens=64, then="int8", after=150, last=("int8", "int4"))
    options = {"precision_policy": ageing, "dtype": "bfloat16", "num_pages": 60}
    with evicting_cache(64, budget=448, eviction=policy, **options) as cache:
        seqs = [cache.sequence()]
        written = {seqs[0]: no_tokens()}
        for count in (128, 100, 1, 64, 128, 3, 128, 90, 1, 64):
            for seq in list(seqs):
                k, v = (rows(rng, count, HEADS, HEAD_DIM) for _ in range(2))
                with cache.step([seq], [count]) as step:
                    step.attend(0, rows(rng, count, 2 * HEADS, HEAD_DIM), k, v)
                written[seq] = [
                    np.concatenate([old, new]) for old, new in zip(written[seq], (k, v), strict=True)
                ]
                held = seq.held_positions
                for got, exact in zip(seq.gather(0), written[seq], strict=True):
                    np.testing.assert_allclose(got, exact[held], rtol=0, atol=0.4)
                    recent = held >= len(seq) - 64
                    np.testing.assert_allclose(got[recent], exact[held][recent], rtol=2**-8, atol=1e-6)
                cache.check()
            if len(seqs) < 3:
                seqs.append(seqs[0].fork())
                written[seqs[-1]] = written[seqs[0]]
        assert set(cache.stats().formats) == {"bfloat16", "int8", "int8,int4"}
        assert all(one.num_pages for one in cache.stats().formats.values())
        assert cache.stats().num_dropped_pages > 0


def test_forks_with_holes_give_the_same_bits_together_and_alone():
    class Latest:
        needs_mass = False

        def drop(self, pages, excess_tokens):
            return pages.numbers[pages.can_be_dropped][-(excess_tokens // 16) :].tolist()

    rng = np.random.default_rng(SEED)
    with evicting_cache(budget=640, eviction=Latest(), num_pages=200, num_threads=2) as cache:
        seq = cache.sequence()
        for _ in range(8):
            grow(cache, seq, 128, rng)
        assert 39 not in held_pages(seq) and 31 in held_pages(seq)
        forks = [seq.fork() for _ in range(6)]
        q, k, v = (rows(rng, 6, heads, HEAD_DIM) for heads in (2 * HEADS, HEADS, HEADS))
        step = cache.step(forks, [1] * 6)
        step._handle.batch.may_share = 2  # PKV_SHARE_ALL
        together = step.attend(0, q, k, v)
        assert step.bytes_not_read > 0
        step.rollback()
        for i, fork in enumerate(forks):
            own, step = slice(i, i + 1), cache.step([fork], [1])
            np.testing.assert_array_equal(step.attend(0, q[own], k[own], v[own]), together[own])
            step.rollback()


# ---- interrupts


def test_an_interrupt_in_any_call_of_a_commit_that_drops_loses_nothing():
    """Whether the step was committed and cut or not, pages are accounted for, and the next commit cuts."""
    rng, at, was_raised = np.random.default_rng(SEED), 1, True
    k, ids = rows(rng, 240, HEADS, HEAD_DIM), list(range(240))
    while was_raised:
        with evicting_cache(eviction="attention", num_pages=40) as cache:
            seq = cache.sequence()
            with cache.step([seq], [ids[:112]]) as step:
                step.attend(0, k[:112], k[:112], k[:112])
            fork = seq.fork()
            step = cache.step([seq], [ids[112:176]])
            step.attend(0, k[112:176], k[112:176], k[112:176])
            trip = Tripwire(at)
            with trip:
                step.commit()
            was_raised = bool(trip.raised)
            trip.raised.clear()
            del step
            cache.check()
            length = len(seq)
            assert length in (112, 176) and fork.held_positions.tolist() == list(range(112))
            for one in (seq, fork, cache.sequence(ids)):
                np.testing.assert_array_equal(one.gather(0)[0], k[one.held_positions])
                with cache.step([one], [64]) as step:
                    step.attend(0, *[k[len(one) : len(one) + 64]] * 3)
                assert len(one.held_positions) == 112
                one.free()
            cache.check()
            assert cache.stats().num_used_pages == 0
        at += 1
    assert at > 10
