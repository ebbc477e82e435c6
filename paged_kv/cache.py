"""The paged KV cache: pages, the sequences that own them, and the steps that make them grow.

Imports step and sequence.
"""

import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._binding import integer, kernels, real
from .cache_stats import CacheStats, stats_of
from .errors import ArgumentError, InvariantViolation
from .formats import Ageing, ageing_layouts, format_tag, layouts_of, packed_pages, packing_of
from .frames import Recording, record
from .gathered import gather
from .lifetime import Uncopyable
from .pages.block_table import Window
from .pages.budgets import eviction_of, least_budget
from .pages.events import Event
from .pages.eviction import EvictionPolicy
from .pages.layout import (
    BY_CHANNEL,
    DEFAULT_PAGE_SIZE,
    PageLayout,
    parse_memory,
    stored_dtypes,
)
from .pages.match import Match, explain
from .pages.new_tokens import MAX_TOKENS, counts_of, token_ids_of
from .pages.pool import MAX_PAGE_BYTES
from .pages.retention import KeepPolicy, priority_of, seconds
from .pages.salts import bytes_of
from .pin import Pin, pin
from .sequence import Sequence, matched_sequence, new_sequences, select_sequences
from .step import Step, seq_ids_of
from .store import Store


class PagedKVCache(Uncopyable):
    """Keys and values of many sequences, in pages of one pool.

    Parameters
    ----------
    num_layers, num_kv_heads : int
    head_dim, head_dim_v : of keys and values, multiples of 8 from 8 to 256; None: values are as wide as keys
    dtype : what pages store: float32, float16, bfloat16, int8 or int4, or a pair, of keys and of values.
        int8: a token's head is 8-bit integers and one bfloat16 scale, half the memory of bfloat16; int4:
        4-bit integers, a scale and a minimum, of each token's values and of each dim of 64 tokens' keys
    num_pages, memory : exactly one; memory in bytes or as a string ("512MiB"), rounded down to whole pages.
        Where pages are packed, num_pages are of these, beside open pages for one step; what sequences keep
        open beyond those takes the room of packed pages
    page_size : tokens per page, a multiple of 16
    max_sequences : int, sequences at a time
    max_seq_len : tokens of one sequence; None: as many as the pool holds, without limit with a window
    window, num_sink_tokens : a token sees the last `window` tokens, itself included, and the first sinks;
        pages that no later token sees are released at commit.  None: all tokens
    window_slack : tokens that are held beyond the window, so that a sequence can be truncated to its greatest
        length so far less as many
    max_step_tokens : of one sequence in one step; limited with a window or a budget only
    recent_tokens : new tokens are stored as `open_dtype`; a sequence's commit packs into `dtype` its pages
        whose tokens are all older than the newest recent_tokens, without those of the first num_sink_tokens.
        None, without open_dtype: 64 for keys of int4 (and 4 sinks, without a window), else tokens are stored
        as `dtype` at once
    open_dtype : None: int8 for keys of int4, else bfloat16
    precision_policy : Ageing: tokens are stored as `dtype`, and pages are packed twice as they age; with
        neither recent_tokens nor open_dtype
    eviction, budget_tokens : a sequence whose commit would leave it with more than budget_tokens, in whole
        pages, drops pages: "attention", those that get least attention; "window", the oldest; or those
        that an `EvictionPolicy` names.  The first num_sink_tokens (None: 4) and the newest 64 tokens
        always stay.  Tokens keep their positions.  What a sequence computes after its first drop is not
        found by others.  Without budget_tokens the pool is the budget: a step that lacks pages takes them
        from sequences that are in no step, those of the least mean attention, or the oldest; no policy of the
        caller's.  docs/eviction.md says what it costs.  None: all is kept
    prefix_caching : pages of known token ids can be found again by `sequence(tokens)`, and are kept without
        an owner until a step needs them
    fingerprint : bytes that identify the model: part of every page's hash in `events`
    keep_policy : in which order cached pages without an owner give way; None: those first that were not used
        for longest
    retention_half_life : seconds that a page counts as used later when priority + 1 doubles
    pin_budget : the share of all pages that pins may hold, from 0 to 1
    clock : seconds, of any start; ages, ttls and the order of kept pages are measured with it
    num_threads : threads of one attend; None: the CPUs that the process may use

    Raises: ArgumentError; MemoryError, naming both sizes, when there is too little of it.
    Cost: allocates all memory here, and none later, but for the mean keys that `attend(top_pages=)` wants.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: object = "bfloat16",
        num_pages: int | None = None,
        memory: int | str | None = None,
        page_size: int | None = None,
        max_sequences: int = 256,
        max_seq_len: int | None = None,
        max_step_tokens: int = 2048,
        window: int | None = None,
        num_sink_tokens: int | None = None,
        window_slack: int = 0,
        recent_tokens: int | None = None,
        open_dtype: object = None,
        precision_policy: Ageing | None = None,
        eviction: str | EvictionPolicy | None = None,
        budget_tokens: int | None = None,
        prefix_caching: bool = True,
        fingerprint: bytes = b"",
        keep_policy: KeepPolicy | None = None,
        retention_half_life: float = 600.0,
        pin_budget: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
        num_threads: int | None = None,
    ) -> None:
        kernels()  # an unknown PAGED_KV_KERNEL is an error here, before memory is taken
        page_size = DEFAULT_PAGE_SIZE if page_size is None else page_size
        given = PageLayout(
            num_layers=integer("num_layers", num_layers, 1, 2**16),
            num_kv_heads=integer("num_kv_heads", num_kv_heads, 1, 2**16),
            head_dim=_multiple("head_dim", head_dim, 8, 256),
            head_dim_v=_multiple("head_dim_v", head_dim if head_dim_v is None else head_dim_v, 8, 256),
            dtypes=stored_dtypes(dtype),
            page_size=_multiple("page_size", page_size, 16, 2**20),
        )
        if precision_policy is not None and (recent_tokens is not None or open_dtype is not None):
            raise ArgumentError("give precision_policy, or recent_tokens and open_dtype, not both")
        # Without these, keys of int4 lose some of what a model finds; benchmarks/quality.py.
        is_usual = given.dtypes[0] == BY_CHANNEL and open_dtype is None
        if num_sink_tokens is None:
            has_sinks = is_usual or eviction is not None or precision_policy is not None
            num_sink_tokens = 4 if window is None and has_sinks else 0
        num_sinks = integer("num_sink_tokens", num_sink_tokens, 0, MAX_TOKENS)
        max_step_tokens = integer("max_step_tokens", max_step_tokens, 1, MAX_TOKENS)
        if precision_policy is None:
            layouts, recent = layouts_of(given, recent_tokens, open_dtype)
        else:
            layouts, recent = ageing_layouts(given, precision_policy)
        packing = packing_of(recent, num_sinks, precision_policy, window)
        opened, layout = layouts[0], layouts[-1]
        if opened.page_bytes > MAX_PAGE_BYTES:
            raise ArgumentError(
                f"a page of {layout.page_size} tokens takes {opened.page_bytes:,} bytes in "
                f"{layout.num_layers} layers of {layout.num_kv_heads} heads; at most "
                f"{MAX_PAGE_BYTES:,} can be"
            )
        is_exact, packed = memory is not None, None
        num_pages = _num_pages(layout, num_pages, memory)
        if packing is not None:
            packed = packed_pages(layouts, num_pages, packing, max_step_tokens, is_exact)
            num_pages = packed.slabs.num_slabs * max(packed.slabs.places)
        evicting = eviction_of(layout.page_size, eviction, budget_tokens, num_sinks, max_step_tokens, window)
        # Without a window no sequence grows beyond what the pool holds; its row need not be longer.
        is_endless = window is not None or evicting is not None
        most = MAX_TOKENS if is_endless else min(num_pages * layout.page_size, MAX_TOKENS)
        if max_seq_len is not None:
            most = min(most, integer("max_seq_len", max_seq_len, 1, MAX_TOKENS))
        if type(prefix_caching) is not bool:
            raise ArgumentError(f"prefix_caching is {prefix_caching!r}; give True or False")
        slack = integer("window_slack", window_slack, 0, MAX_TOKENS)
        if slack and window is None:
            raise ArgumentError(f"window_slack is {slack} without a window, where every token is held")
        seen = None
        if window is not None:
            window = integer("window", window, 1, MAX_TOKENS)
            seen = Window(window, num_sinks, max_step_tokens, slack)
        self._store = Store(
            opened,
            num_pages,
            integer("max_sequences", max_sequences, 1, 2**24),
            most,
            seen,
            None if num_threads is None else integer("num_threads", num_threads, 1, 1024),
            prefix_caching,
            clock,
            seconds("retention_half_life", retention_half_life),
            keep_policy,
            bytes_of("fingerprint", fingerprint) + format_tag(layouts, packing),
            _share("pin_budget", pin_budget),
            packed,
            evicting,
        )

    @property
    def num_layers(self) -> int:
        return self._store.layout.num_layers

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self._store.layout.page_size

    @property
    def max_sequences(self) -> int:
        """Sequences at a time."""
        return self._store.tables.rows.max_sequences

    @property
    def max_seq_len(self) -> int:
        """Tokens of one sequence."""
        return self._store.tables.rows.max_seq_len

    @property
    def window(self) -> int | None:
        """Tokens that a token sees, itself included; None: all."""
        window = self._store.tables.window
        return None if window is None else window.size

    @property
    def prefix_caching(self) -> bool:
        """Can the pages of known token ids be found again?"""
        return self._store.index is not None

    @property
    def max_sequence_pages(self) -> int:
        """Pages that one sequence holds at most, in an open step."""
        return int(self._store.tables.page_ids.shape[1])

    @property
    def max_step_tokens(self) -> int:
        """Tokens of one sequence in one step; without a window or a budget as many as a sequence may have."""
        limited = self._store.tables.window or self._store.tables.budget
        return self.max_seq_len if limited is None else limited.max_step_tokens

    @property
    def budget_tokens(self) -> int | None:
        """Tokens that a sequence holds between steps, in whole pages; None: as many as the pool has."""
        budget = self._store.tables.budget
        return None if budget is None or budget.is_pool else budget.num_tokens

    @property
    def num_available_pages(self) -> int:
        """Pages that steps can take now: free ones, and kept ones, which they evict.  Cost: O(1)."""
        pool = self._store.pool
        self._store.require_open()
        return pool.num_reclaimable + pool.num_trimmed

    def sequence(
        self,
        tokens: object = None,
        *,
        salt: bytes = b"",
        priority: int = 0,
        budget_tokens: int | None = None,
    ) -> Sequence:
        """A new sequence: empty, or with prefix_caching the longest prefix of `tokens` that the cache holds.

        Parameters
        ----------
        tokens : the ids of a prompt, a list or an integer array [n].  The sequence begins with those first
            ones that any sequence has committed with their ids, whether it still has them, has released them
            or goes on appending; never with the last token, which has to be computed.  `len(seq)` and
            `seq.num_cached_tokens` say how many: `step([seq], [tokens[len(seq):]])` computes the rest.

        salt : only sequences of the same salt share pages, or find each other's tokens.  Give each tenant one
            that others cannot guess, so that none learns from timing what others have sent.  A page that
            held another salt is cleared before it is written.

        priority : how long its pages are worth keeping once no sequence has them; `retain` explains it

        budget_tokens : how many tokens it may hold, at most the cache's; None: as many

        Pages are shared, and nothing is copied now.  Keys and values must depend on the tokens alone: one
        cache serves one model.
        Raises: OutOfSequences, ArgumentError, CacheClosed.
        Cost: O(tokens); takes no page.
        """
        salt, priority = bytes_of("salt", salt), priority_of(priority)
        budget = None if budget_tokens is None else self._budget(budget_tokens)
        if tokens is None:
            return new_sequences(self._store, 1, salt=salt, priority=priority, budget=budget)[0]
        return matched_sequence(self._store, token_ids_of("tokens", tokens), salt, priority, budget)

    def _budget(self, budget_tokens: object) -> int:
        """Of one sequence."""
        budget = self._store.tables.budget
        if budget is None:
            raise ArgumentError(f"budget_tokens is {budget_tokens!r:.40}; build the cache with eviction=")
        least = least_budget(self.page_size, budget.num_sink_tokens)
        return integer("budget_tokens", budget_tokens, least, budget.num_tokens)

    def select(self, seqs: list[Sequence], indices: list[int]) -> list[Sequence]:
        """What a batch becomes when its place i goes on from the sequence at indices[i], as beams do.

        seqs : sequences of this cache
        indices : int [new size of the batch], places in `seqs`

        Returns: of each index its sequence, where it is named first, else a fork of it.  Sequences that no
        index names are freed.
        Raises: ArgumentError, OutOfSequences (forks are made before others are freed), StaleSequence,
        SequenceBusy, CacheClosed; then nothing has changed.
        Cost: O(pages of the forks).
        """
        return select_sequences(self._store, seqs, indices)

    def gather(
        self, seqs: Iterable[Sequence], layer: int, *, dtype: object = None, out: Any = None
    ) -> tuple[Any, Any, NDArray[np.int32]]:
        """A copy of one layer's keys and values, of several sequences, for code that reads no pages.

        Parameters
        ----------
        seqs : n sequences of this cache
        dtype : of the result: float32, float16 or bfloat16; one of torch's gives tensors.  None: float32
        out : instead, (k, v): where the result goes, arrays or tensors of its shape or with more rows a
            sequence, dense along the last axis; [n, heads, rows, dim] goes in as its transpose

        Returns: (k, v, lengths): [n, longest, num_kv_heads, head_dim] and [.., head_dim_v], of each sequence
        the tokens at its `held_positions`, oldest first, and zeros behind them; int32 [n], how many they are.
        Values round to nearest even; finite ones beyond the dtype's range saturate.
        Raises: ArgumentError, StaleSequence, CacheClosed.  Cost: copies every token.
        """
        return gather(self._store, seq_ids_of(seqs)[1], layer, dtype, out)

    def match(self, tokens: object, salt: bytes = b"", *, also: Iterable[bytes] = ()) -> Match:
        """How much of a prompt `sequence(tokens, salt=salt)` would find now, and why it is not more.

        Parameters
        ----------
        also : other salts that the caller may know of; whether one of them has more is said, too

        Returns: Match(num_tokens, reason, would_have_hit, num_lost, ...); its docstring lists the reasons.
        It takes no page and changes nothing, so it promises nothing: the pages can be evicted.
        Raises: ArgumentError, CacheClosed.  Cost: O(tokens).
        """
        store, number = self._store, self._store.salts.numbers.get
        ids, salt = token_ids_of("tokens", tokens), bytes_of("salt", salt)
        also = [bytes_of("salt", other) for other in also]
        with store.reading() as is_alone:
            store.reclaim_abandoned(is_alone)
            if store.index is None:
                return Match(0, "disabled", 0)
            ids = store.findable(ids)
            found, others = store.index.match(ids, number(salt, 0)), [number(other, 0) for other in also]
            answer = explain(store.index, found, ids, number(salt, 0), store.plans, others)
            return answer.of(ids, salt, store.pool.num_owned(found.page_ids) * store.layout.page_size)

    def pin(self, match: Match, ttl: float | None = None) -> Pin:
        """Keep the pages of a match from being evicted, as long as the pin is not released or collected.

        Parameters
        ----------
        match : what `match` returned; it is looked up again
        ttl : seconds after which the pin is released by itself; None: never

        Returns: Pin, whose `outcome` is "accepted", "clipped" (to what is still there, or to pin_budget) or
        "rejected", and whose `num_tokens` are pinned.  A pin takes one of max_sequences.
        Raises: ArgumentError, CacheClosed.  Cost: O(tokens + pinned pages).
        """
        if not isinstance(match, Match):
            raise ArgumentError(f"match is {match!r:.60}; give what cache.match(tokens) returned")
        return pin(self._store, match, None if ttl is None else seconds("ttl", ttl))

    def reset_prefix_cache(self) -> int:
        """Let no later sequence find what was computed so far, as when the model's weights have changed.

        Kept pages are free then.  Sequences keep what they hold; nothing of it can be found again, nor what
        open steps compute and what these sequences append, until they are reset.
        Returns: how many pages are free that were kept.  Raises: CacheClosed.  Cost: O(pages).
        """
        store = self._store
        with store.lock:
            store.reclaim_abandoned()
            if store.index is None:
                return 0
            return store.index.clear(store.plans)

    def events(self, since: int = 0) -> list[Event]:
        """Which full pages can be found, since an event: BlockStored, BlockRemoved, AllBlocksCleared.

        Parameters
        ----------
        since : the id of the last event that the caller has seen; 0: none

        Ids are consecutive.  The last 16,384 events are kept; if others are missing, or `since` is none of
        this cache's, the answer begins with AllBlocksCleared and a BlockStored for each page that is there.
        Replaying any answer gives the state of now.
        Raises: ArgumentError, CacheClosed.  Cost: O(events), and a SHA-256 for each page once.
        """
        store, since = self._store, integer("since", since, 0, 2**63 - 1)
        with store.lock:
            store.reclaim_abandoned()
            return [] if store.index is None else store.index.events.since(since, store.index.full_entries())

    def record(self, path: object, *, every: float = 0.1) -> Recording:
        """Write what the pool looks like into a file, until the recording is closed or the cache is.

        path : of the file, which is replaced; `paged-kv replay FILE` shows it
        every : seconds between two frames, at least 0.001

        Returns: Recording, for `with`.  A frame is a line of JSON, which names what has changed; frames.py
        has the form.
        Raises: ArgumentError, OSError, CacheClosed.  Cost: a thread, and O(num_pages) a frame.
        """
        return record(self._store, path, every)

    def step(self, seqs: Iterable[Sequence], new: object) -> Step:
        """Reserve slots for the next tokens of some sequences: of all of them, or of none.

        Parameters
        ----------
        seqs : the sequences, each once
        new : for each its new token ids (anything with a length) or their count; or an integer array of
            counts.  0: the step skips the sequence, which has no rows of q and is not busy

        Raises: OutOfPages, SequenceTooLong, SequenceBusy, StaleSequence, ArgumentError, CacheClosed.
        Cost: O(new tokens + pages of the batch).
        """
        return Step(self._store, seqs, new)

    def pages_needed(self, seqs: Iterable[Sequence], new: object) -> int:
        """How many free pages `step(seqs, new)` would take, copies of shared pages included.

        Also when fewer are free.  Raises: what `step` raises, except OutOfPages.  Cost: O(sequences); nothing
        changes.
        """
        _, seq_ids = seq_ids_of(seqs)
        counts = counts_of(new, len(seq_ids))
        with self._store.lock:
            self._store.reclaim_abandoned()
            return self._store.tables.pages_needed(seq_ids, counts)

    def stats(self) -> CacheStats:
        """Counts of this moment.  Raises: CacheClosed.  Cost: O(max_sequences)."""
        return stats_of(self._store)

    def trim(self, *, cached: bool = False) -> int:
        """Give the memory of free pages back to the system, in blocks of 2 MiB that hold nothing else.

        Parameters
        ----------
        cached : evict all cached pages without an owner before, so that their memory goes, too

        Steps take it again when they need it.  They raise OutOfPages when the machine does not have it any
        more; the kernel ends the process if another one takes it at the same moment.
        Returns: bytes given back.  Raises: ArgumentError, CacheClosed.  Cost: O(pages * num_layers).
        """
        store = self._store
        if type(cached) is not bool:
            raise ArgumentError(f"cached is {cached!r:.60}; give True or False")
        with store.lock:
            store.reclaim_abandoned()
            store.release_old_pins()
            if cached and store.index is not None:
                store.index.make_room(store.pool.num_reclaimable, "limit")
            return store.pool.trim()

    def check(self) -> None:
        """Raise InvariantViolation unless every page is accounted for.  Cost: O(pages)."""
        with self._store.reading() as is_alone:
            self._store.reclaim_abandoned(is_alone)
            self._store.tables.check()
            broken = self._store.index.broken_rule() if self._store.index is not None else None
        if broken is not None:
            raise InvariantViolation(f"prefix index: {broken}")

    def close(self) -> None:
        """Wait for running calls, roll back open steps, release the memory.  A second close does nothing."""
        self._store.close()

    def __enter__(self) -> "PagedKVCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _multiple(name: str, value: object, of: int, high: int) -> int:
    number = integer(name, value, of, high)
    if number % of:
        raise ArgumentError(f"{name} is {number}; it must be a multiple of {of}")
    return number


def _share(name: str, value: object) -> float:
    share = real(name, value, 0.0)
    if share > 1:
        raise ArgumentError(f"{name} is {share}; give a number from 0 to 1")
    return share


def _num_pages(layout: PageLayout, num_pages: object, memory: object) -> int:
    if (num_pages is None) == (memory is None):
        raise ArgumentError("give exactly one of num_pages and memory")
    if num_pages is not None:
        return integer("num_pages", num_pages, 1)
    num_bytes = integer("memory", parse_memory(memory), 1, 2**50)
    if num_bytes < layout.page_bytes:
        raise ArgumentError(f"memory is {num_bytes} bytes; one page takes {layout.page_bytes}")
    return min(num_bytes // layout.page_bytes, 2**31 - 1)
