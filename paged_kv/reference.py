"""Attention in plain numpy, float64: the thing to read first, and what every kernel is held against.

Imported by tests.  Imports numpy alone.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def attend(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    positions: ArrayLike | None = None,
    *,
    window: int | None = None,
    num_sink_tokens: int = 0,
    sm_scale: float | None = None,
) -> NDArray[np.float64]:
    """Causal attention of one sequence's newest tokens over those of its tokens that they see.

    Parameters
    ----------
    q : [num_tokens, num_q_heads, head_dim], of the last num_tokens tokens
    k, v : [num_keys, num_kv_heads, head_dim], oldest first
    positions : int [num_keys], of the keys in their sequence; None: 0, 1, ...
    window, num_sink_tokens : a row at position i sees j <= i where j > i - window or j < num_sink_tokens;
        None: all j <= i
    sm_scale : factor of the scores; None: 1 / sqrt(head_dim)

    q head h reads kv head ``h // (num_q_heads / num_kv_heads)``.

    Returns: float64 [num_tokens, num_q_heads, head_dim].
    Source: Vaswani et al., Attention is all you need, 2017; Ainslie et al., GQA, 2023.
    """
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    num_tokens, num_q_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    positions = np.arange(num_keys) if positions is None else np.asarray(positions)
    group = num_q_heads // num_kv_heads
    sm_scale = 1 / np.sqrt(head_dim) if sm_scale is None else sm_scale
    out = np.empty((num_tokens, num_q_heads, v.shape[2]))
    for row in range(num_tokens):
        own = positions[num_keys - num_tokens + row]
        seen = positions <= own
        if window is not None:
            seen &= (positions > own - window) | (positions < num_sink_tokens)
        for head in range(num_q_heads):
            keys, values = k[seen, head // group], v[seen, head // group]
            scores = sm_scale * (keys @ q[row, head])
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ values / weights.sum()
    return out
