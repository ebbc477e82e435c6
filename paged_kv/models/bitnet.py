"""BitNet b1.58: a whole model, from token ids to logits, and the small one that ships with the library.

Where keys and values are kept is a step's business (layers.KVStep): the model asks it for positions and
attention, and takes the tokens of many sequences at once.

    ids ── embedding ── blocks ── final norm ── head (the embedding, transposed) ── logits

Imports layers, ternary and sampling, and the cache for `generate_sequence`.  Imported by generate.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._binding import integer
from ..cache import PagedKVCache
from ..errors import ArgumentError
from ..sequence import Sequence
from .layers import BitNetAttentionLayer, BitNetBlock, KVStep, rms_norm, rope_tables
from .sampling import Sampler
from .ternary import BitLinear, FloatArray, unpack_ternary

__all__ = ["BitNetAttentionLayer", "BitNetBlock", "BitNetConfig", "BitNetModel"]

#: The model that ships with the library: weights, tokenizer, and the modules that training held out.
TINY_BITNET = Path(__file__).parent / "tiny_bitnet"


@dataclass(frozen=True)
class BitNetConfig:
    """The shape of a BitNet, under the names of transformers' BitNetConfig."""

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
    bos_token_id: int
    eos_token_id: int

    @classmethod
    def from_json(cls, text: str | bytes) -> "BitNetConfig":
        """From a config.json; ArgumentError when a field is missing."""
        fields = json.loads(text)
        fields |= fields.get("rope_parameters", {})
        try:
            return cls(**{name: fields[name] for name in cls.__dataclass_fields__})
        except KeyError as missing:
            raise ArgumentError(f"the model's config has no {missing.args[0]}") from None


@dataclass
class GenerationReport:
    """What a generation took.  Times are of steps that held prompt tokens, and of those that held none."""

    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    num_steps: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0

    def count_step(self, num_prompt_tokens: int, num_new_tokens: int, elapsed_ns: int) -> None:
        self.num_steps += 1
        self.num_prompt_tokens += num_prompt_tokens
        self.num_new_tokens += num_new_tokens
        if num_prompt_tokens:
            self.prefill_ns += elapsed_ns
        else:
            self.decode_ns += elapsed_ns

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, prefill included."""
        elapsed_ns = self.prefill_ns + self.decode_ns
        return self.num_new_tokens / elapsed_ns * 1e9 if elapsed_ns else 0.0

    def __str__(self) -> str:
        return (
            f"{self.num_prompt_tokens:,} prompt and {self.num_new_tokens:,} new tokens in {self.num_steps:,} "
            f"steps: prefill {self.prefill_ns / 1e6:,.0f} ms, decode {self.decode_ns / 1e6:,.0f} ms, "
            f"{self.tokens_per_s:,.1f} tokens/s"
        )


class BitNetModel:
    """A BitNet's weights and its forward pass.

    Parameters
    ----------
    config : BitNetConfig
    blocks : a BitNetBlock for each layer
    embedding : float32 [vocab_size, hidden_size], also the head
    final_norm : float32 [hidden_size]
    batch_size : sequences of `generate_sequence`
    """

    def __init__(
        self,
        config: BitNetConfig,
        blocks: Iterable[BitNetBlock],
        embedding: FloatArray,
        final_norm: FloatArray,
        *,
        batch_size: int = 8,
    ) -> None:
        self.config = config
        self.blocks = tuple(blocks)
        self.embedding = embedding
        self.final_norm = final_norm
        self.batch_size = integer("batch_size", batch_size, 1)
        if len(self.blocks) != config.num_hidden_layers:
            raise ArgumentError(f"{len(self.blocks)} blocks for {config.num_hidden_layers} layers")
        if embedding.shape != (config.vocab_size, config.hidden_size):
            raise ArgumentError(f"the embedding has shape {list(embedding.shape)}, which is not the config's")
        self._cos, self._sin = rope_tables(config.head_dim, config.max_position_embeddings, config.rope_theta)
        self._cache: PagedKVCache | None = None
        self._entries: dict[int, _Entry] = {}
        self.report = GenerationReport()

    @classmethod
    def load(cls, path: Path | str, *, batch_size: int = 8) -> "BitNetModel":
        """A model from an .npz file with transformers' names, as benchmarks/tiny_bitnet/README.md has it."""
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, NDArray[Any]] = dict(file)
        config = BitNetConfig.from_json(arrays.pop("config").tobytes())
        scales = arrays["model.embed_tokens.weight_scale"]
        embedding = arrays["model.embed_tokens.weight"] * scales[:, None]
        blocks = [_block(config, arrays, f"model.layers.{i}.") for i in range(config.num_hidden_layers)]
        return cls(config, blocks, embedding, arrays["model.norm.weight"], batch_size=batch_size)

    @classmethod
    def tiny(cls) -> "BitNetModel":
        """The small model that ships with the library: 5.4 million ternary weights, trained on Python."""
        return cls.load(TINY_BITNET / "tiny_bitnet.npz")

    def forward(self, ids: ArrayLike, step: KVStep, rows: ArrayLike) -> FloatArray:
        """Logits after some of a step's tokens.

        Parameters
        ----------
        ids : int [num_tokens], the step's new tokens, of all its sequences
        step : takes their keys and values and attends
        rows : int [num_rows], the tokens whose logits are wanted

        Returns: float32 [num_rows, vocab_size].  A row's bits do not depend on the other rows.
        Raises: ArgumentError for ids that the vocabulary does not hold and positions beyond the model's.
        """
        ids, positions = np.asarray(ids), step.positions
        if ids.size and not (ids.min() >= 0 and ids.max() < self.config.vocab_size):
            raise ArgumentError(f"ids lie outside 0 to {self.config.vocab_size - 1}")
        if ids.size and positions.max() >= len(self._cos):
            raise ArgumentError(f"position {positions.max()} is beyond the model's {len(self._cos)}")
        x = self.embedding[ids]
        cos, sin = self._cos[positions], self._sin[positions]
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, step, layer)
        x = rms_norm(x[np.asarray(rows, np.intp)], self.final_norm, self.config.rms_norm_eps)
        # A product per row: one of several rows would add in another order.
        logits = np.empty((len(x), self.config.vocab_size), np.float32)
        for i, row in enumerate(x):
            np.dot(self.embedding, row, out=logits[i])
        return logits

    def new_cache(self, **options: Any) -> PagedKVCache:
        """A cache of this model's shape; options as PagedKVCache, float32 pages unless told otherwise."""
        config = self.config
        defaults: dict[str, Any] = {"dtype": "float32", "max_seq_len": config.max_position_embeddings}
        shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        return PagedKVCache(*shape, **(defaults | options))

    def generate_sequence(
        self,
        num_tokens: int,
        batch_idx: int,
        prompt: ArrayLike | None = None,
        *,
        sampler: Sampler | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> NDArray[np.int32]:
        """Go on with one of the model's own sequences.

        Parameters
        ----------
        num_tokens : how many tokens to generate; fewer when the end token comes
        batch_idx : which sequence, from 0 to batch_size - 1; each remembers its tokens
        prompt : ids that come first; None: go on where the sequence stands, or begin with the begin token
        sampler : how to choose; None: the likeliest
        progress : called with the number of new tokens after each

        Returns: int32, the new ids.  `report` tells what it took.
        Raises: ArgumentError; SequenceTooLong when the model's positions are used up.
        """
        num_tokens = integer("num_tokens", num_tokens, 0)
        entry = self._entry(integer("batch_idx", batch_idx, 0, self.batch_size - 1))
        fresh = [] if len(entry.seq) or entry.pending else [self.config.bos_token_id]
        pending = entry.pending + (fresh if prompt is None else np.asarray(prompt).tolist())
        sampler = sampler or Sampler()
        assert self._cache is not None
        new_ids: list[int] = []
        while len(new_ids) < num_tokens:
            begin = time.perf_counter_ns()
            with self._cache.step([entry.seq], [pending]) as step:
                logits = self.forward(pending, step, [-1])[0]
            num_prompt_tokens = len(pending) if not new_ids else 0
            pending = [sampler.sample(logits)]
            new_ids += pending
            entry.pending = pending
            self.report.count_step(num_prompt_tokens, 1, time.perf_counter_ns() - begin)
            if progress is not None:
                progress(len(new_ids))
            if new_ids[-1] == self.config.eos_token_id:
                break
        entry.pending = pending
        return np.array(new_ids, np.int32)

    def reset_sequence(self, batch_idx: int) -> None:
        """Forget the tokens of one of the model's own sequences."""
        entry = self._entry(integer("batch_idx", batch_idx, 0, self.batch_size - 1))
        entry.seq.reset()
        entry.pending = []

    def _entry(self, batch_idx: int) -> "_Entry":
        if self._cache is None:
            page_size = 64
            num_pages = self.batch_size * -(-self.config.max_position_embeddings // page_size)
            self._cache = self.new_cache(
                num_pages=num_pages, page_size=page_size, max_sequences=self.batch_size
            )
        if batch_idx not in self._entries:
            self._entries[batch_idx] = _Entry(self._cache.sequence(), [])
        return self._entries[batch_idx]


@dataclass
class _Entry:
    """One of the model's own sequences, and ids that it has not seen yet."""

    seq: Sequence
    pending: list[int]


def _block(config: BitNetConfig, arrays: dict[str, NDArray[Any]], prefix: str) -> BitNetBlock:
    def linear(name: str) -> BitLinear:
        weight = f"{prefix}{name}_proj.weight"
        return BitLinear(unpack_ternary(arrays[weight]), arrays[f"{weight}_scale"])

    def gain(name: str) -> FloatArray:
        return arrays[f"{prefix}{name}.weight"]

    attention = BitNetAttentionLayer(
        q=linear("self_attn.q"),
        k=linear("self_attn.k"),
        v=linear("self_attn.v"),
        o=linear("self_attn.o"),
        sub_norm=gain("self_attn.attn_sub_norm"),
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
    )
    return BitNetBlock(
        attention,
        gate=linear("mlp.gate"),
        up=linear("mlp.up"),
        down=linear("mlp.down"),
        input_norm=gain("input_layernorm"),
        post_attention_norm=gain("post_attention_layernorm"),
        ffn_sub_norm=gain("mlp.ffn_sub_norm"),
        eps=config.rms_norm_eps,
    )
