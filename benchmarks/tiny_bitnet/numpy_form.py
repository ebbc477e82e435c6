"""The small BitNet in numpy over a cache: as it was first written, which the kernels are measured against.

Products run in numpy's BLAS, on integers that travel as float32: exact, since every partial sum is an integer
below 2**24.  Norms, rotations and gates are numpy's.  Attention and the cache are the library's.

Used by benchmarks/bitnet.py.
"""

from collections.abc import Sequence

import numpy as np

from paged_kv.models.bitnet import TINY_BITNET, DecoderConfig
from paged_kv.models.ternary import quantise_activations, unpack_ternary


class BitLinear:
    """A linear map with ternary weights, as float32, and int8 activations."""

    def __init__(self, weight: np.ndarray, scale: np.ndarray) -> None:
        self.weight, self.scale = weight.astype(np.float32), scale

    @classmethod
    def stack(cls, parts: Sequence["BitLinear"]) -> "BitLinear":
        """One map that computes several over the same input, their outputs side by side."""
        scales = [np.broadcast_to(part.scale, len(part.weight)) for part in parts]
        return cls(np.concatenate([part.weight for part in parts]), np.concatenate(scales))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        q, s = quantise_activations(x)
        y = q @ self.weight.T
        y /= s
        y *= self.scale
        return y


class Block:
    """One layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, arrays: dict, prefix: str) -> None:
        def linear(name: str) -> BitLinear:
            weight = f"{prefix}{name}_proj.weight"
            return BitLinear(unpack_ternary(arrays[weight]), arrays[f"{weight}_scale"])

        self.config, self.prefix, self.arrays = config, prefix, arrays
        self.qkv = BitLinear.stack([linear(f"self_attn.{name}") for name in "qkv"])
        self.o, self.down = linear("self_attn.o"), linear("mlp.down")
        self.gate_up = BitLinear.stack([linear("mlp.gate"), linear("mlp.up")])

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return rms_norm(x, self.arrays[f"{self.prefix}{name}.weight"], self.config.rms_norm_eps)

    def __call__(self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, kv, layer: int) -> np.ndarray:
        x = x + self.attend(self.norm(x, "input_layernorm"), cos, sin, kv, layer)
        both = self.gate_up(self.norm(x, "post_attention_layernorm"))
        gate, up = np.split(both, 2, axis=1)
        gated = np.maximum(gate, np.float32(0))
        gated *= gated
        gated *= up
        return x + self.down(self.norm(gated, "mlp.ffn_sub_norm"))

    def attend(self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, kv, layer: int) -> np.ndarray:
        config = self.config
        num_q, num_kv = config.num_attention_heads, config.num_key_value_heads
        heads = self.qkv(x).reshape(len(x), num_q + 2 * num_kv, config.head_dim)
        q = rope(heads[:, :num_q], cos, sin)
        k = rope(heads[:, num_q : num_q + num_kv], cos, sin)
        attended = kv.attend(layer, q, k, np.ascontiguousarray(heads[:, num_q + num_kv :]))
        return self.o(self.norm(attended.reshape(len(x), -1), "self_attn.attn_sub_norm"))


class NumpyBitNet:
    """The small model's forward pass; stands in for BitNetModel where something is generated."""

    def __init__(self) -> None:
        with np.load(TINY_BITNET / "tiny_bitnet.npz", allow_pickle=False) as file:
            arrays = dict(file)
        self.config = config = DecoderConfig.from_json(arrays.pop("config").tobytes())
        self.blocks = [Block(config, arrays, f"model.layers.{i}.") for i in range(config.num_hidden_layers)]
        scales = arrays["model.embed_tokens.weight_scale"]
        self.embedding = arrays["model.embed_tokens.weight"] * scales[:, None]
        self.final_norm = arrays["model.norm.weight"]
        tables = rope_tables(config.head_dim, config.max_position_embeddings, config.rope_theta)
        self.cos, self.sin = tables

    def forward(self, ids, step, rows) -> np.ndarray:
        x, positions = self.embedding[np.asarray(ids)], step.positions
        for layer, block in enumerate(self.blocks):
            x = block(x, self.cos[positions], self.sin[positions], step, layer)
        x = rms_norm(x[np.asarray(rows)], self.final_norm, self.config.rms_norm_eps)
        # A product per row: one of several rows would add in another order.
        return np.stack([self.embedding @ row for row in x])


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
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


def rope_tables(head_dim: int, max_positions: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
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


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
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
