"""What is stored: rounding, saturation, and the values that are no numbers."""

import ml_dtypes
import numpy as np
import pytest
from conftest import fill, make_cache, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_kv import reference

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


#: Rows with edges of int8 and int4: no magnitude, the least that has a scale and the one below, subnormals,
#: constants, the largest, values that are no numbers.
EDGE_ROWS = [
    [0.0, -0.0],
    [127 * 2.0**-100, 1e-30],
    [np.nextafter(np.float32(127 * 2.0**-100), np.float32(0)), 0],
    [1e-40, -1e-45],
    [3.4028235e38, -3.4028235e38],
    [3.4e38, 1e-30],
    [1.0, 1.0],
    [1.0] * 8,
    [1.01] * 8,
    [-1.01] * 8,
    [3.4028235e38] * 8,
    [-3.4028235e38] * 8,
    [1e30, *[1e30 + 1e24] * 7],
    [-127.0, 63.5, 62.5, 0.5, 1.5],
    [np.nan, 1.0],
    [np.inf, 1.0],
    [-np.inf, np.nan],
]


def rows_with_edges(rng, dim):
    """Rows of many magnitudes, of any bits, of ties, and the edges."""
    with np.errstate(all="ignore"):
        scaled = rows(rng, 300, dim) * np.float32(10) ** rng.integers(-37, 38, (300, 1)).astype(np.float32)
    any_bits = rng.integers(0, 2**32, (100, dim), dtype=np.uint32).view(np.float32)
    ties = rng.integers(-127, 128, (100, dim)).astype(np.float32) / 2
    edges = np.zeros((len(EDGE_ROWS), dim), np.float32)
    for row, values in zip(edges, EDGE_ROWS, strict=True):
        row[: len(values)] = values
    return np.concatenate([scaled, any_bits, ties, edges])


@pytest.mark.parametrize("given_as", DTYPES)
@pytest.mark.parametrize("dim", [8, 24, 64, 128, 256])
def test_rows_of_integers_are_what_the_reference_makes_of_them(kernel, dim, given_as, rng):
    with np.errstate(all="ignore"):
        values = rows_with_edges(rng, dim).astype(DTYPES[given_as])
    k = np.stack([values, values[::-1]], axis=1)
    as_floats = k.astype(np.float32)
    sides = {"int8": reference.int8_values(as_floats), "int4": reference.int4_values(as_floats)}
    for v_dtype in sides:
        with make_cache(num_layers=1, dtype=("int8", v_dtype), head_dim=dim, num_pages=40) as cache:
            seq = cache.sequence()
            with cache.step([seq], [len(k)]) as step:
                step.write(0, k, k)
            for side, dtype in zip(seq.gather(0), ("int8", v_dtype), strict=True):
                np.testing.assert_array_equal(side, sides[dtype])
                assert np.isnan(side[-1, 0]).all() and np.isnan(side[0, 1]).all()


@settings(max_examples=200)
@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=8, max_size=8))
def test_a_row_of_int8_is_off_by_half_a_step_at_most(values):
    row = np.array(values, np.float32)
    codes, scale = reference.quantise_int8(row)
    largest = float(np.abs(row).max())
    if largest < 127 * 2.0**-100:
        assert scale == 0 and not codes.any()
        return
    assert largest / 127 <= float(scale) * (1 + 2.0**-23) <= largest / 127 * (1 + 2.0**-7 + 2.0**-20)
    assert np.abs(codes).max() <= 127
    error = np.abs(codes.astype(np.float64) * float(scale) - row.astype(np.float64))
    assert (error <= 0.5001 * float(scale)).all()


@settings(max_examples=200)
@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=8, max_size=8))
def test_a_row_of_int4_is_off_by_half_a_step_at_most(values):
    row = np.array(values, np.float32)
    codes, scale, minimum = (np.asarray(x, np.float64) for x in reference.quantise_int4(row))
    least, largest = float(row.min()), float(row.max())
    magnitude = max(abs(least), abs(largest))
    assert 0 <= least - minimum <= 2.0**-7 * abs(least) or abs(least) < 2.0**-126
    assert codes.min() >= 0 and codes.max() <= 15
    step = max(scale, 2.0**-100)
    assert scale == 0 or scale * 15 <= (largest - minimum) * (1 + 2.0**-7 + 2.0**-20)
    error = np.abs(codes * scale + minimum - row.astype(np.float64))
    # Beside half a step, the rounding of float32 in the difference of value and minimum.
    assert (error <= 0.5001 * step + 15 * 2.0**-100 * (scale == 0) + 2.0**-22 * magnitude).all()


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
@pytest.mark.parametrize("dtype", [*DTYPES, "int8", ("int8", "int4")], ids=str)
@pytest.mark.parametrize("given_as", DTYPES)
def test_much_at_once_is_stored_like_little_at_a_time(kernel, given_as, dtype, head_dim, rng):
    """Much is written past the caches where rows are whole lines."""
    shape = {"num_layers": 1, "head_dim": head_dim, "dtype": dtype, "num_pages": 160, "page_size": 16}
    cache = make_cache(**shape)
    one, many = cache.sequence(), cache.sequence()
    k, v = (rows(rng, 1200, 2, head_dim).astype(DTYPES[given_as]) for _ in "kv")
    with cache.step([many], [1200]) as step:
        step.write(0, k, v)
    for begin in range(0, 1200, 10):
        with cache.step([one], [10]) as step:
            step.write(0, k[begin : begin + 10], v[begin : begin + 10])
    for got, want in zip(many.gather(0), one.gather(0), strict=True):
        np.testing.assert_array_equal(got, want)
