"""Forms: what an array looks like, apart from where it lies.

Layers pass arrays that look alike, over and over.  The first of them is asked everything (arrays.py); of the
next ones it is enough to see that they have its form, and to take their address: a twentieth of the time.

Imports arrays.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import ndarray

from ._binding import ffi
from .arrays import Array, has_tangent, is_tensor

from_buffer = ffi.from_buffer


class Form:
    """The form of an array that was described already, of at least one element and three axes.

    `place(array, rows)` sets the address of another one, that of a `pkv_rows *`; False, and nothing was set,
    when that does not look the same.  `empty()` is a new array of its kind, shape and dtype.
    """

    __slots__ = ("_dtype", "_item_bytes", "_kind", "_layout", "_shape", "_strides", "empty", "place", "span")

    place: Callable[[Any, Any], bool]
    empty: Callable[[], Any]

    def __init__(self, array: Any, described: Array) -> None:
        self._kind = type(array)
        self._dtype = array.dtype
        self._shape = array.shape
        #: Bytes from the first to the one behind the last; no stride is negative.
        low, high = described.extent
        self.span = high - low
        if is_tensor(array):
            self._layout, self._item_bytes = array.layout, array.element_size()
            #: None of a dense one, which is asked in half the time.
            self._strides = None if array.is_contiguous() else array.stride()
            self.place = self._tensor
            empty = sys.modules["torch"].empty
            self.empty = functools.partial(empty, self._shape, dtype=self._dtype, device="cpu")
        else:
            self._strides = array.strides
            self.empty = functools.partial(np.empty, self._shape, self._dtype)
            is_bits = array.dtype.kind == "V" or array.dtype.name == "bfloat16"
            is_dense = array.flags.c_contiguous and not is_bits
            self.place = self._dense if is_dense else self._bits if is_bits else self._gapped

    def _dense(self, array: Any, rows: Any) -> bool:
        if type(array) is not ndarray or array.shape != self._shape or array.dtype is not self._dtype:
            return False
        try:
            rows.data = from_buffer(array)  # which refuses what is not dense: strides need not be looked at
        except ValueError:
            return False
        return True

    def _gapped(self, array: Any, rows: Any) -> bool:
        if not self._has_strides(array):
            return False
        rows.data = from_buffer(array[0, 0])  # the first row has no gaps
        return True

    def _bits(self, array: Any, rows: Any) -> bool:
        """Of bfloat16, which no buffer knows."""
        if not self._has_strides(array):
            return False
        rows.data = from_buffer(array[0, 0].view(np.uint16))
        return True

    def _has_strides(self, array: Any) -> bool:
        return (
            type(array) is ndarray
            and array.shape == self._shape
            and array.dtype is self._dtype
            and array.strides == self._strides
        )

    def _tensor(self, tensor: Any, rows: Any) -> bool:
        if (
            type(tensor) is not self._kind
            or tensor.shape != self._shape
            or tensor.dtype is not self._dtype
            or not tensor.is_cpu
            or tensor.layout is not self._layout
            or tensor.requires_grad
            or not (tensor.is_contiguous() if self._strides is None else tensor.stride() == self._strides)
        ):
            return False
        address = tensor.data_ptr()
        if address == 0 or tensor.is_neg() or has_tangent(tensor):
            return False
        if tensor.untyped_storage().nbytes() < tensor.storage_offset() * self._item_bytes + self.span:
            return False
        rows.address = address
        return True


def has_form(array: Any, described: Array) -> bool:
    """Can it stand for others that look alike?  What is unusual is asked everything each time."""
    is_usual = type(array) is np.ndarray or (is_tensor(array) and not array.requires_grad)
    return is_usual and 0 not in described.shape and min(described.strides) >= 0
