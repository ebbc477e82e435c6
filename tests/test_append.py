"""What is stored: rounding, saturation, and the values that are no numbers."""

import ml_dtypes
import numpy as np
import pytest
from conftest import fill, make_cache, rows

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def stored(values, dtype):
    """`values`, float32 of a multiple of 32, written to a cache and read back."""
    cache = make_cache(num_layers=1, num_kv_heads=1, dtype=dtype, num_pages=-(-values.size // 512))
    seq = cache.sequence()
    k = values.reshape(-1, 1, 32)
    with cache.step([seq], [len(k)]) as step:
        step.write(0, k, k[::-1].copy())
    k_back, v_back = seq.gather(0)
    np.testing.assert_array_equal(v_back[::-1], k_back)
    return k_back.reshape(-1)


def expected(values, dtype):
    """Nearest even by numpy and ml_dtypes; finite values beyond the range become its largest."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(DTYPES[dtype]).astype(np.float32)
    largest = np.float32(ml_dtypes.finfo(DTYPES[dtype]).max)
    return np.where(np.isfinite(values), np.clip(rounded, -largest, largest), values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_round_to_nearest_even_and_saturate(kernel, dtype):
    rng = np.random.default_rng(7)
    any_bits = rng.integers(0, 2**32, 32768, dtype=np.uint32).view(np.float32)
    near_one = rows(rng, 32768)
    halves = np.arange(2**16, dtype=np.uint16)
    float16s = halves.view(np.float16).astype(np.float32)
    bfloat16s = halves.view(ml_dtypes.bfloat16).astype(np.float32)
    with np.errstate(all="ignore"):
        ties = [np.nextafter(x, x * 2) for x in (float16s, bfloat16s)]
        ties += [(x + np.roll(x, 1)) / 2 for x in (float16s, bfloat16s)]
    edges = [0.0, -0.0, np.inf, -np.inf, 65504, 65519.996, 65520, -65520, 3.3895e38, 3.4e38]
    special = np.resize(np.array(edges, np.float32), 32)
    values = np.concatenate([any_bits, near_one, float16s, bfloat16s, *ties, special])
    got, want = stored(values, dtype), expected(values, dtype)
    np.testing.assert_array_equal(got, want)
    numbers = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[numbers]), np.signbit(want[numbers]))


def test_each_layer_and_head_keeps_its_own(rng):
    cache = make_cache(num_layers=3, num_kv_heads=3, head_dim=40)
    a, b = cache.sequence(), cache.sequence()
    first = fill(cache, [a, b], [17, 30], rng)
    second = fill(cache, [b, a], [3, 1], rng)
    for layer in range(3):
        for side in range(2):
            one, two = first[layer][side], second[layer][side]
            np.testing.assert_array_equal(a.gather(layer)[side], np.concatenate([one[:17], two[3:]]))
            np.testing.assert_array_equal(b.gather(layer)[side], np.concatenate([one[17:], two[:3]]))


@pytest.mark.parametrize("head_dim", [32, 40, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
def test_much_at_once_is_stored_like_little_at_a_time(kernel, given, dtype, head_dim, rng):
    """Much is written past the caches where rows are whole lines."""
    shape = {"num_layers": 1, "head_dim": head_dim, "dtype": dtype, "num_pages": 160, "page_size": 16}
    cache = make_cache(**shape)
    one, many = cache.sequence(), cache.sequence()
    k, v = (rows(rng, 1200, 2, head_dim).astype(DTYPES[given]) for _ in "kv")
    with cache.step([many], [1200]) as step:
        step.write(0, k, v)
    for begin in range(0, 1200, 10):
        with cache.step([one], [10]) as step:
            step.write(0, k[begin : begin + 10], v[begin : begin + 10])
    for got, want in zip(many.gather(0), one.gather(0), strict=True):
        np.testing.assert_array_equal(got, want)
