"""Attention over pages that somebody else owns: in numpy arrays or torch tensors, of any page size and order.

Imports attention and machine.  Imported by the baselines, and by whoever brings pages.
"""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._binding import ffi, integer, new_threads
from .arrays import Array, array_of, index_vector
from .attention import Attention
from .errors import ArgumentError
from .machine import num_cpus


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
    """Attention over pages that somebody else owns: decode, prefill and any mix of them.

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
    batch = {
        "window": 0 if window is None else integer("window", window, 1),
        "num_sink_tokens": integer("num_sink_tokens", num_sink_tokens, 0),
        "sees_all": not causal,
    }
    num_tokens = q_rows.shape[0] if q_rows.shape else 0
    lists = _PageLists(num_tokens, qo_indptr, kv_indptr, kv_indices, kv_last_page_len, keys.shape, causal)
    call = Attention(
        pages,
        num_tokens,
        q,
        {"k_pages": keys, "v_pages": values},
        sm_scale=sm_scale,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        out=out,
        return_lse=return_lse,
    )
    threads = _threads(num_cpus() if num_threads is None else integer("num_threads", num_threads, 1, 1024))
    return call.run(threads, ffi.new("pkv_batch *", batch | lists.pointers))


@functools.cache
def _threads(num_threads: int) -> Any:
    """One set of each size for the process; a call that finds it busy computes alone."""
    return new_threads(num_threads)


def _foreign_pages(k: Array, v: Array) -> Any:
    if len(k.shape) != 4 or len(v.shape) != 4 or k.shape[:3] != v.shape[:3]:
        raise ArgumentError(
            f"k_pages and v_pages have the shapes {list(k.shape)} and {list(v.shape)}; they must be "
            "[num_pages, page_size, num_kv_heads, head_dim] and [.., head_dim_v], alike but for the last axis"
        )
    for name, head_dim in (("head_dim", k.shape[3]), ("head_dim_v", v.shape[3])):
        if not 8 <= head_dim <= 256 or head_dim % 8:
            raise ArgumentError(f"{name} is {head_dim}; it must be a multiple of 8 from 8 to 256")
    num_pages, page_size, num_kv_heads, _ = k.shape
    integer("num_pages", num_pages, 0)
    integer("page_size", page_size, 1)
    integer("num_kv_heads", num_kv_heads, 1, 2**16)
    return ffi.new(
        "pkv_pages *",
        {
            **{"k": k.data, "k_page_stride": k.strides[0], "k_token_stride": k.strides[1]},
            **{"v": v.data, "v_page_stride": v.strides[0], "v_token_stride": v.strides[1]},
            **{"k_head_stride": k.strides[2], "v_head_stride": v.strides[2]},
            **{"k_dtype": k.dtype, "v_dtype": v.dtype, "page_size": page_size, "num_kv_heads": num_kv_heads},
            **{"head_dim": k.shape[3], "head_dim_v": v.shape[3]},
        },
    )


class _PageLists:
    """Which rows and pages each sequence has, held against each other, as fields of a `pkv_batch`."""

    def __init__(
        self,
        num_tokens: int,
        qo_indptr: object,
        kv_indptr: object,
        kv_indices: object,
        kv_last_page_len: object,
        pages_shape: tuple[int, ...],
        causal: bool,
    ) -> None:
        rows, pages = index_vector("qo_indptr", qo_indptr), index_vector("kv_indptr", kv_indptr)
        page_ids = index_vector("kv_indices", kv_indices)
        last = index_vector("kv_last_page_len", kv_last_page_len)
        num_seqs, page_size = len(rows) - 1, pages_shape[1]
        if num_seqs < 0 or len(pages) != num_seqs + 1 or len(last) != num_seqs:
            raise ArgumentError(
                f"qo_indptr, kv_indptr and kv_last_page_len have {len(rows)}, {len(pages)} and {len(last)} "
                "entries; they must have one more, one more and as many as there are sequences"
            )
        num_rows, num_pages = _steps("qo_indptr", rows), _steps("kv_indptr", pages)
        if rows[-1] != num_tokens:
            raise ArgumentError(f"qo_indptr ends at {rows[-1]}; q has {num_tokens} rows")
        if pages[-1] > len(page_ids):
            raise ArgumentError(f"kv_indptr ends at {pages[-1]}; kv_indices has {len(page_ids)} entries")
        page_ids = page_ids[: pages[-1]]
        if len(page_ids) and not 0 <= page_ids.min() <= page_ids.max() < pages_shape[0]:
            raise ArgumentError(f"kv_indices holds a page outside 0 to {pages_shape[0] - 1}")
        if ((last < (num_pages > 0)) | (last > page_size)).any():
            raise ArgumentError(f"kv_last_page_len holds a length outside 1 to {page_size}")
        seq_lens = np.where(num_pages > 0, (num_pages - 1) * page_size + last, 0)
        if num_seqs and seq_lens.max() > 2**31 - 1:
            raise ArgumentError(f"a sequence has {seq_lens.max()} tokens, {2**31 - 1} at most can be")
        if causal and (num_rows > seq_lens).any():
            i = int(np.argmax(num_rows > seq_lens))
            raise ArgumentError(
                f"sequence {i} has {num_rows[i]} rows of q and {seq_lens[i]} tokens; they are its last ones"
            )
        arrays = {"qo_indptr": rows, "kv_indptr": pages, "kv_indices": page_ids, "seq_lens": seq_lens}
        self.pointers: dict[str, Any] = {"num_seqs": num_seqs}
        for name, array in arrays.items():
            if len(array):
                self.pointers[name] = ffi.from_buffer("int32_t[]", np.ascontiguousarray(array, np.int32))


def _steps(name: str, indptr: NDArray[np.int64]) -> NDArray[np.int64]:
    steps = np.diff(indptr)
    if indptr[0] != 0 or (steps < 0).any() or indptr[-1] > 2**31 - 1:
        raise ArgumentError(f"{name} must begin with 0 and never fall, up to {2**31 - 1}")
    return steps
