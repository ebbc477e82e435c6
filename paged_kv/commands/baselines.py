"""What one does without a paged cache: grow arrays by concatenation, or keep nothing and compute all again.

Both stand in for a cache's steps, so that the same model and the same serving loop run over them, and both
call the same attention kernel over their plain arrays, described as pages of one token.  Runs and spans are
then those of pages of 16, 32, 64 and 128 tokens: so all of them give the same bits, and a comparison is of
where keys and values are kept and of nothing else.

Imports foreign.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..attention.foreign import paged_attention
from ..models.ternary import FloatArray
from ..pages.new_tokens import counts_of


def attend_rows(q: FloatArray, k: FloatArray, v: FloatArray, num_threads: int, out: FloatArray) -> None:
    """Attention of one sequence's newest tokens over all of them, [seq_len, num_kv_heads, head_dim]."""
    seq_len = len(k)
    paged_attention(
        q,
        k[:, None],
        v[:, None],
        qo_indptr=np.array([0, len(q)]),
        kv_indptr=np.array([0, seq_len]),
        kv_indices=np.arange(seq_len),
        kv_last_page_len=np.ones(1, np.int64),
        out=out,
        num_threads=num_threads,
    )


class ConcatenatedSequence:
    """Keys and values of one sequence: an array for each layer, exactly as long as the sequence."""

    def __init__(self, cache: "ConcatenatedCache") -> None:
        num_layers, num_kv_heads, head_dim = cache.shape
        empty = np.empty((0, num_kv_heads, head_dim), np.float32)
        self.k = [empty] * num_layers
        self.v = [empty] * num_layers
        self._cache = cache

    def __len__(self) -> int:
        return len(self.k[-1])

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in (*self.k, *self.v))

    def free(self) -> None:
        self._cache.sequences.remove(self)


class ConcatenatedCache:
    """Sequences that grow by concatenation: each step copies every token of each sequence, layer by layer.

    copy_bytes is what the last step copied at a time, peak_bytes the most that was alive at once, that
    counted in.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, num_threads: int) -> None:
        self.shape = (num_layers, num_kv_heads, head_dim)
        self.num_threads = num_threads
        self.peak_bytes = self.copy_bytes = 0
        self.sequences: list[ConcatenatedSequence] = []

    @property
    def prefix_caching(self) -> bool:
        return False

    def sequence(self, tokens: object = None) -> ConcatenatedSequence:
        self.sequences.append(ConcatenatedSequence(self))
        return self.sequences[-1]

    @property
    def num_bytes(self) -> int:
        return sum(seq.num_bytes for seq in self.sequences)

    def step(self, seqs: Sequence[ConcatenatedSequence], new: object) -> "ConcatenatedStep":
        return ConcatenatedStep(self, seqs, np.asarray(counts_of(new, len(seqs))))


class RaggedStep:
    """The rows of a step over plain arrays; what ConcatenatedStep and RecomputeStep share."""

    def __init__(self, old_lens: ArrayLike, counts: NDArray[np.int64]) -> None:
        self.qo_indptr = np.concatenate([[0], np.cumsum(counts)])
        shifts = np.repeat(np.asarray(old_lens) - self.qo_indptr[:-1], counts)
        self.positions: NDArray[np.int32] = (np.arange(len(shifts)) + shifts).astype(np.int32)

    def rows(self, i: int) -> slice:
        return slice(int(self.qo_indptr[i]), int(self.qo_indptr[i + 1]))

    def __enter__(self) -> Self:
        return self

    def rollback(self) -> None:
        """As if the step had never been."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing was reserved, so there is nothing to commit."""
        if error is not None:
            self.rollback()


class ConcatenatedStep(RaggedStep):
    """Appends by making every array anew, one token longer."""

    def __init__(
        self, cache: ConcatenatedCache, seqs: Sequence[ConcatenatedSequence], counts: NDArray[np.int64]
    ) -> None:
        self.old_lens = [len(seq) for seq in seqs]
        super().__init__(self.old_lens, counts)
        self.cache, self.seqs = cache, seqs

    def rollback(self) -> None:
        for seq, length in zip(self.seqs, self.old_lens, strict=True):
            seq.k, seq.v = ([array[:length] for array in side] for side in (seq.k, seq.v))

    def attend(
        self, layer: int, q: FloatArray, k: FloatArray, v: FloatArray, /, *, out: FloatArray | None = None
    ) -> FloatArray:
        cache, out = self.cache, np.empty_like(q) if out is None else out
        for i, seq in enumerate(self.seqs):
            rows = self.rows(i)
            seq.k[layer] = np.concatenate([seq.k[layer], k[rows]])
            seq.v[layer] = np.concatenate([seq.v[layer], v[rows]])
            attend_rows(q[rows], seq.k[layer], seq.v[layer], cache.num_threads, out[rows])
        if layer + 1 == cache.shape[0]:
            # Old and new array of the longest sequence live at once while it is copied.
            cache.copy_bytes = max((seq.k[layer].nbytes for seq in self.seqs), default=0)
            cache.peak_bytes = max(cache.peak_bytes, cache.num_bytes + cache.copy_bytes)
        return out


class RecomputeStep(RaggedStep):
    """Whole sequences, every time: keys and values are used where they were computed, and forgotten."""

    def __init__(self, lengths: Sequence[int], num_threads: int) -> None:
        super().__init__(np.zeros(len(lengths)), np.asarray(lengths, np.int64))
        self.num_threads = num_threads

    def attend(
        self, layer: int, q: FloatArray, k: FloatArray, v: FloatArray, /, *, out: FloatArray | None = None
    ) -> FloatArray:
        out = np.empty_like(q) if out is None else out
        for i in range(len(self.qo_indptr) - 1):
            rows = self.rows(i)
            attend_rows(q[rows], k[rows], v[rows], self.num_threads, out[rows])
        return out
