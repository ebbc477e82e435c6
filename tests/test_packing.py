"""Pages that are packed when they are old: who reads which values, against a model of each sequence's own."""

import collections

import ml_dtypes
import numpy as np
import pytest
from conftest import KERNELS, Tripwire, make_cache, poison, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import tolerances

import paged_kv
from paged_kv import ArgumentError, OutOfPages, _binding, reference

PAGE = 64
HEADS, DIM = 2, 16


def as_bfloat16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


OPEN = {"bfloat16": as_bfloat16, "float32": np.array, "int8": reference.int8_values}
PACK = {
    "int8": reference.int8_values,
    "int4": reference.int4_values,
    "int4_by_channel": reference.int4_by_channel_values,
}


def values_of(tokens, layer):
    """K and V of tokens: the same ids have the same, whoever computes them."""
    rngs = [np.random.default_rng([token, layer]) for token in tokens]
    k, v = (np.array([rows(rng, HEADS, DIM) for rng in rngs], np.float32) for _ in "kv")
    return k.reshape(-1, HEADS, DIM), v.reshape(-1, HEADS, DIM)


#: What a cache may hold of a sequence.
LIMITS = ("budget", "window")


class SomePages:
    """Drops pages in an order that the model knows, too."""

    needs_mass = False

    @staticmethod
    def chosen(candidates, length):
        return sorted(candidates, key=lambda page: (page * 2654435761 + length * 40503) % 1000)

    def drop(self, pages, excess_tokens):
        candidates = pages.numbers[pages.can_be_dropped].tolist()
        return self.chosen(candidates, pages.num_tokens)[: -(-excess_tokens // PAGE)]


class Packing(RuleBasedStateMachine):
    """Sequences grow, fork, are cut, end and are found again, with a budget, a window or neither; each reads
    what it should, to the bit."""

    @initialize(
        open_dtype=st.sampled_from(["bfloat16", "float32", "int8"]),
        dtypes=st.sampled_from([("int8", "int8"), ("int8", "int4"), ("int4", "int4"), ("int4", "int8")]),
        recent=st.sampled_from([0, 1, 30, 64, 100, 200]),
        sinks=st.sampled_from([0, 4, 65]),
        num_pages=st.sampled_from([40, 80]),
        caching=st.booleans(),
        kernel=st.sampled_from(KERNELS),
        last=st.sampled_from([None, ("int8", "int4"), ("int4", "int4")]),
        more=st.sampled_from([0, 64, 150]),
        by=st.sampled_from(["age", "mass"]),
        limit=st.sampled_from([None, ("budget", 320), ("budget", 512), ("window", 90), ("window", 300)]),
    )
    def build(self, open_dtype, dtypes, recent, sinks, num_pages, caching, kernel, last, more, by, limit):
        self.before = paged_kv.kernels().active
        _binding.select_kernel(kernel)
        if dtypes == ("int8", "int8") and open_dtype == "int8":
            open_dtype = "float32"
        if dtypes[0] == "int4" or dtypes == last:
            last = None  # pages do not become smaller
        self.opened = open_dtype
        #: Of each format the dtypes of both sides, as they are stored, by which values are rounded; and how
        #: many newest tokens keep it.
        self.chain = [(open_dtype, open_dtype), dtypes, *([last] if last else [])]
        self.chain = [("int4_by_channel" if k == "int4" else k, v) for k, v in self.chain]
        self.recent = [recent, recent + more][: len(self.chain) - 1]
        self.budget, self.window = (limit[1] if limit and limit[0] == kind else None for kind in LIMITS)
        by = "age" if self.window else by
        #: With ageing by mass, pages that keep the format in the middle; no step attends, so the newest.
        self.num_attended = more // PAGE if last and by == "mass" else None
        self.sinks, self.first = sinks, -(-sinks // PAGE)
        options = {"num_sink_tokens": sinks, "prefix_caching": caching}
        if last:
            policy = paged_kv.Ageing(recent_tokens=recent, then=dtypes, after=recent + more, last=last, by=by)
            options |= {"precision_policy": policy, "dtype": open_dtype}
        else:
            options |= {"recent_tokens": recent, "open_dtype": open_dtype, "dtype": dtypes}
        if self.budget:
            options |= {"eviction": SomePages(), "budget_tokens": self.budget, "max_step_tokens": 200}
        if self.window:
            options |= {"window": self.window, "max_step_tokens": 200}
        self.cache = make_cache(
            num_kv_heads=HEADS, head_dim=DIM, num_pages=num_pages, page_size=PAGE, **options
        )
        #: Of each sequence its ids, per layer and side what it reads, how often its pages were packed, and
        #: those that it has dropped, or that have left its window.
        self.seqs, self.next_id = {}, 0

    def teardown(self):
        if hasattr(self, "cache"):
            self.cache.close()
            _binding.select_kernel(self.before)

    def new_tokens(self, data, count):
        """Ids that others have, too, or new ones."""
        return [data.draw(st.integers(0, 1)) for _ in range(min(count, 3))] + [
            self.next_id % 7 for _ in range(count - min(count, 3))
        ]

    def pack_page(self, state, page):
        """A page is copied as it is where the side has one dtype, before and after."""
        format = state["packed"][page] = state["packed"].get(page, 0) + 1
        here = slice(page * PAGE, (page + 1) * PAGE)
        for layer in state["values"]:
            for side, before, dtype in zip(layer, self.chain[format - 1], self.chain[format], strict=True):
                side[here] = side[here] if dtype == before else PACK[dtype](side[here])

    def opened_sides(self, sides, format):
        """What an open page has of a packed one."""
        return [
            side if dtype == self.opened else OPEN[self.opened](side)
            for side, dtype in zip(sides, self.chain[format], strict=True)
        ]

    def pack(self, state):
        """What a sequence's own commit does to its old pages."""
        for format, page in self.due(state):
            assert state["packed"].get(page, 0) == format
            self.pack_page(state, page)

    def due(self, state):
        """The formats and pages that leave them, in order."""
        packed, pages = dict(state["packed"]), []
        for format, recent in enumerate(self.recent):
            by_mass = self.num_attended is not None and format == 1
            end = max(0, len(state["ids"]) - (self.recent[0] if by_mass else recent)) // PAGE
            there = [page for page in range(self.first, end) if page not in state["dropped"]]
            own = [page for page in there if packed.get(page, 0) == format]
            own = own[: max(0, len(own) - self.num_attended)] if by_mass else own
            packed |= dict.fromkeys(own, format + 1)
            pages += [(format, page) for page in own]
        return pages

    def chosen(self, data):
        return data.draw(st.sampled_from(list(self.seqs)))

    @rule()
    def begin(self):
        if len(self.seqs) < 6:
            empty = [[np.empty((0, HEADS, DIM), np.float32) for _ in "kv"] for _ in range(2)]
            self.seqs[self.cache.sequence()] = {"ids": [], "values": empty, "packed": {}, "dropped": set()}

    @precondition(lambda self: any(state["packed"] for state in self.seqs.values()))
    @rule(data=st.data(), count=st.sampled_from([1, 64, 130, 200]), ends=st.sampled_from("ccr"))
    def cut_into_a_packed_page_and_go_on(self, data, count, ends):
        seq = data.draw(st.sampled_from([seq for seq, state in self.seqs.items() if state["packed"]]))
        page = data.draw(st.sampled_from(sorted(self.seqs[seq]["packed"])))
        length = page * PAGE + data.draw(st.integers(1, PAGE - 1))
        if length < len(self.seqs[seq]["ids"]) and self.can_end_at(self.seqs[seq], length):
            seq.truncate(length)
            self.seqs[seq] = self.cut(self.seqs[seq], length)
            self.grow(seq, data, count, ends)

    @precondition(lambda self: self.seqs)
    @rule(data=st.data(), count=st.sampled_from([1, 2, 63, 64, 65, 130, 200]), ends=st.sampled_from("ccr"))
    def step(self, data, count, ends):
        self.grow(self.chosen(data), data, count, ends)

    @precondition(lambda self: self.seqs)
    @rule(data=st.data(), count=st.sampled_from([100, 128, 200]), times=st.integers(2, 5))
    def several_steps(self, data, count, times):
        """A sequence becomes longer than its budget."""
        seq = self.chosen(data)
        for _ in range(times):
            self.grow(seq, data, count, "c")

    def grow(self, seq, data, count, ends):
        state = self.seqs[seq]
        ids = self.new_tokens(data, count)
        try:
            step = self.cache.step([seq], [ids])
        except OutOfPages:
            self.cache.check()
            return
        for layer in range(2):
            step.write(layer, *values_of(ids, layer))
        if ends == "r":
            step.rollback()
            return
        # A packed tail goes on in an open page, from what was rounded.
        tail, offset = divmod(len(state["ids"]), PAGE)
        if offset and tail in state["packed"]:
            format = state["packed"].pop(tail)
            for layer in state["values"]:
                rest = [side[tail * PAGE :] for side in layer]
                for side, opened in zip(rest, self.opened_sides(rest, format), strict=True):
                    side[:] = opened
        state["ids"] += ids
        for layer, sides in enumerate(state["values"]):
            for i, new in enumerate(values_of(ids, layer)):
                sides[i] = np.concatenate([sides[i], OPEN[self.opened](new)])
        pool, most = self.cache._store.pool, len(state["ids"]) // PAGE
        had_room = all(pool.num_available(format) >= 2 * most for format in range(1, len(self.chain)))
        self.drop(state)
        # A commit makes as many twins of a format as its tokens fill pages.
        due = collections.Counter(format for format, _ in self.due(state))
        had_room &= all(count <= -(-len(ids) // PAGE) for count in due.values())
        step.commit()
        if had_room:
            self.pack(state)
        else:  # an exchange that finds no page, or is one too many, waits; the pages say which did not
            self.read_again(seq)

    def drop(self, state):
        """What a commit drops: of pages that were packed as often as can be, if there are enough of them."""
        length, dropped = len(state["ids"]), state["dropped"]
        if self.window:
            for page in range(self.first, self.first_page_at(length)):
                dropped.add(page)
                state["packed"].pop(page, None)
            return
        excess = -(-length // PAGE) - len(dropped) - -(-(self.budget or length) // PAGE)
        candidates = [j for j in range(self.first, max(0, length - 64) // PAGE) if j not in dropped]
        last = [j for j in candidates if state["packed"].get(j, 0) == len(self.chain) - 1]
        candidates = last if len(last) >= excess else candidates
        for page in SomePages.chosen(candidates, length)[: max(0, excess)]:
            dropped.add(page)
            state["packed"].pop(page, None)

    def first_page_at(self, length):
        """The first page behind the sinks' that a window of this length needs."""
        return max(self.first, max(0, length - self.window) // PAGE)

    def held(self, state):
        """Of each token, is it there?"""
        positions = np.arange(len(state["ids"]))
        if self.window:
            return (positions >= len(positions) - self.window) | (positions < self.sinks)
        return ~np.isin(positions // PAGE, list(state["dropped"]))

    def can_end_at(self, state, length):
        if self.window:
            needed = range(self.first_page_at(length), -(-length // PAGE))
            return not state["dropped"] & set(needed)
        return length % PAGE == 0 or length // PAGE not in state["dropped"]

    def read_again(self, seq):
        """Take the format of each page from the cache."""
        state = self.seqs[seq]
        for page, format in self.formats_of(seq).items():
            while state["packed"].get(page, 0) < format:
                self.pack_page(state, page)

    def formats_of(self, seq):
        tables = self.cache._store.tables
        held = (array.tolist() for array in tables.held_pages(tables.rows.row(seq._seq_id)))
        formats = {page: self.cache._store.pool.format_of(id) for page, id in zip(*held, strict=True)}
        return {page: format for page, format in formats.items() if format}

    @precondition(lambda self: self.seqs)
    @rule(data=st.data(), at=st.none() | st.integers(0, 400))
    def fork(self, data, at):
        seq = self.chosen(data)
        state = self.seqs[seq]
        if len(self.seqs) >= 6:
            return
        at = len(state["ids"]) if at is None else min(at, len(state["ids"]))
        if not self.can_end_at(state, at):
            with pytest.raises(ArgumentError, match=r"was dropped|pages were released"):
                seq.fork(at=at)
            return
        self.seqs[seq.fork(at=at)] = self.cut(state, at)

    def cut(self, state, length):
        return {
            "ids": state["ids"][:length],
            "values": [[side[:length].copy() for side in layer] for layer in state["values"]],
            "packed": {page: format for page, format in state["packed"].items() if page * PAGE < length},
            "dropped": {page for page in state["dropped"] if page * PAGE < length},
        }

    @precondition(lambda self: self.seqs)
    @rule(data=st.data(), less=st.integers(0, 300))
    def truncate(self, data, less):
        seq = self.chosen(data)
        length = max(0, len(self.seqs[seq]["ids"]) - less)
        if not self.can_end_at(self.seqs[seq], length):
            with pytest.raises(ArgumentError, match=r"was dropped|pages were released"):
                seq.truncate(length)
            return
        seq.truncate(length)
        self.seqs[seq] = self.cut(self.seqs[seq], length)

    @precondition(lambda self: self.seqs)
    @rule(data=st.data(), again=st.booleans())
    def end(self, data, again):
        """A sequence ends; another one begins with its tokens, as far as they are found."""
        seq = self.chosen(data)
        ids = self.seqs.pop(seq)["ids"]
        seq.free()
        if not again or not ids:
            return
        seq = self.cache.sequence(np.array([*ids, 5], np.int32))
        values = [
            [OPEN[self.opened](side) for side in values_of(ids[: len(seq)], layer)] for layer in range(2)
        ]
        self.seqs[seq] = {"ids": ids[: len(seq)], "values": values, "packed": self.formats_of(seq)}
        first = self.first_page_at(len(seq)) if self.window else self.first
        self.seqs[seq]["dropped"] = set(range(self.first, first))
        held = self.held(self.seqs[seq])
        # What was written before was rounded more than once where a packed page went on as an open one.
        for layer, sides in enumerate(values):
            for i, side in enumerate(seq.gather(layer)):
                assert np.abs(side - sides[i][held]).max(initial=0) < 1.2
                sides[i][held] = side

    @precondition(lambda self: self.seqs)
    @rule(data=st.data(), group=st.sampled_from([1, 3]), may_share=st.sampled_from([0, 1, 2]))
    def attend(self, data, group, may_share):
        """Several sequences at once; 2: pages that they begin with are read once, whether it pays or not."""
        seqs = data.draw(st.lists(st.sampled_from(list(self.seqs)), min_size=1, max_size=4, unique=True))
        rng = np.random.default_rng(len(self.seqs[seqs[0]]["ids"]))
        q, k, v = (rows(rng, 2 * len(seqs), heads, DIM) for heads in (HEADS * group, HEADS, HEADS))
        try:
            step = self.cache.step(seqs, [2] * len(seqs))
        except OutOfPages:
            return
        step._plan.handle.batch.may_share = may_share
        out = step.attend(0, q, k, v, out=np.full_like(q, np.nan))
        step.rollback()
        for i, seq in enumerate(seqs):
            own = slice(2 * i, 2 * i + 2)
            both, options = self.seen_in_a_step(self.seqs[seq], k[own], v[own]), {}
            if self.window:
                options = {"window": self.window, "num_sink_tokens": self.sinks}
            expected = reference.attend(q[own], *both, **options)
            atol, _ = tolerances(q[own], *both, stored=("int8", "int4"))
            np.testing.assert_allclose(out[own], expected, rtol=0, atol=atol)

    def seen_in_a_step(self, state, k, v):
        """Keys and values that two new tokens see, in layer 0."""
        both = [
            np.concatenate([side, OPEN[self.opened](new)])
            for side, new in zip(state["values"][0], (k, v), strict=True)
        ]
        tail, offset = divmod(len(state["ids"]), PAGE)
        if offset and tail in state["packed"]:
            rest = self.opened_sides([x[tail * PAGE : -2] for x in both], state["packed"][tail])
            both = [
                np.concatenate([x[: tail * PAGE], side, x[-2:]]) for x, side in zip(both, rest, strict=True)
            ]
        if self.window:
            return both
        return [side[np.append(self.held(state), [True, True])] for side in both]

    @invariant()
    def each_reads_its_own(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        for seq, state in self.seqs.items():
            for layer, sides in enumerate(state["values"]):
                for got, side in zip(seq.gather(layer), sides, strict=True):
                    np.testing.assert_array_equal(got, side[self.held(state)])
        stats = self.cache.stats()
        assert stats.num_pages == stats.num_used_pages + stats.num_kept_pages + stats.num_free_pages
        used = sum(one.num_pages for one in stats.formats.values())
        assert used == stats.num_used_pages + stats.num_kept_pages


TestPacking = Packing.TestCase
TestPacking.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


FORMATS = [
    {"dtype": "int8", "recent_tokens": 64},
    {"dtype": ("int8", "int4"), "recent_tokens": 64},
    {"dtype": "int4"},
    {"dtype": "int4", "open_dtype": "bfloat16", "recent_tokens": 0},
    {"dtype": ("int4", "int8"), "open_dtype": "float32"},
    {"dtype": "bfloat16", "precision_policy": paged_kv.Ageing(64, "int8", 150, "int4")},
    {"dtype": "float32", "precision_policy": paged_kv.Ageing(0, ("bfloat16", "int8"), 64, ("int8", "int4"))},
]


@settings(max_examples=40, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    page_size=st.sampled_from([64, 128, 192]),
    head_dim=st.sampled_from([8, 40, 64, 128]),
    group=st.sampled_from([1, 2, 3, 4, 5]),
    window=st.sampled_from([None, 63, 100, 300]),
    sinks=st.sampled_from([0, 1, 70]),
    lengths=st.lists(st.sampled_from([1, 63, 64, 129, 300, 500]), min_size=1, max_size=3),
    news=st.sampled_from([1, 2, 70]),
    cap=st.sampled_from([0.0, 5.0]),
    has_slopes=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_options_over_pages_of_both_formats(
    format, page_size, head_dim, group, window, sinks, lengths, news, cap, has_slopes, seed
):
    """On every kernel, with any number of threads: what the reference makes of what `gather` reads."""
    rng = np.random.default_rng(seed)
    shape = {
        "num_layers": 1,
        "head_dim": head_dim,
        "page_size": page_size,
        "num_pages": 120,
        "window": window,
    }
    shape |= format | {"num_sink_tokens": sinks, "max_step_tokens": 600}
    slopes = np.array([0.01, -0.02] * group) if has_slopes else None
    options = {"logits_soft_cap": cap, "alibi_slopes": slopes}
    written = [[rows(rng, n + news, 2, head_dim) for _ in "kv"] for n in lengths]
    q = rows(rng, news * len(lengths), 2 * group, head_dim)
    before, seen = paged_kv.kernels().active, {}
    try:
        for kernel in KERNELS:
            _binding.select_kernel(kernel)
            for num_threads in (1, 3):
                with make_cache(**shape, num_threads=num_threads) as cache:
                    seqs = [cache.sequence() for _ in lengths]
                    for seq, (k, v), n in zip(seqs, written, lengths, strict=True):
                        with cache.step([seq], [n]) as step:
                            step.write(0, k[:n], v[:n])
                    old = [(seq.held_positions, *seq.gather(0)) for seq in seqs]
                    step = cache.step(seqs, [news] * len(seqs))
                    new = [np.concatenate([pair[i][-news:] for pair in written]) for i in range(2)]
                    out = np.full((len(q), 2 * group, head_dim), np.nan, np.float32)
                    step.attend(0, q, *new, out=out, **options)
                    step.rollback()
                assert (seen.setdefault(kernel, out) == out).all()
            opened = cache._store.layout.dtypes
            for i, ((positions, *kept), pair) in enumerate(zip(old, written, strict=True)):
                both = [
                    np.concatenate([side, OPEN[dtype](one[-news:])])
                    for side, one, dtype in zip(kept, pair, opened, strict=True)
                ]
                positions = np.concatenate([positions, lengths[i] + np.arange(news)])
                own = slice(i * news, (i + 1) * news)
                expected = reference.attend(
                    q[own], *both, positions, window=window, num_sink_tokens=sinks, **options
                )
                atol, _ = tolerances(q[own], *both, stored=("int8", "int4"), **options)
                np.testing.assert_allclose(out[own], expected, rtol=0, atol=atol)
    finally:
        _binding.select_kernel(before)


def test_keys_by_channel_at_their_edges(kernel, rng):
    """Constants, subnormals, the largest, and values that are no numbers, of which one makes its dim NaN in a
    page of its head, and in no other page, head or sequence.
    """
    k = rows(rng, 192, 2, 16)
    with np.errstate(all="ignore"):
        edges = [0.0, -0.0, 1.5, -1.5, 1e-45, 3.4028235e38, -3.4028235e38, 1e30]
        k[:64, 0, :8] = np.array(edges, np.float32)
        k[:64, 1] *= np.float32(10) ** rng.integers(-37, 38, 16).astype(np.float32)
    k[70, 0, 3], k[71, 1, 4], k[72, 1, 5] = np.nan, np.inf, -np.inf
    shape = {"num_layers": 1, "head_dim": 16, "open_dtype": "float32", "page_size": PAGE, "num_pages": 30}
    with make_cache(**shape, dtype=("int4", "int8")) as cache:
        seq, other = cache.sequence(), cache.sequence()
        with cache.step([seq, other], [192, 192]) as step:
            step.write(0, np.concatenate([k, np.ones_like(k)]), np.ones((384, 2, 16), np.float32))
        got = seq.gather(0)[0][:128]
        np.testing.assert_array_equal(got, reference.int4_by_channel_values(k[:128]))
        flawed = np.isnan(got)
        assert flawed[64:, 0, 3].all() and flawed[64:, 1, 4:6].all() and flawed.sum() == 3 * 64
        q = rows(rng, 2, 2, 16)
        step = cache.step([seq, other], [1, 1])
        out = step.attend(0, q, np.ones((2, 2, 16), "f4"), np.ones((2, 2, 16), "f4"))
        assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


@pytest.fixture
def packed_cache():
    with make_cache(num_layers=1, dtype="int8", recent_tokens=64, page_size=PAGE, num_pages=40) as cache:
        yield cache


def filled(cache, seq, count, rng):
    k = rows(rng, count, 2, 32)
    with cache.step([seq], [count]) as step:
        step.write(0, k, -k)
    return k


def packed_pages(cache, seq):
    tables = cache._store.tables
    pages = tables.held_pages(tables.rows.row(seq._seq_id))[1].tolist()
    return [page for page, id in enumerate(pages) if cache._store.pool.format_of(id) == 1]


def test_a_page_is_packed_once_its_tokens_are_old(packed_cache, rng):
    seq = packed_cache.sequence()
    for count, packed in ((127, []), (1, [0]), (63, [0]), (1, [0, 1]), (200, [0, 1, 2, 3, 4])):
        filled(packed_cache, seq, count, rng)
        assert packed_pages(packed_cache, seq) == packed
    k, _ = seq.gather(0)
    assert len(k) == 392


def test_a_fork_keeps_the_open_page_until_its_own_commit(packed_cache, rng):
    seq = packed_cache.sequence()
    k = as_bfloat16(filled(packed_cache, seq, 100, rng))
    fork = seq.fork()
    filled(packed_cache, seq, 100, rng)
    assert packed_pages(packed_cache, seq) == [0, 1] and packed_pages(packed_cache, fork) == []
    np.testing.assert_array_equal(fork.gather(0)[0], k)
    np.testing.assert_array_equal(seq.gather(0)[0][:64], reference.int8_values(k[:64]))
    filled(packed_cache, fork, 30, rng)
    assert packed_pages(packed_cache, fork) == [0]
    tables = packed_cache._store.tables
    first = [int(tables.page_ids[tables.rows.row(one._seq_id), 0]) for one in (seq, fork)]
    assert first[0] == first[1]  # the one twin


def test_a_packed_page_that_goes_on_is_open_again_and_packed_later(packed_cache, rng):
    seq = packed_cache.sequence()
    filled(packed_cache, seq, 200, rng)
    before = seq.gather(0)[0]
    seq.truncate(30)
    filled(packed_cache, seq, 1, rng)
    assert packed_pages(packed_cache, seq) == []
    np.testing.assert_array_equal(seq.gather(0)[0][:30], as_bfloat16(before[:30]))
    filled(packed_cache, seq, 100, rng)
    assert packed_pages(packed_cache, seq) == [0]


def test_an_exchange_that_finds_no_page_waits_and_a_commit_does_not_fail(rng):
    with make_cache(
        num_layers=1, dtype="int8", open_dtype="float32", recent_tokens=64, page_size=PAGE, num_pages=60
    ) as cache:
        pool = cache._store.pool
        taken = pool.acquire(pool.num_available(1), 1)
        seq = cache.sequence()
        filled(cache, seq, 64, rng)
        filled(cache, seq, 64, rng)
        assert packed_pages(cache, seq) == [] and len(seq) == 128
        pool.release(taken)
        filled(cache, seq, 1, rng)
        assert packed_pages(cache, seq) == [0]


def test_memory_is_that_of_packed_pages(rng):
    options = {"num_layers": 1, "page_size": PAGE, "num_kv_heads": 2, "head_dim": 128}
    with (
        make_cache(**options, dtype="bfloat16", num_pages=100) as plain,
        make_cache(
            **options, dtype="int8", recent_tokens=64, max_step_tokens=64, num_pages=None, memory="6400KiB"
        ) as packed,
    ):
        assert packed.stats().pool_bytes <= plain.stats().pool_bytes
        lengths = []
        for cache in (plain, packed):
            seq = cache.sequence()
            while True:
                try:
                    with cache.step([seq], [64]) as step:
                        k = rows(rng, 64, 2, 128)
                        step.write(0, k, k)
                except (OutOfPages, paged_kv.SequenceTooLong):
                    break
            lengths.append(len(seq))
            cache.check()
        assert lengths[1] > 1.7 * lengths[0]


@pytest.mark.parametrize("num_pages", [1, 5, 40, 300])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: str(format["dtype"]))
def test_a_pool_holds_as_many_packed_pages_as_requested(format, num_pages, rng):
    with make_cache(
        num_layers=1, num_kv_heads=1, page_size=PAGE, num_pages=num_pages, max_step_tokens=64, **format
    ) as cache:
        pool = cache._store.pool
        last = len(cache._store.layouts) - 1
        assert pool.num_available(last) >= num_pages and pool.num_available(0) >= 2
        seq = cache.sequence()
        for _ in range(num_pages):
            with cache.step([seq], [64]) as step:
                step.write(0, rows(rng, 64, 1, 32), rows(rng, 64, 1, 32))
        assert len(seq) == 64 * num_pages
        cache.check()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"recent_tokens": -1}, "recent_tokens"),
        ({"recent_tokens": 1.5}, "recent_tokens"),
        (
            {"recent_tokens": 64, "page_size": 16},
            "page_size is 16; pages that are packed take a multiple of 64",
        ),
        ({"recent_tokens": 64, "dtype": "bfloat16"}, "no larger than packed ones"),
        ({"recent_tokens": 64, "open_dtype": "int8"}, "no larger than packed ones"),
        ({"recent_tokens": 64, "open_dtype": "int3"}, "dtype is int3"),
        ({"recent_tokens": 64, "num_pages": None, "memory": "16KiB"}, "give more memory"),
        ({"precision_policy": paged_kv.Ageing()}, "pages of int8, int8, int4 do not become smaller"),
        ({"precision_policy": "int4"}, r"give Ageing\(...\)"),
        ({"precision_policy": paged_kv.Ageing(), "open_dtype": "float32"}, "not both"),
        ({"precision_policy": paged_kv.Ageing(after=63), "dtype": "float32"}, "after is 63, outside 64 to"),
        (
            {"precision_policy": paged_kv.Ageing(then="int4", last=("int4", "int4")), "dtype": "float32"},
            "int4 has keys of int4, which only the last format can have",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused(options, reason):
    shape = {"dtype": "int8", "page_size": 64, "num_pages": 40} | options
    with pytest.raises(ArgumentError, match=reason):
        paged_kv.PagedKVCache(1, 2, 32, **shape)


def test_no_byte_of_an_unwritten_slot_is_read(rng):
    """Twins are of full pages, and free places are poison."""
    with make_cache(
        num_layers=1, dtype="int8", recent_tokens=0, open_dtype="bfloat16", page_size=PAGE
    ) as cache:
        poison(cache)
        seq = cache.sequence()
        q, k = rows(rng, 200, 2, 32), rows(rng, 200, 2, 32)
        with cache.step([seq], [200]) as step:
            assert np.isfinite(step.attend(0, q, k, k)).all()
        with cache.step([seq], [1]) as step:
            assert np.isfinite(step.attend(0, q[:1], k[:1], k[:1])).all()


def test_a_sequence_that_a_step_skips_keeps_its_pages(packed_cache, rng):
    """It may stand in another open step, which reads them."""
    seq, other = packed_cache.sequence(), packed_cache.sequence()
    filled(packed_cache, seq, 100, rng)
    fork = seq.fork()
    filled(packed_cache, other, 1, rng)
    step = packed_cache.step([fork], [40])
    with packed_cache.step([other, seq], [1, 0]) as beside:
        beside.write(0, rows(rng, 1, 2, 32), rows(rng, 1, 2, 32))
    assert packed_pages(packed_cache, seq) == []
    k = rows(rng, 40, 2, 32)
    assert np.isfinite(step.attend(0, k, k, k)).all()
    step.commit()
    assert packed_pages(packed_cache, fork) == [0] and packed_pages(packed_cache, seq) == []
    packed_cache.check()


def test_an_interrupt_in_any_call_of_a_commit_that_packs_loses_nothing(rng):
    """Whether the step was committed or not, every page is accounted for, and what is found is right."""
    at, was_raised, ids = 1, True, np.arange(128, dtype=np.int32)
    k = rows(rng, 128, 2, 32)
    while was_raised:
        with make_cache(num_layers=1, dtype="int8", recent_tokens=64, page_size=PAGE, num_pages=20) as cache:
            seq, fork = cache.sequence(), None
            with cache.step([seq], [ids[:100]]) as step:
                step.write(0, k[:100], k[:100])
            fork = seq.fork()
            step = cache.step([seq], [ids[100:]])
            step.write(0, k[100:], k[100:])
            trip = Tripwire(at)
            with trip:
                step.commit()
            was_raised = bool(trip.raised)
            trip.raised.clear()
            del step
            cache.check()
            assert len(seq) in (100, 128) and len(fork) == 100
            np.testing.assert_array_equal(fork.gather(0)[0], as_bfloat16(k[:100]))
            exact, packed = as_bfloat16(k[:64]), reference.int8_values(as_bfloat16(k[:64]))
            found = cache.sequence(ids)
            for one in (seq, found):
                first = one.gather(0)[0][:64]
                same = [np.array_equal(first, form[: len(first)]) for form in (exact, packed)]
                assert any(same), at
            for one in (seq, fork, found):
                one.free()
            cache.check()
            assert cache.stats().num_used_pages == 0
        at += 1
    assert at > 10


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: str(format["dtype"]))
def test_pages_read_once_for_several_sequences_give_the_same_bits(kernel, format, rng):
    with make_cache(
        num_layers=1, num_kv_heads=4, head_dim=64, page_size=PAGE, num_pages=120, **format
    ) as cache:
        seq = cache.sequence()
        k, v = rows(rng, 1200, 4, 64), rows(rng, 1200, 4, 64)
        with cache.step([seq], [1200]) as step:
            step.write(0, k, v)
        seqs = [seq, *seq.fork(3)]
        q, new = rows(rng, 4, 8, 64), rows(rng, 4, 4, 64)
        alone = []
        for i, one in enumerate(seqs):
            step = cache.step([one], [1])
            alone.append(step.attend(0, q[i : i + 1], new[i : i + 1], new[i : i + 1]))
            step.rollback()
        step = cache.step(seqs, [1] * 4)
        together = step.attend(0, q, new, new)
        assert step.bytes_not_read > 0
        step.rollback()
        np.testing.assert_array_equal(together, np.concatenate(alone))


def test_memory_of_another_salt_is_cleared_though_its_pages_had_another_format(rng):
    shape = {"num_layers": 2, "dtype": "int8", "open_dtype": "bfloat16", "page_size": PAGE, "num_pages": 40}
    with make_cache(**shape, prefix_caching=False, max_step_tokens=64) as cache:
        cache._store.pool.data()[:] = 0
        secret = np.full((64, 2, 32), 3.0, np.float32)
        writers = [cache.sequence(salt=b"b"), cache.sequence(salt=b"a")]  # so that they share slabs
        for i in range(100):
            try:
                with cache.step([writers[i % 2]], [64]) as step:
                    for layer in range(2):
                        step.write(layer, secret, secret)
            except (OutOfPages, paged_kv.SequenceTooLong):
                break
        for one in writers:
            one.free()
        assert cache._store.pool.data().any()
        others = []
        while True:  # every open page that there can be, a token each
            others.append(cache.sequence(salt=b"b"))
            try:
                with cache.step(others[-1:], [1]) as step:
                    for layer in range(2):
                        step.write(layer, np.ones((1, 2, 32), "f4"), np.ones((1, 2, 32), "f4"))
            except OutOfPages:
                break
        cache.check()
        pool, layout = cache._store.pool, cache._store.layout
        sizes, data = cache._store.packed.slabs, pool.data()
        shift = (pool.num_ids // sizes.num_slabs).bit_length() - 1
        for seq in others[:-1]:
            (page,) = cache._store.tables.held_pages(cache._store.tables.rows.row(seq._seq_id))[1].tolist()
            slab, place = page >> shift, page & ((1 << shift) - 1)
            for layer in range(2):
                first = slab * sizes.slab_bytes + (layer * sizes.places[0] + place) * layout.page_share_bytes
                share = data[first : first + layout.page_share_bytes].view(ml_dtypes.bfloat16)
                assert set(share.astype("f4").tolist()) == {0.0, 1.0}
        assert len(others) > 8


def test_the_format_is_part_of_a_page_s_hash():
    hashes = set()
    for options in ({"dtype": "bfloat16"}, {"dtype": "int8"}, *FORMATS):
        with make_cache(num_layers=1, page_size=PAGE, num_pages=60, **options) as cache:
            seq, k = cache.sequence(), np.zeros((64, 2, 32), np.float32)
            with cache.step([seq], [np.arange(64)]) as step:
                step.write(0, k, k)
            (event,) = [event for event in cache.events() if type(event).__name__ == "BlockStored"]
            hashes.add(str(event.block_hashes))
    assert len(hashes) == 2 + len(FORMATS)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "int4"}, [1, 2]),
        ({"dtype": "int4", "num_sink_tokens": 0}, [0, 1, 2]),
        ({"dtype": "int4", "recent_tokens": 128}, [1]),
        ({"dtype": "int4", "open_dtype": "int8"}, [0, 1, 2, 3]),
        ({"dtype": "int8", "recent_tokens": 64}, [0, 1, 2]),
    ],
    ids=str,
)
def test_what_is_packed_by_default(options, expected):
    """Of keys of int4 neither the newest 64 tokens nor the first 4; the page of each is open."""
    rng = np.random.default_rng(1)
    with make_cache(num_layers=1, page_size=PAGE, num_pages=40, **options) as cache:
        seq = cache.sequence()
        filled(cache, seq, 4 * PAGE, rng)
        assert packed_pages(cache, seq) == expected


def test_a_page_that_passes_two_formats_in_one_commit_is_found_in_the_last(rng):
    """The page in between is free before the index hears of it."""
    policy = paged_kv.Ageing(recent_tokens=64, then="int8", after=100, last=("int8", "int4"))
    with make_cache(
        num_layers=1,
        dtype="bfloat16",
        precision_policy=policy,
        page_size=PAGE,
        num_pages=60,
        num_sink_tokens=0,
    ) as cache:
        ids, seq = list(range(400)), cache.sequence()
        k = rows(rng, 400, 2, 32)
        with cache.step([seq], [ids]) as step:
            step.write(0, k, -k)
        cache.check()
        assert cache.stats().formats["int8,int4"].num_pages == 4
        expected = seq.gather(0)[0]
        seq.free()
        cache.check()
        again = cache.sequence([*ids, 1])
        assert len(again) == 400
        np.testing.assert_array_equal(again.gather(0)[0], expected)


def test_a_page_in_between_may_have_the_id_of_a_page_that_follows(rng):
    """Its slab was empty, and took the last format within the same commit."""
    policy = paged_kv.Ageing(recent_tokens=0, then="int8", after=0, last="int4")
    options = {"eviction": "window", "budget_tokens": 320, "max_step_tokens": 200, "num_sink_tokens": 4}
    with make_cache(
        num_layers=1, dtype="bfloat16", precision_policy=policy, page_size=PAGE, num_pages=40, **options
    ) as cache:
        seq = cache.sequence()
        for begin in range(0, 1000, 200):
            k = rows(rng, 200, 2, 32)
            with cache.step([seq], [list(range(begin, begin + 200))]) as step:
                step.write(0, k, -k)
            cache.check()


def test_a_page_that_is_written_again_has_lost_its_packed_twin(rng):
    """A fork filled the page in place, packed it and ended; the parent goes on from where they parted."""
    with make_cache(
        num_layers=1, dtype="int8", recent_tokens=0, open_dtype="bfloat16", page_size=PAGE
    ) as cache:
        seq = cache.sequence()
        k = as_bfloat16(filled(cache, seq, 127, rng))
        fork = seq.fork()
        filled(cache, fork, 63, rng)
        assert packed_pages(cache, fork) == [0, 1]
        fork.free()
        k = np.concatenate([k, as_bfloat16(filled(cache, seq, 1, rng))])
        assert packed_pages(cache, seq) == [0, 1]
        np.testing.assert_array_equal(seq.gather(0)[0], reference.int8_values(k))
        cache.check()
