import numpy as np
import pytest

from paged_kv import ArgumentError
from paged_kv.models.ternary import pack_ternary, quantise_activations, ternarise, unpack_ternary


def ternary(rng, *shape):
    return rng.integers(-1, 2, shape).astype(np.int8)


def test_packing_is_undone_by_unpacking_and_interleaves_quarters(rng):
    weight = ternary(rng, 12, 5)
    packed = pack_ternary(weight)
    assert packed.shape == (3, 5)
    np.testing.assert_array_equal(unpack_ternary(packed), weight)
    assert packed[1, 2] >> 4 & 3 == weight[1 + 2 * 3, 2] + 1


def test_activations_round_half_to_even_and_zeros_stay_zeros():
    q, s = quantise_activations(np.array([[127.0, 0.5, 1.5, -2.5], [0, 0, 0, 0]], np.float32))
    assert q.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]]
    assert s[0] == 1


def test_ternarising_divides_by_the_mean_magnitude():
    weight, scale = ternarise(np.array([[1.0, -1.0, 0.1, 0.0], [4.0, -0.4, 0.5, 1.0]]))
    assert scale == np.float32(1.0)
    assert weight.tolist() == [[1, -1, 0, 0], [1, 0, 0, 1]]


def test_what_is_no_ternary_matrix_is_refused():
    zeros = np.zeros((4, 4), np.int8)
    for weight in (zeros + np.int8(2), zeros.astype(float), zeros[0], zeros[:0]):
        with pytest.raises(ArgumentError, match="weight"):
            pack_ternary(weight)
    with pytest.raises(ArgumentError, match="code 3"):
        unpack_ternary(np.array([[0b11]], np.uint8))
    with pytest.raises(ArgumentError, match="finite"):
        ternarise(np.array([[np.nan]]))
