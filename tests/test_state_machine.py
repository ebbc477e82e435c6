"""A random walk over a cache, against a dictionary of what each sequence must hold.

After every rule: contents by gather, page counts, check().  Attention of a step is compared with the
reference.  Every byte that holds no token is NaN from the start.
"""

import collections
import itertools
import os

import numpy as np
import pytest
from conftest import make_cache, rows
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from support import tolerances

from paged_kv import (
    ArgumentError,
    OutOfPages,
    OutOfSequences,
    SequenceBusy,
    SequenceTooLong,
    StaleSequence,
    StepClosed,
    reference,
)

NUM_LAYERS, NUM_KV_HEADS, GROUP, HEAD_DIM = 2, 2, 2, 32
NUM_PAGES, MAX_SEQUENCES = 12, 5
#: Of windowed caches; others are as long as their pool.
MAX_SEQ_LEN, MAX_STEP = 400, 60
ANY = st.integers(0, 2**16)


class SomePages:
    """Drops pages in an order that the model knows, too, and keeps what it was given."""

    def __init__(self, needs_mass):
        self.needs_mass, self.given = needs_mass, []

    @staticmethod
    def chosen(candidates, length):
        return sorted(candidates, key=lambda j: (j * 2654435761 + length * 40503) % 1000)

    def drop(self, pages, excess_tokens):
        self.given.append(pages)
        candidates = pages.numbers[pages.can_be_dropped].tolist()
        return self.chosen(candidates, pages.num_tokens)[: -(-excess_tokens // pages.page_size)]


class CacheMachine(RuleBasedStateMachine):
    """What the cache must be, in dictionaries.

    held    each live handle's tokens, (k, v) of each layer, also those that a window has released
    pages   each live handle's pages, as names of our own, by logical page: who shares what
    filled  of each page, by name, the slots that were reserved since it was taken
    known   each live handle's first ids, as far as all of them were given
    open    each open step's handles and counts, and the pages that it reserved for each
    mass    each live handle's pages, by logical page: their attention so far, and the rows that could look
    """

    page_size = 16
    window, sinks, slack = None, 0, 0
    budget, needs_mass = None, False

    def __init__(self):
        super().__init__()
        self.policy = None if self.budget is None else SomePages(self.needs_mass)
        self.mass = collections.defaultdict(dict)
        self.looks = {}  # of the step that attended last: each sequence's attention, by logical page
        self.cache = make_cache(
            num_layers=NUM_LAYERS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            num_pages=NUM_PAGES,
            page_size=self.page_size,
            max_sequences=MAX_SEQUENCES,
            max_seq_len=None if self.window is None and self.budget is None else MAX_SEQ_LEN,
            window=self.window,
            num_sink_tokens=self.sinks,
            window_slack=self.slack,
            eviction=self.policy,
            budget_tokens=self.budget,
            max_step_tokens=MAX_STEP,
            num_threads=2,
            prefix_caching=False,  # test_prefix_index.py has a walk of its own
        )
        empty = np.empty((0, NUM_KV_HEADS, HEAD_DIM), np.float32)
        self.empty = [(empty, empty)] * NUM_LAYERS
        self.names = itertools.count()
        self.held, self.pages, self.filled, self.known, self.open = {}, {}, {}, {}, {}
        self.handles = []  # the live ones, and a few that were freed; never empty
        self.create()

    def num_pages_of(self, num_tokens):
        return -(-num_tokens // self.page_size)

    def handle(self, choice):
        return self.handles[choice % len(self.handles)]

    def length(self, seq):
        return len(self.held[seq][0][0])

    @property
    def busy(self):
        return {seq for entries in self.open.values() for seq, count, *_ in entries if count}

    @property
    def used_pages(self):
        steps = self.open.values()
        reserved = {page for entries in steps for _, _, pages, _ in entries for page in pages.values()}
        return reserved.union(*(pages.values() for pages in self.pages.values()))

    def tail(self, seq):
        """The page that a sequence appends to, if it is partly filled."""
        is_open = self.length(seq) % self.page_size
        return self.pages[seq][self.length(seq) // self.page_size] if is_open else None

    def must_hold(self, logical_page, length, slack=0):
        """Does a sequence of this length need that page: is it a sink's, or not wholly before the window?

        With a budget, it is the page that its next token goes into.
        """
        if self.budget is not None:
            return length % self.page_size and logical_page == length // self.page_size
        if self.window is None or logical_page * self.page_size < self.sinks:
            return True
        return (logical_page + 1) * self.page_size > length - self.window - slack

    def reserve(self, seqs, counts):
        """The pages that each sequence holds while its new tokens are not committed, and `filled` then.

        A sequence appends in place where no sequence has reserved the next slot, or where it holds the page
        alone; else to a copy.
        """
        filled, grown = dict(self.filled), []
        for seq, count in zip(seqs, counts, strict=True):
            length, pages, tail = self.length(seq), dict(self.pages[seq]), self.tail(seq)
            if not count:
                grown.append({})
                continue
            if tail is not None:
                is_alone = sum(tail in held.values() for held in self.pages.values()) == 1
                if filled[tail] != length % self.page_size and not is_alone:
                    tail = pages[length // self.page_size] = next(self.names)
                filled[tail] = min(length % self.page_size + count, self.page_size)
            for page in range(self.num_pages_of(length), self.num_pages_of(length + count)):
                pages[page] = next(self.names)
                filled[pages[page]] = min(length + count - page * self.page_size, self.page_size)
            grown.append(pages)
        return grown, filled

    def rollback(self, seqs, reserved):
        """The slots that were reserved in place are free again."""
        for seq, pages in zip(seqs, reserved, strict=True):
            if pages and (tail := self.tail(seq)) in pages.values():
                self.filled[tail] = self.length(seq) % self.page_size

    def commit(self, seqs, new, reserved, ids, kept):
        for seq, layers, pages, own_ids, count in zip(seqs, new, reserved, ids, kept, strict=True):
            if not count:
                self.rollback([seq], [pages])
                continue
            if own_ids and len(self.known[seq]) == self.length(seq):
                self.known[seq] = self.known[seq] + own_ids[:count]
            length = self.length(seq) + count
            self.add_mass(seq, count, length, pages)
            if length < len(layers[0][0]):  # the slots that follow are free again
                last = (length - 1) // self.page_size
                self.filled[pages[last]] = length - last * self.page_size
            self.held[seq] = [(k[:length], v[:length]) for k, v in layers]
            kept_pages = range(self.num_pages_of(length))
            if self.budget is None:
                self.pages[seq] = {
                    j: pages[j] for j in kept_pages if j in pages and self.must_hold(j, length, self.slack)
                }
            else:
                self.pages[seq] = {j: pages[j] for j in kept_pages if j in pages}
                self.drop(seq, length)

    def add_mass(self, seq, count, length, pages):
        looks, mass = self.looks[seq], self.mass[seq]
        for j in [j for j in pages if j < self.num_pages_of(length)]:
            before = mass.get(j, (0.0, 0))
            mass[j] = before[0] + looks.get(j, 0.0), before[1] + min(count, length - j * self.page_size)

    def check_mass(self, seq):
        """What the policy was given: the mass of the step's last 32 rows, and the mean of all."""
        given = self.policy.given.pop(0)
        numbers, mass = given.numbers.tolist(), self.mass[seq]
        recent, mean = (
            [self.recent[seq].get(j, 0.0) for j in numbers],
            [mass[j][0] / mass[j][1] for j in numbers],
        )
        np.testing.assert_allclose(given.recent_mass, recent, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(given.mean_mass, mean, rtol=1e-4, atol=1e-5)

    def drop(self, seq, length):
        """What a commit of this length drops, by the same choice as the cache's policy."""
        pages = self.pages[seq]
        excess = len(pages) - self.num_pages_of(self.budget)
        if self.needs_mass and excess > 0:
            self.check_mass(seq)
        first, end = self.num_pages_of(self.sinks), max(0, length - 64) // self.page_size
        for j in SomePages.chosen([j for j in pages if first <= j < end], length)[: max(0, excess)]:
            del pages[j]
            self.mass[seq].pop(j)
            self.known[seq] = self.known[seq][: j * self.page_size]

    def positions(self, pages, length):
        """Of the tokens that a sequence may attend to."""
        held = np.zeros(length, bool)
        for j in pages:
            held[j * self.page_size : (j + 1) * self.page_size] = True
        return np.flatnonzero(held)

    @rule()
    def create(self):
        if len(self.held) == MAX_SEQUENCES:
            with pytest.raises(OutOfSequences):
                self.cache.sequence()
            return
        seq = self.cache.sequence()
        self.held[seq], self.pages[seq], self.known[seq] = self.empty, {}, []
        self.handles.append(seq)

    @rule(choice=ANY, count=st.integers(0, 3), share=st.one_of(st.none(), st.floats(0, 1)))
    def fork(self, choice, count, share):
        seq = self.handle(choice)  # which may be in an open step: its committed tokens are shared
        if seq not in self.held:
            with pytest.raises(StaleSequence):
                seq.fork(count)
            return
        if len(self.held) + count > MAX_SEQUENCES:
            with pytest.raises(OutOfSequences):
                seq.fork(count)
            return
        at = self.length(seq) if share is None else int(share * self.length(seq))
        needed = {j for j in range(self.num_pages_of(at)) if self.must_hold(j, at)}
        if not needed <= self.pages[seq].keys():
            with pytest.raises(ArgumentError, match=r"pages were released|was dropped"):
                seq.fork(count, at=at)
            return
        options = {} if share is None else {"at": at}
        for fork in seq.fork(count, **options) if count != 1 else [seq.fork(**options)]:
            self.held[fork] = [(k[:at], v[:at]) for k, v in self.held[seq]]
            self.pages[fork] = {j: page for j, page in self.pages[seq].items() if j < self.num_pages_of(at)}
            self.known[fork] = self.known[seq][:at]
            self.mass[fork] = {j: mass for j, mass in self.mass[seq].items() if j < self.num_pages_of(at)}
            self.handles.append(fork)

    @rule(choice=ANY, share=st.floats(0, 1), beyond=st.booleans())
    def truncate(self, choice, share, beyond):
        seq = self.handle(choice)
        if seq not in self.held or seq in self.busy:
            with pytest.raises(SequenceBusy if seq in self.held else StaleSequence):
                seq.truncate(0)
            return
        if beyond:
            with pytest.raises(ArgumentError, match="length is"):
                seq.truncate(self.length(seq) + 1)
        length = int(share * self.length(seq))
        needed = {j for j in range(self.num_pages_of(length)) if self.must_hold(j, length)}
        if not needed <= self.pages[seq].keys():
            with pytest.raises(ArgumentError, match=r"pages were released|was dropped"):
                seq.truncate(length)
            return
        seq.truncate(length)
        self.held[seq] = [(k[:length], v[:length]) for k, v in self.held[seq]]
        self.known[seq] = self.known[seq][:length]
        last = self.num_pages_of(length)
        self.pages[seq] = {j: page for j, page in self.pages[seq].items() if j < last}
        self.mass[seq] = {j: mass for j, mass in self.mass[seq].items() if j < last}

    @rule(
        choices=st.lists(ANY, min_size=1, max_size=4),
        counts=st.lists(st.integers(0, 70), min_size=4, max_size=4),
        seed=st.integers(0, 2**32),
        ending=st.sampled_from(["commit", "rollback", "leave open", "exception"]),
        have_ids=st.lists(st.booleans(), min_size=4, max_size=4),
        share_kept=st.sampled_from([None, 0.0, 0.3, 0.9, 1.0]),
    )
    def step(self, choices, counts, seed, ending, have_ids, share_kept):
        seqs = [self.handle(choice) for choice in choices]
        counts = counts[: len(seqs)]
        refusal = self.expected_refusal(seqs, counts)
        if refusal:
            before = self.cache.stats()
            with pytest.raises(refusal):
                self.cache.step(seqs, counts)
            assert self.cache.stats() == before
            return
        # Some sequences get ids, the others counts.
        ids = np.random.default_rng(seed).integers(0, 50, (len(seqs), 70)).tolist()
        ids = [own[:count] if has else None for own, count, has in zip(ids, counts, have_ids, strict=False)]
        step = self.cache.step(seqs, [own or count for own, count in zip(ids, counts, strict=True)])
        reserved, self.filled = self.reserve(seqs, counts)
        if ending == "leave open":
            self.open[step] = list(zip(seqs, counts, reserved, ids, strict=True))
            return
        new = self.attend_all_layers(step, seqs, counts, reserved, np.random.default_rng(seed))
        if ending == "commit":
            kept = counts if share_kept is None else [int(count * share_kept) for count in counts]
            step.commit(None if share_kept is None else kept)
            self.commit(seqs, new, reserved, ids, kept)
        else:
            self.rollback(seqs, reserved)
            if ending == "rollback":
                step.rollback()
            else:
                with pytest.raises(ZeroDivisionError), step:
                    raise ZeroDivisionError
        with pytest.raises(StepClosed):
            step.commit()

    def expected_refusal(self, seqs, counts):
        """The first entry that cannot step decides; pages are counted when all can."""
        for i, (seq, count) in enumerate(zip(seqs, counts, strict=True)):
            if seq not in self.held:
                return StaleSequence
            if seq in self.busy:
                return SequenceBusy
            if seq in seqs[:i]:
                return ArgumentError
            is_endless = self.window is not None or self.budget is not None
            if is_endless and count > MAX_STEP:
                return ArgumentError
            most = MAX_SEQ_LEN if is_endless else NUM_PAGES * self.page_size
            if self.length(seq) + count > most:
                return SequenceTooLong
        reserved = set().union(*(pages.values() for pages in self.reserve(seqs, counts)[0]))
        new_pages = reserved - self.used_pages
        assert self.cache.pages_needed(seqs, counts) == len(new_pages)
        return OutOfPages if len(new_pages) > NUM_PAGES - len(self.used_pages) else None

    def attend_all_layers(self, step, seqs, counts, reserved, rng):
        """Returns what each sequence holds if the step is committed, per layer."""
        num_tokens = sum(counts)
        new = [[] for _ in seqs]
        self.looks, self.recent = ({seq: collections.Counter() for seq in seqs} for _ in range(2))
        for layer in range(NUM_LAYERS):
            q = rows(rng, num_tokens, NUM_KV_HEADS * GROUP, HEAD_DIM)
            k, v = (rows(rng, num_tokens, NUM_KV_HEADS, HEAD_DIM) for _ in range(2))
            out = step.attend(layer, q, k, v, out=np.full_like(q, np.nan))
            for i, seq in enumerate(seqs):
                if not counts[i]:  # the sequence may have been freed since
                    continue
                own = slice(step.qo_indptr[i], step.qo_indptr[i + 1])
                old_k, old_v = self.held[seq][layer]
                all_k, all_v = np.concatenate([old_k, k[own]]), np.concatenate([old_v, v[own]])
                new[i].append((all_k, all_v))
                seen = {"window": self.window, "num_sink_tokens": self.sinks}
                if self.budget is not None:
                    there = self.positions(reserved[i], len(all_k))
                    all_k, all_v, seen = all_k[there], all_v[there], {"positions": there}
                expected, looks = reference.attend(q[own], all_k, all_v, return_probabilities=True, **seen)
                if self.needs_mass:
                    for j in reserved[i]:
                        of_page = looks[..., there // self.page_size == j]
                        self.looks[seq][j] += of_page.sum()
                        self.recent[seq][j] += of_page[-32:].sum()
                atol = tolerances(q[own], all_k, all_v)[0]
                np.testing.assert_allclose(out[own], expected, rtol=0, atol=atol)
        return new

    @rule(seed=st.integers(0, 2**32), commits=st.booleans())
    def end_an_open_step(self, seed, commits):
        if not self.open:
            return
        step, entries = self.open.popitem()
        seqs, counts, reserved, ids = zip(*entries, strict=True)
        new = self.attend_all_layers(step, seqs, counts, reserved, np.random.default_rng(seed))
        if commits:
            step.commit()
            self.commit(seqs, new, reserved, ids, counts)
        else:
            step.rollback()
            self.rollback(seqs, reserved)

    @rule(choice=ANY)
    def reset(self, choice):
        seq = self.handle(choice)
        if seq not in self.held or seq in self.busy:
            with pytest.raises(SequenceBusy if seq in self.held else StaleSequence):
                seq.reset()
            return
        seq.reset()
        self.held[seq], self.pages[seq], self.known[seq] = self.empty, {}, []
        self.mass[seq] = {}

    @rule(choice=ANY)
    def free(self, choice):
        seq = self.handle(choice)
        if seq not in self.held:
            return
        if seq in self.busy:
            with pytest.raises(SequenceBusy):
                seq.free()
            return
        seq.free()
        del self.held[seq], self.pages[seq], self.known[seq]
        stale = [handle for handle in self.handles if handle not in self.held]
        self.handles = [*self.held, *stale[-2:]]
        for call in (seq.free, seq.reset, lambda: len(seq), lambda: self.cache.step([seq], [1])):
            with pytest.raises(StaleSequence):
                call()

    @invariant()
    def everything_is_as_the_model_says(self):
        self.cache.check()
        stats = self.cache.stats()
        assert stats.num_used_pages == len(self.used_pages)
        assert stats.num_sequences == len(self.held)
        assert stats.num_tokens == sum(self.filled_slots().values())
        tables = self.cache._store.tables
        for seq, layers in self.held.items():
            assert len(seq) == self.length(seq)
            if self.window is None:
                assert tables.known_ids(tables.rows.row(seq._seq_id)).tolist() == self.known[seq]
            if self.budget is not None:
                there = self.positions(self.pages[seq], self.length(seq))
                np.testing.assert_array_equal(seq.held_positions, there)
            for layer, expected in enumerate(layers):
                held = seq.held_positions
                np.testing.assert_array_equal(seq.gather(layer), [side[held] for side in expected])

    def filled_slots(self):
        """Of each page, how many of its slots hold a committed token of any sequence."""
        filled = {}
        for seq, pages in self.pages.items():
            for j, page in pages.items():
                count = min(self.length(seq) - j * self.page_size, self.page_size)
                filled[page] = max(filled.get(page, 0), count)
        return filled

    def teardown(self):
        self.cache.close()


class LargePages(CacheMachine):
    page_size = 64


class Window(CacheMachine):
    window = 50


class WindowAndSinks(CacheMachine):
    window, sinks = 23, 20


class WindowAndSlack(CacheMachine):
    window, slack = 30, 40


class WindowSinksAndSlack(CacheMachine):
    window, sinks, slack = 17, 33, 9


class LargePagesWindowAndSinks(CacheMachine):
    page_size, window, sinks = 64, 100, 3


class Eviction(CacheMachine):
    budget, sinks = 112, 4


class EvictionWithoutSinks(CacheMachine):
    budget = 96


class EvictionByMass(CacheMachine):
    budget, sinks, needs_mass = 112, 4, True


#: Rules in all: a few thousand; `make test-long` sets 200,000.
NUM_RULES = int(os.environ.get("PAGED_KV_NUM_RULES", "6000"))
MACHINES = (
    CacheMachine,
    LargePages,
    Window,
    WindowAndSinks,
    WindowAndSlack,
    WindowSinksAndSlack,
    LargePagesWindowAndSinks,
    Eviction,
    EvictionWithoutSinks,
    EvictionByMass,
)
STEPS = 30


@pytest.mark.parametrize("machine", MACHINES)
def test_a_random_walk_is_what_the_dictionaries_say(machine):
    num_examples = max(1, NUM_RULES // STEPS // len(MACHINES))
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
