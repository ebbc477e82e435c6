"""Keys and values gathered from pages into dense arrays, for code that reads no pages.

    k, v, lengths = gather(store, seq_ids, layer, "bfloat16", None)

Imports store.
"""

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._binding import check, ffi, lib
from .attention.arrays import Array, array_of, fill_tensor, is_tensor, require_target
from .errors import ArgumentError
from .pages.layout import dtype_name
from .store import Store

#: Instead of a slot: the row is filled with zeros.
NO_SLOT = -1


def gather(
    store: Store, seq_ids: list[int], layer: object, dtype: object, out: object
) -> tuple[Any, Any, NDArray[np.int32]]:
    """What `PagedKVCache.gather` returns."""
    store.require_open()
    pages, layout, tables = store.pages(layer), store.layout, store.tables
    with store.reading():
        slots = [tables.slots(tables.rows.row(seq_id)) for seq_id in seq_ids]
    lengths = np.array(list(map(len, slots)), np.int32)
    shape = len(slots), int(lengths.max(initial=0)), layout.num_kv_heads
    if out is None:
        sides = [_empty((*shape, dim), dtype) for dim in (layout.head_dim, layout.head_dim_v)]
    else:
        if dtype is not None:
            raise ArgumentError(f"dtype is {dtype!r:.40} beside out, whose dtype counts; give one of them")
        sides = _two_of(out)
    k, v = (
        _target(name, side, (*shape, dim))
        for name, side, dim in zip(
            ("out[0]", "out[1]"), sides, (layout.head_dim, layout.head_dim_v), strict=True
        )
    )
    if k.shape[1] != v.shape[1]:
        raise ArgumentError(f"out has {k.shape[1]} and {v.shape[1]} rows a sequence; give as many of each")
    if 0 not in k.shape and np.shares_memory(k.item_bytes, v.item_bytes):
        raise ArgumentError("out[0] and out[1] share memory; give two arrays")
    rows = np.full(k.shape[1], NO_SLOT, np.int64)
    targets = ffi.new("pkv_tensor[2]")
    for i, own in enumerate(slots):
        rows[: len(own)], rows[len(own) :] = own, NO_SLOT
        for target, side in zip((targets[0], targets[1]), (k, v), strict=True):
            fill_tensor(target, Array(side.data + i * side.strides[0], *_row_of(side)))
        if len(rows):
            status = lib.pkv_gather(
                pages, len(rows), ffi.from_buffer("int64_t[]", rows), targets, targets + 1
            )
            check(status, "gather")
    return sides[0], sides[1], lengths


def _row_of(side: Array) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return side.shape[1:], side.strides[1:], side.dtype


def _empty(shape: tuple[int, ...], dtype: object) -> Any:
    """A torch tensor when the dtype is torch's, else a numpy array."""
    name = dtype_name("float32" if dtype is None else dtype)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        return torch.empty(shape, dtype=dtype)
    try:
        return np.empty(shape, name)
    except TypeError:
        raise ArgumentError(
            "numpy has no bfloat16: import ml_dtypes, give dtype=torch.bfloat16, or out="
        ) from None


def _two_of(out: object) -> list[Any]:
    if not isinstance(out, (list, tuple)) or len(out) != 2 or is_tensor(out[0]) != is_tensor(out[1]):
        raise ArgumentError(f"out is {type(out).__name__}; give (k, v), two arrays or two tensors")
    return list(out)


def _target(name: str, side: object, shape: tuple[int, ...]) -> Array:
    """Describe an array of this shape, or with more rows for each sequence."""
    described = array_of(name, side)
    found = described.shape
    fits = len(found) == 4 and found[0] == shape[0] and found[1] >= shape[1] and found[2:] == shape[2:]
    if not fits:
        raise ArgumentError(
            f"{name} has the shape {list(found)}; it must be {list(shape)}, or have more rows a sequence"
        )
    require_target(name, side, described)
    return described
