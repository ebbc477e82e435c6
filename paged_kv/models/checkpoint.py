"""Checkpoints: tensors under transformers' names, made the blocks of a model.

A BitNet projection is stored in 2 bits with its scale, or as float master weights that are made ternary at
load; a llama's in floats, which are rounded to 8 bits a weight, or to bfloat16.  Projections that share their
input become one matrix; gate and up alternate every eight outputs, so that gating is part of the product.

Imports layers and tensor_file.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from .layers import DecoderBlock, SelfAttention
from .matrix import Matrix, bfloat16_matrix, codes_matrix, int8_matrix
from .tensor_file import DTYPES
from .ternary import FloatArray, pack_ternary, ternarise, unpack_ternary

Tensors = Mapping[str, NDArray[Any]]
#: Bits of float32.
LARGEST_BFLOAT16 = 0x7F7F0000


def float32_of_bits(bits: NDArray[np.uint16]) -> FloatArray:
    """The values of bfloat16's bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bits_of_float32(values: FloatArray) -> NDArray[np.uint16]:
    """bfloat16's bits of finite values, to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # Above the largest bfloat16, a finite value would round to an infinity: it saturates, as in pages.
    largest = np.uint32(LARGEST_BFLOAT16)
    magnitudes = bits & np.uint32(0x7FFFFFFF)
    bits = np.where(magnitudes > largest, bits & np.uint32(0x80000000) | largest, bits)
    return ((bits + 0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


#: Last parts of the names of what a layer computes with; other tensors may be buffers.
PARAMETERS = ("weight", "bias", "weight_scale")


class Checkpoint:
    """The tensors of a model by name, each validated against the shape in the config.

    tensors : by name; uint16 holds the bits of bfloat16
    where : what errors call it

    It records which tensors were used, so that unused ones can be named in an error.

    Raises: ArgumentError that names the tensor: when it is missing, has another shape or dtype, holds values
    that are not finite, or is all zeros where it must not be.
    """

    def __init__(self, tensors: Tensors, where: str) -> None:
        self.tensors, self.where = tensors, where
        self._taken: set[str] = set()

    def raw(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        try:
            array = self.tensors[name]
        except KeyError:
            raise ArgumentError(f"{self.where} has no tensor {name}") from None
        self._taken.add(name)
        if array.shape != shape:
            raise ArgumentError(f"{self.where}: {name} has the shape {list(array.shape)}, not {list(shape)}")
        return array

    def floats(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        """float32, all of them finite."""
        return self._finite(name, self.raw(name, shape))

    def rows(self, name: str, shape: tuple[int, int]) -> NDArray[Any]:
        """An embedding or a head as it is stored, floats or bfloat16's bits: finite, and not all zeros."""
        array = self.raw(name, shape)
        self._require_nonzero(name, self._finite(name, array))
        return array

    def _finite(self, name: str, array: NDArray[Any]) -> FloatArray:
        if array.dtype == np.uint16:
            values = float32_of_bits(array)
        elif array.dtype in (np.float32, np.float16):
            values = np.ascontiguousarray(array, np.float32)
        else:
            raise ArgumentError(f"{self.where}: {name} is {array.dtype}; it must be floating")
        if not np.isfinite(values).all():
            raise ArgumentError(f"{self.where}: {name} holds values that are not finite")
        return values

    def require_all_taken(self) -> None:
        """ArgumentError that names the first tensor which no part of the model has taken.

        Passed over are rotary frequencies, which follow from the config, a head where the config ties it to
        the embedding, and buffers of dtypes that no weight has.
        """
        for name in self.tensors:
            if name not in self._taken and not self._is_harmless(name):
                raise ArgumentError(
                    f"{self.where} has a tensor {name}, which no part of this model takes; "
                    "the model would compute without it"
                )

    def _is_harmless(self, name: str) -> bool:
        if name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight":
            return True
        is_parameter = name.rpartition(".")[2] in PARAMETERS or "lora_" in name
        return not is_parameter and not self._has_known_dtype(name)

    def _has_known_dtype(self, name: str) -> bool:
        dtypes = getattr(self.tensors, "dtypes", None)
        return True if dtypes is None else dtypes[name] in DTYPES

    def nonzero(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        array = self.floats(name, shape)
        self._require_nonzero(name, array)
        return array

    def _require_nonzero(self, name: str, array: FloatArray) -> None:
        if not array.any():
            raise ArgumentError(f"{self.where}: {name} is all zeros; take a whole revision of the checkpoint")

    def ternary(self, name: str, num_out: int, num_in: int, inverse: bool) -> tuple[NDArray[np.uint8], float]:
        """Codes of a projection, uint8 [num_out, num_in] of 0, 1, 2, and its scale.

        inverse : products are divided by the stored scale, not multiplied
        """
        stored = self.tensors.get(f"{name}.weight")
        if stored is None or stored.dtype != np.uint8:
            weight, scale = ternarise(self.nonzero(f"{name}.weight", (num_out, num_in)))
            codes = (weight + np.int8(1)).view(np.uint8)
            return codes, float(scale[0])
        packed = self.raw(f"{name}.weight", (num_out // 4, num_in))
        try:
            weight = unpack_ternary(packed)
        except ArgumentError as error:
            raise ArgumentError(f"{self.where}: {name}.weight: {error}") from None
        if not weight.any():
            raise ArgumentError(
                f"{self.where}: {name}.weight is all zeros, as some uploads of it are; take a whole revision"
            )
        scale = self.nonzero(f"{name}.weight_scale", (1,))
        return (weight + np.int8(1)).view(np.uint8), float(1 / scale[0] if inverse else scale[0])


# ---- blocks

Progress = Callable[[int, int], object]


def blocks_of(
    config: Any, checkpoint: Checkpoint, progress: Progress | None, weights: str = "int8"
) -> list[DecoderBlock]:
    """Every block; progress is called with how many there are so far, and of how many.

    weights : of a model whose weights are not ternary, "int8" or "bfloat16"
    """
    if weights not in ("int8", "bfloat16"):
        raise ArgumentError(f'weights is "{weights}"; it may be int8 or bfloat16')
    blocks = []
    for i in range(config.num_hidden_layers):
        blocks.append(_block(config, checkpoint, i, weights))
        if progress is not None:
            progress(i + 1, config.num_hidden_layers)
    return blocks


def interleaved(gate: NDArray[Any], up: NDArray[Any]) -> NDArray[Any]:
    """Rows of gate and up, alternating every eight, as a gated product needs them."""
    if len(gate) % 8:
        raise ArgumentError(f"intermediate_size is {len(gate)}; it must be a multiple of 8")
    return np.stack([gate.reshape(-1, 8, *gate.shape[1:]), up.reshape(-1, 8, *up.shape[1:])], 1).reshape(
        2 * len(gate), *gate.shape[1:]
    )


def _block(config: Any, checkpoint: Checkpoint, layer: int, weights: str) -> DecoderBlock:
    prefix = f"model.layers.{layer}."
    hidden, inter = config.hidden_size, config.intermediate_size
    q_out, kv_out = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    is_bitnet = config.model_type == "bitnet"

    def stacked(names: list[str], widths: list[int], num_in: int, in_turns: bool = False) -> Matrix:
        pairs = [(f"{prefix}{name}_proj", width) for name, width in zip(names, widths, strict=True)]
        if not is_bitnet:
            floats = [checkpoint.nonzero(f"{name}.weight", (width, num_in)) for name, width in pairs]
            rows = interleaved(*floats) if in_turns else np.concatenate(floats)
            return int8_matrix(rows) if weights == "int8" else bfloat16_matrix(bits_of_float32(rows))
        parts = [checkpoint.ternary(name, width, num_in, config.inverse_scales) for name, width in pairs]
        codes = [part[0] for part in parts]
        scales = [np.full(len(part[0]), part[1], np.float32) for part in parts]
        join = interleaved if in_turns else (lambda *arrays: np.concatenate(arrays))
        return codes_matrix(join(*codes), join(*scales))

    def norm(name: str, width: int) -> FloatArray:
        return checkpoint.floats(f"{prefix}{name}.weight", (width,))

    def biases(names: list[str], widths: list[int], has_biases: bool) -> FloatArray | None:
        if not has_biases:
            return None
        pairs = zip(names, widths, strict=True)
        return np.concatenate(
            [checkpoint.floats(f"{prefix}{name}_proj.bias", (width,)) for name, width in pairs]
        )

    qkv, qkv_widths = [f"self_attn.{name}" for name in "qkv"], [q_out, kv_out, kv_out]
    attention = SelfAttention(
        stacked(qkv, qkv_widths, hidden),
        stacked(["self_attn.o"], [hidden], q_out),
        input_norm=norm("input_layernorm", hidden),
        sub_norm=norm("self_attn.attn_sub_norm", q_out) if is_bitnet else None,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        qkv_bias=biases(qkv, qkv_widths, config.qkv_bias),
        o_bias=biases(["self_attn.o"], [hidden], config.o_bias),
        q_norm=norm("self_attn.q_norm", config.head_dim) if config.qk_norms else None,
        k_norm=norm("self_attn.k_norm", config.head_dim) if config.qk_norms else None,
        is_rotated=layer not in config.unrotated_layers,
    )
    return DecoderBlock(
        attention,
        stacked(["mlp.gate", "mlp.up"], [inter, inter], hidden, in_turns=True),
        stacked(["mlp.down"], [hidden], inter),
        post_attention_norm=norm("post_attention_layernorm", hidden),
        ffn_sub_norm=norm("mlp.ffn_sub_norm", inter) if is_bitnet else None,
        activation=config.hidden_act,
    )


def tensors_of(config: Any, blocks: tuple[DecoderBlock, ...]) -> dict[str, NDArray[Any]]:
    """A BitNet's blocks under their names again, projections packed in 2 bits and norms as float32."""
    tensors: dict[str, NDArray[Any]] = {}
    q_out, kv_out = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    for i, block in enumerate(blocks):
        prefix, attention = f"model.layers.{i}.", block.attention
        projections: dict[str, tuple[NDArray[np.uint8], FloatArray]] = {}
        codes, scales = attention.qkv.codes(), attention.qkv.scales
        for name, begin, end in (
            ("q", 0, q_out),
            ("k", q_out, q_out + kv_out),
            ("v", q_out + kv_out, q_out + 2 * kv_out),
        ):
            projections[f"self_attn.{name}"] = codes[begin:end], scales[begin:end]
        projections["self_attn.o"] = attention.o.codes(), attention.o.scales
        codes = block.gate_up.codes().reshape(-1, 2, 8, config.hidden_size)
        in_turns = block.gate_up.scales.reshape(-1, 2, 8)
        for j, name in enumerate(("gate", "up")):
            rows = codes[:, j].reshape(-1, config.hidden_size)
            projections[f"mlp.{name}"] = rows, in_turns[:, j].ravel()
        projections["mlp.down"] = block.down.codes(), block.down.scales
        for name, (rows, scale) in projections.items():
            tensors[f"{prefix}{name}_proj.weight"] = pack_ternary(rows.view(np.int8) - np.int8(1))
            stored = 1 / scale[:1] if config.inverse_scales else scale[:1]
            tensors[f"{prefix}{name}_proj.weight_scale"] = stored.astype(np.float32)
        norms = {
            "input_layernorm": attention.input_norm,
            "post_attention_layernorm": block.post_attention_norm,
            "self_attn.attn_sub_norm": attention.sub_norm,
            "mlp.ffn_sub_norm": block.ffn_sub_norm,
        }
        tensors |= {f"{prefix}{name}.weight": norm for name, norm in norms.items() if norm is not None}
    return tensors
