"""What test files share: dtypes, memory in use, bounds of rounding errors, the digest of a cache's state."""

import resource
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.dtype("f4"), "float16": np.dtype("f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def resident_bytes():
    """Memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def tolerances(q, k, v, dtype="float32", sm_scale=None, alibi_slopes=None, **_):
    """What float32 may lose against float64, of out and lse: each score's rounding, carried through exp, and
    each sum's; and the rounding of the result to `dtype`.

    A score of head_dim terms is off by at most about eps * |q| |k| * sqrt(head_dim), and by the rounding of
    what a slope adds; a soft cap bends scores together, and adds some eps of its own.  A weighted mean of v
    inherits that, relative to max |v|, twice (its weight and the sum), plus the rounding of its own chain.
    """
    head_dim = q.shape[-1]
    scale = head_dim**-0.5 if sm_scale is None else abs(sm_scale)
    score = scale * np.abs(q).max(initial=0) * np.abs(k).max(initial=0) * head_dim**0.5
    if alibi_slopes is not None:
        score += np.abs(alibi_slopes).max() * len(k)
    largest = np.abs(v).max(initial=0)
    loss = 2 * score * head_dim**0.5 + 16 + len(k) ** 0.5
    rounded = 0.0 if dtype == "float32" else EPS[dtype]
    return float(largest * (EPS["float32"] * loss + rounded)), float(EPS["float32"] * 2 * loss)


def digest(cache):
    """Everything that a refused call must leave as it is."""
    tables = cache._store.tables
    arrays = (tables.page_ids, tables.rows.seq_lens, tables.rows.reserved_lens, tables.tail_copies)
    return cache.stats(), [array.tobytes() for array in arrays], cache._store.pool.data().tobytes()
