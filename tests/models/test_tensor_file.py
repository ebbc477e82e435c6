"""Files in the safetensors format: what is written is read, and a file that lies is refused."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_kv import ArgumentError
from paged_kv.models.tensor_file import DTYPES, TensorFile, write_tensors

EXTENTS = st.lists(st.integers(0, 5), max_size=3)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def file_of(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@settings(max_examples=40)
@given(
    shapes=st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), EXTENTS), max_size=5),
    seed=st.integers(0, 2**32),
)
def test_what_is_written_is_read(tmp_path_factory, shapes, seed):
    rng = np.random.default_rng(seed)
    tensors = {}
    for i, (kind, shape) in enumerate(shapes):
        dtype = np.dtype(DTYPES[kind])
        num_bytes = int(np.prod(shape, dtype=int)) * dtype.itemsize
        tensors[f"t{i} é"] = np.frombuffer(rng.bytes(num_bytes), dtype).reshape(shape)
    path = tmp_path_factory.mktemp("written") / "t.safetensors"
    write_tensors(path, tensors)
    read = TensorFile(path)
    assert list(read) == list(tensors) and len(read) == len(tensors)
    for name, array in tensors.items():
        assert read[name].dtype == array.dtype and read[name].shape == array.shape
        assert read[name].tobytes() == array.tobytes()


def test_the_safetensors_package_reads_it_and_is_read(file, rng):
    package = pytest.importorskip("safetensors.numpy")
    tensors = {"a": rng.random((3, 5)).astype(np.float32), "b": np.arange(7, dtype=np.uint8)}
    write_tensors(file, tensors)
    for name, array in package.load_file(file).items():
        np.testing.assert_array_equal(array, tensors[name])
    package.save_file(tensors, file, metadata={"format": "pt"})
    read = TensorFile(file)
    assert set(read) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(read[name], array)


def test_tensors_lie_in_the_file_and_cannot_be_written(file):
    write_tensors(file, {"a": np.arange(4, dtype=np.float32)})
    with pytest.raises(ValueError, match="read-only"):
        TensorFile(file)["a"][0] = 1


FLOATS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {
    "a shape larger than its bytes": FLOATS | {"shape": [3]},
    "a shape smaller than its bytes": FLOATS | {"shape": [1]},
    "bytes beyond the file": FLOATS | {"shape": [4], "data_offsets": [0, 16]},
    "an end before the beginning": FLOATS | {"shape": [0], "data_offsets": [8, 0]},
    "a negative beginning": FLOATS | {"shape": [4], "data_offsets": [-8, 8]},
    "a negative extent": FLOATS | {"shape": [-1, -2]},
    "a product that would overflow 64 bits": FLOATS | {"shape": [2**33, 2**33]},
    "an extent that is no integer": FLOATS | {"shape": [2.0]},
    "an extent that is a truth value": FLOATS | {"shape": [True, 2]},
    "a dtype that is not known": FLOATS | {"dtype": "F8_E4M3"},
    "a dtype that is no name": FLOATS | {"dtype": ["F32"]},
    "a field that is not there": {"dtype": "F32", "shape": [2]},
    "a field too many": FLOATS | {"stride": 1},
    "no object": 7,
    "three offsets": FLOATS | {"data_offsets": [0, 4, 8]},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_an_entry_that_lies_is_refused(file, lie):
    with pytest.raises(ArgumentError, match=r"model\.safetensors"):
        TensorFile(file_of(file, {"t": lie}, bytes(8)))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"1234", bytes(8), struct.pack("<Q", 2**63), struct.pack("<Q", 100) + b"{}"),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 3) + b"\xff\xfe{",
        struct.pack("<Q", 200000) + b'{"a":' + b"[" * 199995,
    ],
)
def test_a_file_that_is_none_is_refused(file, content):
    file.write_bytes(content)
    with pytest.raises(ArgumentError, match=r"model\.safetensors"):
        TensorFile(file)


@settings(max_examples=150)
@given(data=st.data())
def test_a_file_with_any_byte_changed_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("changed") / "t.safetensors"
    write_tensors(path, {"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.uint8)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        for array in TensorFile(path).values():
            array.tobytes()
    except ArgumentError:
        pass
