"""A decoder: a whole model, from token ids to logits, and how one is loaded from a checkpoint.

    ids ── embedding ── blocks ── final norm ── head (the embedding, transposed) ── logits

It keeps no keys and values: a step does (layers.KVStep), which gives positions and attention, and holds the
tokens of many sequences at once.

Imports checkpoint, config, layers, model_files and program.
"""

from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..cache import PagedKVCache
from ..errors import ArgumentError
from ..lifetime import Uncopyable
from .checkpoint import bits_of_float32, blocks_of, float32_of_bits
from .config import FAMILIES, DecoderConfig
from .layers import DecoderBlock, KVStep, Rotation, rope_frequencies
from .matrix import Matrix, bfloat16_matrix, int8_matrix
from .model_files import ModelFiles
from .program import Program
from .report import Stopwatch
from .ternary import FloatArray
from .token_ids import indices, token_ids

#: How an output head may be kept.
HEADS = ("int8", "bfloat16", "float32")


class DecoderModel(Uncopyable):
    """A model's weights and its forward pass: a BitNet, or the llama family in 8 or 16 bits a weight.

    Parameters
    ----------
    config : DecoderConfig
    blocks : a DecoderBlock for each layer
    embedding : float32 [vocab_size, hidden_size], or uint16, the bits of bfloat16
    final_norm : float32 [hidden_size]
    head : Matrix, or float32 [vocab_size, hidden_size]; None: the embedding, in 8 bits
    """

    def __init__(
        self,
        config: DecoderConfig,
        blocks: Iterable[DecoderBlock],
        embedding: NDArray[Any],
        final_norm: FloatArray,
        *,
        head: Matrix | FloatArray | None = None,
    ) -> None:
        self.config = config
        self.blocks = tuple(blocks)
        self.embedding = embedding
        self.final_norm = final_norm
        if len(self.blocks) != config.num_hidden_layers:
            raise ArgumentError(f"{len(self.blocks)} blocks for {config.num_hidden_layers} layers")
        if embedding.shape != (config.vocab_size, config.hidden_size):
            raise ArgumentError(f"the embedding has shape {list(embedding.shape)}, which is not the config's")
        self.head = head_of(embedding) if head is None else head
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self._rotation = Rotation(frequencies, config.max_position_embeddings)
        #: Counts the time of products, while something measures it.
        self.clock: Stopwatch | None = None
        #: A pass owns one while it runs, so that several threads can run passes.
        self._programs: deque[Program] = deque(maxlen=4)

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str | ModelFiles,
        *,
        head: str = "int8",
        weights: str = "int8",
        progress: Callable[[int, int], object] | None = None,
    ) -> Self:
        """A model from a folder as transformers saves it, or from a GGUF file.

        path : a folder with config.json, safetensors, and generation_config.json, whose end tokens end a text
            too; a .gguf file, for which the extra `gguf` is needed; or "smollm2" (model_files.PACKAGED)
        head : "int8"; "bfloat16", twice as large; or "float32", four times as large and exact
        weights : of projections, "int8" or "bfloat16"; a BitNet's are ternary
        progress : called with the number of loaded blocks, and of all blocks

        Files are memory-mapped; projections are packed into huge pages.  A BitNet's are stored packed in
        2 bits, with scales of either direction, or as floats that are made ternary; a llama's become
        `weights`.
        Raises: ArgumentError, naming the tensor that is missing, of another shape, all zeros, not finite, or
        not used by any part of the model; or the invalid field of a config; OSError.
        """
        files = ModelFiles.open(path)
        config, checkpoint = files.config, files.checkpoint
        shape = (config.vocab_size, config.hidden_size)
        embedding = rows = checkpoint.rows("model.embed_tokens.weight", shape)
        if not files.fields.flag("tie_word_embeddings", FAMILIES[config.model_type].is_tied):
            rows = checkpoint.rows("lm_head.weight", shape)
        norm = checkpoint.floats("model.norm.weight", (config.hidden_size,))
        blocks = blocks_of(config, checkpoint, progress, weights)
        checkpoint.require_all_taken()
        return cls(config, blocks, embedding, norm, head=head_of(rows, head))

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
        rows : int [num_rows], the tokens to compute logits of; negative ones count from the last

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
        program = self._taken_program(len(ids))
        x = program.x[: len(ids)]
        chosen = self.embedding[ids]
        x[:] = float32_of_bits(chosen) if chosen.dtype == np.uint16 else chosen
        program.clock = self.clock
        program.run(step, self._rotation)
        x = x[rows]
        self._programs.append(program)
        if isinstance(self.head, Matrix):
            return self.head(x, norm=self.final_norm, eps=eps)
        x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + np.float32(eps)) * self.final_norm
        # A product per row: one of several rows would add in another order.
        logits = np.empty((len(x), self.config.vocab_size), np.float32)
        for i, row in enumerate(x):
            np.dot(self.head, row, out=logits[i])
        return logits

    def _taken_program(self, num_tokens: int) -> Program:
        """A program of enough tokens that no other pass has."""
        try:
            program = self._programs.pop()
        except IndexError:
            program = Program(self.blocks, _power_of_two(num_tokens))
        if program.capacity < num_tokens:
            program = Program(self.blocks, _power_of_two(num_tokens))
        return program

    def new_cache(self, **options: Any) -> PagedKVCache:
        """A cache of this model's shape and window; options as PagedKVCache.

        Pages are float32 for a BitNet, whose rounded activations turn on small differences, else bfloat16.
        """
        config = self.config
        dtype = "float32" if config.model_type == "bitnet" else "bfloat16"
        defaults: dict[str, Any] = {"dtype": dtype, "max_seq_len": config.max_position_embeddings}
        if config.sliding_window is not None:
            defaults["window"] = config.sliding_window
        shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        return PagedKVCache(*shape, **(defaults | options))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length() if count else 1


def head_of(rows: NDArray[Any], kind: str = "int8") -> Matrix | FloatArray:
    """An output head from rows of floats or of bfloat16's bits, in 8 bits, in bfloat16 or as float32."""
    if kind == "int8":
        return int8_matrix(rows, float32_of_bits if rows.dtype == np.uint16 else None)
    if kind == "bfloat16":
        return bfloat16_matrix(rows if rows.dtype == np.uint16 else bits_of_float32(rows))
    if kind != "float32":
        raise ArgumentError(f'head is "{kind}"; it may be {", ".join(HEADS)}')
    return float32_of_bits(rows) if rows.dtype == np.uint16 else rows.astype(np.float32)
