"""Files of tensors in the safetensors format, read by memory map and written.

    8 bytes: length of the header | header: JSON, name -> dtype, shape, offsets | bytes of the tensors

The safetensors package is not used: it has no bfloat16 without torch, and copies what it reads.  Files are
untrusted: every length and offset is validated against the file's size.

Imports errors and files.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..files import Writer, replace_files

#: bfloat16 comes as its bits.
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U8": np.uint8, "I8": np.int8}
#: Bytes per value of dtypes that can be skipped, in tensors that no part of a model uses.
OTHER_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "C64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "BOOL": 1},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
MAX_HEADER_BYTES = 100 << 20


class TensorFile(Mapping[str, NDArray[Any]]):
    """A safetensors file as a mapping of names to arrays in place, bfloat16 as the uint16 of its bits.

    Raises: ArgumentError for a file that is not one, naming what is wrong; OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        size = len(self._bytes)
        (header_bytes,) = struct.unpack("<Q", self._bytes[:8].tobytes()) if size >= 8 else (0,)
        if not 2 <= header_bytes <= min(size - 8, MAX_HEADER_BYTES):
            raise ArgumentError(f"{path} is no safetensors file: its header would have {header_bytes} bytes")
        self._data = self._bytes[8 + header_bytes :]
        try:
            header = json.loads(self._bytes[8 : 8 + header_bytes].tobytes())
            header.pop("__metadata__", None)
            self._entries = {name: self._entry(name, **fields) for name, fields in header.items()}
            #: Names of dtypes as the file has them, also of those that cannot be read.
            self.dtypes: dict[str, str] = {name: entry[0] for name, entry in self._entries.items()}
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            if isinstance(error, ArgumentError):
                raise
            raise ArgumentError(f"{path} has a header that cannot be read: {error}") from None

    def _entry(self, name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[Any, ...]:
        begin, end = data_offsets
        numbers = [*shape, begin, end]
        if type(dtype) is not str or not all(type(number) is int and number >= 0 for number in numbers):
            raise ArgumentError(f"{self.path}: {name} is {dtype!r} {shape}, at {begin!r} to {end!r}")
        item_bytes = np.dtype(DTYPES[dtype]).itemsize if dtype in DTYPES else OTHER_BYTES.get(dtype)
        # Of a dtype whose size is unknown, only the offsets can be checked.
        num_bytes = end - begin if item_bytes is None else math.prod(shape, start=int(item_bytes))
        if begin > end or end > len(self._data) or end - begin != num_bytes:
            raise ArgumentError(
                f"{self.path}: {name} is {dtype} {shape}, {num_bytes} bytes; the file has {begin} to {end} "
                f"of {len(self._data)} for it"
            )
        return dtype, tuple(shape), begin, end

    def __getitem__(self, name: str) -> NDArray[Any]:
        dtype, shape, begin, end = self._entries[name]
        if dtype not in DTYPES:
            raise ArgumentError(f"{self.path}: {name} is {dtype}; it must be {', '.join(DTYPES)}")
        try:
            # Offsets may be odd; memory-mapped arrays of numpy may be too.
            return np.frombuffer(self._data[begin:end], DTYPES[dtype]).reshape(shape)
        except ValueError as error:
            raise ArgumentError(f"{self.path}: {name} is {dtype} {list(shape)}: {error}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def tensors_writer(tensors: Mapping[str, NDArray[Any]]) -> Writer:
    """Writes a safetensors file; uint16 is the bits of bfloat16."""
    names = {np.dtype(kind): name for name, kind in DTYPES.items()}
    header, begin = {}, 0
    for name, array in tensors.items():
        end = begin + array.nbytes
        header[name] = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            if array.size:
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    return write


def write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write a safetensors file, whole or not at all."""
    replace_files({path: tensors_writer(tensors)})
