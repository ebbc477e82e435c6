"""The layers of BitNet: norms, rotary positions, attention, feed-forward.

Tensors are float32 with one row per token, the tokens of all sequences of a step one after the
other (ragged rows; nothing is padded).  One token's way through a block::

    x ─┬─ input_norm ── q,k,v ── rope ── kv.attend ── attn_sub_norm ── o ──────────────── (+) ─┬─
       └──────────────────────────────────────────────────────────────────────────────────┘   │
    ┌──────────────────────────────────────────────────────────────────────────────────────────┘
    ├─ post_attention_norm ── gate, up ── relu(gate)^2 * up ── ffn_sub_norm ── down ───── (+) ── x'
    └──────────────────────────────────────────────────────────────────────────────────────┘

Where keys and values live is not known here: a `KVStep` takes them and answers with attention.

The bits of a row never depend on the other rows of the call.  Products are exact integers
(ternary.py); everything else is elementwise, or a reduction along the last, contiguous axis,
which numpy adds in an order that depends on its length alone.

Imports ternary.  Imported by bitnet.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from .ternary import BitLinear, FloatArray


class KVStep(Protocol):
    """What a forward pass asks of a cache's step; `paged_kv.Step` is one.

    positions : int32 [num_tokens], each token's position in its sequence
    """

    @property
    def positions(self) -> NDArray[np.int32]: ...

    def attend(self, layer: int, q: FloatArray, k: FloatArray, v: FloatArray, /) -> FloatArray:
        """Store k, v float32 [num_tokens, num_kv_heads, head_dim] and attend, causally, with
        q float32 [num_tokens, num_q_heads, head_dim]; returns q's shape and dtype."""


class BitNetAttentionLayer:
    """Self-attention with ternary projections, rotary positions and a norm before the output.

    Parameters
    ----------
    q : BitLinear, hidden to num_q_heads * head_dim
    k, v : BitLinear, hidden to num_kv_heads * head_dim
    o : BitLinear, num_q_heads * head_dim to hidden
    sub_norm : float32 [num_q_heads * head_dim], the norm between attention and o
    head_dim : int, even
    eps : float, of the norm

    Raises: ArgumentError when the parts do not fit together.
    """

    def __init__(
        self,
        q: BitLinear,
        k: BitLinear,
        v: BitLinear,
        o: BitLinear,
        sub_norm: FloatArray,
        *,
        head_dim: int,
        eps: float,
    ) -> None:
        if q.out_features % head_dim or k.out_features % head_dim or head_dim % 2:
            raise ArgumentError(
                f"q and k have {q.out_features} and {k.out_features} outputs; both must be "
                f"multiples of head_dim, {head_dim}, which must be even"
            )
        if k.out_features != v.out_features or q.out_features % k.out_features:
            raise ArgumentError(
                f"k and v have {k.out_features} and {v.out_features} outputs; they must be equal "
                f"and divide q's {q.out_features}"
            )
        if o.in_features != q.out_features or sub_norm.shape != (q.out_features,):
            raise ArgumentError(
                f"o takes {o.in_features} inputs and sub_norm is {list(sub_norm.shape)}; "
                f"both must have q's {q.out_features} outputs"
            )
        self.num_q_heads = q.out_features // head_dim
        self.num_kv_heads = k.out_features // head_dim
        self.head_dim = head_dim
        self.eps = eps
        self.qkv = BitLinear.stack([q, k, v])
        self.sub_norm = sub_norm
        self.o = o

    def __call__(self, x: FloatArray, cos: FloatArray, sin: FloatArray, kv: KVStep, layer: int) -> FloatArray:
        """Attend: float32 [num_tokens, hidden] to the same shape.

        cos, sin : the rows of `rope_tables` at kv.positions
        layer : the number under which kv keeps this layer's keys and values
        """
        num_tokens = len(x)
        num_rotated = self.num_q_heads + self.num_kv_heads
        heads = self.qkv(x).reshape(num_tokens, num_rotated + self.num_kv_heads, self.head_dim)
        q = rope(heads[:, : self.num_q_heads], cos, sin)
        k = rope(heads[:, self.num_q_heads : num_rotated], cos, sin)
        attended = kv.attend(layer, q, k, np.ascontiguousarray(heads[:, num_rotated:]))
        flat = attended.reshape(num_tokens, self.num_q_heads * self.head_dim)
        return self.o(rms_norm(flat, self.sub_norm, self.eps))


class BitNetBlock:
    """One layer of the model: attention, then feed-forward, each added to the residual stream.

    Parameters
    ----------
    attention : BitNetAttentionLayer
    gate, up : BitLinear, hidden to intermediate
    down : BitLinear, intermediate to hidden
    input_norm, post_attention_norm : float32 [hidden]
    ffn_sub_norm : float32 [intermediate], the norm between the gated product and down
    eps : float, of the norms

    Raises: ArgumentError when the parts do not fit together.
    """

    def __init__(
        self,
        attention: BitNetAttentionLayer,
        gate: BitLinear,
        up: BitLinear,
        down: BitLinear,
        *,
        input_norm: FloatArray,
        post_attention_norm: FloatArray,
        ffn_sub_norm: FloatArray,
        eps: float,
    ) -> None:
        if not gate.out_features == up.out_features == down.in_features == ffn_sub_norm.size:
            raise ArgumentError(
                f"gate, up, down and ffn_sub_norm disagree on the intermediate size: "
                f"{gate.out_features}, {up.out_features}, {down.in_features}, {ffn_sub_norm.size}"
            )
        self.attention = attention
        self.gate_up = BitLinear.stack([gate, up])
        self.down = down
        self.input_norm = input_norm
        self.post_attention_norm = post_attention_norm
        self.ffn_sub_norm = ffn_sub_norm
        self.eps = eps

    def __call__(self, x: FloatArray, cos: FloatArray, sin: FloatArray, kv: KVStep, layer: int) -> FloatArray:
        """float32 [num_tokens, hidden] to the same shape; arguments as BitNetAttentionLayer."""
        x = x + self.attention(rms_norm(x, self.input_norm, self.eps), cos, sin, kv, layer)
        x += self.feed_forward(rms_norm(x, self.post_attention_norm, self.eps))
        return x

    def feed_forward(self, x: FloatArray) -> FloatArray:
        """``down(ffn_sub_norm(relu(gate x)^2 * up x))``, float32 [num_tokens, hidden]."""
        both = self.gate_up(x)
        gate, up = both[:, : self.down.in_features], both[:, self.down.in_features :]
        gated = np.maximum(gate, np.float32(0))
        gated *= gated
        gated *= up
        return self.down(rms_norm(gated, self.ffn_sub_norm, self.eps))


def rms_norm(x: FloatArray, weight: FloatArray, eps: float) -> FloatArray:
    """``weight * x / sqrt(mean(x^2) + eps)`` along the last axis.

    Parameters
    ----------
    x : float32 [..., features]
    weight : float32 [features]
    eps : float

    Returns: float32 of x's shape.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    # Squares in C order: then each row is added pairwise on its own, whatever x's strides are.
    squares = np.multiply(x, x, order="C")
    root = np.add.reduce(squares, axis=-1, keepdims=True)
    root /= np.float32(x.shape[-1])
    root += np.float32(eps)
    np.sqrt(root, out=root)
    np.divide(x, root, out=squares)
    squares *= weight
    return squares


def rope_tables(head_dim: int, max_positions: int, theta: float) -> tuple[FloatArray, FloatArray]:
    """Cosines and signed sines of every position, for `rope`.

    Returns: (cos, sin), each float32 [max_positions, head_dim]; the first half of a row of sin is
    negated, so that `rope` needs one addition and no subtraction.
    Source: Su et al., RoFormer, 2021.
    """
    # All in float32, as where such models are trained: at position 1000 an exact angle differs by up to 6e-5.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(theta) ** -exponents
    angles = np.outer(np.arange(max_positions, dtype=np.float32), frequencies)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([cos, cos], axis=1), np.concatenate([-sin, sin], axis=1)


def rope(x: FloatArray, cos: FloatArray, sin: FloatArray) -> FloatArray:
    """Rotate each head by its token's position; element i pairs with i + head_dim / 2.

    Parameters
    ----------
    x : float32 [num_tokens, num_heads, head_dim]
    cos, sin : float32 [num_tokens, head_dim], rows of `rope_tables` at the tokens' positions

    Returns: float32 of x's shape, contiguous.
    """
    num_tokens, num_heads, head_dim = x.shape
    halves = x.reshape(num_tokens, num_heads, 2, head_dim // 2)
    rotated = halves[:, :, ::-1] * sin.reshape(num_tokens, 1, 2, -1)
    rotated += halves * cos.reshape(num_tokens, 1, 2, -1)
    return np.ascontiguousarray(rotated).reshape(x.shape)
