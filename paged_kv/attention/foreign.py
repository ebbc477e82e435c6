"""Attention over pages that the caller owns: in numpy arrays or torch tensors, of any page size and order.

Imports attention.
"""

from typing import Any

from .._binding import check, ffi, integer, lib, shared_threads
from ..errors import ArgumentError
from .arrays import Array, array_of, index_vector
from .prepared import Attention


def paged_attention(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    *,
    qo_indptr: Any,
    kv_indptr: Any,
    kv_indices: Any,
    kv_last_page_len: Any,
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
    window, num_sink_tokens : a row at position i sees j <= i where j > i - window or j < num_sink_tokens
    causal : False: every row sees every token of its sequence, of which there may be none; no window then,
        and no slopes, since a row has no position.  So parts of a context can be attended to, and merged
    num_threads : None: the CPUs that the process may use

    Dtypes, kinds, the other parameters and what is returned: those of `Step.attend`.
    Raises: ArgumentError.
    Cost: reads the keys and values of each sequence once for every block of its rows.
    """
    keys, values = array_of("k_pages", k_pages), array_of("v_pages", v_pages)
    pages = _foreign_pages(keys, values)
    q_rows = array_of("q", q)
    for name, flag in (("causal", causal), ("return_lse", return_lse)):
        if type(flag) is not bool:
            raise ArgumentError(f"{name} must be True or False, not {flag!r:.60}")
    if not causal and (window is not None or alibi_slopes is not None):
        raise ArgumentError("with causal=False a row has no position for a window or alibi_slopes")
    batch = ffi.new("pkv_batch *")
    batch.window = 0 if window is None else integer("window", window, 1)
    batch.num_sink_tokens = integer("num_sink_tokens", num_sink_tokens, 0)
    batch.sees_all = not causal
    num_tokens = q_rows.shape[0] if q_rows.shape else 0
    lists = (qo_indptr, kv_indptr, kv_indices, kv_last_page_len)
    held = _batch_of_lists(batch, num_tokens, keys.shape, lists)
    call = Attention(
        pages,
        num_tokens,
        (q, q_rows),
        {"k_pages": keys, "v_pages": values},
        out,
        (sm_scale, logits_soft_cap, sinks, alibi_slopes, return_lse, None, 0),
    )
    if num_threads is not None:
        integer("num_threads", num_threads, 1, 1024)
    check(lib.pkv_attend(shared_threads(num_threads), pages, batch, call.arguments), "attend")
    del held  # until here
    return call.result


def _foreign_pages(k: Array, v: Array) -> Any:
    if len(k.shape) != 4 or len(v.shape) != 4 or k.shape[:3] != v.shape[:3]:
        raise ArgumentError(
            f"k_pages and v_pages have the shapes {list(k.shape)} and {list(v.shape)}; they must be "
            "[num_pages, page_size, num_kv_heads, head_dim] and [.., head_dim_v], alike but for the last axis"
        )
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


def _batch_of_lists(
    batch: Any, num_rows: int, shape: tuple[int, ...], lists: tuple[object, object, object, object]
) -> Any:
    """Fill a `pkv_batch` from lists over pages of this shape.  Returns its memory, which must outlive it."""
    names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")
    vectors = [index_vector(name, values) for name, values in zip(names, lists, strict=True)]
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
