"""The shape of a model, under the names of transformers' configurations.

Imports json_file.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from .._binding import integer, real
from ..errors import ArgumentError
from .json_file import Fields, json_object
from .layers import ACTIVATIONS

#: Of families that have a window unless the config says otherwise.
DEFAULT_WINDOW = 4096


@dataclass(frozen=True)
class Family:
    """What transformers takes where a config of this model_type is silent, and what its layers have.

    num_kv_heads, head_dim : None: the number of heads; hidden_size / heads
    has_window : a token sees the last DEFAULT_WINDOW tokens, itself included, unless the config says null
    reads_bias : `attention_bias` decides on biases of q, k, v and o
    qkv_bias : the projections of q, k and v always have biases
    qk_norms : a norm of each head of q and of k, before they are rotated
    unrotated_every : every so many layers, one does not rotate; 0: all do
    """

    hidden_act: str = "silu"
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_positions: int = 2048
    has_window: bool = False
    is_tied: bool = False
    reads_bias: bool = True
    qkv_bias: bool = False
    qk_norms: bool = False
    unrotated_every: int = 0


FAMILIES = {
    "bitnet": Family("relu2", 500000.0, 1e-5),
    "llama": Family(),
    "mistral": Family(num_kv_heads=8, max_positions=131072, has_window=True, reads_bias=False),
    "qwen2": Family(num_kv_heads=32, max_positions=32768, reads_bias=False, qkv_bias=True),
    "qwen3": Family(num_kv_heads=32, head_dim=128, max_positions=32768, qk_norms=True),
    "smollm3": Family(
        rope_theta=2000000.0, num_kv_heads=4, max_positions=32768, is_tied=True, unrotated_every=4
    ),
}
#: Of head_dim: pages take no others.
HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 8, 256
MAX_WIDTH = 2**20
#: Fields that no config.json has: they follow from others.
OWN_FIELDS = ("inverse_scales", "qkv_bias", "o_bias", "qk_norms", "unrotated_layers", "sliding_window")


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a BitNet or of a model of the llama family, under transformers' names.

    qkv_bias, o_bias : whether these projections add biases
    qk_norms : whether heads of q and k have norms of their own
    unrotated_layers : layers whose q and k are not rotated
    sliding_window : tokens that a token sees in every layer, itself included; None: all before it

    Raises: ArgumentError for a field that is outside its range, or does not fit the others.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...]
    model_type: str = "bitnet"
    hidden_act: str = "relu2"
    rope_scaling: dict[str, Any] | None = None
    #: Whether products are divided by a stored scale (linear_class "bitlinear"), not multiplied.
    inverse_scales: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norms: bool = False
    unrotated_layers: tuple[int, ...] = ()
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        integer("vocab_size", self.vocab_size, 1)
        integer("num_hidden_layers", self.num_hidden_layers, 1, 2**16)
        integer("max_position_embeddings", self.max_position_embeddings, 1)
        for name, most in (
            ("hidden_size", MAX_WIDTH),
            ("intermediate_size", MAX_WIDTH),
            ("num_attention_heads", 2**16),
            ("num_key_value_heads", 2**16),
            ("head_dim", MAX_HEAD_DIM),
        ):
            integer(name, getattr(self, name), 1, most)
        for name in ("intermediate_size", "head_dim"):
            if getattr(self, name) % HEAD_DIM_MULTIPLE:
                raise ArgumentError(f"{name} is {getattr(self, name)}; it must be a multiple of 8")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ArgumentError(
                f"num_attention_heads is {self.num_attention_heads}; "
                f"it must be a multiple of num_key_value_heads, {self.num_key_value_heads}"
            )
        if real("rope_theta", self.rope_theta) <= 0 or real("rms_norm_eps", self.rms_norm_eps, 0.0) > 1:
            raise ArgumentError(
                f"rope_theta is {self.rope_theta} and rms_norm_eps {self.rms_norm_eps}; "
                "they must be above 0, and from 0 to 1"
            )
        if self.bos_token_id is not None:
            integer("bos_token_id", self.bos_token_id, 0, self.vocab_size - 1)
        if self.sliding_window is not None:
            integer("sliding_window", self.sliding_window, 1)
        if self.model_type not in FAMILIES:
            raise ArgumentError(f"model_type is {self.model_type}; {', '.join(FAMILIES)} are supported")
        if self.hidden_act not in ACTIVATIONS:
            raise ArgumentError(f"hidden_act is {self.hidden_act}; {' and '.join(ACTIVATIONS)} are supported")

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "the model's config") -> "DecoderConfig":
        """From a config.json; fields that are missing have the defaults of transformers.

        where : what errors call it
        Raises: ArgumentError that names the field that is missing, of another type, or not supported.
        """
        return cls.from_fields(Fields(json_object(text, where), where))

    @classmethod
    def from_fields(cls, fields: Fields) -> "DecoderConfig":
        """The same, of a file's fields."""
        model_type = fields.text("model_type", tuple(FAMILIES), "bitnet")
        family = FAMILIES[model_type]
        rope = fields.fields("rope_parameters")
        if fields.flag("mlp_bias", False):
            raise ArgumentError(
                f"{fields.where}: mlp_bias is true; biases of the feed-forward are not supported"
            )
        has_biases = fields.flag("attention_bias", False) and family.reads_bias
        if has_biases and model_type == "bitnet":
            raise ArgumentError(
                f"{fields.where}: attention_bias is true; a bitnet with biases is not supported"
            )
        vocab_size = fields.integer("vocab_size", 1)
        num_heads = fields.integer("num_attention_heads", 1, 2**16)
        hidden = fields.integer("hidden_size", 1, MAX_WIDTH)
        num_layers = fields.integer("num_hidden_layers", 1, 2**16)
        quantization = fields.fields("quantization_config")
        linear_class = quantization.plain().get("linear_class", "bitlinear")
        theta = rope if "rope_theta" in rope else fields
        eos = fields.ids("eos_token_id")
        # A null says what silence does not: as many as the heads.
        is_silent = family.num_kv_heads is None or fields.is_null("num_key_value_heads")
        num_kv_heads = num_heads if is_silent else family.num_kv_heads
        try:
            return cls(
                vocab_size=vocab_size,
                hidden_size=hidden,
                intermediate_size=fields.integer("intermediate_size", 1, MAX_WIDTH),
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                num_key_value_heads=fields.integer("num_key_value_heads", 1, 2**16, num_kv_heads),
                head_dim=fields.integer("head_dim", 1, MAX_HEAD_DIM, family.head_dim or hidden // num_heads),
                max_position_embeddings=fields.integer(
                    "max_position_embeddings", 1, default=family.max_positions
                ),
                rope_theta=theta.number("rope_theta", 0, default=family.rope_theta),
                rms_norm_eps=fields.number("rms_norm_eps", -1e-30, 1, family.rms_norm_eps),
                bos_token_id=fields.integer("bos_token_id", 0, default=None),
                eos_token_id=eos[0] if len(eos) == 1 else eos,
                model_type=model_type,
                hidden_act=fields.text("hidden_act", tuple(ACTIVATIONS), family.hidden_act),
                rope_scaling=_rope_scaling(fields, rope),
                inverse_scales=linear_class == "bitlinear" and bool(quantization.plain()),
                qkv_bias=family.qkv_bias or has_biases,
                o_bias=has_biases,
                qk_norms=family.qk_norms,
                unrotated_layers=_unrotated_layers(fields, family, num_layers),
                sliding_window=_sliding_window(fields, family, num_layers),
            )
        except ArgumentError as error:
            if str(error).startswith(fields.where):
                raise
            raise ArgumentError(f"{fields.where}: {error}") from None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def with_stop_ids(self, ids: tuple[int, ...]) -> "DecoderConfig":
        """The same, and these end a text too."""
        union = tuple(dict.fromkeys((*self.stop_ids, *ids)))
        return dataclasses.replace(self, eos_token_id=union[0] if len(union) == 1 else union)

    def to_json(self) -> str:
        """As transformers reads it."""
        names = [name for name in self.__dataclass_fields__ if name not in OWN_FIELDS]
        fields = {name: getattr(self, name) for name in names}
        fields |= {"architectures": ["BitNetForCausalLM"], "tie_word_embeddings": True}
        linear_class = "bitlinear" if self.inverse_scales else "autobitlinear"
        fields["quantization_config"] = {
            **{"quant_method": "bitnet", "linear_class": linear_class},
            **{"quantization_mode": "offline", "modules_to_not_convert": ["lm_head"]},
        }
        return json.dumps(fields, indent=2)


def _unrotated_layers(fields: Fields, family: Family, num_layers: int) -> tuple[int, ...]:
    """Layers without rotation: those with a 0 in `no_rope_layers`, or every `no_rope_layer_interval`-th."""
    if not family.unrotated_every:
        return ()
    flags = fields.numbers("no_rope_layers", (0, 1))
    if flags:
        if len(flags) < num_layers:
            raise ArgumentError(f"{fields.where}: no_rope_layers has {len(flags)} of {num_layers} layers")
        return tuple(layer for layer in range(num_layers) if not flags[layer])
    every = fields.integer("no_rope_layer_interval", 1, default=family.unrotated_every)
    return tuple(range(every - 1, num_layers, every))


def _sliding_window(fields: Fields, family: Family, num_layers: int) -> int | None:
    """The window of all layers.  Raises: ArgumentError where only some of them have one."""
    types = fields.plain().get("layer_types")
    if not family.has_window:
        if not fields.flag("use_sliding_window", False):
            return None
        # Qwen's layers before max_window_layers see everything.
        first = fields.integer("max_window_layers", 0, default=28)
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
    else:
        kinds = ["sliding_attention"] * num_layers
    kinds = types if isinstance(types, list) else kinds
    is_silent = "sliding_window" not in fields and not fields.is_null("sliding_window")
    window = DEFAULT_WINDOW if is_silent else fields.integer("sliding_window", 1, default=None)
    if window is None or kinds == ["full_attention"] * num_layers:
        return None
    if kinds != ["sliding_attention"] * num_layers:
        raise ArgumentError(
            f"{fields.where}: sliding_window is {window} on some layers only; "
            "windows of single layers are not supported"
        )
    return window


def _rope_scaling(fields: Fields, rope: Fields) -> dict[str, Any] | None:
    """Llama 3's numbers, from `rope_scaling` or `rope_parameters`; None where positions are not scaled."""
    scaling = fields.fields("rope_scaling")
    if not scaling.plain():
        scaling = rope
    kind = scaling.plain().get("rope_type", scaling.plain().get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ArgumentError(f"{scaling.where}: its type is {kind!r:.60}; default and llama3 are supported")
    low = scaling.number("low_freq_factor", 0)
    return {
        "rope_type": "llama3",
        "factor": scaling.number("factor", 0),
        "low_freq_factor": low,
        "high_freq_factor": scaling.number("high_freq_factor", low),
        "original_max_position_embeddings": scaling.integer("original_max_position_embeddings", 1),
    }


#: The name of 0.1.0.
BitNetConfig = DecoderConfig
