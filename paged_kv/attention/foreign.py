"""Attention over pages that the caller owns: in numpy arrays or torch tensors, of any page size and order.

    paged_attention(q, k_pages, v_pages, qo_indptr=..., ...)       one call
    batch = PagedBatch(qo_indptr=..., ...)                         a step: the lists are validated once
    batch.attend(q, k_pages, v_pages, k, v)                        each layer: writes new rows, then attends

Imports attention.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._binding import DTYPE_CODES, ffi, integer, lib, shared_threads
from ..errors import ArgumentError
from ..lifetime import Uncopyable
from .array_template import template_of
from .arrays import Array, array_of, index_vector, quantised_pages, require_target
from .prepared import Options, PreparedAttention

INT8 = DTYPE_CODES["int8"]

#: return_mass, top_pages and skip_values_below, which are of a cache's pages.
NO_CHOICES = (False, None, 0.0)


def paged_attention(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    *,
    qo_indptr: Any,
    kv_indptr: Any,
    kv_indices: Any,
    kv_last_page_len: Any,
    k: Any = None,
    v: Any = None,
    slots: Any = None,
    k_scales: Any = None,
    v_scales: Any = None,
    window: int | None = None,
    num_sink_tokens: int = 0,
    causal: bool = True,
    sm_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    sinks: Any = None,
    alibi_slopes: Any = None,
    out: Any = None,
    return_lse: bool = False,
    num_threads: int | None = None,
) -> Any:
    """Attention over pages that the caller owns: decode, prefill and any mix of them.

    Parameters
    ----------
    q : [num_tokens, num_q_heads, head_dim], the rows of all sequences one after the other; the rows of a
        sequence are its last tokens
    k_pages : [num_pages, page_size, num_kv_heads, head_dim], any page_size, any strides but along the last
        axis; where heads come before tokens, pass ``k_pages.transpose(0, 2, 1, 3)``
    v_pages : [num_pages, page_size, num_kv_heads, head_dim_v]
    qo_indptr : int32 or int64 [num_seqs + 1]; sequence i has the rows ``q[qo_indptr[i] : qo_indptr[i + 1]]``
    kv_indptr : and the pages ``kv_indices[kv_indptr[i] : kv_indptr[i + 1]]``, in order
    kv_indices : int32 or int64, page ids
    kv_last_page_len : int32 or int64 [num_seqs], tokens in the last of them, 1 to page_size
    k, v : [num_tokens, num_kv_heads, head_dim] and [.., head_dim_v]: keys and values of the rows, which are
        written into the pages first; neither: they are there already
    slots : int32 or int64 [num_tokens], ``page_id * page_size + offset`` of each of them, no two alike; None:
        those of the last tokens of each sequence
    k_scales, v_scales : bfloat16 [num_pages, page_size, num_kv_heads], of any strides, where k_pages or
        v_pages are uint8: a value is (byte - 128) * its token's and head's scale
    window, num_sink_tokens : a row at position i sees j <= i where j > i - window or j < num_sink_tokens
    causal : False: every row sees every token of its sequence, of which there may be none; no window then,
        and no slopes, since a row has no position.  So parts of a context can be attended to, and merged
    num_threads : None: the CPUs that the process may use

    Dtypes, kinds, the other parameters and what is returned: those of `Step.attend`.
    Raises: ArgumentError.
    Cost: reads the keys and values of each sequence once for every block of its rows.
    """
    pages = _Pages(k_pages, v_pages, k_scales, v_scales)
    q_shape = array_of("q", q).shape
    options = (
        sm_scale,
        logits_soft_cap,
        sinks,
        alibi_slopes,
        return_lse,
        window,
        num_sink_tokens,
        *NO_CHOICES,
    )
    batch = PagedBatch(
        num_pages=pages.shape[0],
        page_size=pages.shape[1],
        qo_indptr=qo_indptr,
        kv_indptr=kv_indptr,
        kv_indices=kv_indices,
        kv_last_page_len=kv_last_page_len,
        slots=slots,
        causal=causal,
        num_tokens=q_shape[0] if q_shape else 0,
        num_threads=num_threads,
    )
    batch._require_sense(k, v, options)
    return batch._attend_first(pages, q, k_pages, v_pages, k, v, out, options)[0]


class PagedBatch(Uncopyable):
    """The lists of one step over pages that the caller owns, validated once for all of its layers.

    Parameters
    ----------
    num_pages, page_size : of the pages that `attend` takes
    num_tokens : rows of q; None: as qo_indptr says
    qo_indptr, kv_indptr, kv_indices, kv_last_page_len, slots, causal, num_threads : as for `paged_attention`;
        they are copied

    Like a step, it belongs to one thread.
    Raises: ArgumentError.  Cost: O(pages of the batch + new tokens).
    """

    _instead = "make another one of the same lists"
    __slots__ = ("_calls", "_causal", "_kept", "_plan", "_shape", "_threads", "num_tokens")

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        qo_indptr: Any,
        kv_indptr: Any,
        kv_indices: Any,
        kv_last_page_len: Any,
        slots: Any = None,
        causal: bool = True,
        num_tokens: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        self._shape = integer("num_pages", num_pages, 0), integer("page_size", page_size, 1)
        if type(causal) is not bool:
            raise ArgumentError(f"causal must be True or False, not {causal!r:.60}")
        if num_threads is not None:
            integer("num_threads", num_threads, 1, 1024)
        self._causal, self._threads = causal, shared_threads(num_threads)
        names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")
        lists = (qo_indptr, kv_indptr, kv_indices, kv_last_page_len)
        vectors = [index_vector(name, values) for name, values in zip(names, lists, strict=True)]
        if num_tokens is None:
            num_tokens = int(vectors[0][-1]) if len(vectors[0]) else 0
        self.num_tokens = num_tokens
        batch = ffi.new("pkv_batch *", {"sees_all": not causal})
        memory = _fill_batch(batch, num_tokens, self._shape, vectors)
        found = _slots_of(vectors, self._shape[1]) if slots is None else index_vector("slots", slots)
        if slots is not None and len(found) != num_tokens:
            raise ArgumentError(
                f"slots has {len(found)} entries for {num_tokens} rows of q; give one for each"
            )
        places = np.array(found, np.int64)
        _require_in_pages(places, self._shape[0] * self._shape[1])
        is_written = ffi.new("uint8_t[]", [1])
        self._plan = ffi.new(
            "pkv_plan *", {"batch": batch[0], "is_open": 1, "num_layers": 1, "is_written": is_written}
        )
        if len(places):
            self._plan.slot_mapping = ffi.from_buffer("int64_t[]", places)
        #: What the plan points to.
        self._kept = memory, is_written, places
        #: As `Step` has them: a prepared call and the pages that it reads.
        self._calls: dict[bool, tuple[PreparedAttention, _Pages] | None] = {}

    def attend(
        self,
        q: Any,
        k_pages: Any,
        v_pages: Any,
        k: Any = None,
        v: Any = None,
        *,
        k_scales: Any = None,
        v_scales: Any = None,
        window: int | None = None,
        num_sink_tokens: int = 0,
        sm_scale: float | None = None,
        logits_soft_cap: float = 0.0,
        sinks: Any = None,
        alibi_slopes: Any = None,
        out: Any = None,
        return_lse: bool = False,
    ) -> Any:
        """Attention of one layer: as `paged_attention`, with the lists of this batch.

        Calls whose arrays look like those of the call before take a fraction of its preparation; those with
        scales are validated in full.
        Raises: ArgumentError.
        """
        options = (
            sm_scale,
            logits_soft_cap,
            sinks,
            alibi_slopes,
            return_lse,
            window,
            num_sink_tokens,
            *NO_CHOICES,
        )
        self._require_sense(k, v, options)
        is_read_only = k is None
        known, result = self._calls.pop(is_read_only, None), None
        has_scales = k_scales is not None or v_scales is not None
        can_repeat = known is not None and out is None and not has_scales
        if can_repeat and known is not None and known[1].bind(k_pages, v_pages, is_read_only):
            result = known[0].repeat(self._threads, known[1].handle, self._plan, q, k, v, None, options)
        if result is None:
            pages = _Pages(k_pages, v_pages, k_scales, v_scales)
            result, new = self._attend_first(pages, q, k_pages, v_pages, k, v, out, options)
            known = new or known
        self._calls[is_read_only] = known
        return result

    def _require_sense(self, k: Any, v: Any, options: Options) -> None:
        if (k is None) is not (v is None):
            raise ArgumentError("give k and v, or neither, to attend to what the pages hold")
        if not self._causal and (options[5] is not None or options[3] is not None):
            raise ArgumentError("with causal=False a row has no position for a window or alibi_slopes")

    def _attend_first(
        self,
        pages: "_Pages",
        q: Any,
        k_pages: Any,
        v_pages: Any,
        k: Any,
        v: Any,
        out: Any,
        options: Options,
    ) -> tuple[Any, "tuple[PreparedAttention, _Pages] | None"]:
        """Validate a call in full and run it.  Returns: its result, and what `attend` may repeat, or None."""
        if pages.shape != self._shape:
            raise ArgumentError(
                f"k_pages has {pages.shape[0]} pages of {pages.shape[1]} tokens, and the batch was made for "
                f"{self._shape[0]} of {self._shape[1]}"
            )
        if k is not None:
            pages.require_writable()
            places = self._kept[2]
            if self.num_tokens and not len(places):
                raise ArgumentError("k has rows of sequences with fewer tokens than rows; give slots")
            if len(np.unique(places)) < len(places):
                raise ArgumentError("two rows of k have one slot; sequences that share it cannot both write")
        call = PreparedAttention(pages.handle, self.num_tokens, q, k, v, out, options, others=pages.sides)
        result = call.run(self._threads, pages.handle, self._plan)
        can_repeat = call.can_repeat and pages.can_bind and out is None
        return result, (call, pages) if can_repeat else None


class _Pages:
    """A layer's pages, as C takes them."""

    __slots__ = ("_arrays", "_bound", "_templates", "handle", "shape", "sides")

    def __init__(self, k_pages: Any, v_pages: Any, k_scales: Any = None, v_scales: Any = None) -> None:
        keys, values = _side_of("k_pages", k_pages), _side_of("v_pages", v_pages)
        self._arrays = {"k_pages": k_pages, "v_pages": v_pages}
        self.sides = {"k_pages": keys, "v_pages": values}
        self.handle = _foreign_pages(keys, values)
        self.shape = keys.shape[:2]
        for name, scales, rows in (("k_scales", k_scales, keys), ("v_scales", v_scales, values)):
            described = _scales_of(name, scales, rows)
            if described is not None:
                self._arrays[name], self.sides[name] = scales, described
                page, token, head, _ = described.strides
                setattr(self.handle, name, (described.data, page, head, token))
        can_bind = len(self.sides) == 2
        self._templates = (
            (template_of(k_pages, keys), template_of(v_pages, values)) if can_bind else (None, None)
        )
        self._bound = ffi.new("pkv_tensor *"), ffi.new("pkv_tensor *")

    @property
    def can_bind(self) -> bool:
        return None not in self._templates

    def require_writable(self) -> None:
        for name, side in self.sides.items():
            require_target(name, self._arrays[name], side)

    def bind(self, k_pages: Any, v_pages: Any, is_read_only: bool) -> bool:
        """Take the addresses of pages that look the same; False when they do not, or cannot be written."""
        for array, template, bound in zip((k_pages, v_pages), self._templates, self._bound, strict=True):
            if template is None or not template.bind(array, bound):
                return False
            if not is_read_only and type(array) is np.ndarray and not array.flags.writeable:
                return False
        self.handle.k, self.handle.v = self._bound[0].data, self._bound[1].data
        return True


def _side_of(name: str, array: Any) -> Array:
    return quantised_pages(name, array) or array_of(name, array)


def _scales_of(name: str, scales: Any, rows: Array) -> Array | None:
    """Describe [num_pages, page_size, num_kv_heads, 1] scales of the rows, where these are of 8 bits."""
    pages = name.replace("scales", "pages")
    if rows.dtype != INT8:
        if scales is not None:
            raise ArgumentError(f"{name} is given, but {pages} is not uint8; leave it out")
        return None
    if scales is None:
        raise ArgumentError(f"{pages} is uint8; give {name}, a bfloat16 for each token and head")
    described = array_of(name, scales[..., None])
    if described.dtype != DTYPE_CODES["bfloat16"] or described.shape[:-1] != rows.shape[:3]:
        raise ArgumentError(
            f"{name} is {scales.dtype} {list(scales.shape)}; it must be bfloat16 {list(rows.shape[:3])}"
        )
    return described


def _require_alike(k: Array, v: Array) -> None:
    if len(k.shape) != 4 or len(v.shape) != 4 or k.shape[:3] != v.shape[:3]:
        raise ArgumentError(
            f"k_pages and v_pages have the shapes {list(k.shape)} and {list(v.shape)}; they must be "
            "[num_pages, page_size, num_kv_heads, head_dim] and [.., head_dim_v], alike but for the last axis"
        )


def _foreign_pages(k: Array, v: Array) -> Any:
    _require_alike(k, v)
    for name, head_dim in (("k_pages", k.shape[3]), ("v_pages", v.shape[3])):
        if not 8 <= head_dim <= 256 or head_dim % 8:
            raise ArgumentError(f"{name} has heads of {head_dim}; it takes multiples of 8 from 8 to 256")
    num_pages, page_size, num_kv_heads, _ = k.shape
    integer("num_pages", num_pages, 0)
    integer("page_size", page_size, 1)
    integer("num_kv_heads", num_kv_heads, 1, 2**16)
    # In the order of pkv_pages: addresses, strides to the next page, head and token, dtypes, shape.
    strides = (k.strides[0], k.strides[2], k.strides[1], v.strides[0], v.strides[2], v.strides[1])
    shape = (page_size, num_kv_heads, k.shape[3], v.shape[3])
    return ffi.new("pkv_pages *", (k.data, v.data, *strides, k.dtype, v.dtype, *shape))


#: Messages: {0} is the entry or sequence, {1} what was found there, {2} the limit.
_FAULTS = {
    lib.PKV_BAD_QO_INDPTR: "qo_indptr must begin with 0, never fall and end at q's {2} rows, not at {1}",
    lib.PKV_BAD_KV_INDPTR: "kv_indptr must begin with 0, never fall and end at {2} at most, not at {1}",
    lib.PKV_BAD_KV_INDEX: "kv_indices[{0}] is {1}; pages are 0 to {2}",
    lib.PKV_BAD_LAST_PAGE: "kv_last_page_len[{0}] is {1}, outside 1 to {2}",
    lib.PKV_TOO_LONG: "sequence {0} has {1} tokens, {2} at most can be",
    lib.PKV_MORE_ROWS_THAN_TOKENS: "sequence {0} has {1} rows of q and {2} tokens; they are its last ones",
}


def _fill_batch(batch: Any, num_rows: int, shape: tuple[int, int], vectors: list[NDArray[np.int64]]) -> Any:
    """Fill a `pkv_batch` from lists over pages of this shape.  Returns its memory, which must outlive it."""
    rows, pages, page_ids, last = vectors
    num_seqs = len(rows) - 1
    if num_seqs < 0 or len(pages) != num_seqs + 1 or len(last) != num_seqs:
        raise ArgumentError(
            f"qo_indptr, kv_indptr and kv_last_page_len have {len(rows)}, {len(pages)} and {len(last)} "
            "entries; they must have one more, one more and as many as there are sequences"
        )
    pointers = [ffi.from_buffer("int64_t[]", vector) if len(vector) else ffi.NULL for vector in vectors]
    memory = ffi.new("int32_t[]", 3 * num_seqs + 2 + len(page_ids))
    given = ffi.new("pkv_foreign *", [num_seqs, *pointers, len(page_ids), num_rows, shape[0], shape[1]])
    refusal = ffi.new("pkv_refusal *")
    fault = lib.pkv_batch_of_foreign(given, memory, batch, refusal)
    if fault != lib.PKV_FOREIGN_OK:
        raise ArgumentError(_FAULTS[fault].format(refusal.index, refusal.requested, refusal.available))
    return memory


def _slots_of(vectors: list[NDArray[np.int64]], page_size: int) -> NDArray[np.int64]:
    """The slots of the last tokens of each sequence, as many as it has rows; none where one has fewer."""
    rows, pages, page_ids, last = vectors
    num_rows, counts = np.diff(rows), np.diff(pages)
    lengths = np.where(counts > 0, (counts - 1) * page_size + last, 0)
    if (num_rows > lengths).any():
        return np.empty(0, np.int64)
    positions = np.arange(rows[-1]) + np.repeat(lengths - rows[1:], num_rows)
    in_list, offsets = np.divmod(positions, page_size)
    slots: NDArray[np.int64] = page_ids[np.repeat(pages[:-1], num_rows) + in_list] * page_size + offsets
    return slots


def _require_in_pages(slots: NDArray[np.int64], num_slots: int) -> None:
    wrong = np.flatnonzero((slots < 0) | (slots >= num_slots))
    if len(wrong):
        raise ArgumentError(f"slots[{wrong[0]}] is {slots[wrong[0]]}; slots are 0 to {num_slots - 1}")
