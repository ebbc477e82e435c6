"""Ternary weights and int8 activations: the arithmetic of BitNet b1.58.

A weight matrix is a ternary matrix W of -1, 0, +1 and one scale; an activation row becomes
integers of 8 bits and one factor s.  Their product is a sum of small integers::

    x [tokens, in] --quantise--> q [tokens, in], s [tokens, 1]
    y = (q W^T) / s * scale                                         [tokens, out]

This is the definition in numpy; kernels compute it (matrix.py).  The integers travel as float32:
every partial sum of ``q W^T`` is an integer below 2**24, which float32 holds exactly.

In a file a weight takes 2 bits (code = value + 1, four rows of W in one row of bytes)::

    packed row r:   bits 0-1: row r    bits 2-3: row r + out/4    bits 4-5: r + 2 out/4    ...

Imports errors.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError

FloatArray: TypeAlias = NDArray[np.float32]
Int8Array: TypeAlias = NDArray[np.int8]
ByteArray: TypeAlias = NDArray[np.uint8]

ROWS_PER_BYTE = 4
ACTIVATION_MAX = 127
#: The smallest divisor of a scale: a row (or a matrix) of zeros stays zeros.
SMALLEST_MAGNITUDE = 1e-5


@np.errstate(all="ignore")
def quantise_activations(x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Round each row to integers of 8 bits: ``q = round(x * s)``, ``s = 127 / max|x|``.

    Parameters
    ----------
    x : float32 [tokens, features]

    Returns: (q, s), q float32 [tokens, features] that holds integers from -127 to 127, rounded
    half to even; s float32 [tokens, 1].  A row with a NaN or an infinity becomes NaN; other rows
    do not notice.
    """
    s = np.abs(x).max(axis=-1, keepdims=True)
    np.maximum(s, np.float32(SMALLEST_MAGNITUDE), out=s)
    np.divide(np.float32(ACTIVATION_MAX), s, out=s)
    q = x * s
    # The reference clamps to [-128, 127] here.  |x| * s is at most 127 (1 + 2**-24)**2, so it
    # rounds to 127 at most: the clamp could not act.
    np.rint(q, out=q)
    return q, s


@np.errstate(all="ignore")
def ternarise(weight: NDArray[np.floating[Any]]) -> tuple[Int8Array, FloatArray]:
    """Turn a float matrix into ternary values and one scale: ``W ~ ternary * scale``.

    Parameters
    ----------
    weight : floating [out, in]

    Returns: (ternary int8 [out, in], scale float32 [1]), where scale is the mean of \\|W\\| and
    ternary is ``round(W / scale)`` clamped to -1, 0, +1.
    Raises: ArgumentError, for values that are not finite too.
    """
    if weight.ndim != 2 or weight.size == 0 or not np.issubdtype(weight.dtype, np.floating):
        raise ArgumentError(f"weight is {weight.dtype} {list(weight.shape)}; it must be floating [out, in]")
    mean = np.abs(weight).mean(dtype=np.float64)
    if not np.isfinite(mean):
        raise ArgumentError("weight holds values that are not finite")
    scale = np.float32(max(mean, SMALLEST_MAGNITUDE))
    # Multiply by the reciprocal as the reference does, so that the same values round alike.
    ternary = np.rint(weight.astype(np.float32) * (np.float32(1) / scale)).clip(-1, 1)
    return ternary.astype(np.int8), np.array([scale])


def pack_ternary(weight: Int8Array) -> ByteArray:
    """Pack a ternary matrix, 2 bits a weight.

    Parameters
    ----------
    weight : int8 [out, in] of -1, 0, +1; out is a multiple of 4

    Returns: uint8 [out / 4, in], interleaved by quarters as the file's story draws it.
    Raises: ArgumentError.
    """
    _require_matrix(weight, np.int8, "weight")
    _require_ternary(weight)
    num_out, num_in = weight.shape
    if num_out % ROWS_PER_BYTE:
        raise ArgumentError(f"out is {num_out}; it must be a multiple of {ROWS_PER_BYTE}")
    codes = (weight + 1).astype(np.uint8).reshape(ROWS_PER_BYTE, num_out // ROWS_PER_BYTE, num_in)
    packed: ByteArray = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
    return packed


def unpack_ternary(packed: ByteArray) -> Int8Array:
    """Undo `pack_ternary`: uint8 [out / 4, in] to int8 [out, in].

    Raises: ArgumentError, also when a weight has the code 3, which is no value.
    """
    _require_matrix(packed, np.uint8, "packed")
    if (packed & packed >> 1 & 0b01010101).any():
        raise ArgumentError("a weight has the code 3; the codes are 0, 1, 2 for -1, 0, +1")
    quarters = [packed >> shift & 0b11 for shift in (0, 2, 4, 6)]
    return np.concatenate(quarters).astype(np.int8) - np.int8(1)


def _require_matrix(array: NDArray[Any], dtype: type, name: str) -> None:
    if array.ndim != 2 or array.size == 0 or array.dtype != dtype:
        raise ArgumentError(
            f"{name} is {array.dtype} {list(array.shape)}; "
            f"it must be {np.dtype(dtype)} with two axes, neither empty"
        )


def _require_ternary(weight: Int8Array) -> None:
    lowest, highest = int(weight.min()), int(weight.max())
    if lowest < -1 or highest > 1:
        raise ArgumentError(f"weight holds values from {lowest} to {highest}; it must hold -1, 0, +1")
