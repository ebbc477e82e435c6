"""Attention in plain numpy, float64: the thing to read first, and what every kernel is held against.

Imported by tests.  Imports numpy alone.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def attend(q: ArrayLike, k: ArrayLike, v: ArrayLike, *, sm_scale: float | None = None) -> NDArray[np.float64]:
    """Causal attention of one sequence's newest tokens over all of its tokens.

    Parameters
    ----------
    q : [num_tokens, num_q_heads, head_dim], of the last num_tokens tokens
    k, v : [seq_len, num_kv_heads, head_dim], oldest first
    sm_scale : factor of the scores; None: 1 / sqrt(head_dim)

    A row sees the tokens up to its own.  q head h reads kv head ``h // (num_q_heads / num_kv_heads)``.

    Returns: float64 [num_tokens, num_q_heads, head_dim].
    Source: Vaswani et al., Attention is all you need, 2017; Ainslie et al., GQA, 2023.
    """
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    num_tokens, num_q_heads, head_dim = q.shape
    seq_len, num_kv_heads, _ = k.shape
    group = num_q_heads // num_kv_heads
    sm_scale = 1 / np.sqrt(head_dim) if sm_scale is None else sm_scale
    out = np.empty((num_tokens, num_q_heads, v.shape[2]))
    for row in range(num_tokens):
        num_seen = seq_len - num_tokens + row + 1
        for head in range(num_q_heads):
            keys, values = k[:num_seen, head // group], v[:num_seen, head // group]
            scores = sm_scale * (keys @ q[row, head])
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ values / weights.sum()
    return out
