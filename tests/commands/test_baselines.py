import numpy as np
from conftest import make_cache, rows

from paged_kv.commands.baselines import ConcatenatedCache, RecomputeStep


def test_all_three_ways_give_the_same_bits(kernel, rng):
    """Cache, concatenation and recomputation, over the same tokens in steps of several sequences."""
    q, k, v = rows(rng, 600, 4, 32), rows(rng, 600, 2, 32), rows(rng, 600, 2, 32)
    cache = make_cache(num_layers=1, page_size=64, num_pages=40)
    other = ConcatenatedCache(1, 2, 32, num_threads=2)
    pairs = [(cache.sequence(), other.sequence()) for _ in range(2)]
    fed = [0, 0]
    for counts in ([130, 3], [1, 1], [60, 100], [1, 1], [1, 103]):
        own = [np.arange(300 * i + fed[i], 300 * i + fed[i] + counts[i]) for i in range(2)]
        take = np.concatenate(own)
        with cache.step([pair[0] for pair in pairs], counts) as step:
            paged = step.attend(0, q[take], k[take], v[take])
        with other.step([pair[1] for pair in pairs], counts) as ragged:
            np.testing.assert_array_equal(ragged.positions, step.positions)
            np.testing.assert_array_equal(ragged.attend(0, q[take], k[take], v[take]), paged)
        fed = [fed[i] + counts[i] for i in range(2)]
    whole = np.r_[0 : fed[0], 300 : 300 + fed[1]]
    again = RecomputeStep(fed, num_threads=1).attend(0, q[whole], k[whole], v[whole])
    ends = np.cumsum(fed) - 1
    np.testing.assert_array_equal(again[ends], paged[[0, -1]])


def test_concatenation_counts_its_bytes_and_the_copy_under_way(rng):
    cache = ConcatenatedCache(3, 2, 32, num_threads=1)
    seq, _ = cache.sequence(), cache.sequence()
    token_bytes = 2 * 32 * 4
    k = rows(rng, 10, 2, 32)
    with cache.step([seq], [10]) as step:
        for layer in range(3):
            step.attend(layer, k, k, k)
    assert len(seq) == 10
    assert cache.num_bytes == 6 * 10 * token_bytes
    assert cache.peak_bytes == 7 * 10 * token_bytes
    seq.free()
    cache.sequences[0].free()
    assert cache.num_bytes == 0 and cache.sequences == []
