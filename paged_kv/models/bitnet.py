"""BitNet b1.58: a whole model, from token ids to logits; checkpoints, real sizes, and a small one that ships.

Where keys and values are kept is a step's business (layers.KVStep): the model asks it for positions and
attention, and takes the tokens of many sequences at once.

    ids ── embedding ── blocks ── final norm ── head (the embedding, transposed) ── logits

Imports checkpoint, sampling and session.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._binding import integer
from ..cache import PagedKVCache
from ..errors import ArgumentError
from ..files import replace_files
from ..lifetime import OwnedLock, Uncopyable
from .checkpoint import (
    Checkpoint,
    bits_of_float32,
    blocks_of,
    float32_of_bits,
    open_folder,
    stop_ids_of,
    tensors_of,
)
from .config import BitNetConfig
from .layers import (
    BitNetAttentionLayer,
    BitNetBlock,
    Buffers,
    KVStep,
    Rotation,
    rope_frequencies,
)
from .matrix import Matrix, bfloat16_matrix, int8_matrix, random_matrix
from .sampling import Sampler
from .session import Session
from .tensor_file import tensors_writer
from .ternary import FloatArray
from .token_ids import drawn_id, indices, token_ids

__all__ = ["BitNetAttentionLayer", "BitNetBlock", "BitNetConfig", "BitNetModel"]

#: The model that ships with the library: weights, tokenizer, and the modules that training held out.
TINY_BITNET = Path(__file__).parent / "tiny_bitnet"


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


#: Real sizes: the public 2B-4T; the request's 7B; the 700M of the first paper.
SHAPES = {
    "2b-4t": BitNetConfig(128256, 2560, 6912, 30, 20, 5, 128, 4096, 500000.0, 1e-5, 128000, 128001),
    "7b": BitNetConfig(32000, 4096, 11008, 32, 32, 32, 128, 4096, 10000.0, 1e-5, 1, 2),
    "700m": BitNetConfig(32000, 1536, 4096, 24, 16, 16, 96, 2048, 10000.0, 1e-5, 1, 2),
}


class BitNetModel(Uncopyable):
    """A model's weights and its forward pass: a BitNet, or a llama with 8 or 16 bits a weight.

    Parameters
    ----------
    config : BitNetConfig
    blocks : a BitNetBlock for each layer
    embedding : float32 [vocab_size, hidden_size], or uint16, the bits of bfloat16
    final_norm : float32 [hidden_size]
    head : Matrix, or float32 [vocab_size, hidden_size]; None: the embedding, in 8 bits
    batch_size : sequences of `generate_sequence`
    """

    def __init__(
        self,
        config: BitNetConfig,
        blocks: Iterable[BitNetBlock],
        embedding: NDArray[Any],
        final_norm: FloatArray,
        *,
        head: Matrix | FloatArray | None = None,
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
        self.head = head_of(embedding) if head is None else head
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self._rotation = Rotation(frequencies, config.max_position_embeddings)
        #: Scratch of forward passes; one takes it for as long as it runs, and several threads may.
        self._buffers: deque[Buffers] = deque(maxlen=4)
        self._sessions: dict[int, Session] = {}
        #: Guards the sessions' table and the report.
        self._lock = OwnedLock()
        self.report = GenerationReport()

    @classmethod
    def load(cls, path: Path | str, *, batch_size: int = 8) -> "BitNetModel":
        """A model from an .npz file with transformers' names, as benchmarks/tiny_bitnet/README.md has it."""
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, NDArray[Any]] = dict(file)
        if "config" not in arrays:
            raise ArgumentError(f"{path} has no array config")
        config = BitNetConfig.from_json(arrays.pop("config").tobytes(), str(path))
        checkpoint = Checkpoint(arrays, str(path))
        codes = checkpoint.raw("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        embedding = (
            codes * checkpoint.floats("model.embed_tokens.weight_scale", (config.vocab_size,))[:, None]
        )
        norm = checkpoint.floats("model.norm.weight", (config.hidden_size,))
        blocks = blocks_of(config, checkpoint, None)
        checkpoint.require_all_taken()
        return cls(config, blocks, embedding, norm, batch_size=batch_size)

    @classmethod
    def tiny(cls) -> "BitNetModel":
        """The small model that ships with the library: 5.4 million ternary weights, trained on Python."""
        return cls.load(TINY_BITNET / "tiny_bitnet.npz")

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        head: str = "int8",
        weights: str = "int8",
        batch_size: int = 8,
        progress: Callable[[int, int], object] | None = None,
    ) -> "BitNetModel":
        """A model from a folder as transformers saves it: config.json and safetensors, and
        generation_config.json, whose end tokens end a text too.

        head : "int8"; "bfloat16", twice as large; or "float32", four times as large and exact
        weights : of a llama's projections, "int8" or "bfloat16"; a BitNet's are ternary
        progress : called with the blocks that are there, and how many there will be

        Files are read by memory map; projections go into huge pages.  BitNet's come packed in 2 bits, with
        scales of either direction, or as floats that are made ternary; a llama's as `weights` says.
        Raises: ArgumentError, naming the tensor that is missing, of another shape, all zeros, not finite, or
        that no part of the model takes; and the field of a config that is none; OSError.
        """
        fields, checkpoint = open_folder(Path(folder))
        config = BitNetConfig.from_fields(fields).with_stop_ids(stop_ids_of(Path(folder)))
        shape = (config.vocab_size, config.hidden_size)
        checkpoint.nonzero("model.embed_tokens.weight", shape)
        embedding = rows = checkpoint.raw("model.embed_tokens.weight", shape)
        if not fields.flag("tie_word_embeddings", False):
            checkpoint.nonzero("lm_head.weight", shape)
            rows = checkpoint.raw("lm_head.weight", shape)
        norm = checkpoint.floats("model.norm.weight", (config.hidden_size,))
        blocks = blocks_of(config, checkpoint, progress, weights)
        checkpoint.require_all_taken()
        return cls(config, blocks, embedding, norm, head=head_of(rows, head), batch_size=batch_size)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json and model.safetensors, as `from_pretrained` and transformers read them.

        Files that are there are replaced, once the new ones are whole: also those that this model was loaded
        from, which it goes on reading.

        Raises: ArgumentError for what is no BitNet, or has a head that is not its embedding; OSError.
        """
        if self.config.model_type != "bitnet":
            raise ArgumentError(f"a {self.config.model_type} is not written, only a bitnet")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.final_norm}
        tensors |= tensors_of(self.config, self.blocks)
        config = self.config.to_json().encode()
        replace_files(
            {
                folder / "model.safetensors": tensors_writer(tensors),
                folder / "config.json": lambda file: file.write(config),
            }
        )

    @classmethod
    def random(
        cls,
        shape: str | BitNetConfig = "2b-4t",
        *,
        seed: int = 0,
        head: str = "int8",
        batch_size: int = 8,
        progress: Callable[[int, int], object] | None = None,
    ) -> "BitNetModel":
        """A model of real size and random weights: "2b-4t", "7b" or "700m", or of a config's shape.

        Raises: ArgumentError; MemoryError.
        """
        if isinstance(shape, str) and shape not in SHAPES:
            raise ArgumentError(f'shape is "{shape}"; there are {", ".join(SHAPES)}')
        config = SHAPES[shape] if isinstance(shape, str) else shape
        rng = np.random.default_rng(integer("seed", seed, 0, 2**64))
        blocks = []
        for i in range(config.num_hidden_layers):
            blocks.append(_random_block(config, rng))
            if progress is not None:
                progress(i + 1, config.num_hidden_layers)
        # Of one block of random rows: 128,256 of them take half a minute to draw.
        num_drawn = min(4096, config.vocab_size)
        drawn = bits_of_float32(rng.standard_normal((num_drawn, config.hidden_size), np.float32))
        embedding = np.resize(drawn, (config.vocab_size, config.hidden_size))
        norm = np.ones(config.hidden_size, np.float32)
        return cls(config, blocks, embedding, norm, head=head_of(embedding, head), batch_size=batch_size)

    @property
    def matrices(self) -> list[Matrix]:
        """What every token reads: the blocks' matrices, and the head where it is one."""
        inner = [matrix for block in self.blocks for matrix in block.matrices]
        return [*inner, self.head] if isinstance(self.head, Matrix) else inner

    @property
    def weight_bytes(self) -> int:
        """Bytes that a step reads of weights."""
        head = 0 if isinstance(self.head, Matrix) else self.head.nbytes
        return sum(matrix.num_bytes for matrix in self.matrices) + head

    @np.errstate(all="ignore")
    def forward(self, ids: ArrayLike, step: KVStep, rows: ArrayLike) -> FloatArray:
        """Logits after some of a step's tokens.

        Parameters
        ----------
        ids : int [num_tokens], the step's new tokens, of all its sequences
        step : takes their keys and values and attends
        rows : int [num_rows], the tokens whose logits are wanted; negative ones count from the last

        Returns: float32 [num_rows, vocab_size].  A row's bits do not depend on the other rows.
        Raises: ArgumentError, before any work is done, for ids that the vocabulary does not hold, ids that
        are not as many as the step's tokens, rows that are none of them, and positions beyond the model's.
        """
        ids, positions = token_ids("ids", ids, self.config.vocab_size), step.positions
        if positions.dtype != np.int32 or positions.shape != ids.shape:
            raise ArgumentError(
                f"{ids.size} ids, and a step of {positions.dtype} positions {list(positions.shape)}; "
                "give the ids of its new tokens"
            )
        rows = indices("rows", rows, len(ids))
        self._rotation.require(positions)
        eps = self.config.rms_norm_eps
        try:
            buffers = self._buffers.pop()  # its own until the end: calls of other threads take others
        except IndexError:
            buffers = Buffers()
        x = buffers.rows("x", len(ids), self.config.hidden_size)
        chosen = self.embedding[ids]
        x[:] = float32_of_bits(chosen) if chosen.dtype == np.uint16 else chosen
        for layer, block in enumerate(self.blocks):
            block(x, self._rotation, step, layer, buffers)
        x = x[rows]
        self._buffers.append(buffers)
        if isinstance(self.head, Matrix):
            return self.head(x, norm=self.final_norm, eps=eps)
        x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + np.float32(eps)) * self.final_norm
        # A product per row: one of several rows would add in another order.
        logits = np.empty((len(x), self.config.vocab_size), np.float32)
        for i, row in enumerate(x):
            np.dot(self.head, row, out=logits[i])
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
        Raises: ArgumentError; SequenceTooLong when the model's positions are used up; what `sampler` and
        `progress` raise.  The sequence then holds what was generated before, and the next call goes on there.
        Threads may use different sequences at once; a second one waits for a sequence that is in use.
        Cost: the sequence's cache starts with room for 256 tokens and doubles when it is full.
        """
        num_tokens = integer("num_tokens", num_tokens, 0)
        session, sampler = self._entry(batch_idx), sampler or Sampler()
        new = [] if prompt is None else token_ids("prompt", prompt, self.config.vocab_size).tolist()
        new_ids: list[int] = []
        with session.lock.taken():
            if prompt is None and not session.ids:
                if self.config.bos_token_id is None:
                    raise ArgumentError("the model has no begin token; give a prompt")
                new = [self.config.bos_token_id]
            while len(new_ids) < num_tokens:
                begin = time.perf_counter_ns()
                ids, unseen = session.unseen(new)
                # A sampler that raises rolls the step back, with the prompt.
                with session.step(unseen) as step:
                    logits = self.forward(unseen, step, [-1])[0]
                    new_ids.append(drawn_id(sampler, logits))
                    session.ids = [*ids, new_ids[-1]]
                new = []
                num_prompt_tokens = len(unseen) if len(new_ids) == 1 else 0
                with self._lock.taken():
                    self.report.count_step(num_prompt_tokens, 1, time.perf_counter_ns() - begin)
                if progress is not None:
                    progress(len(new_ids))
                if new_ids[-1] in self.config.stop_ids:
                    break
            if new:  # no token was asked for: the prompt waits for the next call
                session.ids = session.ids + new
        return np.array(new_ids, np.int32)

    def reset_sequence(self, batch_idx: int) -> None:
        """Forget the tokens of one of the model's own sequences."""
        session = self._entry(batch_idx)
        with session.lock.taken():
            session.reset()

    def _entry(self, batch_idx: int) -> Session:
        batch_idx = integer("batch_idx", batch_idx, 0, self.batch_size - 1)
        with self._lock.taken():
            session = self._sessions.get(batch_idx)
            if session is None:
                positions = self.config.max_position_embeddings
                session = self._sessions[batch_idx] = Session(self.new_cache, positions)
            return session


def head_of(rows: NDArray[Any], kind: str = "int8") -> Matrix | FloatArray:
    """An output head from rows of floats or of bfloat16's bits, in 8 bits, in bfloat16 or as float32."""
    if kind == "int8":
        return int8_matrix(rows, float32_of_bits if rows.dtype == np.uint16 else None)
    if kind == "bfloat16":
        return bfloat16_matrix(rows if rows.dtype == np.uint16 else bits_of_float32(rows))
    if kind != "float32":
        raise ArgumentError(f'head is "{kind}"; it may be int8, bfloat16 or float32')
    return float32_of_bits(rows) if rows.dtype == np.uint16 else rows.astype(np.float32)


def _random_block(config: BitNetConfig, rng: np.random.Generator) -> BitNetBlock:
    hidden, inter = config.hidden_size, config.intermediate_size
    q_out, kv_out = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))

    def matrix(num_out: int, num_in: int) -> Matrix:
        return random_matrix(num_out, num_in, rng)

    ones = np.ones(max(hidden, inter, q_out), np.float32)
    attention = BitNetAttentionLayer(
        matrix(q_out + 2 * kv_out, hidden),
        matrix(hidden, q_out),
        input_norm=ones[:hidden],
        sub_norm=ones[:q_out],
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
    )
    return BitNetBlock(
        attention,
        matrix(2 * inter, hidden),
        matrix(hidden, inter),
        post_attention_norm=ones[:hidden],
        ffn_sub_norm=ones[:inter],
    )
