"""Where the pool is the budget: what idle sequences give up for a step, and what they never do."""

from contextlib import closing

import numpy as np
import pytest
from conftest import SEED, Tripwire, make_cache, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from support import held_pages, looking_at

from paged_kv import Ageing, OutOfPages
from paged_kv.pages.pool import PagePool
from paged_kv.pages.slabs import SlabSizes

HEADS, HEAD_DIM = 2, 32


@pytest.mark.parametrize("policy", ["window", "attention"])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_step_takes_pages_of_idle_sequences_that_get_least(policy, prefix_caching):
    rng = np.random.default_rng(SEED)
    options = {"eviction": policy, "num_pages": 34, "prefix_caching": prefix_caching, "num_sink_tokens": 4}
    with make_cache(num_layers=1, max_step_tokens=128, **options) as cache:
        assert cache.budget_tokens is None
        a, b, other = (cache.sequence() for _ in range(3))
        for seq in (a, b):
            looking_at(cache, seq, 96, 2, rng)
            looking_at(cache, seq, 96, 2, rng)
        looking_at(cache, other, 128, 0, rng)
        assert cache.stats().num_free_pages == 2 and cache.stats().num_dropped_pages == 0
        with cache.step([b], [1]) as step:  # b is busy: only a gives pages
            step.write(0, *(rows(rng, 1, HEADS, HEAD_DIM) for _ in range(2)))
            looking_at(cache, other, 48, 0, rng)
        assert cache.stats().num_dropped_pages == 2
        gone = {*range(12)} - {*held_pages(a)}
        assert gone == {1, 2} if policy == "window" else gone < {1, *range(3, 8)}
        assert held_pages(b) == [*range(13)]
        looking_at(cache, a, 1, 2, rng)
        cache.check()
        # What would not be enough is not begun.
        more = [other, cache.sequence(), cache.sequence()]
        before = cache.stats()
        with pytest.raises(OutOfPages):
            cache.step(more, [128] * 3)
        assert cache.stats() == before


def test_pages_that_others_hold_are_not_given_up():
    rng = np.random.default_rng(SEED)
    with make_cache(num_layers=1, num_pages=16, eviction="window", max_step_tokens=128) as cache:
        seq = cache.sequence()
        looking_at(cache, seq, 128, 0, rng)
        fork = seq.fork()
        other = cache.sequence()
        looking_at(cache, other, 128, 0, rng)
        with pytest.raises(OutOfPages):
            cache.step([other], [16])
        fork.free()
        looking_at(cache, other, 16, 0, rng)
        assert held_pages(seq) == [0, *range(2, 8)]


def test_pinned_pages_are_not_given_up():
    rng = np.random.default_rng(SEED)
    with make_cache(
        num_layers=1, num_pages=16, eviction="window", max_step_tokens=128, pin_budget=1.0
    ) as cache:
        ids, seq = list(range(128)), cache.sequence()
        k = rows(rng, 128, HEADS, HEAD_DIM)
        with cache.step([seq], [ids]) as step:
            step.write(0, k, k)
        pin = cache.pin(cache.match([*ids, 1]))
        assert pin.num_tokens == 128
        seq.free()
        other = cache.sequence()
        looking_at(cache, other, 128, 0, rng)
        with pytest.raises(OutOfPages, match="8 are pinned"):
            cache.step([other], [16])
        pin.release()
        looking_at(cache, other, 16, 0, rng)
        cache.check()


# ---- pages that can be packed


def ageing_cache(policy="attention", num_pages=100, after=512, **options):
    return make_cache(
        num_layers=2,
        dtype="bfloat16",
        page_size=64,
        num_pages=num_pages,
        eviction=policy,
        precision_policy=Ageing(64, "int8", after, ("int8", "int4")),
        max_step_tokens=512,
        **options,
    )


def filled(cache, seq, count, rng):
    """Returns the keys of the step's tokens, of one layer."""
    with cache.step([seq], [count]) as step:
        for layer in range(2):
            k = rows(rng, count, HEADS, HEAD_DIM)
            step.attend(layer, rows(rng, count, 2 * HEADS, HEAD_DIM), k, k)
    return k


def contents(seqs):
    return [seq.gather(layer)[side].copy() for seq in seqs for layer in range(2) for side in range(2)]


@pytest.mark.parametrize("policy", ["window", "attention"])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_pages_are_packed_before_any_is_dropped(policy, prefix_caching):
    rng = np.random.default_rng(SEED)
    with ageing_cache(policy, prefix_caching=prefix_caching) as cache:
        seqs, was_packed = [], False
        while not cache.stats().num_dropped_pages:
            before = cache.stats().formats
            seqs.append(cache.sequence())
            filled(cache, seqs[-1], 512, rng)
            cache.check()
            of_all = cache.stats().formats
            # A sequence of 512 tokens packs none into int4 by itself.
            was_packed |= of_all["int8,int4"].num_pages > before["int8,int4"].num_pages
        assert was_packed and len(seqs) > 10
        # What was dropped had the last format: no idle sequence has less than its newest 64 tokens.
        assert all(set(range(448, 512)) <= set(seq.held_positions.tolist()) for seq in seqs)


def test_a_step_that_cannot_have_room_changes_nothing():
    rng = np.random.default_rng(SEED)
    with ageing_cache() as cache:
        seqs = [cache.sequence() for _ in range(8)]
        for seq in seqs:
            filled(cache, seq, 512, rng)
        before, expected = cache.stats(), contents(seqs)
        with pytest.raises(OutOfPages):
            cache.step([cache.sequence() for _ in range(16)], [512] * 16)
        after = cache.stats()
        assert (after.formats, after.num_dropped_pages) == (before.formats, before.num_dropped_pages)
        for got, known in zip(contents(seqs), expected, strict=True):
            np.testing.assert_array_equal(got, known)


def test_packed_pages_give_room_by_the_slab():
    """Of a slab that other sequences hold pages of, none is dropped: no open page would have room there."""
    sizes = SlabSizes(num_slabs=6, slab_bytes=512, page_bytes=(256, 128, 64), floors=(1, 1, 1))
    with closing(PagePool(slabs=sizes)) as pool:
        opened, packed = pool.acquire(3), pool.acquire(6, format=1)
        pool.release(packed[4:5])
        alone = np.concatenate([opened[1:], packed[1:4], packed[5:]])
        assert pool.room_groups(alone).tolist() == [0, 1, -1, -1, -1, 5]
        assert pool.room_groups(np.append(packed[:1], alone)).tolist() == [0, 1, 2, 0, 0, 0, 6]
        # Two slabs are empty, one of them is a floor of the third format.
        assert pool.num_reclaimable == 3
        assert pool.num_reclaimable_without(packed[:3]) == 3
        assert pool.num_reclaimable_without(packed[:4]) == 5
        assert pool.num_reclaimable_without(opened) == 6
        assert pool.num_reclaimable == 3
    with closing(PagePool(8, 64)) as pool:
        pages = pool.acquire(5)
        assert pool.room_groups(pages).tolist() == [0, 1, 2, 3, 4]
        assert pool.num_reclaimable_without(pages[:2]) == 5


@given(
    floors=st.tuples(*[st.integers(0, 2)] * 3),
    formats=st.lists(st.integers(0, 2), max_size=30),
    leave=st.lists(st.booleans(), min_size=30, max_size=30),
    kept=st.lists(st.booleans(), min_size=30, max_size=30),
)
def test_what_would_be_reclaimable_is_what_will_be(floors, formats, leave, kept):
    sizes = SlabSizes(num_slabs=7, slab_bytes=512, page_bytes=(256, 128, 64), floors=floors)
    with closing(PagePool(slabs=sizes)) as pool:
        pages = []
        for format, is_kept in zip(formats, kept, strict=False):
            if pool.num_available(format):
                pages += pool.acquire(1, format).tolist()
                if is_kept:  # without an owner it stays until it is evicted
                    pool.set_indexed(pages[-1], True)
        goes = np.array([page for page, is_gone in zip(pages, leave, strict=False) if is_gone], np.int32)
        expected, groups = pool.num_reclaimable_without(goes), pool.room_groups(goes).tolist()
        before, formats = pool.num_reclaimable, pool.formats_of(goes).tolist()
        pool.release(goes)
        assert pool.num_reclaimable == expected >= before
        for page, group, format in zip(goes.tolist(), groups, formats, strict=True):
            assert (group >= 0) == (format == 0 or pool.num_owned(places_beside(page)) == 0)
            assert group < 0 or goes[group] // 8 == page // 8


def places_beside(page):
    """Ids of the places of a page's slab, of which the smallest format has 8."""
    return list(range(page // 8 * 8, page // 8 * 8 + 8))


@settings(max_examples=20, deadline=None)
@given(
    policy=st.sampled_from(["window", "attention"]),
    caching=st.booleans(),
    after=st.sampled_from([64, 192, 512]),
    moves=st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from([1, 64, 200, 512])), min_size=10, max_size=30
    ),
    forks=st.sets(st.integers(0, 30), max_size=4),
    seed=st.integers(0, 2**32),
)
def test_sequences_read_their_own_whatever_gave_way(policy, caching, after, moves, forks, seed):
    """Rounded to 4 bits at worst, at their true positions, and the newest tokens always."""
    rng = np.random.default_rng(seed)
    with ageing_cache(policy, 60, after, prefix_caching=caching, num_sink_tokens=4) as cache:
        seqs = [cache.sequence() for _ in range(6)]
        exact = [np.empty((0, HEADS, HEAD_DIM), np.float32) for _ in seqs]
        for i, (choice, count) in enumerate(moves):
            if i in forks:
                seqs[choice].free()
                seqs[choice], exact[choice] = seqs[choice - 1].fork(), exact[choice - 1]
            before = cache.stats(), [seq.held_positions for seq in seqs]
            try:
                k = filled(cache, seqs[choice], count, rng)
                exact[choice] = np.concatenate([exact[choice], k])
            except OutOfPages:
                after_it = cache.stats(), [seq.held_positions for seq in seqs]
                assert after_it[0].formats == before[0].formats
                for now, then in zip(after_it[1], before[1], strict=True):
                    np.testing.assert_array_equal(now, then)
            cache.check()
            for seq, own in zip(seqs, exact, strict=True):
                held = seq.held_positions
                assert len(seq) == len(own)
                assert set(range(max(0, len(seq) - 64), len(seq))) <= set(held.tolist())
                assert set(range(min(4, len(seq)))) <= set(held.tolist())
                for side in seq.gather(1):
                    np.testing.assert_allclose(side, own[held], rtol=0, atol=0.5)


@pytest.mark.parametrize("policy", ["window", "attention"])
def test_an_interrupt_while_room_is_made_loses_nothing(policy):
    """At whatever call it comes: pages are accounted for, and the next step has room."""
    at, was_raised = 1, True
    while was_raised:
        rng = np.random.default_rng(SEED)
        with ageing_cache(policy, 28, 128, prefix_caching=True) as cache:
            seqs, exact = [cache.sequence() for _ in range(6)], []
            for i, seq in enumerate(seqs):
                k = rows(rng, 384, HEADS, HEAD_DIM)
                with cache.step([seq], [list(range(1000 * i, 1000 * i + 384))]) as step:
                    for layer in range(2):
                        step.write(layer, k, k)
                exact.append(k)
            new, trip = cache.sequence(), Tripwire(at)
            with trip:
                cache.step([new], [512]).rollback()
            was_raised = bool(trip.raised)
            trip.raised.clear()
            cache.check()
            for seq, own in zip(seqs, exact, strict=True):
                np.testing.assert_allclose(seq.gather(0)[0], own[seq.held_positions], rtol=0, atol=0.5)
            filled(cache, new, 512, rng)
            assert cache.stats().num_dropped_pages
            cache.check()
        at += 1 + at // 16  # each call of the beginning, and some of what is repeated
    assert at > 100
