"""The layers of a decoder: norms, rotary positions, attention, feed-forward; BitNet's, and llama's.

Tensors are float32 with one row per token, the tokens of all sequences of a step one after the
other (ragged rows; nothing is padded).  One token's way through a block::

    x ─┬─ input_norm ── q,k,v ── rope ── kv.attend ── attn_sub_norm ── o ──────────────── (+) ─┬─
       └──────────────────────────────────────────────────────────────────────────────────┘   │
    ┌──────────────────────────────────────────────────────────────────────────────────────────┘
    ├─ post_attention_norm ── gate, up ── act(gate) * up ── ffn_sub_norm ── down ─────── (+) ── x'
    └──────────────────────────────────────────────────────────────────────────────────────┘

act is relu squared in BitNet, which has attn_sub_norm and ffn_sub_norm, and SiLU in llama, which has neither.
Norms and activations are fused into the products (matrix.py); program.py runs blocks.

A `KVStep` stores keys and values and computes attention.  A row's bits never depend on the other rows of the
call.

Imports matrix.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .._binding import DTYPE_CODES, check, ffi, int32_pointer, lib, shared_threads
from ..attention.arrays import array_of, fill_tensor
from ..errors import ArgumentError
from .matrix import RELU2_GATE, SILU_GATE, Matrix
from .ternary import FloatArray

#: Positions that a model's tables begin with.
FIRST_POSITIONS = 1024

ACTIVATIONS = {"relu2": RELU2_GATE, "silu": SILU_GATE}


class KVStep(Protocol):
    """The step that a forward pass needs; `paged_kv.Step` is one.

    positions : int32 [num_tokens], each token's position in its sequence
    """

    @property
    def positions(self) -> NDArray[np.int32]: ...

    def attend(
        self, layer: int, q: FloatArray, k: FloatArray, v: FloatArray, /, *, out: FloatArray
    ) -> FloatArray:
        """Store k, v float32 [num_tokens, num_kv_heads, head_dim] and attend, causally, with
        q float32 [num_tokens, num_q_heads, head_dim], all strided along tokens; fills and returns out, of
        q's shape."""


class Rotation:
    """Turns pairs of a head's elements by angles in proportion to a token's position.

    frequencies : float32 [head_dim / 2], radians a position
    max_positions : positions are below it

    Cosines and sines are computed for the positions that come up, at least twice as many each time.
    """

    def __init__(self, frequencies: FloatArray, max_positions: int) -> None:
        self.max_positions = max_positions
        self._frequencies = frequencies
        #: (cosines, sines), each float32 [positions, head_dim / 2].  Replaced as one, so that threads may
        #: grow it.
        self.tables = self._tables_of(min(max_positions, FIRST_POSITIONS))

    @np.errstate(all="ignore")
    def _tables_of(self, num_positions: int) -> tuple[FloatArray, FloatArray]:
        # All in float32, as where such models are trained: at position 1000 an exact angle differs by 6e-5.
        angles = np.outer(np.arange(num_positions, dtype=np.float32), self._frequencies)
        return np.cos(angles), np.sin(angles)

    def require(self, positions: NDArray[np.int32]) -> None:
        """ArgumentError unless all of these are positions of the model; after that they can be rotated by."""
        low, high = (int(positions.min()), int(positions.max())) if positions.size else (0, -1)
        if low < 0 or high >= self.max_positions:
            outside = low if low < 0 else high
            raise ArgumentError(f"position {outside} is beyond the model's {self.max_positions}")
        num_known = len(self.tables[0])
        if high >= num_known:
            self.tables = self._tables_of(min(max(high + 1, 2 * num_known), self.max_positions))

    def __call__(self, heads: FloatArray, positions: NDArray[np.int32]) -> None:
        """Rotate float32 [num_tokens, num_heads, head_dim] in place; i pairs with i + head_dim / 2.

        positions : int32 [num_tokens]
        Raises: ArgumentError, and nothing has changed.
        """
        described = array_of("heads", heads)
        half = len(self._frequencies)
        if described.dtype != DTYPE_CODES["float32"] or described.shape[2:] != (2 * half,):
            raise ArgumentError(
                f"heads is {heads.dtype} {list(heads.shape)}; it must be float32 [.., {2 * half}]"
            )
        at = int32_pointer("positions", positions)
        if len(positions) != len(heads):
            raise ArgumentError(f"{len(heads)} tokens have {len(positions)} positions; give one for each")
        if not len(heads):
            return
        rows = ffi.new("pkv_tensor *")
        fill_tensor(rows, described)
        for _ in range(2):
            tables = self.tables
            pointers = [ffi.from_buffer("float[]", table) for table in tables]
            status = lib.pkv_rotate(shared_threads(), rows, *heads.shape, at, len(tables[0]), *pointers)
            if status == lib.PKV_OK:
                return
            self.require(positions)
        check(status, "rotate")


@np.errstate(all="ignore")
def rope_frequencies(head_dim: int, theta: float, scaling: dict[str, float] | None = None) -> FloatArray:
    """Radians a position of each pair of elements, float32 [head_dim / 2].

    scaling : llama 3's `rope_scaling` ("factor", "low_freq_factor", "high_freq_factor",
        "original_max_position_embeddings"); slow turns are slowed down by the factor, fast ones stay, and
        those in between go over smoothly
    Source: Su et al., RoFormer, 2021; Grattafiori et al., The Llama 3 Herd of Models, 2024.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies: FloatArray = np.float32(theta) ** -exponents
    if scaling is None:
        return frequencies
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)  # in the trained length
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    scaled: FloatArray = ((1 - kept) / scaling["factor"] + kept).astype(np.float32) * frequencies
    return scaled


class SelfAttention:
    """Self-attention: projections, rotary positions, and in BitNet a norm before the output.

    Parameters
    ----------
    qkv : Matrix, hidden to (num_q_heads + 2 * num_kv_heads) * head_dim
    o : Matrix, num_q_heads * head_dim to hidden
    input_norm : float32 [hidden], of what goes into qkv
    sub_norm : float32 [num_q_heads * head_dim], the norm between attention and o; None: none
    num_kv_heads, head_dim : int; head_dim is even
    eps : float, of the norms
    qkv_bias, o_bias : float32, as long as the outputs, which are added to them; None: none
    q_norm, k_norm : float32 [head_dim], norms of each head of q and of k, before rotation; None: none
    is_rotated : whether positions rotate q and k

    Raises: ArgumentError when the parts do not fit together.
    """

    def __init__(
        self,
        qkv: Matrix,
        o: Matrix,
        *,
        input_norm: FloatArray,
        sub_norm: FloatArray | None,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        qkv_bias: FloatArray | None = None,
        o_bias: FloatArray | None = None,
        q_norm: FloatArray | None = None,
        k_norm: FloatArray | None = None,
        is_rotated: bool = True,
    ) -> None:
        num_q_heads = qkv.num_out // head_dim - 2 * num_kv_heads
        for name, array, count in (
            *(("qkv_bias", qkv_bias, qkv.num_out), ("o_bias", o_bias, o.num_out)),
            *(("q_norm", q_norm, head_dim), ("k_norm", k_norm, head_dim)),
        ):
            if array is not None and array.shape != (count,):
                raise ArgumentError(f"{name} is {list(array.shape)}; it must be [{count}]")
        if (q_norm is not None or k_norm is not None) and head_dim % 8:
            raise ArgumentError(f"head_dim is {head_dim}; with norms of heads it must be a multiple of 8")
        if qkv.num_out % head_dim or head_dim % 2 or num_q_heads < 1 or num_q_heads % num_kv_heads:
            raise ArgumentError(
                f"qkv has {qkv.num_out} outputs; they must be heads of {head_dim}, an even number: "
                f"{num_kv_heads} of keys and of values, and a multiple of that of queries"
            )
        if o.num_in != num_q_heads * head_dim or (sub_norm is not None and sub_norm.shape != (o.num_in,)):
            raise ArgumentError(
                f"o takes {o.num_in} inputs, {num_q_heads} heads of {head_dim} have "
                f"{num_q_heads * head_dim}; a sub_norm must have as many"
            )
        self.num_q_heads, self.num_kv_heads, self.head_dim = num_q_heads, num_kv_heads, head_dim
        self.qkv, self.o, self.eps = qkv, o, eps
        self.input_norm, self.sub_norm = input_norm, sub_norm
        self.qkv_bias, self.o_bias = qkv_bias, o_bias
        self.q_norm, self.k_norm, self.is_rotated = q_norm, k_norm, is_rotated


class DecoderBlock:
    """One layer of the model: attention, then feed-forward, each added to the residual stream.

    Parameters
    ----------
    attention : SelfAttention
    gate_up : Matrix, hidden to 2 * intermediate, eights of gate and of up in turn
    down : Matrix, intermediate to hidden
    post_attention_norm : float32 [hidden]
    ffn_sub_norm : float32 [intermediate], the norm between the gated product and down; None: none
    activation : "relu2" or "silu"

    Raises: ArgumentError when the parts do not fit together.
    """

    def __init__(
        self,
        attention: SelfAttention,
        gate_up: Matrix,
        down: Matrix,
        *,
        post_attention_norm: FloatArray,
        ffn_sub_norm: FloatArray | None,
        activation: str = "relu2",
    ) -> None:
        sizes = {gate_up.num_out / 2, down.num_in, down.num_in if ffn_sub_norm is None else ffn_sub_norm.size}
        if len(sizes) != 1:
            raise ArgumentError(
                f"gate_up, down and ffn_sub_norm disagree on the intermediate size: {gate_up.num_out} / 2, "
                f"{down.num_in}, {None if ffn_sub_norm is None else ffn_sub_norm.size}"
            )
        self.attention, self.gate_up, self.down = attention, gate_up, down
        self.post_attention_norm, self.ffn_sub_norm = post_attention_norm, ffn_sub_norm
        self.epilogue = ACTIVATIONS[activation]

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return self.attention.qkv, self.attention.o, self.gate_up, self.down


#: The names of 0.1.0.
BitNetBlock = DecoderBlock
BitNetAttentionLayer = SelfAttention
