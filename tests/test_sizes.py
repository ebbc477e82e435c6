"""Sizes that are accepted take the memory that they need, and no more; the others are
refused by their names.
"""

import numpy as np
import pytest
from conftest import fill, make_cache
from support import resident_bytes

from paged_kv import ArgumentError, KVCacheManager, OutOfPages, OutOfSequences, PagedKVCache
from paged_kv.attention.foreign import paged_attention

MOST = 2**31 - 1


NO_LIMIT = {
    "a window": {"window": MOST},
    "a window and steps": {"window": MOST, "max_step_tokens": MOST},
    "steps": {"window": 100, "max_step_tokens": MOST},
    "a window, steps and length": {"window": MOST, "max_step_tokens": MOST, "max_seq_len": MOST},
    "sinks": {"window": 100, "num_sink_tokens": MOST},
    "everything": {
        **{"window": MOST, "max_step_tokens": MOST, "num_sink_tokens": MOST, "max_seq_len": MOST},
        **{"max_sequences": 1000},
    },
    "length": {"max_seq_len": MOST},
    "sequences": {"max_sequences": 2**24},
    "sequences with a window": {"max_sequences": 2**20, "window": 100},
}


@pytest.mark.parametrize("options", NO_LIMIT.values(), ids=NO_LIMIT)
def test_no_limit_can_be_said_by_a_number(options, rng):
    before = resident_bytes()
    cache = make_cache(num_layers=1, num_pages=8, **options)
    assert resident_bytes() - before < 16 << 20
    seqs = [cache.sequence() for _ in range(2)]
    try:
        written = fill(cache, seqs, [60, 30], rng)
        np.testing.assert_array_equal(seqs[0].gather(0)[0][-60:], written[0][0][:60])
    except OutOfPages:  # sinks keep every page
        pass
    with pytest.raises(OutOfPages):
        for _ in range(8):
            fill(cache, seqs[:1], [30], rng)
            if options.get("window") == 100 and not options.get("num_sink_tokens"):
                raise OutOfPages  # a window goes on
    with pytest.raises(OutOfSequences):
        seqs[0].fork(MOST)
    cache.check()
    cache.stats()


@pytest.mark.parametrize(("window", "num_sinks"), [(100, 0), (100, 3), (MOST, 0), (5, 40)])
def test_a_ring_that_is_as_long_as_the_pool_holds_what_a_longer_one_would(window, num_sinks, rng):
    """Few pages, and a step that could be longer than all of them."""
    options = {"num_layers": 1, "window": window, "num_sink_tokens": num_sinks}
    short = make_cache(num_pages=11, max_step_tokens=MOST, **options)
    longer = make_cache(num_pages=11, max_step_tokens=64, **options)
    assert short._store.tables.page_ids.shape[1] <= 11
    seqs = [cache.sequence() for cache in (short, longer)]
    for _ in range(40):
        count = int(rng.integers(1, 40))
        seed, outcomes = int(rng.integers(2**32)), []
        for cache, seq in zip((short, longer), seqs, strict=True):
            try:
                fill(cache, [seq], [count], np.random.default_rng(seed))
                outcomes.append(None)
            except OutOfPages:
                outcomes.append(OutOfPages)
            cache.check()
        assert outcomes[0] == outcomes[1]
        assert short.stats() == longer.stats()
        np.testing.assert_array_equal(seqs[0].gather(0)[0], seqs[1].gather(0)[0])


ABSURD = {
    "heads": (
        lambda: PagedKVCache(2**16, 2**16, 256, num_pages=1),
        ArgumentError,
        "65536 layers of 65536 heads",
    ),
    "pages": (lambda: PagedKVCache(1, 1, 8, num_pages=2**31), ArgumentError, "num_pages"),
    "memory": (lambda: PagedKVCache(1, 1, 8, memory="1e9GiB"), ArgumentError, "memory"),
    "memory that is not there": (lambda: PagedKVCache(1, 1, 256, memory=2**49), MemoryError, "available"),
    "threads": (lambda: PagedKVCache(1, 1, 8, num_pages=1, num_threads=2000), ArgumentError, "num_threads"),
    "a table of half the address space": (
        lambda: PagedKVCache(1, 1, 8, num_pages=2**21, page_size=16, max_sequences=2**24, max_seq_len=MOST),
        MemoryError,
        "max_sequences",
    ),
    "a manager's entry": (
        lambda: KVCacheManager().allocate(MOST, 1, 2**20, 16),
        ArgumentError,
        "batch entry",
    ),
    "a manager's entries": (lambda: KVCacheManager().allocate(2**20, MOST, 16, 1), MemoryError, "available"),
    "a window that is none": (
        lambda: PagedKVCache(1, 1, 8, num_pages=1, window=2**31),
        ArgumentError,
        "window",
    ),
}


@pytest.mark.parametrize(("build", "error", "words"), ABSURD.values(), ids=ABSURD)
def test_what_cannot_be_is_refused_by_the_name_that_it_was_given(build, error, words):
    before = resident_bytes()
    with pytest.raises(error, match=words):
        build()
    assert resident_bytes() - before < 64 << 20


def test_values_whose_sum_is_finite_are_right():
    """Values are summed before they are divided: up to 3.4e38 for all tokens that a row sees, no
    sum overflows.
    """
    k = np.zeros((1, 64, 1, 8), np.float32)
    v = np.full((1, 64, 1, 8), np.float32(3.4e38) / 64, np.float32)
    lists = {"qo_indptr": [0, 1], "kv_indptr": [0, 1], "kv_indices": [0], "kv_last_page_len": [64]}
    out = paged_attention(np.zeros((1, 1, 8), np.float32), k, v, **lists)
    np.testing.assert_allclose(out[0, 0], v[0, 0, 0], rtol=1e-6)
