"""A GGUF file: its config under transformers' names, and its tensors, dequantised when they are read.

    blk.3.attn_q.weight, Q4_1, rows in the file's order  ──  model.layers.3.self_attn.q_proj.weight, float32

The package gguf parses the file and dequantises.  What is done here is the translation: names, fields, and
the order of rows.  Architectures that rotate neighbouring elements store the rows of q and k in that order;
here element i turns with element i + head_dim / 2, so these rows are put back.

Imports extras, json_file and layers.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..extras import require
from .json_file import Fields
from .layers import rope_frequencies

#: Architectures, and whether their files hold q and k in the order of neighbouring pairs.
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False, "smollm3": True}
#: Names of a layer's parts, and transformers' names.
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
#: The divisors of the rotary frequencies: part of the config here, no tensor of the model.
ROPE_FACTORS = "rope_freqs.weight"
#: Llama 3's numbers; a file stores the factors that follow from them.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GGUFFile(Mapping[str, NDArray[Any]]):
    """The tensors of a GGUF file under transformers' names, as float32 or as the file has them in 16 bits.

    path : of a file of one of ARCHITECTURES

    A tensor is dequantised each time that it is read; names that have no counterpart stay as they are.
    Raises: ImportError that names the extra; ArgumentError for a file that is none, is one part of several or
    has another architecture; OSError.
    """

    def __init__(self, path: Path) -> None:
        self._gguf = require("gguf", "gguf")
        self.path = path
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise ArgumentError(f"{path} is no GGUF file: it begins with {magic!r}")
        try:
            self._reader = _reader_of(self._gguf)(path)
            #: Every field of the file by its name: numbers, texts and lists.
            self.metadata: dict[str, Any] = {
                name: field.contents() for name, field in self._reader.fields.items()
            }
        except Exception as error:  # lengths and offsets that lie: the package raises what numpy raises
            raise ArgumentError(f"{path} is a GGUF file that cannot be read: {error}") from error
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise ArgumentError(
                f"{path}: the architecture is {self.architecture!r:.60}; "
                f"{', '.join(ARCHITECTURES)} are supported"
            )
        if self.metadata.get("split.count", 0) > 1:
            raise ArgumentError(
                f"{path} is one of {self.metadata['split.count']} parts; "
                "join them with llama-gguf-split --merge"
            )
        self._tensors = {_name_of(tensor.name): tensor for tensor in self._reader.tensors}
        self._rope_factors = self._tensors.pop(ROPE_FACTORS, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> NDArray[Any]:
        tensor = self._tensors[name]
        heads = self._heads_of(name)
        array = self._floats(tensor)
        if heads is None:
            return array
        width = array.shape[-1] if array.ndim == 2 else 1
        if len(array) % (2 * heads):
            raise ArgumentError(
                f"{self.path}: {tensor.name} has {len(array)} rows, which are no {heads} heads"
            )
        in_pairs = array.reshape(heads, -1, 2, width)
        return np.ascontiguousarray(in_pairs.swapaxes(1, 2)).reshape(array.shape)

    def _floats(self, tensor: Any) -> NDArray[Any]:
        """float32; float16, and bfloat16 as its bits, where the file has them."""
        types = self._gguf.GGMLQuantizationType
        kind = types(tensor.tensor_type)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if kind == types.BF16:
            bits: NDArray[Any] = tensor.data.view(np.uint16)
            return bits.reshape(shape)
        try:
            array: NDArray[Any] = self._gguf.dequantize(tensor.data, kind)
        except Exception as error:
            raise ArgumentError(
                f"{self.path}: {tensor.name} is {kind.name}, which is not read: {error}"
            ) from error
        return array.astype(np.float32, copy=False).reshape(shape)

    def _heads_of(self, name: str) -> int | None:
        """How many heads a projection's rows are, where they have to be put back; None: they stay."""
        if not ARCHITECTURES[self.architecture] or not name.endswith((".weight", ".bias")):
            return None
        field = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        return None if field is None else int(self.fields.plain()[field])

    @cached_property
    def fields(self) -> Fields:
        """What config.json would hold.  Raises: ArgumentError for what no model here computes."""
        of = {
            name.removeprefix(f"{self.architecture}."): value
            for name, value in self.metadata.items()
            if name.startswith(f"{self.architecture}.")
        }
        num_heads = of.get("attention.head_count")
        hidden = of.get("embedding_length")
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise ArgumentError(f"{self.path} has no tensor token_embd.weight")
        head_dim = of.get("attention.key_length")
        if head_dim is None and isinstance(hidden, int) and isinstance(num_heads, int) and num_heads > 0:
            head_dim = hidden // num_heads
        self._refuse_unsupported(of, head_dim)
        fields = {
            "model_type": self.architecture,
            "vocab_size": int(embedding.shape[-1]),
            "hidden_size": hidden,
            "intermediate_size": of.get("feed_forward_length"),
            "num_hidden_layers": of.get("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": of.get("attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "max_position_embeddings": of.get("context_length"),
            "rope_theta": of.get("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(of, head_dim),
            "rms_norm_eps": of.get("attention.layer_norm_rms_epsilon"),
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": list(self.stop_ids),
            "hidden_act": "silu",
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "sliding_window": None,
        }
        return Fields(fields, str(self.path))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, and those that end a turn."""
        names = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot")]
        return tuple(dict.fromkeys(self.metadata[name] for name in names if name in self.metadata))

    def _refuse_unsupported(self, of: dict[str, Any], head_dim: object) -> None:
        if of.get("expert_count", 0):
            raise ArgumentError(f"{self.path} has {of['expert_count']} experts; dense models are supported")
        for name in ("attention.value_length", "rope.dimension_count"):
            if of.get(name, head_dim) != head_dim:
                raise ArgumentError(f"{self.path}: {name} is {of[name]}; it must be head_dim, {head_dim}")
        scaling = of.get("rope.scaling.type", "none")
        if scaling != "none" or of.get("rope.scale_linear", 1) != 1:
            raise ArgumentError(
                f"{self.path}: rotary scaling is {scaling!r:.40}; none and llama3 are supported"
            )
        if of.get("attention.sliding_window", 0):
            raise ArgumentError(f"{self.path}: a sliding window is not supported in GGUF files")

    def _rope_scaling(self, of: dict[str, Any], head_dim: object) -> dict[str, Any] | None:
        """Llama 3's scaling, found again from the factors that the file stores; None without them."""
        if self._rope_factors is None:
            return None
        factors = self._floats(self._rope_factors).astype(np.float32).ravel()
        theta = float(of.get("rope.freq_base", 10000.0))
        scaling: dict[str, Any] = LLAMA3 | {"rope_type": "llama3", "factor": float(factors.max())}
        if isinstance(head_dim, int) and len(factors) == head_dim // 2:
            plain = rope_frequencies(head_dim, theta)
            if np.allclose(plain / factors, rope_frequencies(head_dim, theta, scaling), rtol=1e-3):
                return scaling
        raise ArgumentError(f"{self.path}: {ROPE_FACTORS} is not llama 3's scaling, which alone is supported")


def _reader_of(gguf: Any) -> Any:
    """The package's reader over a plain array: slices of a memory map are objects that take 10 us to make."""

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> NDArray[Any]:
            return self._data

        @data.setter
        def data(self, mapped: NDArray[Any]) -> None:
            self._data = mapped.view(np.ndarray)

    return Reader


def _name_of(name: str) -> str:
    """transformers' name of a tensor; its own where there is none."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in OUTER_NAMES:
        return f"{OUTER_NAMES[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name
