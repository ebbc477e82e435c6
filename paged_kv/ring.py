"""The ring cache: one layer's keys and values, a ring of tokens for each batch entry, allocated once.

    m = KVCacheManager()
    m.allocate(max_seq_len, batch_size, hidden_dim, num_heads)
    m.append(K, V, seq_pos, batch_idx)          O(1): slot seq_pos % max_seq_len, overwriting the oldest
    K, V, cached_len = m.get_cache(batch_idx)   oldest first; a view where possible
    m.reset(batch_idx)                          O(1)

A batch entry is one page of the pool, as many tokens long as the ring:

    [batch entry][head][K or V][slot][dim]   float32

each head's K and V contiguous and beginning on a cache line: 2 * num_heads * batch_size *
align_up(max_seq_len * head_dim * 4) bytes.  For many sequences of different lengths, and for attention, use
PagedKVCache.

Imports pool and _binding.
"""

import time
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._binding import check, ffi, integer, lib
from .attention.arrays import float32_pointer, read_only
from .errors import ArgumentError, CacheClosed
from .lifetime import OwnedLock, Uncopyable
from .pages.pool import MAX_PAGE_BYTES, PagePool

#: A cache line.
ALIGNMENT = 64

FloatArray: TypeAlias = NDArray[np.float32]
Pair: TypeAlias = tuple[FloatArray, FloatArray]


def align_up(num_bytes: int, alignment: int = ALIGNMENT) -> int:
    """The smallest multiple of `alignment` (a power of two) that is at least num_bytes."""
    num_bytes = integer("num_bytes", num_bytes, 0, 2**62)
    return (num_bytes + alignment - 1) // _power_of_two(alignment) * alignment


def is_aligned(address: int | NDArray[Any], alignment: int = ALIGNMENT) -> bool:
    """Whether an address, or that of an array's first element, is a multiple of `alignment` (a power of
    two).
    """
    if isinstance(address, np.ndarray):
        address = address.__array_interface__["data"][0]
    return integer("address", address, 0, 2**64 - 1) % _power_of_two(alignment) == 0


def _power_of_two(alignment: int) -> int:
    alignment = integer("alignment", alignment, 1, 2**62)
    if alignment & (alignment - 1):
        raise ArgumentError(f"alignment is {alignment}; it must be a power of two")
    return alignment


@dataclass(frozen=True)
class CacheState:
    """The state of one batch entry's ring."""

    seq_len: int  # tokens ever appended, since the last reset
    ring_pos: int  # seq_len % max_seq_len: the slot of the next token
    full_count: int  # seq_len // max_seq_len: how often the ring was filled


@dataclass
class CacheMetrics:
    """What a manager has done since it was allocated.  Times are of whole calls, in nanoseconds."""

    num_appends: int = 0
    num_resets: int = 0
    num_views: int = 0  # get_cache without a copy
    num_reconstructions: int = 0  # get_cache with one
    appended_bytes: int = 0
    copied_bytes: int = 0  # by reconstructions
    storage_bytes: int = 0
    allocate_ns: int = 0
    append_ns: int = 0
    get_cache_ns: int = 0

    @property
    def append_ns_per_token(self) -> float:
        """Mean time of an append, all heads; 0.0 of none."""
        return self.append_ns / self.num_appends if self.num_appends else 0.0


@dataclass(frozen=True)
class BatchKVStorage:
    """The memory layout: an array of `shape` and `strides` (bytes) over `num_bytes`.

    shape is (batch_size, num_heads, 2, max_seq_len, head_dim), K before V.
    """

    shape: tuple[int, int, int, int, int]
    strides: tuple[int, int, int, int, int]
    alignment: int
    num_bytes: int

    @classmethod
    def of(cls, max_seq_len: int, batch_size: int, hidden_dim: int, num_heads: int) -> "BatchKVStorage":
        """The storage of these sizes; ArgumentError when they cannot be."""
        max_seq_len = integer("max_seq_len", max_seq_len, 1)
        batch_size = integer("batch_size", batch_size, 1)
        hidden_dim = integer("hidden_dim", hidden_dim, 1)
        num_heads = integer("num_heads", num_heads, 1)
        if hidden_dim % num_heads:
            raise ArgumentError(f"hidden_dim, {hidden_dim}, must be a multiple of num_heads, {num_heads}")
        head_dim = hidden_dim // num_heads
        side = align_up(max_seq_len * head_dim * 4)
        entry = num_heads * 2 * side
        if entry > MAX_PAGE_BYTES:
            raise ArgumentError(
                f"{max_seq_len} tokens of {num_heads} heads of {head_dim} take {entry:,} bytes "
                f"a batch entry; at most {MAX_PAGE_BYTES:,} can be"
            )
        return cls(
            shape=(batch_size, num_heads, 2, max_seq_len, head_dim),
            strides=(entry, 2 * side, side, head_dim * 4, 4),
            alignment=ALIGNMENT,
            num_bytes=batch_size * entry,
        )


class KVCacheManager(Uncopyable):
    """Keys and values of `batch_size` sequences of one layer, float32, in rings of max_seq_len tokens.

    Calls before `allocate` raise CacheClosed.  Returned arrays can never be made writable.  They stay
    readable as long as they are referenced, and show their tokens until the next append or reset of their
    batch entry. Several threads may call; each call is atomic.
    """

    def __init__(self) -> None:
        self._ring: _Rings | None = None
        self._lock = OwnedLock()

    def allocate(self, max_seq_len: int, batch_size: int, hidden_dim: int, num_heads: int) -> None:
        """Allocate all memory.  Earlier storage is replaced, once the new storage is there.

        Parameters
        ----------
        max_seq_len : tokens that each batch entry keeps
        batch_size : entries
        hidden_dim : num_heads * head_dim
        num_heads : heads of K and V

        Raises: ArgumentError; MemoryError, naming both sizes.  Then everything is as before.
        Cost: touches every byte once.
        """
        begin = time.perf_counter_ns()
        ring = _Rings(BatchKVStorage.of(max_seq_len, batch_size, hidden_dim, num_heads))
        ring.metrics.allocate_ns = time.perf_counter_ns() - begin
        with self._lock.taken():
            self._ring = ring

    def append(self, K: FloatArray, V: FloatArray, seq_pos: int, batch_idx: int) -> None:
        """Add one token to a batch entry; once the ring is full, it replaces the oldest.

        Parameters
        ----------
        K, V : float32 [num_heads, head_dim] or [hidden_dim], C-contiguous
        seq_pos : the entry's tokens so far, which keeps growing when the ring wraps
        batch_idx : from 0 to batch_size - 1

        Raises: ArgumentError, CacheClosed.  Cost: O(1), nothing is allocated.
        """
        begin = time.perf_counter_ns()
        with self._lock.taken():
            rings = self._rings()
            rings.append(K, V, seq_pos, batch_idx)
            rings.metrics.append_ns += time.perf_counter_ns() - begin

    def get_cache(self, batch_idx: int) -> tuple[FloatArray, FloatArray, int]:
        """A batch entry's tokens, oldest first.

        Returns: (K, V, cached_len), float32 [num_heads, cached_len, head_dim], read-only.
        Raises: ArgumentError, CacheClosed.
        Cost: O(1), a view, until the ring wraps and whenever it is exactly full; else a copy.
        """
        begin = time.perf_counter_ns()
        with self._lock.taken():
            rings = self._rings()
            result = rings.get_cache(batch_idx)
            rings.metrics.get_cache_ns += time.perf_counter_ns() - begin
        return result

    def get_segments(self, batch_idx: int) -> tuple[Pair, Pair]:
        """A batch entry's tokens as two pairs of views, the older one first; the newer one may be empty.

        Returns: ((K, V), (K, V)), float32 [num_heads, tokens, head_dim], read-only.
        Raises: ArgumentError, CacheClosed.  Cost: O(1), always.
        """
        with self._lock.taken():
            return self._rings().segments(batch_idx)

    def reset(self, batch_idx: int) -> None:
        """Forget a batch entry's tokens.  Raises: ArgumentError, CacheClosed.  Cost: O(1)."""
        with self._lock.taken():
            rings = self._rings()
            rings.seq_lens[rings.entry(batch_idx)] = 0
            rings.metrics.num_resets += 1

    def state(self, batch_idx: int) -> CacheState:
        """The state of a batch entry's ring.  Raises: ArgumentError, CacheClosed."""
        rings = self._rings()
        seq_len = rings.seq_lens[rings.entry(batch_idx)]
        return CacheState(seq_len, seq_len % rings.max_seq_len, seq_len // rings.max_seq_len)

    def metrics(self) -> CacheMetrics:
        """A copy of the counters.  Raises: CacheClosed."""
        with self._lock.taken():
            return replace(self._rings().metrics)

    @property
    def storage(self) -> BatchKVStorage:
        """The memory layout.  Raises: CacheClosed."""
        return self._rings().storage

    def _rings(self) -> "_Rings":
        if self._ring is None:
            raise CacheClosed("there is no storage yet; call allocate first")
        return self._ring


class _Rings(Uncopyable):
    """One allocation: a page for each batch entry, and how many tokens each has seen.

    The caller holds the manager's lock.
    """

    def __init__(self, storage: BatchKVStorage) -> None:
        batch_size, self.num_heads, _, self.max_seq_len, self.head_dim = storage.shape
        self.storage = storage
        self.pool = PagePool(batch_size, storage.strides[0])
        self.page_ids = ffi.from_buffer("int32_t[]", self.pool.acquire(batch_size))
        self.seq_lens = ffi.new("int64_t[]", batch_size)  # C counts a token in the call that stores it
        self.metrics = CacheMetrics(storage_bytes=storage.num_bytes)
        entry, head, side, token, _ = storage.strides
        whole = self.pool.array(storage.shape, "f4", storage.strides, writable=False)
        self._k, self._v = whole[:, :, 0], whole[:, :, 1]
        strides = {"page_stride": entry, "head_stride": head, "token_stride": token}
        self.pages = ffi.new(
            "pkv_pages *",
            {
                "k": ffi.cast("char *", self.pool.address),
                "v": ffi.cast("char *", self.pool.address + side),
                **{f"{k_or_v}_{name}": stride for name, stride in strides.items() for k_or_v in "kv"},
                "page_size": self.max_seq_len,
                "num_kv_heads": self.num_heads,
                "head_dim": self.head_dim,
                "head_dim_v": self.head_dim,
            },
        )
        # Scratch of `append`, under the manager's lock: where the token's rows are.
        self._k_rows, self._v_rows = (
            ffi.new("pkv_tensor *", {"head_stride": self.head_dim * 4}) for _ in range(2)
        )
        self._shapes = ((self.num_heads, self.head_dim), (self.num_heads * self.head_dim,))
        self._token_bytes = 2 * self.num_heads * self.head_dim * 4

    def entry(self, batch_idx: int) -> int:
        return integer("batch_idx", batch_idx, 0, len(self.seq_lens) - 1)

    def append(self, K: FloatArray, V: FloatArray, seq_pos: int, batch_idx: int) -> None:
        entry = self.entry(batch_idx)
        seq_len = self.seq_lens[entry]
        if integer("seq_pos", seq_pos, 0, 2**63 - 1) != seq_len:
            raise ArgumentError(f"seq_pos is {seq_pos}; batch entry {entry} has {seq_len} tokens so far")
        k_at, v_at = float32_pointer("K", K, *self._shapes), float32_pointer("V", V, *self._shapes)
        self._k_rows.data, self._v_rows.data = k_at, v_at
        status = lib.pkv_append_to_ring(
            self.pages, self.page_ids, self.seq_lens, entry, self._k_rows, self._v_rows
        )
        if status:
            check(status, "append")
        self.metrics.num_appends += 1
        self.metrics.appended_bytes += self._token_bytes

    def segments(self, batch_idx: int) -> tuple[Pair, Pair]:
        entry = self.entry(batch_idx)
        seq_len = self.seq_lens[entry]
        if seq_len <= self.max_seq_len:
            return self._views(entry, 0, seq_len), self._views(entry, seq_len, seq_len)
        newest = seq_len % self.max_seq_len
        return self._views(entry, newest, self.max_seq_len), self._views(entry, 0, newest)

    def get_cache(self, batch_idx: int) -> tuple[FloatArray, FloatArray, int]:
        entry = self.entry(batch_idx)
        cached_len = min(self.seq_lens[entry], self.max_seq_len)
        if self.seq_lens[entry] <= self.max_seq_len or self.seq_lens[entry] % self.max_seq_len == 0:
            self.metrics.num_views += 1
            return *self._views(entry, 0, cached_len), cached_len
        older, newer = self.segments(entry)
        k, v = (read_only(np.concatenate(parts, axis=1)) for parts in zip(older, newer, strict=True))
        self.metrics.num_reconstructions += 1
        self.metrics.copied_bytes += k.nbytes + v.nbytes
        return k, v, cached_len

    def _views(self, entry: int, start: int, end: int) -> Pair:
        """K and V of the slots start .. end - 1, in place."""
        page_id = self.page_ids[entry]
        return self._k[page_id, :, start:end], self._v[page_id, :, start:end]
