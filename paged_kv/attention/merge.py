"""Merging: attention over a whole context from attention over disjoint parts of it.

Imports arrays.
"""

from typing import Any

from .._binding import check, ffi, lib
from ..errors import ArgumentError
from .arrays import array_of, dense_float32, empty_like, fill_tensor


def merge_states(outputs: Any, lses: Any) -> Any:
    """Attention over all of some disjoint parts of the same context, from that over each of them.

    Parameters
    ----------
    outputs : [num_parts, num_tokens, num_q_heads, head_dim_v], or a list of num_parts such arrays; float32,
        float16 or bfloat16, numpy or torch
    lses : float32 [num_parts, num_tokens, num_q_heads], natural logarithms, or a list of them

    Parts whose lse is -inf count for nothing, whatever their output holds.  Learned sinks belong to one part
    only.

    Returns: (out, lse), [num_tokens, num_q_heads, head_dim_v] of the first part's dtype and kind, and float32
    of its kind.
    Raises: ArgumentError.  Cost: reads every part once.
    Source: Ye et al., FlashInfer, MLSys 2025, section 2.2.
    """
    try:
        outputs, lses = list(outputs), list(lses)
    except TypeError:
        raise ArgumentError("outputs and lses must be lists of arrays, or arrays of one more axis") from None
    if not outputs or len(outputs) != len(lses):
        raise ArgumentError(f"there are {len(outputs)} outputs and {len(lses)} lses; give one for each part")
    parts = [array_of(f"outputs[{i}]", output) for i, output in enumerate(outputs)]
    shape = parts[0].shape
    if len(shape) != 3 or not 8 <= shape[2] <= 256 or shape[2] % 8:
        raise ArgumentError(
            f"outputs[0] has the shape {list(shape)}; it must be [num_tokens, num_q_heads, head_dim_v], "
            "head_dim_v a multiple of 8 from 8 to 256"
        )
    sums = []
    for i, (part, lse) in enumerate(zip(parts, lses, strict=True)):
        if part.shape != shape:
            raise ArgumentError(f"outputs[{i}] has the shape {list(part.shape)}, outputs[0] {list(shape)}")
        sums.append(dense_float32(f"lses[{i}]", lse, shape[:2]))
    rows = ffi.new("pkv_tensor[]", len(parts))
    for row, part in zip(rows, parts, strict=True):
        fill_tensor(row, part)
    out, lse = empty_like(outputs[0], shape), empty_like(outputs[0], shape[:2], "float32")
    out_rows = ffi.new("pkv_tensor *")
    fill_tensor(out_rows, array_of("out", out))
    pointers = [ffi.from_buffer("float[]", array) if array.size else ffi.NULL for array in sums]
    lse_at = ffi.cast("float *", array_of("lse", lse).data)
    lses_at = ffi.new("float *[]", pointers)
    check(lib.pkv_merge_states(len(parts), rows, lses_at, *shape, out_rows, lse_at), "merge_states")
    return out, lse
