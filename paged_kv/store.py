"""The store: what a cache, its sequences and its steps share.

Pool, block tables, layout and threads, and one lock.  The lock covers bookkeeping; it is not held while
attention runs.  Calls that read or write pages pass a gate in C, which counts them: close() closes it, and
waits for those that run.

    handles      a Ref for each sequence, by its id       recorded before its row is taken
    open_plans   a Ref for each step's plan               recorded before its pages are reserved

so nothing is lost when a handle is collected or an interrupt comes, at whatever moment.  C records which
seq_ids are in use and which plans are open, in the call that changes it; the dictionaries only name the
owners.

Imports prefix_index and attention.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._binding import DTYPE_CODES, ffi, integer, lib, shared_threads
from .errors import CacheClosed, OutOfPages
from .lifetime import OwnedLock, Ref, Uncopyable, reentrant_call, renew_in_children
from .machine import shared_cache_bytes
from .pages.block_table import BlockTables, Packing, Window
from .pages.budgets import Budgets, Drop, Eviction
from .pages.events import Events
from .pages.idle_pages import IdlePages
from .pages.layout import SCALE_BYTES, PageLayout, Side
from .pages.new_tokens import NewTokens
from .pages.plan import Plan
from .pages.pool import PagePool
from .pages.prefix_index import PrefixIndex
from .pages.retention import KeepPolicy, Retention
from .pages.rows import Rows
from .pages.salts import Salts
from .pages.slabs import SlabSizes
from .pages.windowed_index import WindowedIndex

#: A step's prepared calls, by what they do: PreparedAppend, PreparedAttention or None.
Calls: TypeAlias = dict[str, Any]
#: Numbers of tokens for which calls are kept.
MAX_SPARE_CALLS = 8


class PackedPages(NamedTuple):
    """What old pages are packed into, from one layout to the next, and when."""

    layouts: tuple[PageLayout, ...]
    slabs: SlabSizes
    packing: Packing


class Store(Uncopyable):
    """Pages for `num_pages * layout.page_size` tokens and the rows of `max_sequences` sequences.

    with store.lock: store.settle() ...     bookkeeping
    """

    def __init__(
        self,
        layout: PageLayout,
        num_pages: int,
        max_sequences: int,
        max_seq_len: int,
        window: Window | None,
        num_threads: int | None,
        prefix_caching: bool = False,
        clock: Callable[[], float] = time.monotonic,
        half_life: float = 600.0,
        keep_policy: KeepPolicy | None = None,
        fingerprint: bytes = b"",
        pin_budget: float = 0.5,
        packed: PackedPages | None = None,
        eviction: Eviction | None = None,
    ) -> None:
        self.layout, self.packed = layout, packed
        self.threads = shared_threads(num_threads)
        if packed is None:
            self.pool = PagePool(num_pages, layout.page_bytes, layout.num_layers)
        else:
            self.pool = PagePool(slabs=packed.slabs)
            num_pages = self.pool.num_pages
        self.rows = Rows(max_sequences, max_seq_len)
        packing = None if packed is None else packed.packing
        budget = None if eviction is None else eviction.budget
        self.tables = BlockTables(
            self.pool, self.rows, layout.page_size, window, layout.num_layers, packing, budget
        )
        self.salts = Salts()
        self.index: PrefixIndex | None = None
        if prefix_caching:
            rows_and_pages = (self.pool, max_sequences, layout.page_size)
            retention = Retention(*rows_and_pages, clock, half_life, keep_policy)
            events = Events(layout.page_size, fingerprint)
            kind = PrefixIndex if window is None else WindowedIndex
            self.index = kind(self.tables, self.salts, retention, events)
        #: None: sequences hold all of their tokens, or those of a window.
        self.budgets = None if eviction is None else Budgets(self.tables, eviction.policy, self.index)
        self.layer_pages = ffi.new("pkv_pages[]", layout.num_layers)
        #: None: the pool is no budget.
        self.idle_pages = None
        if self.budgets is not None and self.budgets.limits.is_pool:
            self.idle_pages = IdlePages(self.budgets, self.layer_pages)
        #: Of packed pages, format by format, which `layer_pages` point to.
        num_packed = len(packed.layouts) if packed else 0
        self._packed_pages = ffi.new("pkv_pages[]", layout.num_layers * num_packed)
        self._pages_of = [self.layer_pages + layer for layer in range(layout.num_layers)]
        #: Of steps that ended, by their number of tokens, the last one at the end.
        self._spare_calls: dict[int, Calls] = {}
        self.gate = ffi.new("pkv_gate *")
        renew_in_children(self)
        # All layers are read in turn, and whatever a model reads between them.
        cached_bytes = shared_cache_bytes() // 2 // layout.num_layers
        for layer in range(layout.num_layers):
            self._describe_layer(layer, num_pages, cached_bytes)
            if packed is not None:
                self._describe_slabs(layer, packed, cached_bytes)
        #: The mean keys of pages, [num_layers, num_ids, heads * dim], and their stamps; None: none are kept.
        self._means: tuple[NDArray[np.uint16], NDArray[np.uint32]] | None = None
        self.closed = False
        self._lock = OwnedLock()
        self.handles: dict[int, Ref] = {}
        self.open_plans: dict[int, Ref] = {}
        #: Of hidden sequences that pin pages, by their ids, when their time is over.
        self.pins: dict[int, float] = {}
        self.max_pinned = int(pin_budget * num_pages)
        #: Refs whose owners were collected, possibly while the lock was held.  The next call that takes the
        #: lock gives back what they hold.
        self._abandoned_plans: deque[Ref] = deque()
        self._abandoned_seq_ids: deque[Ref] = deque()
        self._abandon_plan, self._abandon_seq_id = (
            self._abandoned_plans.append,
            self._abandoned_seq_ids.append,
        )

    @property
    def lock(self) -> Any:
        """For `with`.  Raises: ReentrantCall where this thread holds it, in a frame below."""
        lock = self._lock.lock  # as OwnedLock.taken, which would be a call more in each step
        if lock._is_owned():
            raise reentrant_call()
        return lock

    def reading(self) -> Any:
        """For `with`, round what only reads; also inside another call of this thread, where it yields False.

        A signal handler or a finaliser runs between two lines of Python, where what C keeps is whole.
        """
        return nullcontext(False) if self._lock.is_mine else self._lock.taken()

    def renew(self) -> None:
        """In a forked child."""
        lib.pkv_gate_forget_others(self.gate)

    def keep_means(self) -> None:
        """From now on, pages have mean keys, which attention computes when it first wants them."""
        if self._means is not None:
            return
        layout, num_ids = self.layout, self.pool.num_ids
        # Untouched zeros: pages whose mean is never wanted cost no memory.
        means = np.zeros((layout.num_layers, num_ids, layout.num_kv_heads * layout.head_dim), np.uint16)
        stamps = np.zeros((layout.num_layers, num_ids), np.uint32)
        with self.lock:
            self.require_open()
            if self._means is not None:
                return
            self._means = means, stamps
            for layer in range(layout.num_layers):
                pages = self.layer_pages[layer]
                pages.page_stamps = ffi.from_buffer("uint32_t[]", self.tables.page_stamps)
                pages.mean_stamps = ffi.from_buffer("uint32_t[]", stamps[layer])
                pages.means = ffi.from_buffer("uint16_t[]", means[layer])

    def _describe_layer(self, layer: int, num_pages: int, cached_bytes: int) -> None:
        first = layer * num_pages * self.layout.page_share_bytes
        self.layer_pages[layer] = self._described(self.layout, first, cached_bytes, layer)

    def _describe_slabs(self, layer: int, packed: PackedPages, cached_bytes: int) -> None:
        """A layer in a pool of slabs: within each, layer after layer, in any format."""
        in_slabs = {
            "slab_formats": lib.pkv_pool_slab_formats(self.pool.handle),
            "slab_bytes": packed.slabs.slab_bytes,
            "slab_shift": lib.pkv_pool_shift(self.pool.handle),
        }
        following = ffi.NULL  # each points to the pages of the next format
        for format in reversed(range(len(self.layouts))):
            one = self.layouts[format]
            first = layer * packed.slabs.places[format] * one.page_share_bytes
            described = self._described(one, first, cached_bytes, layer) | in_slabs | {"packed": following}
            if format == 0:
                self.layer_pages[layer] = described
            else:
                place = (format - 1) * self.layout.num_layers + layer
                self._packed_pages[place] = described
                following = self._packed_pages + place

    def _described(self, layout: PageLayout, first: int, cached_bytes: int, layer: int) -> dict[str, Any]:
        """A `pkv_pages`: a layer whose first page begins at byte `first` of the pool, or of a slab."""
        k = int(ffi.cast("uintptr_t", self.pool.address)) + first
        return {
            **_described_side("k", layout, layout.keys, k),
            **_described_side("v", layout, layout.values, k + layout.keys.num_bytes),
            "page_size": layout.page_size,
            "num_kv_heads": layout.num_kv_heads,
            "head_dim": layout.head_dim,
            "head_dim_v": layout.head_dim_v,
            "cached_bytes": cached_bytes,
            "layer": layer,
            "gate": self.gate,
        }

    @property
    def layouts(self) -> tuple[PageLayout, ...]:
        """Of each format, the open one first."""
        return (self.layout, *(self.packed.layouts if self.packed else ()))

    def require_open(self) -> None:
        if self.closed:
            raise CacheClosed("the cache was closed; build a new one")

    def reclaim_abandoned(self, is_alone: bool = True) -> None:
        """Begin work under the lock: CacheClosed, or release what collected handles held.

        is_alone : what `reading` yields
        """
        if self.closed:
            self.require_open()
        if is_alone and self.index is not None:
            self.index.require_whole()
        if is_alone and (self._abandoned_plans or self._abandoned_seq_ids):
            self._give_back_abandoned()

    def _give_back_abandoned(self) -> None:
        # An entry leaves its queue after it was dealt with: an interrupt makes it be dealt with twice, which
        # changes nothing.  Plans first, since their sequences are busy.
        while self._abandoned_plans:
            self.roll_back(self._abandoned_plans[0].held)
            self._abandoned_plans.popleft()
        for _ in range(len(self._abandoned_seq_ids)):
            abandoned = self._abandoned_seq_ids[0]
            if not self.free(abandoned.held):
                self._abandoned_seq_ids.append(abandoned)  # it is in an open step, which has to end first
            self._abandoned_seq_ids.popleft()

    # ---- sequences

    def salt_number(self, salt: bytes) -> int:
        """The number of a salt, for a new sequence."""
        index = self.index
        self.salts.forget_unused(
            self.rows.salts_in_use,
            index.has_entries if index is not None else lambda number: False,
        )
        return self.salts.number(salt)

    def start_budgets(self, seq_ids: list[int], parent: int | None, num_tokens: int | None) -> None:
        """Of new sequences, where there are any."""
        if self.budgets is not None:
            self.budgets.start(seq_ids, parent, num_tokens)

    def findable(self, ids: NDArray[np.int32], num_tokens: int | None = None) -> NDArray[np.int32]:
        """Of a prompt's ids, those whose match a sequence can hold, and one that is computed."""
        return ids if self.budgets is None else self.budgets.findable(ids, num_tokens)

    def note_handle(self, handle: object, seq_id: int) -> None:
        """Free the sequence when its handle is collected."""
        noted = Ref(handle, self._abandon_seq_id)
        noted.held = seq_id
        self.handles[seq_id] = noted

    def free(self, seq_id: int) -> bool:
        """Release what a sequence holds, if it is not freed yet; False when it is in an open step."""
        if self.index is not None and self.tables.rows.is_idle(seq_id):
            self.index.leave(self.tables.rows.row(seq_id))
        is_free = self.tables.remove(seq_id)
        if is_free:
            self.handles.pop(seq_id, None)
            self.pins.pop(seq_id, None)
        return is_free

    def free_later(self, seq_id: int) -> None:
        """Queue a sequence, where this thread holds the lock in a frame below."""
        if (handle := self.handles.get(seq_id)) is not None:
            self._abandoned_seq_ids.append(handle)

    def pinned_pages(self) -> set[int]:
        """Pages that pins hold."""
        tables, pinned = self.tables, set[int]()
        for seq_id in self.pins:
            if tables.rows.is_idle(seq_id):  # else an interrupt came before it had a row
                pinned.update(tables.held_pages(tables.rows.row(seq_id))[1].tolist())
        return pinned

    def release_old_pins(self) -> None:
        """Free the pins whose time is over."""
        if self.pins and self.index is not None:
            now = self.index.retention.clock()
            for seq_id in [seq_id for seq_id, deadline in self.pins.items() if deadline <= now]:
                self.free(seq_id)

    # ---- steps

    @property
    def plans(self) -> list[Plan]:
        """Of steps, some of which may have ended."""
        return [noted.held for noted in self.open_plans.values()]

    def open_plan(self, step: object, seq_ids: list[int], new: NewTokens) -> Plan:
        """Reserve what a step takes, until it ends or is collected."""
        # As large as the last plan and some pages more: enough for the same batch, without a second call.
        plan = Plan(self.tables.size.plan_bytes + 512)
        noted = Ref(step, self._abandon_plan)
        noted.held = plan
        self.open_plans[id(plan)] = noted
        try:
            try:
                self.tables.open(plan, seq_ids, new)
            except OutOfPages as error:
                reason = self._make_room(seq_ids, new)
                if reason is not None:
                    if reason:
                        raise OutOfPages(f"{error}; {reason}") from None
                    raise
                self.tables.open(plan, seq_ids, new)
        except BaseException:
            self.roll_back(plan)
            raise
        return plan

    def _make_room(self, seq_ids: list[int], new: NewTokens) -> str | None:
        """Take trimmed pages again and evict kept ones, so that a step can be opened.

        A step that would open without an index opens with one.
        Returns: None when there is room, else what is to be said besides.
        """
        pool, index, reasons = self.pool, self.index, []
        self.release_old_pins()
        needed = self.tables.pages_needed(seq_ids, new.counts)
        num_trimmed = min(pool.num_trimmed, max(0, needed - pool.num_free))
        is_enough = needed <= pool.num_reclaimable + pool.num_trimmed
        if num_trimmed and is_enough and (refusal := pool.restore(num_trimmed)):
            reasons.append(refusal)
        if index is not None and not index.make_room(needed):
            index.release_tails([self.tables.rows.row(seq_id) for seq_id in seq_ids])
            needed = self.tables.pages_needed(seq_ids, new.counts)
            index.make_room(needed)
        if self.idle_pages is not None and needed > pool.num_reclaimable:
            has_room = self.idle_pages.make_room([*seq_ids, *self.pins], needed)
            if has_room and index is not None:
                index.make_room(needed)
        if self.pins:
            reasons.append(f"{len(self.pinned_pages())} are pinned")
        return None if needed <= pool.num_free else "; ".join(reasons)

    def commit(
        self, plan: Plan, counts: NDArray[np.int32] | None = None, drops: list[Drop] | None = None
    ) -> None:
        index = self.index
        if index is None or not plan.handle.completes_page:
            self.tables.commit(plan, counts)
        elif isinstance(index, WindowedIndex):
            if plan.is_complete:
                index.publish_step(plan, counts)
            self.tables.commit(plan, counts)
        else:
            self.tables.commit(plan, counts)
            index.publish(plan.rows)
        if drops and self.budgets is not None:
            self.budgets.drop(drops)
        if self.packed is not None:
            self._pack(plan)
        self.open_plans.pop(id(plan), None)

    def _pack(self, plan: Plan) -> None:
        """Exchange old pages of the rows whose step was committed."""
        num_new = np.diff(plan.qo_indptr)
        has_new = num_new > 0
        old, new = self.tables.pack(self.layer_pages, plan.rows[has_new], num_new[has_new])
        if old and self.index is not None:
            self.index.exchange(old, new)

    def roll_back(self, plan: Plan) -> None:
        """Give back what a plan reserved, if it has not ended yet."""
        self.tables.rollback(plan)
        self.open_plans.pop(id(plan), None)

    def roll_back_later(self, plan: Plan) -> None:
        """Queue a plan, where this thread holds the lock in a frame below."""
        if (noted := self.open_plans.get(id(plan))) is not None:
            self._abandoned_plans.append(noted)

    def spare_calls(self, num_tokens: int) -> Calls:
        """Prepared calls for a step of num_tokens, which it owns until it ends."""
        return self._spare_calls.pop(num_tokens, None) or {}

    def keep_calls(self, num_tokens: int, calls: Calls) -> None:
        """Keep a step's calls for the next one of as many tokens."""
        self._spare_calls[num_tokens] = calls
        if len(self._spare_calls) > MAX_SPARE_CALLS:
            del self._spare_calls[next(iter(self._spare_calls))]

    def pages(self, layer: object) -> Any:
        """A layer's `pkv_pages *`; ArgumentError when there is no such layer."""
        pages_of = self._pages_of
        if type(layer) is int and 0 <= layer < len(pages_of):
            return pages_of[layer]
        return pages_of[integer("layer", layer, 0, self.layout.num_layers - 1)]

    def close(self) -> None:
        """Refuse new calls, wait for running ones, roll back open steps, release the memory.

        Each part can be repeated: the next close completes one that was interrupted.
        """
        with self.lock:
            self.closed = True
        lib.pkv_gate_close(self.gate)
        with self.lock:
            for plan in list(self.open_plans.values()):
                self.roll_back(plan.held)
            self.handles.clear()
            self.pool.close()


def _described_side(name: str, layout: PageLayout, side: Side, address: int) -> dict[str, Any]:
    """The fields of a `pkv_pages` that are of keys, or of values."""
    strides = {"page_stride": layout.page_share_bytes, "head_stride": layout.head_bytes}
    described: dict[str, Any] = {
        name: ffi.cast("char *", address),
        **{f"{name}_{stride}": num_bytes for stride, num_bytes in strides.items()},
        f"{name}_token_stride": side.row_bytes,
        f"{name}_dtype": DTYPE_CODES[side.dtype],
    }
    if side.dtype in SCALE_BYTES:
        scales = ffi.cast("char *", address + side.rows_bytes)
        described[f"{name}_scales"] = {"data": scales, **strides, "token_stride": SCALE_BYTES[side.dtype]}
    return described
