"""What test files share: dtypes, memory in use, bounds of rounding errors, the digest of a cache's state."""

import resource
from pathlib import Path

import ml_dtypes
import numpy as np

from paged_kv import reference

DTYPES = {"float32": np.dtype("f4"), "float16": np.dtype("f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
#: What pages may store, of keys and of values.
STORED = [*DTYPES, "int8", ("int8", "bfloat16"), ("float16", "int8"), ("int8", "int4"), ("float32", "int4")]


def pair_of(dtype):
    """The dtypes of keys and of values."""
    return dtype if isinstance(dtype, tuple) else (dtype, dtype)


def stored(array, dtype):
    """The float32 values that pages of this dtype hold, of values within its range."""
    if dtype in ("int8", "int4"):
        return reference.int8_values(array) if dtype == "int8" else reference.int4_values(array)
    return array.astype(DTYPES[dtype]).astype(np.float32)


def resident_bytes():
    """Memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def tolerances(q, k, v, dtype="float32", stored="float32", sm_scale=None, alibi_slopes=None, **_):
    """What float32 may lose against float64, of out and lse: each score's rounding, carried through exp, and
    each sum's; and the rounding of the result to `dtype`.

    A score of head_dim terms is off by at most about eps * |q| |k| * sqrt(head_dim), and by the rounding of
    what a slope adds; a soft cap bends scores together, and adds some eps of its own.  A weighted mean of v
    inherits that, relative to max |v|, twice (its weight and the sum), plus the rounding of its own chain.

    Where pages store int8, q is rounded to 1 / 32512 of its largest, and weights to 1 / 32639 of a run's
    largest.  These errors are independent, so their sums grow with the square root: six standard deviations.
    """
    head_dim = q.shape[-1]
    scale = head_dim**-0.5 if sm_scale is None else abs(sm_scale)
    score = scale * np.abs(q).max(initial=0) * np.abs(k).max(initial=0) * head_dim**0.5
    if alibi_slopes is not None:
        score += np.abs(alibi_slopes).max() * len(k)
    largest = np.abs(v).max(initial=0)
    loss = 2 * score * head_dim**0.5 + 16 + len(k) ** 0.5
    rounded = 0.0 if dtype == "float32" else EPS[dtype]
    k_dtype, v_dtype = pair_of(stored)
    q_error = 6 * 12**-0.5 / 32512 * score if k_dtype == "int8" else 0.0
    # Codes of int4 count from a row's minimum: up to twice its largest magnitude.
    v_error = 6 * 12**-0.5 / 32639 * len(k) ** 0.5 * {"int8": 1, "int4": 2}.get(v_dtype, 0)
    out = largest * (EPS["float32"] * loss + rounded + 2 * q_error + v_error)
    return float(out), float(EPS["float32"] * 2 * loss + q_error)


def digest(cache):
    """Everything that a refused call must leave as it is."""
    tables = cache._store.tables
    arrays = (tables.page_ids, tables.rows.seq_lens, tables.rows.reserved_lens, tables.tail_copies)
    return cache.stats(), [array.tobytes() for array in arrays], cache._store.pool.data().tobytes()


def directions(begin, count, page_size, num_kv_heads=2, head_dim=32):
    """Keys of tokens from `begin` on, that only a query for their page is like."""
    pages = (begin + np.arange(count)) // page_size % head_dim
    return np.repeat(30 * np.eye(head_dim, dtype=np.float32)[pages][:, None], num_kv_heads, axis=1)


def looking_at(cache, seq, count, page, rng, num_kv_heads=2, head_dim=32):
    """One step whose new tokens look at one page only."""
    k = directions(len(seq), count, cache.page_size, num_kv_heads, head_dim)
    q = np.zeros((count, 2 * num_kv_heads, head_dim), np.float32)
    q[:, :, page % head_dim] = 30
    with cache.step([seq], [count]) as step:
        step.attend(0, q, k, rng.standard_normal(k.shape, np.float32))


def held_pages(seq, page_size=16):
    return sorted(set((seq.held_positions // page_size).tolist()))
