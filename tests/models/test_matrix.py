"""Products of packed weights against plain numpy: sums are exact, so they are equal."""

import itertools

import numpy as np
import pytest
from conftest import rows
from hypothesis import given, settings
from hypothesis import strategies as st

import paged_kv
from paged_kv import ArgumentError, _binding
from paged_kv.models import matrix as matrices
from paged_kv.models.checkpoint import bits_of_float32, float32_of_bits
from paged_kv.models.matrix import (
    ADD,
    RELU2_GATE,
    SILU_GATE,
    bfloat16_matrix,
    int8_codes_matrix,
    int8_matrix,
    ternary_matrix,
)
from paged_kv.models.ternary import quantise_activations


def ternary(rng, num_out, num_in):
    return rng.integers(-1, 2, (num_out, num_in)).astype(np.int8)


def expected_ternary(weight, scale, x):
    q, s = quantise_activations(x)
    return (q.astype(np.int64) @ weight.T.astype(np.int64)).astype(np.float32) / s * scale


@settings(max_examples=40)
@given(
    num_rows=st.integers(0, 11) | st.sampled_from([32, 41, 300]),
    num_out=st.integers(1, 70),
    num_in=st.sampled_from([1, 5, 64, 100, 255, 256, 257, 336, 700]),
    seed=st.integers(0, 2**32 - 1),
)
def test_ternary_products_are_exact(num_rows, num_out, num_in, seed):
    rng = np.random.default_rng(seed)
    weight, x = ternary(rng, num_out, num_in), 3 * rows(rng, num_rows, num_in)
    scale = rng.random(num_out).astype(np.float32)
    matrix, before = ternary_matrix(weight, scale), paged_kv.kernels().active
    try:
        for kernel in paged_kv.kernels().available:
            _binding.select_kernel(kernel)
            out = np.full((num_rows, num_out + 3), np.nan, np.float32)
            assert matrix(x, out=out[:, :num_out]).base is out
            np.testing.assert_array_equal(out[:, :num_out], expected_ternary(weight, scale, x))
            assert np.isnan(out[:, num_out:]).all()
    finally:
        _binding.select_kernel(before)


def test_sums_at_the_edge_of_their_range_do_not_overflow(kernel):
    """All activations at their largest magnitude, of either sign, against weights of one sign."""
    for weight, x in itertools.product((-1, 1), (-1, 1)):
        matrix = ternary_matrix(np.full((32, 11008), weight, np.int8), np.ones(1, np.float32))
        for num_rows in (5, 32):
            out = matrix(np.full((num_rows, 11008), x, np.float32))
            np.testing.assert_array_equal(out, np.full((num_rows, 32), 11008.0 * weight * x))
        floats = np.full((16, 11008), weight, np.float32)
        # 1 / 127 in bfloat16 is off by up to half a unit of its 8 bits; float sums of 344 groups by less.
        np.testing.assert_allclose(
            int8_matrix(floats)(np.full((5, 11008), x, np.float32)), out[:5, :16], rtol=2**-8
        )


@pytest.mark.parametrize("num_rows", [1, 3, 4, 9, 33, 130])
def test_rows_do_not_know_of_each_other_nor_of_threads(kernel, num_rows, rng):
    x = rows(rng, num_rows, 1000)
    norm = rows(rng, 1000)
    for matrix in (ternary_matrix(ternary(rng, 600, 1000), rows(rng, 1)), int8_matrix(rows(rng, 600, 1000))):
        together = matrix(x, norm=norm, eps=1e-5)
        matrix._threads = _binding.new_threads(1)
        alone = np.concatenate([matrix(row[None], norm=norm, eps=1e-5) for row in x])
        np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("num_rows", [7, 45])
def test_every_kernel_gives_the_same_bits(num_rows, rng):
    x, norm, before, results = rows(rng, num_rows, 300), rows(rng, 300), paged_kv.kernels().active, []
    maps = ternary_matrix(ternary(rng, 64, 300), rows(rng, 64)), int8_matrix(rows(rng, 64, 300))
    try:
        for kernel in paged_kv.kernels().available:
            _binding.select_kernel(kernel)
            results.append(
                [m(x, norm=norm, epilogue=epilogue) for m in maps for epilogue in (0, RELU2_GATE, SILU_GATE)]
            )
    finally:
        _binding.select_kernel(before)
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(got, expected)


def test_weights_of_8_bits_are_as_precise_as_their_rounding(kernel, rng):
    for num_in in (2560, 2570, 31):
        weight, x = rows(rng, 100, num_in) * 10.0 ** rng.integers(-9, 9), rows(rng, 5, num_in)
        exact = x.astype(np.float64) @ rounded_to_8_bits(weight).T
        # Activations have 16 bits: off by half a step each, at random.
        step = np.abs(x).max(axis=1, keepdims=True) / 32767
        atol = 6 * step / np.sqrt(12) * np.sqrt((weight.astype(np.float64) ** 2).sum(axis=1))
        assert (np.abs(int8_matrix(weight)(x) - exact) <= atol + 1e-6 * np.abs(x) @ np.abs(weight.T)).all()


def rounded_to_8_bits(weight):
    """The rule in words: a scale for each 32 inputs, in bfloat16, of which weights are -127 to 127."""
    num_out, num_in = weight.shape
    groups = np.zeros((num_out, -(-num_in // 32), 32), np.float32)
    groups.reshape(num_out, -1)[:, :num_in] = weight
    largest = np.abs(groups).max(axis=2, keepdims=True)
    scales = float32_of_bits(bits_of_float32(largest / np.float32(127))).astype(np.float64)
    integers = np.rint(groups / np.where(scales > 0, scales, 1))
    assert np.abs(integers).max() <= 127
    return (integers * scales).reshape(num_out, -1)[:, :num_in]


def test_weights_that_are_multiples_of_their_scale_are_exact(kernel, rng):
    """As those of a Q8_0 file: codes of 8 bits, and a scale for each 32 inputs."""
    codes = rng.integers(-127, 128, (40, 4, 32)).astype(np.float32)
    codes[:, :, 0] = 127
    weight = (codes * 2.0 ** rng.integers(-12, 3, (40, 4, 1))).astype(np.float32).reshape(40, 128)
    x = rng.integers(-32767, 32768, (6, 128)).astype(np.float32)
    x[:, 5] = 32767
    exact = x.astype(np.float64) @ weight.T
    # The sum of each group is exact; those of the four groups are added in float32.
    atol = 2**-21 * np.abs(x).astype(np.float64) @ np.abs(weight.T)
    assert (np.abs(int8_matrix(weight)(x) - exact) <= atol).all()


def test_codes_of_8_bits_are_multiplied_as_they_are(kernel, rng):
    codes, scales = rng.integers(-127, 128, (40, 100)).astype(np.int8), rows(rng, 40)
    x = rng.integers(-32767, 32768, (6, 100)).astype(np.float32)
    x[:, 5] = 32767
    exact = x.astype(np.float64) @ codes.T * scales
    atol = 2**-20 * np.abs(x).astype(np.float64) @ np.abs(codes.astype(np.float64)).T * np.abs(scales)
    assert (np.abs(int8_codes_matrix(codes, scales)(x) - exact) <= atol).all()


def test_weights_that_are_no_numbers_give_none(kernel, rng):
    weight = rows(rng, 20, 64)
    weight[3, 40], weight[7, 0] = np.nan, np.inf
    out = int8_matrix(weight)(rows(rng, 2, 64))
    assert np.isnan(out[:, [3, 7]]).all() and np.isfinite(np.delete(out, [3, 7], 1)).all()


@settings(max_examples=30)
@given(
    num_rows=st.integers(0, 26),
    num_out=st.integers(1, 70),
    num_in=st.sampled_from([1, 5, 64, 257, 512, 700]),
    seed=st.integers(0, 2**32 - 1),
)
def test_weights_in_bfloat16_are_multiplied_as_they_are(num_rows, num_out, num_in, seed):
    rng = np.random.default_rng(seed)
    bits, x, norm = (
        bits_of_float32(rows(rng, num_out, num_in)),
        rows(rng, num_rows, num_in),
        rows(rng, num_in),
    )
    weight, matrix = float32_of_bits(bits).astype(np.float64), bfloat16_matrix(bits)
    before, results = paged_kv.kernels().active, []
    try:
        for kernel in paged_kv.kernels().available:
            _binding.select_kernel(kernel)
            out = np.full((num_rows, num_out + 3), np.nan, np.float32)
            results.append(matrix(x, out=out[:, :num_out]))
            assert np.isnan(out[:, num_out:]).all()
            alone = [matrix(row[None], norm=norm, eps=1e-5)[0] for row in x]
            np.testing.assert_array_equal(matrix(x, norm=norm, eps=1e-5), np.reshape(alone, (-1, num_out)))
    finally:
        _binding.select_kernel(before)
    for result in results:
        # A chain of num_in additions, each off by half a unit at most.
        bound = num_in * 2.0**-24 * (np.abs(x.astype(np.float64)) @ np.abs(weight.T)) * 1.01 + 1e-30
        assert (np.abs(result - x.astype(np.float64) @ weight.T) <= bound).all()


def test_what_comes_out_is_added_or_gated(kernel, rng):
    weight, x = ternary(rng, 48, 100), rows(rng, 6, 100)
    matrix, plain = ternary_matrix(weight, rows(rng, 48)), None
    plain = matrix(x)
    out = rows(rng, 6, 48)
    np.testing.assert_array_equal(matrix(x, out=out.copy(), epilogue=ADD), out + plain)
    blocks = plain.reshape(6, 3, 2, 8)
    gate, up = blocks[:, :, 0].reshape(6, 24), blocks[:, :, 1].reshape(6, 24)
    np.testing.assert_array_equal(matrix(x, epilogue=RELU2_GATE), np.square(np.maximum(gate, 0)) * up)
    silu = gate / (1 + np.exp(-gate.astype(np.float64))) * up
    np.testing.assert_allclose(matrix(x, epilogue=SILU_GATE), silu, rtol=1e-5, atol=1e-6)


def test_silu_is_exact_to_the_last_bits_over_its_whole_range(kernel):
    """The gate's value, and beside it values of 1, through a matrix that repeats its input."""
    x = np.concatenate([np.linspace(-100, 100, 20011), [0, -0.0, 1e-30, 88, -87.3, 3e4, -3e4]])
    rows_of = np.stack([x, np.ones_like(x)], 1).astype(np.float32)
    weight = np.repeat(np.eye(2, dtype=np.float32), 8, axis=0)
    got = bfloat16_matrix(bits_of_float32(weight))(rows_of, epilogue=SILU_GATE)[:, 0]
    gate = rows_of[:, 0].astype(np.float64)
    expected = gate / (1 + np.exp(np.minimum(-gate, 700)))
    # Below -87, e^-x stays what it is there.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-33)
    near = np.abs(gate) < 20
    np.testing.assert_allclose(got[near], expected[near], rtol=2e-6)


def test_norms_are_root_mean_squares(kernel, rng):
    weight, x, norm = np.eye(64, dtype=np.float32), rows(rng, 5, 64), rows(rng, 64)
    normed = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + 1e-5) * norm
    largest = np.abs(normed).max()
    out = int8_matrix(weight)(x, norm=norm, eps=1e-5)
    np.testing.assert_allclose(out, normed, rtol=2**-8, atol=largest / 30000)


def test_a_nan_touches_its_own_row_only(kernel, rng):
    x = rows(rng, 6, 64)
    x[2, 3], x[4, 0] = np.nan, np.inf
    for matrix in (ternary_matrix(ternary(rng, 32, 64), np.ones(1, "f4")), int8_matrix(rows(rng, 32, 64))):
        for epilogue in (0, RELU2_GATE):
            out = matrix(x, epilogue=epilogue)
            assert np.isnan(out[[2, 4]]).all() and np.isfinite(out[[0, 1, 3, 5]]).all()


def test_large_weights_lie_in_huge_pages_that_live_as_long_as_they(rng):
    weight, x = ternary(rng, 2048, 2048), rows(rng, 2, 2048)
    matrix = ternary_matrix(weight, np.ones(1, np.float32))
    assert matrix.num_bytes >= matrices.HUGE_BYTES and matrix.packed.ctypes.data % 2**21 == 0
    np.testing.assert_array_equal(matrix(x), expected_ternary(weight, np.float32(1), x))


def test_what_does_not_fit_is_refused(rng):
    matrix = ternary_matrix(ternary(rng, 32, 64), np.ones(1, np.float32))
    x = rows(rng, 3, 64)
    for bad in (x[:, :63], x.astype("f8"), x[0], rows(rng, 3, 128)[:, ::2]):
        with pytest.raises(ArgumentError, match="x "):
            matrix(bad)
    for bad in (np.empty((3, 31), "f4"), np.empty((2, 32), "f4"), np.empty((3, 32))):
        with pytest.raises(ArgumentError, match="out "):
            matrix(x, out=bad)
    with pytest.raises(ArgumentError, match="norm "):
        matrix(x, norm=rows(rng, 63))
