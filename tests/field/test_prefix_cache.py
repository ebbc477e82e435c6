"""Failures of other prefix caches, from their issues: each cannot happen here, and its test says why.

Keys, values and queries are functions of the tokens, so what attention must give is known for any sequence,
bit for bit: what a cache without prefix caching gives for the whole of it.
"""

import os

import numpy as np
import pytest
from conftest import make_cache

from paged_kv import ArgumentError, OutOfPages, OutOfSequences
from paged_kv.pages.salts import NO_SALT

PAGE_SIZE, HEADS, DIM = 16, 2, 16
#: Random workloads; `make test-long` has ten thousand.
NUM_WORKLOADS = int(os.environ.get("PAGED_KV_NUM_WORKLOADS", "40"))


def caching(**changes):
    shape = {"num_layers": 1, "num_kv_heads": HEADS, "head_dim": DIM, "page_size": PAGE_SIZE, "num_pages": 64}
    return make_cache(**shape | {"max_sequences": 8} | changes)


def rows_of(tokens):
    """q, k, v of each token, which depend on it and on all before it."""
    value, values = 1, []
    for token in tokens:
        value = (value * 31 + token + 1) % 65521
        values.append(value)
    waves = np.array(values, np.float64)[:, None, None] * np.arange(1, HEADS * DIM + 1).reshape(HEADS, DIM)
    return [part.astype(np.float32) for part in (3 * np.cos(waves), np.sin(waves), np.sin(3 * waves + 1))]


class Expected:
    """The bits that attention gives for each token of a sequence, without any sharing."""

    def __init__(self, **window):
        self.known, self.window = {}, window

    def __call__(self, tokens):
        key = tuple(tokens)
        if key not in self.known:
            with (
                caching(prefix_caching=False, **self.window) as cache,
                cache.step([cache.sequence()], [len(key)]) as step,
            ):
                self.known[key] = step.attend(0, *rows_of(tokens))
        return self.known[key]


def advance(cache, seqs, held, new, expected):
    """A step that appends ids to some sequences; each output row has the expected bits."""
    step = cache.step(seqs, new)
    parts = [rows_of(held[seq] + ids) for seq, ids in zip(seqs, new, strict=True)]
    q, k, v = (
        np.concatenate([part[i][len(held[seq]) :] for seq, part in zip(seqs, parts, strict=True)])
        for i in range(3)
    )
    out = step.attend(0, q, k, v, out=np.full_like(q, np.nan))
    step.commit()
    for i, (seq, ids) in enumerate(zip(seqs, new, strict=True)):
        held[seq] = held[seq] + ids
        own = out[step.qo_indptr[i] : step.qo_indptr[i + 1]]
        np.testing.assert_array_equal(own, expected(held[seq])[-len(ids) :])


def begin(cache, tokens, held, expected):
    seq = cache.sequence(tokens)
    held[seq] = tokens[: len(seq)]
    advance(cache, [seq], held, [tokens[len(seq) :]], expected)
    return seq


class Colliding:
    """A hash that is always the same."""

    def __init__(self, content):
        assert content

    def digest(self):
        return b"7"


def test_row_40_and_41_no_hash_decides(monkeypatch):
    """CVE-2025-25183, OpenVINO GenAI #3722: predictable or unchecked hashes gave one prompt another's pages.

    Look-ups compare tokens.  With events whose hashes all collide, matches are the same.
    """
    monkeypatch.setattr("paged_kv.pages.events.hashlib.sha256", Colliding)
    expected, held = Expected(), {}
    with caching(max_sequences=20) as cache:
        for first in range(20):
            seq = begin(cache, [first, *range(40)], held, expected)
            assert seq.num_cached_tokens == 0
        assert {event.block_hashes[0] for event in cache.events()} == {b"7"}
        assert cache.match([3, *range(40), 99]).num_tokens == 41


def test_row_42_ids_that_differ_in_high_bits_only_differ():
    """vllm-mlx PR #444: the key kept the low byte of an id."""
    with caching() as cache:
        for shift in range(0, 31):
            tokens = [1 << shift] * 20
            seq = cache.sequence(tokens)
            assert seq.num_cached_tokens == 0
            with cache.step([seq], [tokens]) as step:
                step.write(0, *rows_of(tokens)[1:])
            seq.free()
        assert cache.match([2**31 - 1] * 5).reason == "first"
        with pytest.raises(ValueError, match="outside"):
            cache.match([2**31])


def test_row_43_and_49_fields_are_not_run_together():
    """vLLM #44701, tinfoil router PR #386: ("org_1", "2345") had the key of ("org_12345", "")."""
    tokens = list(range(30))
    with caching() as cache:
        for salt in (b"org_1", b"org_12345", b"", b"2345", b"org_1" + bytes(4)):
            seq = cache.sequence(tokens, salt=salt)
            assert seq.num_cached_tokens == 0, salt
            with cache.step([seq], [tokens]) as step:
                step.write(0, *rows_of(tokens)[1:])
        number = cache._store.salts.numbers
        assert number[b""] == NO_SALT and len(set(number.values())) == len(number) == 5


@pytest.mark.parametrize("is_freed", [False, True])
def test_row_47_another_tenant_learns_nothing(is_freed):
    """CVE-2025-46570: time to the first token told whether someone had sent a prompt."""
    tokens = list(range(50))
    with caching() as cache:
        seq = cache.sequence(tokens, salt=b"a")
        with cache.step([seq], [tokens]) as step:
            step.write(0, *rows_of(tokens)[1:])
        if is_freed:
            seq.free()
        assert cache.match(tokens, b"a").num_tokens == 49
        for salt in (b"", b"b", b"A", b"a\x00"):
            match = cache.match(tokens, salt)
            assert (match.num_tokens, match.reason, match.num_lost) == (0, "first", 0)
            assert cache.sequence(tokens, salt=salt).num_cached_tokens == 0


@pytest.mark.parametrize(
    "length", [1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 2 * PAGE_SIZE - 1, 2 * PAGE_SIZE]
)
@pytest.mark.parametrize("more", [1, 2, PAGE_SIZE])
def test_row_50_prefixes_round_a_page_edge_are_whole(length, more):
    """SGLang #22819: output was wrong when the prefix was as long as a page."""
    expected, held = Expected(), {}
    with caching() as cache:
        first = begin(cache, list(range(length)), held, expected)
        second = begin(cache, [*range(length), *[7] * more], held, expected)
        assert second.num_cached_tokens == length
        advance(cache, [first, second], held, [[8], [9, 9]], expected)


@pytest.mark.parametrize("window", [{}, {"window": 37}, {"window": 20, "num_sink_tokens": 18}], ids=str)
def test_row_51_outputs_do_not_depend_on_the_cache(window):
    """vLLM #37076, #39146: outputs diverged under eviction pressure.

    Random workloads over a simulated day, on few and many pages: prompts with shared beginnings, batches of
    several writers on one page, forks, truncation, rollbacks, priorities, trimming.  Every output has the
    bits that it has without prefix caching.
    """
    expected = Expected(**window)
    num_hits = num_evictions = 0
    for seed in range(-(-NUM_WORKLOADS // 3)):
        rng, now, held = np.random.default_rng([51, seed]), [0.0], {}
        if len(expected.known) > 20000:
            expected.known.clear()
        num_pages = int(rng.integers(8, 40))
        with caching(num_pages=num_pages, clock=lambda now=now: now[0], **window) as cache:
            for _ in range(40):
                now[0] += float(rng.exponential(2000))
                work(cache, rng, held, expected)
                cache.check()
            stats = cache.stats()
            num_hits += stats.num_hits
            num_evictions += stats.num_evictions
    assert num_hits > NUM_WORKLOADS // 2 and num_evictions > NUM_WORKLOADS // 3


def work(cache, rng, held, expected):
    """One random deed; what finds no room changes nothing."""
    choice, seqs = rng.integers(0, 10), list(held)
    any_seq = seqs[int(rng.integers(0, len(seqs)))] if seqs else None
    try:
        if choice < 3:
            beginnings = [[], [1] * 20, [1] * 20 + [2] * 30, list(range(16)), *held.values()]
            tokens = beginnings[int(rng.integers(0, len(beginnings)))][: int(rng.integers(1, 90))]
            tokens = tokens + rng.integers(0, 3, int(rng.integers(1, 20))).tolist()
            if len(tokens) < 140:
                begin(cache, tokens, held, expected)
        elif any_seq is None:
            return
        elif choice < 6:
            some = [seq for seq in seqs if len(held[seq]) < 150 and rng.random() < 0.7]
            new = [rng.integers(0, 3, int(rng.integers(1, 4))).tolist() for _ in some]
            if some:
                advance(cache, some, held, new, expected)
        elif choice == 6:
            fork = any_seq.fork(at=(at := int(rng.integers(0, len(held[any_seq]) + 1))))
            held[fork] = held[any_seq][:at]
        elif choice == 7:
            any_seq.truncate(length := int(rng.integers(0, len(held[any_seq]) + 1)))
            held[any_seq] = held[any_seq][:length]
        elif choice == 8:
            any_seq.retain(priority=int(rng.integers(0, 4)), ttl=float(rng.exponential(5000)))
            cache.step([any_seq], [[1, 2, 3]]).rollback()
            cache.trim()
        else:
            any_seq.free()
            del held[any_seq]
    except ArgumentError:
        assert cache.window is not None  # which has passed the place of a fork or of a cut
    except (OutOfPages, OutOfSequences):
        # A sequence that `begin` could not step was made all the same.
        for seq in [seq for seq in held if rng.random() < 0.5]:
            seq.free()
            del held[seq]


def test_row_52_a_prompt_resumes_at_every_offset_as_from_scratch():
    """tenstorrent/vllm #415: prefill that went on from cached keys computed something else."""
    expected, tokens = Expected(), [int(id) for id in np.random.default_rng(0).integers(0, 9, 70)]
    for offset in range(1, 70):
        held = {}
        with caching() as cache:
            begin(cache, tokens[:offset], held, expected).free()
            held.clear()
            seq = begin(cache, tokens, held, expected)
            assert seq.num_cached_tokens == offset


def test_row_53_after_every_eviction_entries_and_pages_name_each_other():
    """local-inference-lab/vllm #480: hits on pages that had been evicted, under churn."""
    rng, expected = np.random.default_rng(53), Expected()
    with caching(num_pages=6) as cache:
        for i in range(300):
            held = {}
            tokens = [i % 7, *rng.integers(0, 2, int(rng.integers(1, 60))).tolist()]
            begin(cache, tokens, held, expected).free()
            cache.check()
            index = cache._store.index
            kept = [page for page in range(6) if index.pool.is_kept(page)]
            assert sorted(index.by_page) == kept and len(index.entries) == len(kept)
        assert cache.stats().num_evictions > 300


@pytest.mark.parametrize("num_writers", [2, 4])
def test_two_writers_on_one_open_page_get_pages_of_their_own(num_writers):
    """atlas #692, #1193: streams that went on from one shared tail wrote into the same page."""
    expected, held = Expected(), {}
    with caching() as cache:
        first = begin(cache, list(range(20)), held, expected)
        seqs = [first]
        for i in range(1, num_writers):
            seq = cache.sequence([*range(20), 100 + i])
            held[seq] = list(range(20))
            seqs.append(seq)
        for _ in range(20):
            advance(cache, seqs, held, [[i] for i in range(num_writers)], expected)
        tails = {
            int(cache._store.tables.page_ids[cache._store.tables.rows.row(seq._seq_id), 1]) for seq in seqs
        }
        assert len(tails) == num_writers
