"""Attention in plain numpy, float64: the definition to read first, and what tests compare every kernel with;
and what pages of 8 and 4 bits make of keys and
values.

Imported by tests.  Imports numpy alone.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


@np.errstate(all="ignore")
def attend(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    positions: ArrayLike | None = None,
    *,
    window: int | None = None,
    num_sink_tokens: int = 0,
    causal: bool = True,
    sm_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    return_lse: bool = False,
    return_probabilities: bool = False,
) -> NDArray[np.float64] | tuple[NDArray[np.float64], ...]:
    """Attention of one sequence's newest tokens over those of its tokens that they see.

    Parameters
    ----------
    q : [num_tokens, num_q_heads, head_dim], of the last num_tokens tokens
    k : [num_keys, num_kv_heads, head_dim], oldest first
    v : [num_keys, num_kv_heads, head_dim_v]
    positions : int [num_keys], of the keys in their sequence; None: 0, 1, ...
    window, num_sink_tokens : a row at position i sees j <= i where j > i - window or j < num_sink_tokens;
        None: all j <= i
    causal : False: every row sees every key; no window then
    sm_scale : factor of the scores; None: 1 / sqrt(head_dim)
    logits_soft_cap : when above 0, a score s becomes cap * tanh(s / cap)
    alibi_slopes : [num_q_heads]; then slope * (j - i) is added
    sinks : [num_q_heads], logits that join the sum of the softmax, and have no value
    return_lse : also the natural logarithm of that sum, float64 [num_tokens, num_q_heads]
    return_probabilities : also the weights that values get, float64 [num_tokens, num_q_heads, num_keys]

    q head h reads kv head ``h // (num_q_heads / num_kv_heads)``.  A row whose sum is 0 gives 0 and -inf.

    Returns: float64 [num_tokens, num_q_heads, head_dim_v], or a tuple of it, lse and probabilities.
    Source: Vaswani et al., Attention is all you need, 2017; Ainslie et al., GQA, 2023; Press et al., ALiBi,
    2022; Xiao et al., Attention sinks, 2024.
    """
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    num_tokens, num_q_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    positions = np.arange(num_keys) if positions is None else np.asarray(positions, np.int64)
    group = num_q_heads // num_kv_heads
    sm_scale = 1 / np.sqrt(head_dim) if sm_scale is None else sm_scale
    sinks = np.full(num_q_heads, -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    out = np.zeros((num_tokens, num_q_heads, v.shape[2]))
    lse = np.full((num_tokens, num_q_heads), -np.inf)
    probabilities = np.zeros((num_tokens, num_q_heads, num_keys))
    for row in range(num_tokens):
        seen = np.ones(num_keys, bool)
        if causal:
            own = positions[num_keys - num_tokens + row]
            seen = positions <= own
            if window is not None:
                seen &= (positions > own - window) | (positions < num_sink_tokens)
        for head in range(num_q_heads):
            keys, values = k[seen, head // group], v[seen, head // group]
            scores = sm_scale * (keys @ q[row, head])
            if logits_soft_cap > 0:
                scores = logits_soft_cap * np.tanh(scores / logits_soft_cap)
            if alibi_slopes is not None:
                scores = scores + np.asarray(alibi_slopes, np.float64)[head] * (positions[seen] - own)
            largest = scores.max(initial=sinks[head])
            if largest == -np.inf:
                continue
            weights = np.exp(scores - largest)
            total = weights.sum() + np.exp(sinks[head] - largest)
            out[row, head] = weights @ values / total
            probabilities[row, head, seen] = weights / total
            lse[row, head] = largest + np.log(total)
    others = [*([lse] if return_lse else []), *([probabilities] if return_probabilities else [])]
    return (out, *others) if others else out


def _saturated(x: ArrayLike, limit: float) -> NDArray[np.float32]:
    """float32, finite values within +-limit."""
    x = np.asarray(x, np.float32)
    return np.where(np.isfinite(x), np.clip(x, np.float32(-limit), np.float32(limit)), x)


@np.errstate(all="ignore")
def quantise_int8(x: ArrayLike) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Rows as pages of int8 store them.

    x : [..., dim], float32; a row is a token's head

    Returns: codes int8 [..., dim] from -127 to 127, and scales float32 [...], exact in bfloat16.  A row's
    scale is its largest magnitude / 127, rounded up to bfloat16; codes are x / scale rounded to nearest even.
    Where that scale is below 2^-100, scale and codes are 0.  A row with NaN or infinity has the scale NaN.
    Finite values beyond 2^127 saturate.
    """
    x = _saturated(x, 2.0**127)
    exact = np.abs(x).max(axis=-1) / np.float32(127)
    scales = ((exact.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
    scales = np.where(exact < np.float32(2.0**-100), np.float32(0), scales)
    scales = np.where(np.isfinite(x).all(axis=-1), scales, np.float32(np.nan))
    inverse = np.where(scales > 0, np.float32(1) / scales, np.float32(0))
    codes = np.rint(np.nan_to_num(x, nan=0, posinf=0, neginf=0) * inverse[..., None])
    return codes.astype(np.int8), scales


def int8_values(x: ArrayLike) -> NDArray[np.float32]:
    """What is read of rows that pages of int8 store: codes times scales, exact in float32."""
    codes, scales = quantise_int8(x)
    return codes.astype(np.float32) * scales[..., None]


@np.errstate(all="ignore")
def quantise_int4(x: ArrayLike) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Rows as values of int4 are stored.

    x : [..., dim], float32; a row is a token's head

    Returns: codes uint8 [..., dim] from 0 to 15, scales and minima float32 [...], exact in bfloat16.  The
    minimum of a row is rounded down; its scale is (largest - minimum) / 15, rounded up; codes are
    (x - minimum) / scale rounded to nearest even.  Where that scale is below 2^-100, scale and codes are 0.
    A row with NaN or infinity has the scale and the minimum NaN.  Finite values beyond 2^126 saturate.
    """
    x = _saturated(x, 2.0**126)
    flaws = np.abs(x).max(axis=-1) * np.float32(0)  # 0, or NaN
    x = np.where(np.isnan(flaws)[..., None], np.float32(0), x)
    least, largest = x.min(axis=-1), x.max(axis=-1)
    up = np.where(least < 0, np.uint32(0xFFFF), np.uint32(0))
    minima = ((least.view(np.uint32) + up) & np.uint32(0xFFFF0000)).view(np.float32)
    exact = largest / np.float32(15) - minima / np.float32(15)
    scales = ((exact.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
    scales = np.where(scales < np.float32(2.0**-100), np.float32(0), scales)
    inverse = np.where(scales > 0, np.float32(1) / scales, np.float32(0))
    codes = np.rint(np.clip((x - minima[..., None]) * inverse[..., None], 0, 15))
    return codes.astype(np.uint8), scales + flaws, minima + flaws


def int4_values(x: ArrayLike) -> NDArray[np.float32]:
    """What is read of rows of values that pages of int4 store."""
    codes, scales, minima = quantise_int4(x)
    return codes.astype(np.float32) * scales[..., None] + minima[..., None]


def quantise_int4_by_channel(
    x: ArrayLike,
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Keys as packed pages of int4 store them: as `quantise_int4`, of each dim of 64 tokens.

    x : [num_tokens, num_heads, dim], num_tokens a multiple of 64

    Returns: codes of x's shape, scales and minima [num_tokens / 64, num_heads, dim].
    """
    x = np.asarray(x, np.float32)
    groups = x.reshape(-1, 64, *x.shape[1:])
    codes, scales, minima = quantise_int4(np.moveaxis(groups, 1, -1))
    return np.moveaxis(codes, -1, 1).reshape(x.shape), scales, minima


def int4_by_channel_values(x: ArrayLike) -> NDArray[np.float32]:
    """What is read of keys that packed pages of int4 store."""
    codes, scales, minima = quantise_int4_by_channel(x)
    groups = codes.reshape(-1, 64, *codes.shape[1:]).astype(np.float32)
    return (groups * scales[:, None] + minima[:, None]).reshape(codes.shape)
