"""Forward passes refuse what does not fit together before C sees it; rotary tables grow with
the positions.
"""

import numpy as np
import pytest

from paged_kv import ArgumentError
from paged_kv.commands.baselines import RecomputeStep
from paged_kv.models import layers
from paged_kv.models.bitnet import BitNetModel
from paged_kv.models.layers import Rotation, rope_frequencies
from paged_kv.models.matrix import Matrix, codes_matrix, ternary_matrix


@pytest.fixture(scope="module")
def model():
    return BitNetModel.tiny()


#: (ids, rows, words) for a step of two tokens.
REFUSED = {
    "more ids than tokens": (list(range(2, 502)), [-1], "500 ids"),
    "fewer": ([5], [0], "1 ids"),
    "none": ([], [], "0 ids"),
    "a matrix": ([[5, 6]], [0], "ids is"),
    "floats": ([5.0, 6.7], [0], "ids is"),
    "bools": ([True, False], [0], "ids is"),
    "text": ("ab", [0], "ids is"),
    "None": (None, [0], "ids is"),
    "beyond the vocabulary": ([5, 2048], [0], r"ids\[1\] is 2048"),
    "beyond 64 bits": ([5, 2**70], [0], "ids is"),
    "below 0": ([-1, 5], [0], r"ids\[0\] is -1"),
    "a row beyond": ([5, 6], [2], r"rows\[0\] is 2"),
    "a row before": ([5, 6], [0, -3], r"rows\[1\] is -3"),
    "rows of floats": ([5, 6], [0.5], "rows is"),
    "rows of bools": ([5, 6], [True, False], "rows is"),
    "rows of a matrix": ([5, 6], [[0]], "rows is"),
}


@pytest.mark.parametrize(("ids", "rows", "words"), REFUSED.values(), ids=REFUSED)
def test_forward_refuses_ids_and_rows_that_are_not_the_steps(model, ids, rows, words):
    with model.new_cache(num_pages=2) as cache, cache.sequence() as seq:
        step = cache.step([seq], [2])
        with pytest.raises(ArgumentError, match=words):
            model.forward(ids, step, rows)
        assert not any(step._plan.is_written)
        step.rollback()


@pytest.mark.parametrize("positions", [[0, 1.0], [0, 1], [[0, 1]], [0, 1, 2], [0, 1024], [-1, 0]], ids=str)
def test_forward_refuses_positions_of_somebody_elses_step(model, positions):
    """A KVStep is whatever has positions and attend."""
    step = RecomputeStep([2], 1)
    kind = np.int64 if positions == [0, 1] else None
    step.positions = np.array(
        positions, kind or (np.int32 if np.asarray(positions).dtype.kind == "i" else None)
    )
    with pytest.raises(ArgumentError, match="position"):
        model.forward([5, 6], step, [0])


def test_no_rows_are_no_logits(model):
    with model.new_cache(num_pages=2) as cache, cache.step([cache.sequence()], [2]) as step:
        assert model.forward([5, 6], step, []).shape == (0, 2048)


def rotated(rotation, heads, positions):
    heads = heads.copy()
    rotation(heads, np.asarray(positions, np.int32))
    return heads


def test_tables_that_grew_have_the_bits_of_tables_made_at_once(rng, monkeypatch):
    frequencies = rope_frequencies(64, 500000.0)
    heads = rng.standard_normal((50, 3, 64)).astype(np.float32)
    positions = np.sort(rng.integers(0, 20000, 50))
    monkeypatch.setattr(layers, "FIRST_POSITIONS", 20000)
    at_once = rotated(Rotation(frequencies, 20000), heads, positions)
    monkeypatch.setattr(layers, "FIRST_POSITIONS", 1)
    growing = Rotation(frequencies, 20000)
    for i, position in enumerate(positions):
        np.testing.assert_array_equal(rotated(growing, heads[i : i + 1], [position]), at_once[i : i + 1])
    np.testing.assert_array_equal(rotated(growing, heads, positions), at_once)


def test_tables_are_as_long_as_what_came_up():
    """mistral.rs #44, vLLM PR #44738: tables of millions of positions, for weights of kilobytes."""
    rotation = Rotation(rope_frequencies(8, 10000.0), 2**31 - 1)
    heads = np.ones((1, 1, 8), np.float32)
    rotated(rotation, heads, [3])
    assert rotation.tables[0].nbytes < 2**20
    rotated(rotation, heads, [100000])
    assert 100001 <= len(rotation.tables[0]) <= 200002


@pytest.mark.parametrize(
    ("heads", "positions"),
    [
        (np.ones((2, 1, 8), np.float32), np.array([0, 100], np.int32)),
        (np.ones((2, 1, 8), np.float32), np.array([-1, 0], np.int32)),
        (np.ones((2, 1, 8), np.float32), np.array([0, 1], np.int64)),
        (np.ones((2, 1, 8), np.float32), np.array([0], np.int32)),
        (np.ones((2, 1, 8), np.float32), np.array([[0], [1]], np.int32)),
        (np.ones((2, 1, 6), np.float32), np.array([0, 1], np.int32)),
        (np.ones((2, 8), np.float32), np.array([0, 1], np.int32)),
        (np.ones((2, 1, 8), np.float64), np.array([0, 1], np.int32)),
        (np.ones((2, 1, 8), np.float16), np.array([0, 1], np.int32)),
    ],
    ids=["beyond", "below", "int64", "too few", "a matrix", "narrow", "no heads", "float64", "float16"],
)
def test_rotation_refuses_what_does_not_fit_and_changes_nothing(heads, positions):
    before = heads.copy()
    with pytest.raises(ArgumentError, match=r"heads|position"):
        Rotation(rope_frequencies(8, 10000.0), 100)(heads, positions)
    np.testing.assert_array_equal(heads, before)


def test_a_matrix_is_made_of_what_it_says():
    codes = np.ones((16, 16), np.uint8)
    packed = ternary_matrix(np.zeros((16, 16), np.int8), np.ones(1, np.float32)).packed
    for bad in (codes.astype(np.int64), codes[0], codes * 3):
        with pytest.raises(ArgumentError, match="codes"):
            codes_matrix(bad, np.ones(1, np.float32))
    for kind, num_out, num_in in (("ternary", 32, 16), ("int8", 16, 16), ("int3", 16, 16)):
        with pytest.raises(ArgumentError, match="matrix"):
            Matrix(kind, num_out, num_in, packed, np.ones(num_out, np.float32))
    for scales in (np.ones(15, np.float32), np.float32(1), np.ones((16, 1), np.float32)):
        with pytest.raises(ArgumentError, match="scales"):
            Matrix("ternary", 16, 16, packed, scales)


def test_rows_whose_strides_are_no_floats_are_refused():
    """A column of a packed record: four bytes wide, and its rows lie at addresses between floats."""
    matrix = ternary_matrix(np.zeros((16, 16), np.int8), np.ones(1, np.float32))
    records = np.zeros(3, np.dtype([("x", np.float32, 16), ("flag", np.uint8)]))
    with pytest.raises(ArgumentError, match="dense along rows"):
        matrix(records["x"])
