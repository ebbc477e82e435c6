"""The order in which kept pages give way: keys, priorities, times to live, policies of the caller."""

from itertools import chain

import numpy as np
import pytest
from test_prefix_index import PAGE_SIZE, extend, prefix_cache, start

from paged_kv import ArgumentError, CostAware, KeptPage, StaleSequence


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def run(cache, tokens, **retained):
    """Compute a prompt and free it."""
    seq, _ = start(cache, tokens)
    if retained:
        seq.retain(**retained)
    seq.free()


def page(first, num_pages=1):
    """Tokens of so many pages, which begin with `first`."""
    return [first, *range(10, 10 + num_pages * PAGE_SIZE - 1)]


def is_there(cache, tokens):
    return cache.match([*tokens, 99, 98]).num_tokens == len(tokens)


def press(cache, num_pages):
    """Take so many pages, and give them back."""
    with cache.sequence() as seq, cache.step([seq], [num_pages * PAGE_SIZE]) as step:
        step.rollback()


def test_the_page_that_was_not_used_for_longest_goes_first():
    clock = Clock()
    with prefix_cache(num_pages=3, clock=clock) as cache:
        for first in (1, 2, 3):
            run(cache, page(first))
            clock.now += 1
        cache.sequence([*page(1), 5]).free()  # which uses it
        press(cache, 1)
        assert [is_there(cache, page(first)) for first in (1, 2, 3)] == [True, False, True]
        press(cache, 2)
        assert [is_there(cache, page(first)) for first in (1, 2, 3)] == [True, False, False]


def test_a_priority_of_three_is_worth_two_half_lives():
    clock = Clock()
    for age, first_gone in ((19, 2), (21, 1)):
        with prefix_cache(num_pages=2, clock=clock, retention_half_life=10) as cache:
            run(cache, page(1), priority=3)
            clock.now += age
            run(cache, page(2))
            press(cache, 1)
            assert not is_there(cache, page(first_gone)) and is_there(cache, page(3 - first_gone))


def test_a_sequence_is_made_with_a_priority_and_its_forks_have_it():
    clock = Clock()
    with prefix_cache(num_pages=2, clock=clock) as cache:
        seq = cache.sequence(priority=1)
        fork = seq.fork()
        extend(cache, fork, [], page(1)).commit()
        fork.free()
        clock.now += 500
        run(cache, page(2))
        press(cache, 1)
        assert is_there(cache, page(1)) and not is_there(cache, page(2))
        # The row that the fork had does not pass its priority on.
        run(cache, page(2))
        clock.now += 1000
        run(cache, page(3))
        assert is_there(cache, page(3))


def test_after_its_time_a_page_goes_before_all_others():
    clock = Clock()
    with prefix_cache(num_pages=3, clock=clock) as cache:
        run(cache, page(1))
        clock.now += 1
        run(cache, page(2), ttl=5, priority=1000)
        clock.now += 1
        run(cache, page(3), ttl=50)
        clock.now += 4.5
        press(cache, 1)
        match = cache.match([*page(2), 1, 2])
        assert (match.reason, match.cause, match.age) == ("evicted", "time", 0.0)
        press(cache, 2)
        assert cache.match([*page(1), 1, 2]).cause == "pressure"
        assert is_there(cache, page(3))


def test_a_time_to_live_begins_at_the_end_of_the_last_sequence_that_has_the_page():
    clock = Clock()
    with prefix_cache(num_pages=2, clock=clock) as cache:
        run(cache, page(1), ttl=5)
        clock.now += 4
        other = cache.sequence([*page(1), 7])
        other.retain(ttl=5, priority=1000)
        clock.now += 10  # it has an owner all the time
        run(cache, page(2))
        press(cache, 1)
        assert is_there(cache, page(1))
        other.free()
        clock.now += 4
        run(cache, page(2))
        press(cache, 1)
        assert is_there(cache, page(1)) and not is_there(cache, page(2))
        clock.now += 2
        run(cache, page(2))
        press(cache, 1)
        assert is_there(cache, page(2)) and not is_there(cache, page(1))


@pytest.mark.parametrize("ttls", [(5, None), (None, 5)])
def test_what_one_sequence_leaves_without_a_time_to_live_has_none(ttls):
    clock = Clock()
    with prefix_cache(num_pages=2, clock=clock) as cache:
        first, _ = start(cache, page(1))
        second = cache.sequence([*page(1), 7])
        for seq, ttl in zip((first, second), ttls, strict=True):
            seq.retain(ttl=ttl, priority=1)
            seq.free()
        clock.now += 100
        run(cache, page(2))
        press(cache, 1)
        assert is_there(cache, page(1)) and not is_there(cache, page(2))


def test_a_page_that_is_used_for_other_tokens_forgets_its_time_to_live():
    clock = Clock()
    with prefix_cache(num_pages=1, clock=clock) as cache:
        run(cache, page(1), ttl=5)
        run(cache, page(2))
        clock.now += 10
        press(cache, 1)
        assert cache.match([*page(2), 1, 2]).cause == "pressure"
        assert not cache._store.index.retention._by_deadline


@pytest.mark.parametrize("shortfall", range(1, 9))
def test_a_step_evicts_just_what_it_lacks(shortfall):
    with prefix_cache(num_pages=10) as cache:
        run(cache, page(1, 5))
        run(cache, [*page(1, 3), *page(2)])
        assert cache.stats().num_kept_pages == 6
        press(cache, 4 + min(shortfall, 6))
        assert cache.stats().num_evictions == min(shortfall, 6)
        cache.check()


class Policy:
    """Keys by a function of the page."""

    def __init__(self, key):
        self.key, self.seen = self.noted, []
        self.function = key

    def noted(self, kept):
        self.seen.append(kept)
        return self.function(kept)


def test_a_policy_of_the_caller_decides():
    policy = Policy(lambda kept: -kept.last_used)  # the newest goes first
    clock = Clock()
    with prefix_cache(num_pages=3, keep_policy=policy, clock=clock) as cache:
        for first in (1, 2, 3):
            run(cache, page(first), priority=7)
            clock.now += 1
        press(cache, 1)
        assert [is_there(cache, page(first)) for first in (1, 2, 3)] == [True, True, False]
        with cache.sequence([*page(1), 4]):
            pass
        hit = policy.seen[-1]
        assert (hit.position, hit.num_hits, hit.last_used, hit.priority) == (0, 1, 1003.0, 0)
        run(cache, page(1, 3))
        assert [kept.position for kept in policy.seen[-3:]] == [0, 16, 32]


def test_the_end_of_a_chain_goes_first_whatever_a_policy_says():
    policy = Policy(lambda kept: kept.position)
    with prefix_cache(num_pages=4, keep_policy=policy) as cache:
        run(cache, page(1, 4))
        for left in (3, 2, 1, 0):
            press(cache, 4 - left)
            assert cache.match([*page(1, 4), 5]).num_tokens == left * PAGE_SIZE
            cache.check()


def test_cost_aware_keeps_what_is_found_often():
    clock = Clock()
    with prefix_cache(num_pages=3, keep_policy=CostAware(), clock=clock, retention_half_life=100) as cache:
        run(cache, page(1))
        for _ in range(3):
            cache.sequence([*page(1), 5]).free()
        clock.now += 30  # a fifth of the idle time, which is a half-life at first, for each doubling: 40 s
        for first in (2, 3):
            run(cache, page(first))
        press(cache, 1)
        assert is_there(cache, page(1)) and not is_there(cache, page(2))
        clock.now += 200
        run(cache, page(4))
        press(cache, 2)
        assert not is_there(cache, page(1)) and is_there(cache, page(4))


def test_cost_aware_weighs_position_and_priority_as_it_says():
    policy = CostAware(even_position=100)
    kept = KeptPage(0, 0, 50.0, 0, half_life=10.0, idle_seconds=20.0)
    assert policy.key(kept) == 50.0
    assert policy.key(kept._replace(num_hits=3)) == 50.0 + 0.2 * 20 * 2
    assert policy.key(kept._replace(position=300)) == 50.0 + 0.2 * 20 * 2
    assert policy.key(kept._replace(priority=1)) == 60.0
    with pytest.raises(ArgumentError, match="even_position"):
        CostAware(0)


def test_the_idle_time_of_evicted_pages_is_measured():
    policy, clock = Policy(lambda kept: kept.last_used), Clock()
    with prefix_cache(num_pages=2, keep_policy=policy, clock=clock, retention_half_life=100) as cache:
        run(cache, page(1))
        assert policy.seen[-1].idle_seconds == 100
        clock.now += 356
        run(cache, page(2, 2))  # which evicts the first
        assert policy.seen[-1].idle_seconds == 100 + 256 / 256


def raises(kept):
    raise ZeroDivisionError


@pytest.mark.parametrize("key", [raises, lambda kept: float("nan"), lambda kept: None, lambda kept: "x"])
def test_a_policy_that_fails_is_counted_and_lru_decides(key):
    clock = Clock()
    with prefix_cache(num_pages=2, keep_policy=Policy(key), clock=clock) as cache:
        for first in (1, 2):
            run(cache, page(first))
            clock.now += 1
        press(cache, 1)
        assert is_there(cache, page(2)) and not is_there(cache, page(1))
        assert cache.stats().num_policy_errors == 4  # published and left, twice


def test_a_policy_that_uses_the_cache_fails_and_changes_nothing():
    policy = Policy(lambda kept: len(cache.sequence()))
    with prefix_cache(num_pages=2, keep_policy=policy) as cache:
        run(cache, page(1))
        assert cache.stats().num_policy_errors == 2
        assert cache.stats().num_sequences == 0 and is_there(cache, page(1))
        cache.check()


@pytest.mark.parametrize(
    "change",
    [{"priority": value} for value in (-1, 1.5, 2**31, True)]
    + [{"ttl": value} for value in (0, -1, True, float("nan"), "5")],
)
def test_bad_input_is_refused(change):
    with prefix_cache() as cache:
        seq = cache.sequence()
        (name,) = change
        with pytest.raises(ArgumentError, match=name):
            seq.retain(**change)
        if name == "priority":
            with pytest.raises(ArgumentError, match=name):
                cache.sequence(**change)
        seq.free()
        with pytest.raises(StaleSequence):
            seq.retain(priority=1)
    with pytest.raises(ArgumentError, match="retention_half_life"):
        prefix_cache(retention_half_life=0)


def test_without_prefix_caching_nothing_is_retained():
    with prefix_cache(prefix_caching=False) as cache:
        seq, _ = start(cache, page(1))
        seq.retain(priority=5, ttl=1)
        seq.free()
        assert cache.stats().num_kept_pages == 0


@pytest.mark.parametrize("seed", range(10))
def test_pages_go_in_the_order_that_a_model_finds(seed):
    """Prompts of whole pages that share beginnings: the model has a key for each prefix."""
    rng = np.random.default_rng(seed)
    clock, num_pages, keys = Clock(), 12, {}
    with prefix_cache(num_pages=num_pages, clock=clock, retention_half_life=3.3) as cache:
        for _ in range(150):
            clock.now += 1
            prompt = tuple(int(choice) for choice in rng.integers(0, 3, rng.integers(1, 4)))
            tokens = [token for first in prompt for token in page(first)]
            prefixes = [prompt[: i + 1] for i in range(len(prompt))]
            num_there = next((i for i, prefix in enumerate(prefixes) if prefix not in keys), len(prompt))
            seq = cache.sequence([*tokens, 1], priority=(priority := int(rng.integers(0, 3))))
            assert len(seq) == num_there * PAGE_SIZE
            now = clock.now + 3.3 * np.log2(1 + priority)
            for prefix in prefixes:
                keys[prefix] = max(keys.get(prefix, 0), now)
            if num_there < len(prompt):
                extend(cache, seq, tokens[: len(seq)], tokens[len(seq) :]).commit()
            seq.free()
            # As many pages as fit: of equal keys, those at the end of a chain go first.
            in_order = sorted(keys, key=lambda prefix: (keys[prefix], -len(prefix)))
            for gone in in_order[: max(0, len(keys) - num_pages)]:
                del keys[gone]
            there = [prefix for prefix in keys if is_there(cache, [*chain.from_iterable(map(page, prefix))])]
            assert there == list(keys)
        assert cache.stats().num_evictions > 20
