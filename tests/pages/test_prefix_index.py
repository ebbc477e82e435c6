"""The prefix cache: what `sequence(tokens)` finds, against a list of everything that was ever offered.

Keys of a token depend on the tokens up to it, so a wrong page shows in what `gather` reads.
"""

import contextlib
import gc
import os
from collections import deque
from types import MappingProxyType

import numpy as np
import pytest
from conftest import SEED, STRIDE, Tripwire, make_cache
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from paged_kv import AllBlocksCleared, ArgumentError, BlockRemoved, OutOfPages, OutOfSequences, PagedKVError
from paged_kv.pages.token_keys import ids_of

PAGE_SIZE = 16
STEPS = 40
#: Few different ids, so that prompts agree for a while.
IDS = st.lists(st.sampled_from([1, 2, 3]), max_size=3)


def prefix_values(tokens, salt=b""):
    """For each token a number that depends on it, on all before it and on the salt, exact in float32."""
    values, value = [], 7 + len(salt)
    for token in tokens:
        value = (value * 31 + token) % 65521
        values.append(value)
    return np.array(values, np.float32)


def extend(cache, seq, held, ids, salt=b""):
    """Append ids to a sequence that holds `held`."""
    step = cache.step([seq], [ids])
    values = prefix_values(held + ids, salt)[len(held) :]
    rows = np.repeat(values, 8).reshape(len(ids), 1, 8)
    step.write(0, rows, -rows)
    return step


def prefix_cache(**changes):
    size = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "page_size": PAGE_SIZE, "dtype": "float32"}
    return make_cache(**(size | {"prefix_caching": True, "num_pages": 64, "max_sequences": 6} | changes))


def start(cache, tokens):
    """A sequence that holds all of these tokens, and how many of them were there."""
    seq = cache.sequence(tokens)
    num_cached = seq.num_cached_tokens
    assert len(seq) == num_cached
    extend(cache, seq, tokens[:num_cached], tokens[num_cached:]).commit()
    return seq, num_cached


def holds(seq, tokens, salt=b""):
    k, v = seq.gather(0)
    values = prefix_values(tokens, salt)[seq.held_positions]
    np.testing.assert_array_equal(k[:, 0, 0], values)
    np.testing.assert_array_equal(v[:, 0, 0], -values)


PROMPT = list(range(1, 41))  # two pages and a half


def test_a_prompt_is_found_after_its_sequence_was_freed():
    with prefix_cache() as cache:
        seq, num_cached = start(cache, PROMPT)
        assert num_cached == 0
        seq.free()
        stats = cache.stats()
        assert (stats.num_used_pages, stats.num_kept_pages, stats.num_free_pages) == (0, 3, 61)
        again, num_cached = start(cache, PROMPT)
        assert num_cached == len(PROMPT) - 1  # the last token has to be computed
        holds(again, PROMPT)
        stats = cache.stats()
        assert (stats.num_queried_tokens, stats.num_hit_tokens) == (80, 39)


def test_tokens_of_a_running_sequence_are_found_and_it_goes_on_in_place():
    with prefix_cache() as cache:
        first, _ = start(cache, PROMPT)
        second = cache.sequence([*PROMPT, 99])
        assert second.num_cached_tokens == len(PROMPT)
        extend(cache, first, PROMPT, [50]).commit()
        assert cache.stats().num_copies == 0
        extend(cache, second, PROMPT, [99]).commit()
        assert cache.stats().num_copies == 1
        holds(first, [*PROMPT, 50])
        holds(second, [*PROMPT, 99])


def test_a_match_ends_at_the_first_token_that_differs():
    with prefix_cache() as cache:
        start(cache, PROMPT)
        for length in (0, 1, 15, 16, 17, 31, 32, 33, 39):
            other = cache.sequence([*PROMPT[:length], 77, *PROMPT[length + 1 :], 78])
            assert other.num_cached_tokens == length
            holds(other, PROMPT[:length])
            other.free()
        for length in (1, 16, 17, 32, 40):
            with cache.sequence(PROMPT[:length]) as other:
                assert other.num_cached_tokens == length - 1


def test_a_step_that_rolls_back_offers_nothing():
    with prefix_cache() as cache:
        seq = cache.sequence()
        extend(cache, seq, [], PROMPT).rollback()
        open_step = extend(cache, seq, [], PROMPT)
        assert cache.sequence(PROMPT).num_cached_tokens == 0
        open_step.rollback()
        assert cache.sequence(PROMPT).num_cached_tokens == 0


def test_after_a_bare_count_nothing_later_is_offered():
    with prefix_cache() as cache:
        seq, _ = start(cache, PROMPT[:20])
        with cache.step([seq], [1]) as step:
            step.write(0, np.zeros((1, 1, 8), np.float32), np.zeros((1, 1, 8), np.float32))
            step.commit()
        extend(cache, seq, [*PROMPT[:20], 0], PROMPT[21:]).commit()
        assert cache.sequence(PROMPT).num_cached_tokens == 20
        seq.free()
        assert cache.sequence(PROMPT).num_cached_tokens == 20


def test_kept_pages_give_way_and_those_kept_longest_first():
    with prefix_cache(num_pages=4) as cache:
        for first in (100, 200):
            start(cache, [first, *PROMPT[:20]])[0].free()
        assert cache.stats().num_kept_pages == 4
        seq, num_cached = start(cache, [300])
        assert num_cached == 0 and cache.stats().num_evictions == 1
        with cache.sequence([200, *PROMPT[:21]]) as kept:
            assert kept.num_cached_tokens == 21
        with cache.sequence([100, *PROMPT[:21]]) as cut:
            assert cut.num_cached_tokens == 16  # its last page went before its first
        with pytest.raises(OutOfPages, match="needs 4 new pages, 3 of 4 are free"):
            cache.step([seq, cache.sequence()], [63, 1])


def test_a_step_that_opens_without_an_index_opens_with_one():
    with prefix_cache(num_pages=1) as cache:
        seq, _ = start(cache, PROMPT[:16])
        seq.truncate(8)  # its only page is indexed, and no page is there for a copy
        extend(cache, seq, PROMPT[:8], [5]).commit()
        holds(seq, [*PROMPT[:8], 5])
        assert cache.sequence(PROMPT[:16]).num_cached_tokens == 8
        cache.check()


def test_a_fork_offers_what_it_appends():
    with prefix_cache() as cache:
        seq, _ = start(cache, PROMPT)
        fork = seq.fork(at=20)
        seq.free()
        extend(cache, fork, PROMPT[:20], [8] * 20).commit()
        wanted = [*PROMPT[:20], *[8] * 20, 9]
        assert cache.sequence(wanted).num_cached_tokens == 40
        again = cache.sequence(wanted).fork(at=5)
        assert (len(again), again.num_cached_tokens) == (5, 5)


@pytest.mark.parametrize("tokens", [5, "abc", [1.5], [-1], [2**31], [[1, 2]], [True], object()])
def test_what_holds_no_ids_is_refused(tokens):
    with prefix_cache() as cache:
        with pytest.raises(ArgumentError, match="tokens"):
            cache.sequence(tokens)
        assert cache.stats().num_sequences == 0


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_prefix_caching_takes_true_or_false(value):
    with pytest.raises(ArgumentError, match="prefix_caching is"):
        make_cache(prefix_caching=value)


def test_without_prefix_caching_a_sequence_begins_empty():
    with prefix_cache(prefix_caching=False) as cache:
        start(cache, PROMPT)[0].free()
        assert cache.sequence(np.array(PROMPT)).num_cached_tokens == 0
        assert cache.stats().num_kept_pages == 0


class Replica:
    """Who follows a cache by its events: the hashes of all full pages that can be found."""

    def __init__(self):
        self.last_id, self.blocks = 0, {}

    def read(self, cache):
        events = cache.events(self.last_id)
        ids = [event.event_id for event in events]
        assert ids == list(range(ids[0], ids[0] + len(ids))) if ids else True
        assert not ids or ids[0] == self.last_id + 1 or type(events[0]) is AllBlocksCleared
        for event in events:
            if type(event) is AllBlocksCleared:
                self.blocks.clear()
            elif type(event) is BlockRemoved:
                (block,) = event.block_hashes
                del self.blocks[block]
            else:
                (block,), parent = event.block_hashes, event.parent_block_hash
                assert block not in self.blocks
                assert parent is None or parent in self.blocks or cache.window is not None
                assert len(event.token_ids) == event.block_size == cache.page_size
                self.blocks[block] = (parent, event.token_ids)
        self.last_id = max([self.last_id, *ids])
        index = cache._store.index
        there = {index.events.digest(entry): ids_of(entry.key).tolist() for entry in index.full_entries()}
        assert {block: ids for block, (_, ids) in self.blocks.items()} == there
        full = [entry for entry in index.entries.values() if entry.num_tokens == cache.page_size]
        assert len(there) == sum(entry.page_id >= 0 for entry in full)


def num_common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class PrefixMachine(RuleBasedStateMachine):
    """held: tokens of each live sequence; offered: what freed and cut ones left behind.

    Tokens begin with the salt, so that those of different salts have nothing in common.
    mute: live sequences that hold tokens of before a reset, and so offer nothing
    open: of sequences in an open step, the step and its ids, which are None after a reset
    pins: what pins hold, which nothing evicts
    replicas: what two readers of the events know, one of whom reads all the time
    """

    num_pages, is_roomy, window = 400, True, {}

    def __init__(self):
        super().__init__()
        self.held, self.offered, self.mute = {}, [], set()
        self.open, self.new_ids, self.pins = {}, {}, {}
        options = {"num_pages": self.num_pages, **self.window}
        self.cache = prefix_cache(**options, clock=lambda: float(len(self.offered)))

        self.cache._store.index.events._ring = deque(maxlen=5)
        self.replicas = [Replica(), Replica()]

    def teardown(self):
        self.cache.close()

    def everything(self):
        live = [tokens for seq, tokens in self.held.items() if seq not in self.mute]
        return self.offered + live + [tokens for tokens in self.pins.values() if tokens]

    def any_of(self, choice):
        return list(self.held)[choice % len(self.held)] if self.held else None

    def idle(self, choice):
        """A sequence that is in no open step."""
        idle = [seq for seq in self.held if seq not in self.open]
        return idle[choice % len(idle)] if idle else None

    def most(self, tokens):
        return max((num_common(tokens[:-1], offered) for offered in self.everything()), default=1)

    @rule(
        choice=st.integers(0, 99),
        length=st.integers(0, 60),
        more=IDS,
        is_new=st.booleans(),
        salt=st.sampled_from([b"", b"a"]),
    )
    def begin(self, choice, length, more, is_new, salt):
        """A prompt like one that was there, with another end or another salt."""
        known = self.offered + list(self.held.values()) or [[b""]]
        tokens = [salt] + ([] if is_new else known[choice % len(known)][1 : 1 + length]) + more
        match = self.cache.match(tokens[1:], salt)
        assert self.cache.match(np.array(tokens[1:], np.int64), salt) == match
        self.explains(match, tokens)
        try:
            seq = self.cache.sequence(np.array(tokens[1:], np.int64), salt=salt)
        except OutOfSequences:
            assert len(self.held) + len(self.pins) == 6
            return
        num_cached = seq.num_cached_tokens
        most = max(1, self.most(tokens)) - 1 if tokens[1:] else 0
        assert len(seq) == num_cached == match.num_tokens <= most
        assert not self.is_roomy or num_cached == most
        self.held[seq] = tokens[: 1 + num_cached]

    def explains(self, match, tokens):
        """The reason is the one that the model finds."""
        ids = tokens[1:]
        most = max(1, self.most(tokens)) - 1 if ids else 0
        steps = [self.held[seq] + ids for seq, (_, ids) in self.open.items() if ids and seq not in self.mute]
        in_flight = max((num_common(tokens[:-1], offered) for offered in steps), default=1) - 1
        if not self.is_roomy:
            assert match.num_tokens <= match.would_have_hit <= max(most, in_flight)
            assert (match.reason in ("evicted", "in_flight", "window_passed")) == (match.num_lost > 0)
            return
        if ids and in_flight > most:
            assert (match.reason, match.num_tokens, match.would_have_hit) == ("in_flight", most, in_flight)
            return
        agreeing = [offered for offered in self.everything() if num_common(tokens[:-1], offered) == most + 1]
        goes_on = any(len(offered) > most + 1 for offered in agreeing)
        reason = "diverged" if goes_on and most else "longer" if most else "first"
        if most == max(0, len(ids) - 1):
            reason = "full"
        assert (match.reason, match.num_tokens, match.num_lost) == (reason, most, 0)
        assert match.at == (most if reason == "diverged" else None)

    @rule(
        choice=st.integers(0, 99),
        ids=IDS,
        times=st.sampled_from([1, 7, 16]),
        ending=st.sampled_from(["commit", "commit", "rollback", "leave open"]),
    )
    def append(self, choice, ids, times, ending):
        seq, ids = self.idle(choice), ids * times
        if seq is None or not ids:
            return
        salt, *held = self.held[seq]
        if len(held) + len(ids) > self.cache.max_seq_len:
            return
        try:
            step = extend(self.cache, seq, held, ids, salt)
        except OutOfPages:
            num_owned = self.cache.stats().num_used_pages
            assert not self.is_roomy and num_owned + len(ids) // PAGE_SIZE + 2 > self.num_pages
            return
        self.open[seq] = step, ids
        self.new_ids[step] = ids
        if ending != "leave open":
            self.end(seq, ending == "commit")

    @rule(choice=st.integers(0, 99), commits=st.booleans())
    def end_an_open_step(self, choice, commits):
        if self.open:
            self.end(list(self.open)[choice % len(self.open)], commits)

    def end(self, seq, commits):
        step, ids = self.open.pop(seq)
        if not commits:
            step.rollback()
            return
        step.commit()
        self.held[seq] = self.held[seq] + self.new_ids.pop(step)
        self.mute |= {seq} if ids is None else set()

    @rule(choice=st.integers(0, 99), at=st.integers(0, 99))
    def fork(self, choice, at):
        seq = self.any_of(choice)
        if seq is not None and len(self.held) + len(self.pins) < 6:
            at = at % len(self.held[seq])
            try:
                fork = seq.fork(at=at)
            except ArgumentError:
                assert self.window  # which has passed
                return
            self.held[fork] = self.held[seq][: 1 + at]
            self.mute |= {fork} if at and seq in self.mute else set()

    @rule(choice=st.integers(0, 99), length=st.integers(0, 99))
    def truncate(self, choice, length):
        seq = self.idle(choice)
        if seq is not None:
            tokens = self.held[seq]
            length = length % len(tokens)
            try:
                seq.truncate(length)
            except ArgumentError:
                assert self.window  # which has passed
                return
            if seq not in self.mute:
                self.offered.append(tokens[: 1 + (len(tokens) - 1) // PAGE_SIZE * PAGE_SIZE])
            self.mute -= {seq} if length == 0 else set()
            self.held[seq] = tokens[: 1 + length]

    @rule(choice=st.integers(0, 99), is_freed=st.booleans())
    def leave(self, choice, is_freed):
        seq = self.idle(choice)
        if seq is not None:
            if seq not in self.mute:
                self.offered.append(self.held[seq])
            self.mute.discard(seq)
            self.held[seq] = self.held[seq][:1]
            if is_freed:
                seq.free()
                del self.held[seq]
            else:
                seq.reset()

    @rule()
    def reset_the_prefix_cache(self):
        num_kept = self.cache.stats().num_kept_pages
        assert self.cache.reset_prefix_cache() == num_kept
        assert self.cache.stats().num_kept_pages == 0
        self.offered = []
        self.mute = {seq for seq, tokens in self.held.items() if len(tokens) > 1}
        self.open = {seq: (step, None) for seq, (step, _) in self.open.items()}
        self.pins = {pin: None for pin in self.pins}

    @rule(choice=st.integers(0, 99), length=st.integers(0, 60))
    def pin(self, choice, length):
        known = self.everything() or [[b""]]
        salt, *ids = known[choice % len(known)][: 1 + length]
        match = self.cache.match([*ids, 1], salt)
        pin = self.cache.pin(match)
        assert pin.num_tokens <= match.num_tokens
        assert (pin.outcome == "accepted") == (0 < pin.num_tokens == match.num_tokens)
        if pin.outcome != "rejected":
            self.pins[pin] = [salt, *ids, 1][: 1 + pin.num_tokens]

    @rule(choice=st.integers(0, 99))
    def release(self, choice):
        if self.pins:
            pin = list(self.pins)[choice % len(self.pins)]
            tokens = self.pins.pop(pin)
            pin.release()
            if tokens:
                self.offered.append(tokens)

    @rule(choice=st.integers(0, 99), priority=st.integers(0, 9), ttl=st.sampled_from([None, 0.5, 3.0]))
    def retain(self, choice, priority, ttl):
        if (seq := self.any_of(choice)) is not None:
            seq.retain(priority=priority, ttl=ttl)

    @rule()
    def read_events(self):
        self.replicas[1].read(self.cache)

    @invariant()
    def contents_hold(self):
        self.replicas[0].read(self.cache)
        self.cache.check()
        stats = self.cache.stats()
        assert stats.num_sequences == len(self.held)
        assert stats.num_pinned_pages <= self.num_pages // 2
        for tokens in self.pins.values():
            if tokens:
                salt, *ids = tokens
                assert self.cache.match([*ids, 9, 9], salt).num_tokens >= len(ids)
        for seq, (salt, *tokens) in self.held.items():
            holds(seq, tokens, salt)


class PressedMachine(PrefixMachine):
    num_pages, is_roomy = 9, False


class WindowedMachine(PrefixMachine):
    window = MappingProxyType({"window": 40, "num_sink_tokens": 3})


class PressedWindowedMachine(PressedMachine):
    window = MappingProxyType({"window": 20, "num_sink_tokens": 0})


class PressedSinksMachine(PressedMachine):
    num_pages, window = 14, {"window": 33, "num_sink_tokens": 20, "window_slack": 15}


class Scattered:
    """Drops pages here and there."""

    needs_mass = True

    def drop(self, pages, excess_tokens):
        candidates = sorted(
            pages.numbers[pages.can_be_dropped].tolist(), key=lambda j: (7 * j + len(pages.numbers)) % 5
        )
        return candidates[: -(-excess_tokens // PAGE_SIZE)]


class BudgetMachine(PrefixMachine):
    """What is computed after a drop is not offered, so less may be found than is held."""

    is_roomy = False
    window = MappingProxyType({"eviction": Scattered(), "budget_tokens": 112, "max_step_tokens": 64})

    @rule(choice=st.integers(0, 99), ids=st.lists(st.sampled_from([1, 2, 3]), min_size=60, max_size=60))
    def grow_beyond_the_budget(self, choice, ids):
        seq = self.idle(choice)
        for _ in range(3 if seq is not None else 0):
            salt, *held = self.held[seq]
            try:
                extend(self.cache, seq, held, ids, salt).commit()
            except OutOfPages:
                assert self.cache.stats().num_used_pages + 6 > self.num_pages
                return
            self.held[seq] = self.held[seq] + ids


class PressedBudgetMachine(BudgetMachine):
    num_pages = 24


MACHINES = [
    *(PrefixMachine, PressedMachine, WindowedMachine, PressedWindowedMachine, PressedSinksMachine),
    *(BudgetMachine, PressedBudgetMachine),
]


@pytest.mark.parametrize("machine", MACHINES)
def test_whatever_happens_a_match_is_token_exact(machine):
    num_examples = max(1, int(os.environ.get("PAGED_KV_NUM_RULES", "5000")) // STEPS // len(MACHINES))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=num_examples,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck) if num_examples > 200 else [],
            derandomize=num_examples > 200,
        ),
    )


def life(cache, tripwire):
    """Prompts that share, grow, leave and press each other out, each call by itself."""
    live = {}
    for prompt in (PROMPT, [*PROMPT[:36], 70, 71], PROMPT[:20], [*PROMPT, *range(60, 90)]):
        seq = None
        with tripwire:
            seq = cache.sequence(prompt)
            live[seq] = prompt[: len(seq)]
        if seq is None or seq not in live:
            continue
        held = live[seq]
        with tripwire:
            step = extend(cache, seq, held, prompt[len(held) :])
            live[seq] = None  # from here it holds as much as it says
            step.commit()
        live[seq] = prompt[: len(seq)]
        with tripwire:
            fork = seq.fork(at=len(seq) // 2)
            live[fork] = prompt[: len(fork)]
        if len(prompt) == 20:
            with tripwire:
                seq.truncate(10)
            live[seq] = prompt[: len(seq)]
            with tripwire:
                extend(cache, seq, prompt[:10], [5]).commit()
            live[seq] = [*prompt[:10], 5] if len(seq) == 11 else prompt[: len(seq)]
        elif len(live) > 2:
            first = next(iter(live))
            with tripwire:
                del live[first]
                first.free()
    return live


def test_an_interrupt_at_any_call_leaves_the_index_whole():
    """With whatever was raised kept alive, and then gone: pages are what entries say, and none is lost."""

    def run(at):
        with prefix_cache(num_pages=10) as cache:
            tripwire, seq = Tripwire(at), None
            with contextlib.suppress(PagedKVError):  # a step that was left open keeps its sequence busy
                live = life(cache, tripwire)
                cache.check()
                for seq, tokens in live.items():
                    holds(seq, tokens)
                live.clear()
            seq = None
            tripwire.raised.clear()
            gc.collect()
            assert seq is None and cache.stats().num_used_pages == 0, at
            cache.check()
            for prompt in (PROMPT, PROMPT[:20]):
                with cache.sequence(prompt) as seq:
                    holds(seq, prompt[: len(seq)])
            # Every page can be had again.
            with cache.sequence([9] * 160) as seq, extend(cache, seq, [], [9] * 160) as step:
                step.commit()
            cache.check()
        return tripwire.count

    num_calls = run(0)
    assert num_calls > 100
    for at in range(1 + SEED % STRIDE, num_calls + 1, STRIDE):
        run(at)
