"""Attention over pages, whoever owns them: one call, its arguments held against each other; and the merging
of parts.

Imports form.
"""

from typing import Any

import numpy as np
from numpy import ndarray

from ._binding import FLOAT32_MAX, check, ffi, lib, real
from .arrays import (
    Array,
    array_of,
    dense_float32,
    empty_like,
    head_values,
    is_tensor,
    output,
    set_rows,
)
from .errors import ArgumentError
from .form import Form, has_form

OUT_OVERLAPS = lib.PKV_OUT_OVERLAPS


class Append:
    """One call that writes a step's keys and values into a layer's slots, and others that look like it.

    pages is one layer's `pkv_pages *`, plan a `pkv_plan *`.
    """

    __slots__ = ("_forms", "_k", "_v", "num_tokens")

    def __init__(self, k: tuple[Any, Array], v: tuple[Any, Array]) -> None:
        """k and v are arrays and their descriptions."""
        self._k, self._v = ffi.new("pkv_rows *"), ffi.new("pkv_rows *")
        set_rows(self._k, k[1])
        set_rows(self._v, v[1])
        self.num_tokens = k[1].shape[0]
        self._forms = (Form(*k), Form(*v)) if has_form(*k) and has_form(*v) else None

    def run(self, pages: Any, plan: Any) -> None:
        if status := lib.pkv_step_write(pages, plan, self._k, self._v):
            check(status, "append")

    def repeat(self, pages: Any, plan: Any, k: Any, v: Any) -> bool:
        """Write these; False, and nothing was done, when they have to be asked everything."""
        if self._forms is None:
            return False
        if not (self._forms[0].place(k, self._k) and self._forms[1].place(v, self._v)):
            return False
        self.run(pages, plan)
        return True


class Attention:
    """One call of attention, checked and ready to run: `pkv_attention` and what it points to.

    pages is one layer's `pkv_pages *`; q is an array and its description, of num_tokens rows.  With slots, an
    `int64_t *`, the rows `inputs["k"]` and `inputs["v"]` are written there first; out must not overlap any of
    the inputs.
    The other parameters are those of `Step.attend`.
    """

    __slots__ = ("_arguments", "_kept", "_pages", "_rows", "lse", "out")

    def __init__(
        self,
        pages: Any,
        num_tokens: int,
        q: tuple[Any, Array],
        inputs: dict[str, Array],
        slots: Any = None,
        *,
        sm_scale: object,
        logits_soft_cap: object,
        sinks: object,
        alibi_slopes: object,
        out: Any,
        return_lse: object,
    ) -> None:
        num_kv_heads, head_dim, head_dim_v = pages.num_kv_heads, pages.head_dim, pages.head_dim_v
        q_array, q_rows = q
        num_q_heads = _num_q_heads(q_rows, num_tokens, num_kv_heads, head_dim)
        arguments = self._arguments = ffi.new("pkv_attention *")
        arguments.num_q_heads = num_q_heads
        arguments.sm_scale = head_dim**-0.5 if sm_scale is None else real("sm_scale", sm_scale)
        if logits_soft_cap != 0.0 or type(logits_soft_cap) is not float:
            arguments.logits_soft_cap = real("logits_soft_cap", logits_soft_cap, least=0.0)
        self._pages = pages
        self._kept: list[Any] = []  # what else has to stay for as long as the call runs
        if sinks is not None:
            floats = head_values("sinks", sinks, num_q_heads, least=-np.inf)
            arguments.sinks = self._keep(ffi.from_buffer("float[]", floats))
        if alibi_slopes is not None:
            floats = head_values("alibi_slopes", alibi_slopes, num_q_heads, least=-FLOAT32_MAX)
            arguments.alibi_slopes = self._keep(ffi.from_buffer("float[]", floats))
        if slots is not None:
            arguments.slots = slots
            set_rows(arguments.k, inputs["k"])
            set_rows(arguments.v, inputs["v"])
        shape = (num_tokens, num_q_heads, head_dim_v)
        if out is None:
            self.out = empty_like(q_array, shape)
            out_rows = array_of("out", self.out)
        else:
            self.out = out
            out_rows = output("out", out, shape, q_rows, {"q": q_rows, **inputs})
        set_rows(arguments.q, q_rows)
        set_rows(arguments.out, out_rows)
        self._rows = (q_rows, out_rows, inputs)
        if type(return_lse) is not bool:
            raise ArgumentError(f"return_lse must be True or False, not {return_lse!r:.60}")
        self.lse = None
        if return_lse:
            self.lse = empty_like(q_array, shape[:2], "float32")
            arguments.lse = ffi.cast("float *", self._keep(array_of("lse", self.lse).data))

    def _keep(self, pointer: Any) -> Any:
        self._kept.append(pointer)
        return pointer

    def run(self, threads: Any, batch: Any) -> Any:
        """Attend: q's rows are those of `batch`, a `pkv_batch *`.  Returns: out, or (out, lse)."""
        check(lib.pkv_attend(threads, self._pages, batch, self._arguments), "attend")
        return self.out if self.lse is None else (self.out, self.lse)


class RepeatedAttention:
    """A call that was made, for the next ones whose arrays look like its own: of these, addresses are all
    that has to be set, which takes a quarter of the time.

    Calls with sinks, slopes or an lse and those with unusual arrays are not repeated: `of` returns None.
    """

    __slots__ = ("_arguments", "_forms", "_rows", "_spans", "num_tokens", "scale")

    def __init__(self, call: Attention, forms: tuple[Any, ...], scale: tuple[Any, Any]) -> None:
        arguments = self._arguments = call._arguments
        self._rows = (arguments.q, arguments.k, arguments.v, arguments.out)
        self._forms = forms
        self.scale = scale
        self.num_tokens = call._rows[0].shape[0]
        self._spans = ffi.new("int64_t[4]", [0 if form is None else form.span for form in forms])
        arguments.spans = self._spans

    @classmethod
    def of(
        cls, call: Attention, arrays: tuple[Any, Any, Any], scale: tuple[Any, Any]
    ) -> "RepeatedAttention | None":
        """`arrays` are its q, k and v, `scale` its sm_scale and logits_soft_cap, as they were given."""
        # The next result is of the form of this one; without `out` it must be of q's kind.
        if call._kept or call.lse is not None or is_tensor(call.out) != is_tensor(arrays[0]):
            return None
        q_rows, out_rows, inputs = call._rows
        described = (q_rows, inputs.get("k"), inputs.get("v"), out_rows)
        pairs = list(zip((*arrays, call.out), described, strict=True))
        if not all(rows is None or has_form(array, rows) for array, rows in pairs):
            return None
        return cls(call, tuple(rows and Form(array, rows) for array, rows in pairs), scale)

    def run(self, threads: Any, pages: Any, batch: Any, slots: Any, q: Any, k: Any, v: Any, out: Any) -> Any:
        """As `Attention.run`; None, and nothing was done, when these arrays have to be asked everything.

        pages are of this call's store, and batch has `num_tokens` rows.
        """
        q_form, k_form, v_form, out_form = self._forms
        arguments = self._arguments
        q_rows, k_rows, v_rows, out_rows = self._rows
        if (k is None) != (k_form is None) or not q_form.place(q, q_rows):
            return None
        if k_form is not None:
            if not (k_form.place(k, k_rows) and v_form.place(v, v_rows)):
                return None
            arguments.slots = slots
        if out is None:
            out = out_form.empty()
        elif type(out) is ndarray and not out.flags.writeable:
            return None
        if not out_form.place(out, out_rows):
            return None
        if status := lib.pkv_attend(threads, pages, batch, arguments):
            if status == OUT_OVERLAPS:
                return None
            check(status, "attend")
        return out


def _num_q_heads(q: Array, num_tokens: int, num_kv_heads: int, head_dim: int) -> int:
    if len(q.shape) != 3 or q.shape[0] != num_tokens or q.shape[2] != head_dim:
        wanted = f"[{num_tokens}, num_q_heads, {head_dim}]"
        raise ArgumentError(f"q has the shape {list(q.shape)}; it must be {wanted}")
    num_q_heads = q.shape[1]
    if num_q_heads < 1 or num_q_heads % num_kv_heads or num_q_heads > 2**16:
        raise ArgumentError(f"q has {num_q_heads} heads; it takes a multiple of the {num_kv_heads} kv heads")
    return num_q_heads


# ---- parts


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
    rows = ffi.new("pkv_rows[]", len(parts))
    for row, part in zip(rows, parts, strict=True):
        set_rows(row, part)
    out, lse = empty_like(outputs[0], shape), empty_like(outputs[0], shape[:2], "float32")
    out_rows = ffi.new("pkv_rows *")
    set_rows(out_rows, array_of("out", out))
    pointers = [ffi.from_buffer("float[]", array) if array.size else ffi.NULL for array in sums]
    lse_at = ffi.cast("float *", array_of("lse", lse).data)
    lses_at = ffi.new("float *[]", pointers)
    check(lib.pkv_merge_states(len(parts), rows, lses_at, *shape, out_rows, lse_at), "merge_states")
    return out, lse
