"""Arrays as C sees them: numpy arrays or torch tensors, of three dtypes, strided in the leading axes.

An array becomes an address, strides and a dtype; nothing is copied.  torch is never imported here: a caller
that passes a tensor has imported it.

Imports _binding.
"""

import sys
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from .._binding import DTYPE_CODES, ffi
from ..errors import ArgumentError

#: pkv_dtype by the name of an array's dtype; pages may store others.
_NAMED = {name: DTYPE_CODES[name] for name in ("float32", "float16", "bfloat16")}
_CODES: dict[Any, int] = {np.dtype(name): _NAMED[name] for name in ("float32", "float16")}
_ITEM_BYTES = {_NAMED["float32"]: 4, _NAMED["float16"]: 2, _NAMED["bfloat16"]: 2, DTYPE_CODES["int8"]: 1}
_NAMES = {code: name for name, code in _NAMED.items()}


class Array(NamedTuple):
    """An array's address, as a `char *`, its shape, strides in bytes, and dtype."""

    data: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: int  # pkv_dtype

    @property
    def extent(self) -> tuple[int, int]:
        """The first byte, and one past the last."""
        address = int(ffi.cast("intptr_t", self.data))
        low, high = address, address + _ITEM_BYTES[self.dtype]
        for stride, size in zip(self.strides, self.shape, strict=True):
            if stride > 0:
                high += stride * (size - 1)
            else:
                low += stride * (size - 1)
        return low, high

    @property
    def item_bytes(self) -> NDArray[np.void]:
        """The same memory as a numpy array, to compare which bytes it covers."""
        holder = type("holder", (), {})()
        holder.__array_interface__ = {
            "version": 3,
            "data": (int(ffi.cast("intptr_t", self.data)), True),
            "shape": self.shape,
            "strides": self.strides,
            "typestr": f"|V{_ITEM_BYTES[self.dtype]}",
        }
        return np.asarray(holder)


def is_tensor(array: object) -> bool:
    """Is it a torch tensor?"""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, getattr(torch, "Tensor", ()))


def array_of(name: str, array: object) -> Array:
    """Describe an array whose last axis is dense.

    Raises: ArgumentError for what is neither a numpy array nor a torch tensor of this machine's memory, for
    other dtypes, for tensors that require gradients, and for a last axis with gaps.
    """
    if isinstance(array, np.ndarray):
        described = _numpy_array(name, array)
    elif is_tensor(array):
        described = _tensor(name, array)
    else:
        raise ArgumentError(f"{name} must be a numpy array or a torch tensor, not {type(array).__name__}")
    shape = described.shape
    is_dense = 0 in shape or shape[-1:] in ((), (1,)) or described.strides[-1] == _ITEM_BYTES[described.dtype]
    if not is_dense:
        raise ArgumentError(f"{name} has gaps along its last axis; pass a contiguous copy")
    return described


def quantised_pages(name: str, array: Any) -> Array | None:
    """Describe pages of uint8, which are PKV_INT8; None where they are of another dtype."""
    if str(getattr(array, "dtype", "")).removeprefix("torch.") != "uint8":
        return None
    # Of the bytes, only the address and the strides count.
    if isinstance(array, np.ndarray):
        data = ffi.cast("char *", array.__array_interface__["data"][0])
        described = Array(data, array.shape, array.strides, DTYPE_CODES["int8"])
    elif is_tensor(array):
        address = _address_of_values(name, array)
        strides = tuple(array.stride())
        described = Array(ffi.cast("char *", address), tuple(array.shape), strides, DTYPE_CODES["int8"])
    else:
        return None
    if 0 not in described.shape and described.strides[-1:] != (1,):
        raise ArgumentError(f"{name} has gaps along its last axis; pass a contiguous copy")
    return described


def _numpy_array(name: str, array: NDArray[Any]) -> Array:
    dtype = _CODES.get(array.dtype)
    if dtype is None:
        # ml_dtypes registers bfloat16; compare its name, so that ml_dtypes need not be imported.
        if array.dtype.name != "bfloat16" or array.dtype.itemsize != 2:
            raise ArgumentError(f"{name} is {array.dtype}; it must be float32, float16 or bfloat16")
        dtype = _CODES[array.dtype] = _NAMED["bfloat16"]
    if array.size == 0:
        data = ffi.NULL  # cffi refuses to take the address of no bytes
    elif array.flags.c_contiguous:
        # The buffer protocol has no bfloat16.
        bits = array if dtype != _NAMED["bfloat16"] else array.view(np.uint16)
        data = ffi.from_buffer(bits)
    else:
        data = ffi.cast("char *", array.__array_interface__["data"][0])
    return Array(data, array.shape, array.strides, dtype)


def _tensor(name: str, tensor: Any) -> Array:
    torch = sys.modules["torch"]
    dtype = _NAMED.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise ArgumentError(f"{name} is {tensor.dtype}; it must be float32, float16 or bfloat16")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(f"{name} requires grad, and nothing here has one: use torch.no_grad()")
    address = _address_of_values(name, tensor)
    item_bytes = _ITEM_BYTES[dtype]
    strides = tuple(stride * item_bytes for stride in tensor.stride())
    return Array(ffi.cast("char *", address), tuple(tensor.shape), strides, dtype)


def _address_of_values(name: str, tensor: Any) -> int:
    """The address of a tensor's first value; ArgumentError when its values are not in its memory.

    A tensor may have no memory (fake, distributed, wrapped, its storage freed), less than its shape says (its
    storage shrunk), or memory that means something else (a sign in a flag, a tangent beside it).
    """
    _require_plain(name, tensor)
    if tensor.is_neg() or tensor.is_conj():
        raise ArgumentError(f"{name} has its sign in a flag; pass {name}.resolve_neg().resolve_conj()")
    if has_tangent(tensor):
        raise ArgumentError(f"{name} has a tangent, and nothing here has one; pass its primal value")
    try:
        address = int(tensor.data_ptr())
        num_bytes = int(tensor.untyped_storage().nbytes())
    except (RuntimeError, NotImplementedError) as error:
        raise ArgumentError(f"{name} has no memory of its own: {error!s:.120}") from None
    if tensor.numel():
        last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
        if address == 0 or num_bytes < needed:
            raise ArgumentError(
                f"{name} takes {needed} bytes of its storage, which has {num_bytes}; it was resized or freed"
            )
    return address


def _require_plain(name: str, tensor: Any) -> None:
    """ArgumentError for tensors that are not strided CPU tensors, or that dispatch their
    operations elsewhere.
    """
    torch = sys.modules["torch"]
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        raise ArgumentError(f"{name} is on {tensor.device}, {tensor.layout}; it must be a strided CPU tensor")
    kind = type(tensor)
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise ArgumentError(
            f"{name} is a {kind.__name__}, whose values are not in its own memory; pass these"
        )


def has_tangent(tensor: Any) -> bool:
    """Is it a dual tensor of forward-mode differentiation?"""
    forward_ad = sys.modules.get("torch.autograd.forward_ad")
    if forward_ad is None or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def numpy_of(name: str, array: Any) -> Any:
    """A tensor's values as a numpy array; anything else as it is.  Raises: ArgumentError."""
    if not is_tensor(array):
        return array
    _require_plain(name, array)
    array = array.detach().resolve_conj().resolve_neg()
    _address_of_values(name, array)
    torch = sys.modules["torch"]
    return array.float().numpy() if array.dtype is torch.bfloat16 else array.numpy()


Element = TypeVar("Element", bound=np.generic)


def read_only(array: NDArray[Element]) -> NDArray[Element]:
    """The array's elements, in place, through a buffer that offers no writing: `setflags` cannot allow it."""
    return np.asarray(array.data.toreadonly())


def rows_of(name: str, array: object, *shapes: tuple[int, int, int]) -> Array:
    """Describe [num_tokens, num_heads, dim], which has one of these shapes."""
    described = array_of(name, array)
    if described.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ArgumentError(f"{name} has the shape {list(described.shape)}; it must be {wanted}")
    return described


def fill_tensor(rows: Any, array: Array) -> None:
    """Fill a `pkv_tensor`; the array must outlive it."""
    rows.data = array.data
    rows.token_stride, rows.head_stride, _ = array.strides
    rows.dtype = array.dtype


def empty_like(array: Any, shape: tuple[int, ...], dtype: str | None = None) -> Any:
    """A new array of the kind of this one, and its dtype if none is named."""
    if is_tensor(array):
        torch = sys.modules["torch"]
        return array.new_empty(shape, dtype=array.dtype if dtype is None else getattr(torch, dtype))
    return np.empty(shape, array.dtype if dtype is None else dtype)


def output(
    name: str, array: object, shape: tuple[int, int, int], like: Array, inputs: dict[str, Array]
) -> Array:
    """Describe an array that can take a result of `like`'s dtype: `like` itself, or memory apart from inputs.

    Raises: ArgumentError also when it cannot be written, or two of its elements are one.
    """
    out = rows_of(name, array, shape)
    if out.dtype != like.dtype:
        raise ArgumentError(f"{name} is {_NAMES[out.dtype]}; it must be {_NAMES[like.dtype]}, as q is")
    require_target(name, array, out)
    low, high = out.extent
    for other_name, other in inputs.items():
        other_low, other_high = other.extent
        if low >= other_high or other_low >= high or 0 in out.shape or 0 in other.shape:
            continue
        if other is like and (low, high) == other.extent and out.strides == other.strides:
            continue
        # Slices of one array may interleave.
        if np.shares_memory(out.item_bytes, other.item_bytes):
            raise ArgumentError(f"{name} overlaps {other_name}; pass q itself, or memory apart from it")
    return out


def require_target(name: str, array: object, described: Array) -> None:
    """ArgumentError for an array that cannot be written, or two of whose elements are one."""
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ArgumentError(f"{name} is read-only")
    if _overlaps_itself(described):
        raise ArgumentError(f"{name} has several elements in one place; pass an array of its own")


def _overlaps_itself(array: Array) -> bool:
    if 0 in array.shape:
        return False
    reach = _ITEM_BYTES[array.dtype]  # bytes that the axes so far take
    for stride, size in sorted(zip(map(abs, array.strides), array.shape, strict=True)):
        if size > 1 and stride < reach:
            return True
        reach = max(reach, stride * (size - 1) + _ITEM_BYTES[array.dtype])
    return False


def float32_pointer(name: str, array: object, *shapes: tuple[int, ...]) -> Any:
    """A pointer to a C-contiguous float32 array of one of these shapes; ArgumentError for anything else."""
    if not isinstance(array, np.ndarray):
        raise ArgumentError(f"{name} must be a numpy array, not {type(array).__name__}")
    if array.dtype != np.float32 or array.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ArgumentError(
            f"{name} must be float32 of shape {wanted}, not {array.dtype} of shape {list(array.shape)}"
        )
    if not array.flags.c_contiguous:
        raise ArgumentError(f"{name} must be C-contiguous; pass numpy.ascontiguousarray({name})")
    # cffi refuses to take the address of no bytes.
    return ffi.from_buffer("char[]", array) if array.size else ffi.NULL


def head_values(name: str, values: object, num_q_heads: int, *, least: float) -> NDArray[np.float32]:
    """float32 [num_q_heads] of a vector of real numbers, each finite or, where that is allowed, -inf."""
    values = numpy_of(name, values)
    try:
        vector = np.asarray(values)
        is_real = vector.dtype.kind in "fiu" or vector.dtype.name == "bfloat16"
    except (TypeError, ValueError):
        vector, is_real = np.empty(0), False
    if not is_real or vector.shape != (num_q_heads,):
        raise ArgumentError(f"{name} must be {num_q_heads} numbers, one for each q head, not {values!r:.60}")
    if vector.dtype == np.float32:
        floats = vector.copy()  # the caller may change its array
    else:
        with np.errstate(all="ignore"):
            floats = vector.astype(np.float32)
    if not (floats.min() >= least and floats.max() < np.inf):
        raise ArgumentError(f"{name} must be finite{', or -inf' if least == -np.inf else ''}: {values!r:.60}")
    return floats


def index_vector(name: str, values: object) -> NDArray[np.int64]:
    """A vector of int32 or int64 numbers, of numpy, torch or a list, as int64."""
    values = numpy_of(name, values)
    try:
        vector = np.asarray(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(f"{name} is {values!r:.60}; it must be a vector of integers: {error}") from None
    if vector.size == 0 and isinstance(values, list):
        vector = np.empty(0, np.int64)
    if vector.ndim != 1 or vector.dtype not in (np.int32, np.int64):
        found = f"{vector.dtype} {list(vector.shape)}"
        raise ArgumentError(f"{name} is {found}; it must be a vector of int32 or int64")
    return np.ascontiguousarray(vector, np.int64)


def dense_float32(name: str, values: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A contiguous float32 array of this shape: the array itself, or a copy if it has gaps."""
    if is_tensor(values):
        _tensor(name, values)
        values = values.detach()
        values = values.numpy() if str(values.dtype) == "torch.float32" else values
    if getattr(values, "dtype", None) != np.float32 or values.shape != shape:
        found = f"{getattr(values, 'dtype', type(values).__name__)} {list(getattr(values, 'shape', []))}"
        raise ArgumentError(f"{name} is {found}; it must be float32 {list(shape)}")
    return np.ascontiguousarray(values)
