"""BitNet b1.58: the decoder with ternary weights; real sizes, and a small model that ships.

    model = BitNetModel.tiny()
    ids = model.generate_sequence(20, batch_idx=0, prompt=[...])      the model's own sequences (session.py)

Imports decoder, report, sampling and session.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._binding import integer
from ..errors import ArgumentError
from ..files import replace_files
from ..lifetime import OwnedLock
from .checkpoint import Checkpoint, bits_of_float32, blocks_of, tensors_of
from .config import DecoderConfig
from .decoder import DecoderModel, head_of
from .layers import DecoderBlock, SelfAttention
from .matrix import Matrix, int8_codes_matrix, random_matrix
from .model_files import ModelFiles
from .report import GenerationReport
from .sampling import Sampler
from .session import Session
from .tensor_file import tensors_writer
from .ternary import FloatArray
from .token_ids import drawn_id, token_ids

__all__ = [
    "SHAPES",
    "TINY_BITNET",
    "BitNetAttentionLayer",
    "BitNetBlock",
    "BitNetConfig",
    "BitNetModel",
    "GenerationReport",
]

#: The names of 0.1.0.
BitNetConfig = DecoderConfig
BitNetBlock = DecoderBlock
BitNetAttentionLayer = SelfAttention

#: The model that ships with the library: weights, tokenizer, and the modules that training held out.
TINY_BITNET = Path(__file__).parent / "tiny_bitnet"

#: Real sizes: the public 2B-4T; the request's 7B; the 700M of the first paper.
SHAPES = {
    "2b-4t": DecoderConfig(128256, 2560, 6912, 30, 20, 5, 128, 4096, 500000.0, 1e-5, 128000, 128001),
    "7b": DecoderConfig(32000, 4096, 11008, 32, 32, 32, 128, 4096, 10000.0, 1e-5, 1, 2),
    "700m": DecoderConfig(32000, 1536, 4096, 24, 16, 16, 96, 2048, 10000.0, 1e-5, 1, 2),
}


class BitNetModel(DecoderModel):
    """A decoder with ternary weights, and sequences of its own; `from_pretrained` also loads a llama.

    Parameters
    ----------
    config, blocks, embedding, final_norm, head : as DecoderModel
    batch_size : sequences of `generate_sequence`
    """

    def __init__(
        self,
        config: DecoderConfig,
        blocks: Iterable[DecoderBlock],
        embedding: NDArray[Any],
        final_norm: FloatArray,
        *,
        head: Matrix | FloatArray | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__(config, blocks, embedding, final_norm, head=head)
        self.batch_size = integer("batch_size", batch_size, 1)
        self._sessions: dict[int, Session] = {}
        #: Guards the sessions' table and the report.
        self._lock = OwnedLock()
        self.report = GenerationReport()

    @classmethod
    def load(cls, path: Path | str, *, batch_size: int = 8) -> Self:
        """A model from an .npz file with transformers' names, as benchmarks/tiny_bitnet/README.md has it."""
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, NDArray[Any]] = dict(file)
        if "config" not in arrays:
            raise ArgumentError(f"{path} has no array config")
        config = DecoderConfig.from_json(arrays.pop("config").tobytes(), str(path))
        checkpoint = Checkpoint(arrays, str(path))
        codes = checkpoint.raw("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        scales = checkpoint.floats("model.embed_tokens.weight_scale", (config.vocab_size,))
        norm = checkpoint.floats("model.norm.weight", (config.hidden_size,))
        blocks = blocks_of(config, checkpoint, None)
        checkpoint.require_all_taken()
        head = int8_codes_matrix(codes, scales)
        return cls(config, blocks, codes * scales[:, None], norm, head=head, batch_size=batch_size)

    @classmethod
    def tiny(cls) -> Self:
        """The small model that ships with the library: 5.4 million ternary weights, trained on Python."""
        return cls.load(TINY_BITNET / "tiny_bitnet.npz")

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str | ModelFiles,
        *,
        head: str = "int8",
        weights: str = "int8",
        batch_size: int = 8,
        progress: Callable[[int, int], object] | None = None,
    ) -> Self:
        """As `DecoderModel.from_pretrained`, with `batch_size` sequences of its own."""
        batch_size = integer("batch_size", batch_size, 1)
        model = super().from_pretrained(path, head=head, weights=weights, progress=progress)
        model.batch_size = batch_size
        return model

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json and model.safetensors, as `from_pretrained` and transformers read them.

        Existing files are replaced once the new ones are complete, also those that this model was loaded
        from, whose bytes it keeps.

        Raises: ArgumentError unless the model is a BitNet whose head is its embedding; OSError.
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
        shape: str | DecoderConfig = "2b-4t",
        *,
        seed: int = 0,
        head: str = "int8",
        batch_size: int = 8,
        progress: Callable[[int, int], object] | None = None,
    ) -> Self:
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

    def generate_sequence(
        self,
        num_tokens: int,
        batch_idx: int,
        prompt: ArrayLike | None = None,
        *,
        sampler: Sampler | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> NDArray[np.int32]:
        """Continue one of the model's own sequences.

        Parameters
        ----------
        num_tokens : how many tokens to generate; fewer when the end token comes
        batch_idx : which sequence, from 0 to batch_size - 1; each remembers its tokens
        prompt : ids that come first; None: continue the sequence, or begin with the begin token
        sampler : how to choose; None: the likeliest
        progress : called with the number of new tokens after each

        Returns: int32, the new ids.  `report` counts tokens and times.
        Raises: ArgumentError; SequenceTooLong when the model's positions are used up; what `sampler` and
        `progress` raise.  The sequence then holds what was generated so far, and the next call continues it.
        Threads may use different sequences at once; a second thread waits for a sequence that is in use.
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
                    new_ids.append(drawn_id(sampler, logits, ids))
                    session.ids = [*ids, new_ids[-1]]
                new = []
                num_prompt_tokens = len(unseen) if len(new_ids) == 1 else 0
                with self._lock.taken():
                    self.report.count_step(num_prompt_tokens, 1, time.perf_counter_ns() - begin)
                if progress is not None:
                    progress(len(new_ids))
                if new_ids[-1] in self.config.stop_ids:
                    break
            if new:  # num_tokens is 0: the prompt is fed by the next call
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


def _random_block(config: DecoderConfig, rng: np.random.Generator) -> DecoderBlock:
    hidden, inter = config.hidden_size, config.intermediate_size
    q_out, kv_out = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))

    def matrix(num_out: int, num_in: int) -> Matrix:
        return random_matrix(num_out, num_in, rng)

    ones = np.ones(max(hidden, inter, q_out), np.float32)
    attention = SelfAttention(
        matrix(q_out + 2 * kv_out, hidden),
        matrix(hidden, q_out),
        input_norm=ones[:hidden],
        sub_norm=ones[:q_out],
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
    )
    return DecoderBlock(
        attention,
        matrix(2 * inter, hidden),
        matrix(hidden, inter),
        post_attention_norm=ones[:hidden],
        ffn_sub_norm=ones[:inter],
    )
