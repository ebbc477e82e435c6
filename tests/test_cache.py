import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import fill, make_cache

from paged_kv import ArgumentError, OutOfSequences, PagedKVCache, StaleSequence


def test_stats_add_up(rng):
    cache = make_cache(num_pages=10)
    a, b = cache.sequence(), cache.sequence()
    fill(cache, [a, b], [17, 16], rng)
    stats = cache.stats()
    assert (stats.num_pages, stats.num_used_pages, stats.num_free_pages) == (10, 3, 7)
    assert (stats.num_sequences, stats.num_tokens) == (2, 33)
    assert stats.utilization == 33 / 48
    assert stats.pool_bytes == 10 * 2 * 2 * 2 * 16 * 32 * 4
    step = cache.step([a], [32])
    assert cache.stats().num_used_pages == 5 and cache.stats().num_tokens == 33
    step.rollback()
    a.free()
    b.free()
    assert cache.stats().num_free_pages == 10 and cache.stats().utilization == 0.0


def test_reset_empties_and_free_ends_a_sequence(rng):
    cache = make_cache()
    seq = cache.sequence()
    fill(cache, [seq], [40], rng)
    seq.reset()
    assert len(seq) == 0 and seq and cache.stats().num_used_pages == 0
    assert seq.gather(0)[0].shape == (0, 2, 32)
    fill(cache, [seq], [3], rng)
    seq.free()
    for call in (seq.free, seq.reset, lambda: len(seq), lambda: seq.gather(0)):
        with pytest.raises(StaleSequence):
            call()
    cache.check()


def test_with_frees_a_sequence(rng):
    cache = make_cache()
    with cache.sequence() as seq:
        fill(cache, [seq], [3], rng)
    assert cache.stats().num_sequences == 0 and cache.stats().num_used_pages == 0
    with cache.sequence() as seq:
        seq.free()


def test_there_are_no_more_sequences_than_max_sequences():
    cache = make_cache(max_sequences=2)
    a, _ = cache.sequence(), cache.sequence()
    with pytest.raises(OutOfSequences, match="all 2"):
        cache.sequence()
    a.free()
    cache.sequence()


def test_memory_counts_pages_only_and_is_rounded_down():
    page_bytes = 2 * 2 * 2 * 16 * 32 * 4
    assert make_cache(num_pages=None, memory=3 * page_bytes - 1).stats().num_pages == 2
    assert make_cache(num_pages=None, memory="1MiB").stats().num_pages == 2**20 // page_bytes
    assert make_cache(num_pages=None, memory="0.5 MiB").stats().pool_bytes == 2**19


@pytest.mark.parametrize(
    "options",
    [
        {"num_pages": None},
        {"memory": 2**20},
        {"num_pages": None, "memory": "12"},
        {"num_pages": None, "memory": "x MiB"},
        {"num_pages": None, "memory": "infMiB"},
        {"num_pages": None, "memory": 100},
        {"num_pages": 0},
        {"num_pages": 2**31},
        {"num_pages": 2.0},
        {"num_layers": 0},
        {"num_kv_heads": -1},
        {"num_kv_heads": True},
        {"head_dim": 12},
        {"head_dim": 264},
        {"head_dim": 0},
        {"page_size": 24},
        {"page_size": 0},
        {"max_sequences": 0},
        {"max_seq_len": 0},
        {"num_threads": 0},
        {"dtype": "int16"},
        {"dtype": np.float64},
        {"dtype": 3},
        {"dtype": None},
    ],
)
def test_a_cache_that_cannot_be_is_refused(options):
    name = r"num_pages|memory" if options.keys() & {"num_pages", "memory"} else next(iter(options))
    with pytest.raises(ArgumentError, match=name):
        make_cache(**options)


def test_an_argument_that_is_not_there_is_a_type_error():
    for name in ("num_heads", "layers", "n_pages"):
        with pytest.raises(TypeError, match=name):
            PagedKVCache(1, 1, 32, num_pages=1, **{name: 1})


#: A thousand; `make test-long` builds ten thousand.
NUM_CACHES = int(os.environ.get("PAGED_KV_NUM_CACHES", "1000"))


#: In a process of its own, where no other test's threads and garbage come and go.
LIVE_AND_DIE = """
import sys
import numpy as np
from support import resident_bytes
from paged_kv import PagedKVCache

k = np.ones((1, 1, 8), np.float32)

def live_and_die():
    with PagedKVCache(1, 1, 8, num_pages=4, page_size=16, max_sequences=4, num_threads=2) as cache:
        seq = cache.sequence()
        with cache.step([seq], [1]) as step:
            step.attend(0, k, k, k)

for _ in range(200):
    live_and_die()
before = resident_bytes()
for _ in range(int(sys.argv[1])):
    live_and_die()
print(resident_bytes() - before)
"""


def test_caches_that_come_and_go_leave_resident_memory_flat():
    command = [sys.executable, "-c", LIVE_AND_DIE, str(NUM_CACHES)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    # A page of the system, let alone a pool, left by each would be eight times that.
    assert int(done.stdout) < 2**20 + 512 * NUM_CACHES


def test_too_much_memory_is_a_memory_error():
    with pytest.raises(MemoryError, match="MiB are available"):
        PagedKVCache(32, 32, 128, memory="900GiB")
