"""Pages that age by attention mass: those that get most keep more bits, against a model of the mean mass."""

import numpy as np
import pytest
from conftest import make_cache, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_kv import Ageing, ArgumentError

PAGE, HEADS, DIM = 64, 2, 32
FORMATS = {"bfloat16": 0, "int8": 1, "int8,int4": 2}


def ageing_cache(recent=64, after=192, **options):
    policy = Ageing(recent, "int8", after, ("int8", "int4"), by="mass")
    options = {"num_pages": 120, "num_sink_tokens": 4, "prefix_caching": False} | options
    return make_cache(page_size=PAGE, num_layers=1, dtype="bfloat16", precision_policy=policy, **options)


def formats_of(cache, seq):
    """Of each logical page that a sequence holds."""
    tables, pool = cache._store.tables, cache._store.pool
    numbers, pages = tables.held_pages(tables.rows.row(seq._seq_id))
    return {page: pool.format_of(id) for page, id in zip(numbers.tolist(), pages.tolist(), strict=True)}


class Mass:
    """Of a sequence's pages the mean mass, by what `attend(return_mass=True)` gave."""

    def __init__(self, sums=None):
        self.sums = dict(sums or {})

    def add(self, numbers, mass, length, count):
        for page, new in zip(numbers, mass.sum(axis=1).tolist(), strict=True):
            before = self.sums.get(page, (0.0, 0))
            self.sums[page] = before[0] + new, before[1] + min(count, length - page * PAGE)

    def mean(self, page):
        return self.sums[page][0] / self.sums[page][1]


def grow(cache, seqs, masses, count, rng, scale=8.0):
    """One step of `count` tokens of each sequence, whose attention is far from even."""
    q, k, v = (rows(rng, count * len(seqs), heads, DIM) for heads in (2 * HEADS, HEADS, HEADS))
    with cache.step(seqs, [count] * len(seqs)) as step:
        _, mass = step.attend(0, scale * q, k, v, return_mass=True)
        indptr = step.kv_indptr
    for i, (seq, own) in enumerate(zip(seqs, masses, strict=True)):
        part = mass[indptr[i] : indptr[i + 1]]
        own.add(range(len(part)), part, len(seq), count)


def check_formats(cache, seq, mass, before, recent, after):
    """Sinks and new tokens are open; of the others those of least mass left int8, as many as had to."""
    now, num_full = formats_of(cache, seq), max(0, len(seq) - recent) // PAGE
    assert all(format == 0 for page, format in now.items() if page == 0 or page >= num_full)
    old = {page: now[page] for page in range(1, num_full)}
    assert all(format > 0 for format in old.values())
    stay = [page for page, format in old.items() if format == 1]
    assert len(stay) == min(len(old), (after - recent) // PAGE)
    left = [page for page, format in old.items() if format == 2 and before.get(page, 0) < 2]
    most = max((mass.mean(page) for page in left), default=0.0)
    assert all(mass.mean(page) >= most * (1 - 1e-4) for page in stay)


@settings(max_examples=25, deadline=None)
@given(
    recent=st.sampled_from([0, 64, 100]),
    more=st.sampled_from([0, 64, 200]),
    counts=st.lists(st.sampled_from([1, 64, 65, 130, 300]), min_size=3, max_size=8),
    forks_at=st.integers(0, 5),
    caching=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_pages_that_get_most_attention_keep_more_bits(recent, more, counts, forks_at, caching, seed):
    rng, after = np.random.default_rng(seed), recent + more
    with ageing_cache(recent, after, prefix_caching=caching) as cache:
        seqs, masses = [cache.sequence()], [Mass()]
        for i, count in enumerate(counts):
            if i == forks_at:
                seqs.append(seqs[0].fork())
                masses.append(Mass(masses[0].sums))
            before = [formats_of(cache, seq) for seq in seqs]
            grow(cache, seqs, masses, count, rng)
            cache.check()
            for seq, mass, formats in zip(seqs, masses, before, strict=True):
                check_formats(cache, seq, mass, formats, recent, after)


def test_a_page_that_is_looked_at_keeps_its_bits_however_old_it_is():
    rng = np.random.default_rng(1)
    with ageing_cache() as cache:
        seq, key = cache.sequence(), np.zeros(DIM, np.float32)
        key[0] = 6
        q = np.broadcast_to(key * 6, (1, 2 * HEADS, DIM))
        for position in range(12 * PAGE):
            k, v = rows(rng, 1, HEADS, DIM), rows(rng, 1, HEADS, DIM)
            k[..., 0] = 6 if position // PAGE == 1 else 0
            with cache.step([seq], [1]) as step:
                step.attend(0, q, k, v)
        formats = formats_of(cache, seq)
        assert [page for page, format in formats.items() if format == 1] == [1, 10]
        assert [page for page, format in formats.items() if format == 2] == [*range(2, 10)]
        assert seq.attention_lost == 0


@pytest.mark.parametrize("by", ["age", "mass"])
def test_what_had_to_wait_ages_a_page_a_step(by):
    """Where a pool had no room for packed pages, each single token packs one of each format."""
    rng = np.random.default_rng(2)
    policy = Ageing(0, "int8", 0, ("int8", "int4"), by=by)
    options = {"num_pages": 120, "num_sink_tokens": 0, "prefix_caching": False}
    with make_cache(
        page_size=PAGE, num_layers=1, dtype="bfloat16", precision_policy=policy, **options
    ) as cache:
        seq, pool = cache.sequence(), cache._store.pool
        others = [pool.acquire(pool.num_available(format), format) for format in (1, 2)]
        grow(cache, [seq], [Mass()], 6 * PAGE, rng)
        assert set(formats_of(cache, seq).values()) == {0}
        for pages in others:
            pool.release(pages)
        for num_steps in range(1, 9):
            grow(cache, [seq], [Mass()], 1, rng)
            packed = [format for format in formats_of(cache, seq).values() if format]
            assert len(packed) == min(num_steps, 6)
        assert set(packed) == {2}


def test_ageing_by_mass_drops_nothing_and_keeps_a_budget():
    """Alone it is no budget: a sequence grows as long as the pool, in steps of any size."""
    rng = np.random.default_rng(3)
    with ageing_cache(num_pages=60) as cache:
        assert cache.budget_tokens is None and cache.max_step_tokens == cache.max_seq_len
        with pytest.raises(ArgumentError, match="build the cache with eviction="):
            cache.sequence(budget_tokens=512)
        seq = cache.sequence()
        grow(cache, [seq], [Mass()], 3000, rng)
        assert len(seq.held_positions) == 3000 and cache.stats().num_dropped_pages == 0
        seq.truncate(1000)
        fork = seq.fork(at=333)
        grow(cache, [seq], [Mass()], 100, rng)
        grow(cache, [fork], [Mass()], 400, rng)
        cache.check()
    with ageing_cache(num_pages=60, eviction="attention", budget_tokens=512, max_step_tokens=256) as cache:
        seq = cache.sequence()
        for _ in range(6):
            q, k, v = (rows(rng, 256, heads, DIM) for heads in (2 * HEADS, HEADS, HEADS))
            with cache.step([seq], [256]) as step:
                step.attend(0, q, k, v)
            cache.check()
        assert len(seq.held_positions) == 512
        formats = formats_of(cache, seq).values()
        assert [sum(format == one for format in formats) for one in range(3)] == [2, 2, 4]


def test_what_cannot_age_by_mass():
    with pytest.raises(ArgumentError, match=r'by is "size"|by is \'size\'; give "age" or "mass"'):
        make_cache(dtype="bfloat16", page_size=64, precision_policy=Ageing(by="size"))
    with pytest.raises(ArgumentError, match="a window keeps no attention mass"):
        make_cache(dtype="bfloat16", page_size=64, precision_policy=Ageing(by="mass"), window=256)


def test_pages_that_age_by_mass_have_hashes_of_their_own():
    tags = set()
    for by in ("age", "mass"):
        with make_cache(
            dtype="bfloat16", num_pages=60, page_size=64, precision_policy=Ageing(by=by), prefix_caching=True
        ) as cache:
            tags.add(cache._store.index.events._head)
    assert len(tags) == 2
