"""Prepared calls: append and attention, validated once and repeated while the arrays look the same.

    call = PreparedAttention(...)      validates everything
    call.run(...)                      one C call
    call.repeat(...)                   compares the next arrays, sets their addresses, one C call

Imports array_template.
"""

from typing import Any

import numpy as np
from numpy import ndarray
from numpy.typing import NDArray

from .._binding import FLOAT32_MAX, check, ffi, integer, lib, real
from ..errors import ArgumentError, LayerNotWritten
from .array_template import template_of
from .arrays import (
    Array,
    array_of,
    empty_like,
    fill_tensor,
    head_values,
    is_tensor,
    output,
    rows_of,
)

OUT_OVERLAPS = lib.PKV_OUT_OVERLAPS

#: sm_scale, logits_soft_cap, sinks, alibi_slopes, return_lse, window, num_sink_tokens, return_mass, top_pages
#: and skip_values_below, as `Step.attend` takes them.
Options = tuple[Any, Any, Any, Any, Any, Any, Any, Any, Any, Any]


class PreparedAppend:
    """A validated call that writes one layer of a step's keys and values.

    Parameters
    ----------
    pages : a `pkv_pages *`, of any layer of the cache
    num_tokens : of the step
    k, v : as `Step.write` takes them

    `repeat` runs it with other arrays, for steps of num_tokens in the same cache: a quarter of the time when
    they look the same.
    """

    __slots__ = ("_k", "_k_template", "_v", "_v_template")

    def __init__(self, pages: Any, num_tokens: int, k: Any, v: Any) -> None:
        k_rows, v_rows = new_rows(pages, num_tokens, k, v).values()
        self._k, self._v = ffi.new("pkv_tensor *"), ffi.new("pkv_tensor *")
        fill_tensor(self._k, k_rows)
        fill_tensor(self._v, v_rows)
        self._k_template, self._v_template = template_of(k, k_rows), template_of(v, v_rows)

    def run(self, pages: Any, plan: Any) -> None:
        """Write into the slots of plan, a `pkv_plan *`.  Raises: StepClosed, CacheClosed."""
        if status := lib.pkv_step_write(pages, plan, self._k, self._v):
            check(status, "write")

    def repeat(self, pages: Any, plan: Any, k: Any, v: Any) -> bool:
        """Write these arrays; False, and nothing was done, when they have to be validated in full."""
        k_template, v_template = self._k_template, self._v_template
        if k_template is None or v_template is None:
            return False
        if not (k_template.bind(k, self._k) and v_template.bind(v, self._v)):
            return False
        if status := lib.pkv_step_write(pages, plan, self._k, self._v):
            check(status, "write")
        return True


def new_rows(pages: Any, num_tokens: int, k: object, v: object) -> dict[str, Array]:
    """Describe one layer's keys and values of a step."""
    return {
        "k": rows_of("k", k, (num_tokens, pages.num_kv_heads, pages.head_dim)),
        "v": rows_of("v", v, (num_tokens, pages.num_kv_heads, pages.head_dim_v)),
    }


class Attention:
    """A validated `pkv_attention`, and what it points to.

    pages is a `pkv_pages *`; q is an array and its description, of num_tokens rows; out must not overlap any
    of the inputs.  The other parameters are those of `Step.attend`.
    """

    __slots__ = ("arguments", "lse", "mass", "out", "out_rows", "per_head")

    def __init__(
        self,
        pages: Any,
        num_tokens: int,
        q: tuple[Any, Array],
        inputs: dict[str, Array],
        out: Any,
        options: Options,
        num_pages: int = 0,
    ) -> None:
        return_lse, return_mass = options[4], options[7]
        num_kv_heads, head_dim, head_dim_v = pages.num_kv_heads, pages.head_dim, pages.head_dim_v
        q_array, q_rows = q
        num_q_heads = _num_q_heads(q_rows, num_tokens, num_kv_heads, head_dim)
        arguments = self.arguments = ffi.new("pkv_attention *")
        arguments.num_q_heads = num_q_heads
        set_scales(arguments, head_dim, options)
        #: Sinks and slopes, which `arguments` points to.
        self.per_head = per_head_of(options, num_q_heads)
        for name, floats in zip(("sinks", "alibi_slopes"), self.per_head, strict=True):
            if floats is not None:
                setattr(arguments, name, ffi.from_buffer("float[]", floats))
        shape = (num_tokens, num_q_heads, head_dim_v)
        if out is None:
            self.out = empty_like(q_array, shape)
            self.out_rows = array_of("out", self.out)
        else:
            self.out = out
            self.out_rows = output("out", out, shape, q_rows, {"q": q_rows, **inputs})
        fill_tensor(arguments.q, q_rows)
        fill_tensor(arguments.out, self.out_rows)
        if type(return_lse) is not bool:
            raise ArgumentError(f"return_lse must be True or False, not {return_lse!r:.60}")
        self.lse = None
        if return_lse:
            self.lse = empty_like(q_array, shape[:2], "float32")
            arguments.lse = ffi.cast("float *", array_of("lse", self.lse).data)
        if type(return_mass) is not bool:
            raise ArgumentError(f"return_mass must be True or False, not {return_mass!r:.60}")
        self.mass = None
        if return_mass:
            self.mass = empty_like(q_array, (num_pages, num_kv_heads), "float32")
            arguments.mass = ffi.cast("float *", array_of("mass", self.mass).data)

    @property
    def result(self) -> Any:
        """out, or a tuple of it and what else is returned."""
        others = [other for other in (self.lse, self.mass) if other is not None]
        return (self.out, *others) if others else self.out


class PreparedAttention:
    """A validated call of a step's attention, with or without new keys and values.

    Parameters
    ----------
    pages : a `pkv_pages *`, of any layer of the cache
    num_tokens, num_pages : of the step
    q, k, v, out, options : as `Step.attend` takes them; k and v may both be None
    others : arrays besides, which out must not overlap

    `repeat` runs it with other arrays, for steps of num_tokens in the same cache: a tenth of the time when
    they look the same.  Calls that return more than out are not repeated, nor those of unusual arrays:
    `can_repeat` is False.
    """

    __slots__ = (
        *("_arguments", "_byte_lengths", "_call", "_head_dim", "_per_head", "_rows", "_scales", "_templates"),
    )

    def __init__(
        self,
        pages: Any,
        num_tokens: int,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        options: Options,
        num_pages: int = 0,
        others: dict[str, Array] | None = None,
    ) -> None:
        q_rows = array_of("q", q)
        inputs = dict(others or {}) if k is None else new_rows(pages, num_tokens, k, v) | (others or {})
        call = Attention(pages, num_tokens, (q, q_rows), inputs, out, options, num_pages)
        self._call: Attention | None = call  # until it has run
        arguments = self._arguments = call.arguments
        if k is not None:
            arguments.has_rows = 1
            fill_tensor(arguments.k, inputs["k"])
            fill_tensor(arguments.v, inputs["v"])
        self._rows = (arguments.q, arguments.k, arguments.v, arguments.out)
        self._head_dim, self._scales, self._per_head = pages.head_dim, scales_of(options), call.per_head
        self._templates = None
        # `repeat` without out makes one of q's kind.
        if options[4] is False and options[7] is False and is_tensor(call.out) == is_tensor(q):
            described = (q_rows, inputs.get("k"), inputs.get("v"), call.out_rows)
            self._templates = templates_of((q, k, v, call.out), described)

    @property
    def can_repeat(self) -> bool:
        return self._templates is not None

    def run(self, threads: Any, pages: Any, plan: Any) -> Any:
        """Attend, once, from a plan's rows.  Returns: out, or a tuple of it, lse and mass.

        Raises: LayerNotWritten, StepClosed, CacheClosed.
        """
        call, self._call = self._call, None  # so that its arrays live no longer than this method
        assert call is not None
        if status := lib.pkv_step_attend(threads, pages, plan, self._arguments):
            raise_for(status, pages)
        if self._templates is not None:
            num_bytes = [0 if template is None else template.num_bytes for template in self._templates]
            self._arguments.byte_lengths = self._byte_lengths = ffi.new("int64_t[4]", num_bytes)
        return call.result

    def repeat(
        self, threads: Any, pages: Any, plan: Any, q: Any, k: Any, v: Any, out: Any, options: Options
    ) -> Any:
        """As `run`, of these arrays, k and v being None as before; None, and nothing was done, when they have
        to be validated in full.
        """
        if self._templates is None or options[4] is not False or options[7] is not False:
            return None
        if (options[2] is None) is not (self._per_head[0] is None):
            return None
        if (options[3] is None) is not (self._per_head[1] is None):
            return None
        q_template, k_template, v_template, out_template = self._templates
        q_rows, k_rows, v_rows, out_rows = self._rows
        if not q_template.bind(q, q_rows):
            return None
        if k_template is not None and not (k_template.bind(k, k_rows) and v_template.bind(v, v_rows)):
            return None
        if out is None:
            out = out_template.new()
        elif type(out) is ndarray and not out.flags.writeable:
            return None
        if not out_template.bind(out, out_rows):
            return None
        if options[2] is not None or options[3] is not None:
            self._set_per_head(options)
        scale, cap, window, sinks, top_pages, share = self._scales
        # By identity: what is no number must not be compared.
        if (
            options[0] is not scale
            or options[1] is not cap
            or options[5] is not window
            or options[6] is not sinks
            or options[8] is not top_pages
            or options[9] is not share
        ):
            set_scales(self._arguments, self._head_dim, options)
            self._scales = scales_of(options)
        if status := lib.pkv_step_attend(threads, pages, plan, self._arguments):
            if status == OUT_OVERLAPS:
                return None
            raise_for(status, pages)
        return out

    def _set_per_head(self, options: Options) -> None:
        """Copy other sinks and slopes to where `arguments` points: both, or none when one is invalid."""
        found = per_head_of(options, self._arguments.num_q_heads)
        for floats, kept in zip(found, self._per_head, strict=True):
            if floats is not None and kept is not None:
                kept[:] = floats


def templates_of(arrays: tuple[Any, ...], described: tuple[Array | None, ...]) -> tuple[Any, ...] | None:
    """A template of each array, None for one that is not there; None when one of them cannot have any."""
    pairs = zip(arrays, described, strict=True)
    templates = [None if rows is None else template_of(array, rows) for array, rows in pairs]
    if [template is None for template in templates] != [rows is None for rows in described]:
        return None
    return tuple(templates)


def per_head_of(
    options: Options, num_q_heads: int
) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """Sinks and slopes, float32 [num_q_heads], or None."""
    sinks, slopes = options[2], options[3]
    return (
        None if sinks is None else head_values("sinks", sinks, num_q_heads, least=-np.inf),
        None if slopes is None else head_values("alibi_slopes", slopes, num_q_heads, least=-FLOAT32_MAX),
    )


def scales_of(options: Options) -> tuple[Any, Any, Any, Any, Any, Any]:
    """What may differ between repeated calls: sm_scale, logits_soft_cap, window, num_sink_tokens, top_pages
    and skip_values_below."""
    return options[0], options[1], options[5], options[6], options[8], options[9]


def set_scales(arguments: Any, head_dim: int, options: Options) -> None:
    """Write what `scales_of` names: all, or none when one is invalid."""
    sm_scale, logits_soft_cap, window, num_sink_tokens, top_pages, skip_values_below = scales_of(options)
    scale = head_dim**-0.5 if sm_scale is None else real("sm_scale", sm_scale)
    cap = real("logits_soft_cap", logits_soft_cap, least=0.0)
    size = 0 if window is None else integer("window", window, 1)
    sinks = integer("num_sink_tokens", num_sink_tokens, 0)
    num_top = 0 if top_pages is None else integer("top_pages", top_pages, 1)
    share = real("skip_values_below", skip_values_below, least=0.0)
    arguments.sm_scale, arguments.logits_soft_cap = scale, cap
    arguments.top_pages, arguments.skip_values_below = num_top, share
    arguments.window, arguments.num_sink_tokens = size, sinks if size else 0


def raise_for(status: int, pages: Any) -> None:
    """What a step's attention raises."""
    if status == lib.PKV_LAYER_NOT_WRITTEN:
        raise LayerNotWritten(f"layer {pages.layer} has no keys and values; write them, or give them")
    check(status, "attend")


def _num_q_heads(q: Array, num_tokens: int, num_kv_heads: int, head_dim: int) -> int:
    if len(q.shape) != 3 or q.shape[0] != num_tokens or q.shape[2] != head_dim:
        wanted = f"[{num_tokens}, num_q_heads, {head_dim}]"
        raise ArgumentError(f"q has the shape {list(q.shape)}; it must be {wanted}")
    num_q_heads = q.shape[1]
    if num_q_heads < 1 or num_q_heads % num_kv_heads or num_q_heads > 2**16:
        raise ArgumentError(f"q has {num_q_heads} heads; it takes a multiple of the {num_kv_heads} kv heads")
    return num_q_heads
