"""Linear maps whose weights take 2, 8 or 16 bits, computed by the library's kernels.

Weights are packed once into the order in which the kernels read them, in blocks of 16 outputs, in huge pages
where they are large (native/src/kernels/product.h draws it).  A call norms and rounds its rows,
multiplies, scales, and stores, adds or gates: one C call, nothing in between is kept.

Imports ternary.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._binding import check, ffi, lib, shared_threads
from ..errors import ArgumentError
from ..lifetime import Uncopyable
from ..pages.pool import PagePool
from .ternary import FloatArray, Int8Array

OUT_BLOCK, IN_GROUP = 16, 16
#: Inputs that share a scale, and the bytes of them and of the scale, for each output.
INT8_GROUP, INT8_GROUP_BYTES = 32, 34
#: From this size on, weights have a mapping of their own, in huge pages.
HUGE_BYTES = 1 << 20

KINDS = {"ternary": lib.PKV_TERNARY, "int8": lib.PKV_INT8_WEIGHTS, "bfloat16": lib.PKV_BFLOAT16_WEIGHTS}
BITS = {"ternary": 2, "int8": 8, "bfloat16": 16}
STORE, ADD = lib.PKV_STORE, lib.PKV_ADD
RELU2_GATE, SILU_GATE = lib.PKV_RELU2_GATE, lib.PKV_SILU_GATE


class Matrix(Uncopyable):
    """A packed matrix [num_out, num_in] and its scales, as `pkv_multiply` takes them.

    kind : "ternary", "int8" or "bfloat16"
    packed : uint8, as `packed_bytes` says how many
    scales : float32 [num_out], of ternary and 8-bit weights

    Rows of the result do not depend on each other or on threads in a single bit; nor on the kernel, but for
    weights in bfloat16.
    """

    def __init__(
        self, kind: str, num_out: int, num_in: int, packed: NDArray[np.uint8], scales: FloatArray
    ) -> None:
        self.kind, self.num_out, self.num_in = kind, num_out, num_in
        if kind not in KINDS or packed.nbytes != packed_bytes(kind, num_out, num_in):
            raise ArgumentError(f"{packed.nbytes} bytes are no {kind} matrix [{num_out}, {num_in}]")
        if np.shape(scales) != (num_out,):
            raise ArgumentError(f"scales have the shape {list(np.shape(scales))}, not [{num_out}]")
        self.packed = packed
        self.scales = np.zeros(_up(num_out, OUT_BLOCK), np.float32)
        self.scales[:num_out] = scales
        #: As C has it.
        self.described = ffi.new(
            "pkv_matrix *",
            {
                "weights": ffi.from_buffer(packed),
                "scales": ffi.from_buffer("float[]", self.scales),
                "num_out": num_out,
                "num_in": num_in,
                "kind": KINDS[kind],
                "bits": BITS[kind],
            },
        )
        self._threads = shared_threads()

    def codes(self) -> NDArray[np.uint8]:
        """A ternary matrix's codes, uint8 [num_out, num_in] of 0, 1, 2 for -1, 0, +1."""
        codes = np.empty((self.num_out, self.num_in), np.uint8)
        packed_at = ffi.from_buffer("uint8_t[]", self.packed)
        lib.pkv_unpack_ternary(packed_at, self.num_out, self.num_in, ffi.from_buffer("uint8_t[]", codes))
        return codes

    @property
    def num_bytes(self) -> int:
        """Of weights, as they are read by every call."""
        return self.packed.nbytes

    def __call__(
        self,
        x: FloatArray,
        *,
        norm: FloatArray | None = None,
        eps: float = 0.0,
        out: FloatArray | None = None,
        epilogue: int = STORE,
    ) -> FloatArray:
        """Map float32 [tokens, num_in] to [tokens, num_out], half as wide when gated.

        norm : float32 [num_in]; x is divided by its root mean square and multiplied by this before
        out : where it goes, or what it is added to (ADD); its rows may be parts of wider ones
        Raises: ArgumentError.
        """
        width = self.num_out if epilogue in (STORE, ADD) else self.num_out // 2
        if out is None:
            out = np.empty((len(x), width), np.float32)
        _require_rows("x", x, (len(x), self.num_in))
        _require_rows("out", out, (len(x), width))
        if norm is not None:
            _require_rows("norm", norm[None], (1, self.num_in))
        if not len(x):
            return out
        call = ffi.new("pkv_linear *")
        call.x, call.x_stride, call.num_rows = _address(x), x.strides[0] // 4, len(x)
        call.norm = _address(norm) if norm is not None else ffi.NULL
        call.eps = eps
        call.out, call.out_stride, call.epilogue = _address(out), out.strides[0] // 4, epilogue
        check(lib.pkv_multiply(self._threads, self.described, call), "multiply")
        return out


def _up(count: int, to: int) -> int:
    return -(-count // to) * to


def packed_bytes(kind: str, num_out: int, num_in: int) -> int:
    """Bytes of a packed matrix."""
    if kind == "int8":
        return _up(num_out, OUT_BLOCK) * _up(num_in, INT8_GROUP) // INT8_GROUP * INT8_GROUP_BYTES
    return _up(num_out, OUT_BLOCK) * _up(num_in, IN_GROUP) * BITS[kind] // 8


def new_bytes(count: int) -> NDArray[np.uint8]:
    """Memory for weights: in huge pages when it is large."""
    if count < HUGE_BYTES:
        return np.empty(count, np.uint8)
    return PagePool(1, _up(count, 64)).array((count,), "u1", writable=True)


def ternary_matrix(weight: Int8Array, scale: FloatArray) -> Matrix:
    """From int8 [out, in] of -1, 0, +1, and a scale: one, or one for each output."""
    return codes_matrix((weight + 1).astype(np.uint8), scale)


def codes_matrix(codes: NDArray[np.uint8], scale: FloatArray) -> Matrix:
    """From uint8 [out, in] of 0, 1, 2 for -1, 0, +1, and a scale: one, or one for each output."""
    if codes.dtype != np.uint8 or codes.ndim != 2 or (codes.size and codes.max() > 2):
        raise ArgumentError(
            f"codes are {codes.dtype} {list(codes.shape)}; they must be uint8 [out, in], 0 to 2"
        )
    num_out, num_in = codes.shape
    packed = new_bytes(packed_bytes("ternary", num_out, num_in))
    codes_at = ffi.from_buffer("uint8_t[]", np.ascontiguousarray(codes))
    lib.pkv_pack_ternary(codes_at, num_out, num_in, ffi.from_buffer("uint8_t[]", packed))
    return Matrix("ternary", num_out, num_in, packed, np.broadcast_to(scale, num_out))


def random_matrix(num_out: int, num_in: int, rng: np.random.Generator) -> Matrix:
    """Random ternary weights, whose products have about the size of what goes in."""
    scale = np.array([1 / np.sqrt(num_in * 2 / 3)], np.float32)
    if num_out % OUT_BLOCK or num_in % IN_GROUP:
        return codes_matrix(rng.integers(0, 3, (num_out, num_in), np.uint8), scale)
    packed = new_bytes(packed_bytes("ternary", num_out, num_in))
    four = np.arange(81)  # every byte of four codes
    valid = (four % 3 | four // 3 % 3 << 2 | four // 9 % 3 << 4 | four // 27 << 6).astype(np.uint8)
    np.take(valid, rng.integers(0, 81, len(packed), np.uint8), out=packed)
    return Matrix("ternary", num_out, num_in, packed, np.broadcast_to(scale, num_out))


def int8_matrix(
    weight: NDArray[Any],
    floats: Callable[[NDArray[Any]], FloatArray] | None = None,
    rows_at_a_time: int = 4096,
) -> Matrix:
    """Round a float matrix [out, in] to 8 bits, with a scale for each output and each 32 inputs.

    floats : makes some of its rows float32, where they are stored as something else

    Weights so small that their scale would be no normal number become zeros.
    """
    num_out, num_in = weight.shape
    packed = new_bytes(packed_bytes("int8", num_out, num_in))
    block_bytes = len(packed) // max(1, _up(num_out, OUT_BLOCK) // OUT_BLOCK)
    for begin in range(0, num_out, rows_at_a_time):
        stored = weight[begin : begin + rows_at_a_time]
        rows = np.ascontiguousarray(stored if floats is None else floats(stored), np.float32)
        at = packed[begin // OUT_BLOCK * block_bytes :]
        lib.pkv_pack_int8(
            ffi.from_buffer("float[]", rows), len(rows), num_in, 0, ffi.from_buffer("uint8_t[]", at)
        )
    return Matrix("int8", num_out, num_in, packed, np.ones(num_out, np.float32))


def int8_codes_matrix(codes: NDArray[np.int8], scales: FloatArray) -> Matrix:
    """From int8 [out, in] of -127 to 127, and a scale for each output: exactly their products."""
    num_out, num_in = codes.shape
    packed = new_bytes(packed_bytes("int8", num_out, num_in))
    rows = ffi.from_buffer("float[]", codes.astype(np.float32))
    lib.pkv_pack_int8(rows, num_out, num_in, 1, ffi.from_buffer("uint8_t[]", packed))
    return Matrix("int8", num_out, num_in, packed, scales)


def bfloat16_matrix(bits: NDArray[np.uint16], rows_at_a_time: int = 4096) -> Matrix:
    """From the bits of bfloat16, uint16 [out, in], which stay what they are."""
    num_out, num_in = bits.shape
    padded_in = _up(num_in, IN_GROUP)
    packed = new_bytes(packed_bytes("bfloat16", num_out, num_in))
    blocks = packed.view(np.uint16).reshape(-1, padded_in // 2, OUT_BLOCK, 2)
    for begin in range(0, num_out, rows_at_a_time):
        rows = bits[begin : begin + rows_at_a_time]
        padded = np.zeros((_up(len(rows), OUT_BLOCK), padded_in), np.uint16)
        padded[: len(rows), :num_in] = rows
        parts = padded.reshape(-1, OUT_BLOCK, padded_in // 2, 2).transpose(0, 2, 1, 3)
        blocks[begin // OUT_BLOCK : begin // OUT_BLOCK + len(parts)] = parts
    return Matrix("bfloat16", num_out, num_in, packed, np.ones(num_out, np.float32))


def _address(array: FloatArray) -> Any:
    if array.flags.c_contiguous:
        return ffi.from_buffer("float[]", array)
    return ffi.cast("float *", array.ctypes.data)


def _require_rows(name: str, array: FloatArray, shape: tuple[int, int]) -> None:
    is_dense = array.ndim == 2 and ((array.strides[1] == 4 and array.strides[0] % 4 == 0) or array.size == 0)
    if array.dtype != np.float32 or array.shape != shape or not is_dense:
        raise ArgumentError(
            f"{name} is {array.dtype} {list(array.shape)}; it must be float32 {list(shape)}, dense along rows"
        )
