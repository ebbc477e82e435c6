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

#: What transformers takes where a config is silent.
DEFAULTS: dict[str, dict[str, Any]] = {
    "bitnet": {"hidden_act": "relu2", "rope_theta": 500000.0, "rms_norm_eps": 1e-5},
    "llama": {"hidden_act": "silu", "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
}
DEFAULT_POSITIONS = 2048
#: Of head_dim: pages take no others.
HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 8, 256
MAX_WIDTH = 2**20


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a BitNet, or of a llama, under the names of transformers' configurations.

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
        if self.model_type not in DEFAULTS:
            raise ArgumentError(f"model_type is {self.model_type}; {' and '.join(DEFAULTS)} are supported")
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
        model_type = fields.text("model_type", tuple(DEFAULTS), "bitnet")
        defaults = DEFAULTS[model_type]
        rope = fields.fields("rope_parameters")
        if fields.flag("attention_bias", False) or fields.flag("mlp_bias", False):
            raise ArgumentError(f"{fields.where}: the model has biases, which are not there")
        vocab_size = fields.integer("vocab_size", 1)
        num_heads = fields.integer("num_attention_heads", 1, 2**16)
        hidden = fields.integer("hidden_size", 1, MAX_WIDTH)
        quantization = fields.fields("quantization_config")
        linear_class = quantization.plain().get("linear_class", "bitlinear")
        theta = rope if "rope_theta" in rope else fields
        eos = fields.ids("eos_token_id")
        try:
            return cls(
                vocab_size=vocab_size,
                hidden_size=hidden,
                intermediate_size=fields.integer("intermediate_size", 1, MAX_WIDTH),
                num_hidden_layers=fields.integer("num_hidden_layers", 1, 2**16),
                num_attention_heads=num_heads,
                num_key_value_heads=fields.integer("num_key_value_heads", 1, 2**16, num_heads),
                head_dim=fields.integer("head_dim", 1, MAX_HEAD_DIM, hidden // num_heads),
                max_position_embeddings=fields.integer(
                    "max_position_embeddings", 1, default=DEFAULT_POSITIONS
                ),
                rope_theta=theta.number("rope_theta", 0, default=defaults["rope_theta"]),
                rms_norm_eps=fields.number("rms_norm_eps", -1e-30, 1, defaults["rms_norm_eps"]),
                bos_token_id=fields.integer("bos_token_id", 0, default=None),
                eos_token_id=eos[0] if len(eos) == 1 else eos,
                model_type=model_type,
                hidden_act=fields.text("hidden_act", tuple(ACTIVATIONS), defaults["hidden_act"]),
                rope_scaling=_rope_scaling(fields, rope),
                inverse_scales=linear_class == "bitlinear" and bool(quantization.plain()),
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
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "inverse_scales"}
        fields |= {"architectures": ["BitNetForCausalLM"], "tie_word_embeddings": True}
        linear_class = "bitlinear" if self.inverse_scales else "autobitlinear"
        fields["quantization_config"] = {
            **{"quant_method": "bitnet", "linear_class": linear_class},
            **{"quantization_mode": "offline", "modules_to_not_convert": ["lm_head"]},
        }
        return json.dumps(fields, indent=2)


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
