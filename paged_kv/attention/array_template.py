"""Array templates: what an array looks like, apart from its address.

Layers pass arrays that look alike, again and again.  The first one is validated in full (arrays.py).  A later
one of the same type, dtype, shape and strides needs only its address, in a twentieth of the time.

Imports arrays.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import ndarray

from .._binding import ffi
from .arrays import Array, has_tangent, is_tensor

from_buffer = ffi.from_buffer


class ArrayTemplate:
    """The looks of an array that was validated: at least one element, two axes or more, no negative strides.

    `bind(array, rows)` writes the address of another array into a `pkv_tensor *`; False, and nothing was
    written, when that array does not look the same.  `new()` is a new array of the same kind, shape and
    dtype.
    """

    __slots__ = (
        "_dtype",
        "_first",
        "_item_bytes",
        "_kind",
        "_layout",
        "_shape",
        "_strides",
        "bind",
        "new",
        "num_bytes",
    )

    bind: Callable[[Any, Any], bool]
    new: Callable[[], Any]

    def __init__(self, array: Any, described: Array) -> None:
        self._kind = type(array)
        self._dtype = array.dtype
        self._shape = array.shape
        self._first = (0,) * (len(described.shape) - 1)
        low, high = described.extent
        #: From the first byte to one past the last.
        self.num_bytes = high - low
        if is_tensor(array):
            self._layout, self._item_bytes = array.layout, array.element_size()
            #: None when the array is dense: is_contiguous() takes half the time of comparing strides.
            self._strides = None if array.is_contiguous() else array.stride()
            self.bind = self._tensor
            empty = sys.modules["torch"].empty
            self.new = functools.partial(empty, self._shape, dtype=self._dtype, device="cpu")
        else:
            self._strides = array.strides
            self.new = functools.partial(np.empty, self._shape, self._dtype)
            is_bits = array.dtype.kind == "V" or array.dtype.name == "bfloat16"
            is_dense = array.flags.c_contiguous and not is_bits
            self.bind = self._dense if is_dense else self._bits if is_bits else self._strided

    def _dense(self, array: Any, rows: Any) -> bool:
        if type(array) is not ndarray or array.shape != self._shape or array.dtype is not self._dtype:
            return False
        try:
            rows.data = from_buffer(array)  # raises for arrays with gaps, so strides need no comparison
        except ValueError:
            return False
        return True

    def _strided(self, array: Any, rows: Any) -> bool:
        if not self._has_strides(array):
            return False
        rows.data = from_buffer(array[self._first])  # one row has no gaps
        return True

    def _bits(self, array: Any, rows: Any) -> bool:
        """bfloat16, which the buffer protocol does not have."""
        if not self._has_strides(array):
            return False
        rows.data = from_buffer(array[self._first].view(np.uint16))
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
        needed = tensor.storage_offset() * self._item_bytes + self.num_bytes
        if tensor.untyped_storage().nbytes() < needed:
            return False
        rows.address = address
        return True


def template_of(array: Any, described: Array) -> ArrayTemplate | None:
    """A template of this array; None when arrays of its kind have to be validated one by one."""
    is_usual = type(array) is ndarray or (is_tensor(array) and not array.requires_grad)
    if not is_usual or 0 in described.shape or min(described.strides) < 0:
        return None
    return ArrayTemplate(array, described)
