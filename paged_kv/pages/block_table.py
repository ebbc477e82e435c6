"""Block tables: which pages hold a sequence's tokens, in order, and how a batch of sequences grows.

Token t of a sequence is in its logical page ``j = t // page_size`` at offset ``t % page_size``.  Page j is in
cell j of the sequence's row; with a window, the cells after those of the sinks' ``s`` pages are a ring,
and it is in ``s + (j - s) % (ring_pages - s)``.  With a budget, pages in between can be dropped: the cells
are compact, and ``cell_pages`` has the logical page of each.  numpy owns the arrays, and C works on them in
place, for a whole batch in one call.

Imports rows, pool, plan, new_tokens and salts.  The caller holds the cache's lock.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .._binding import check, ffi, integer, lib
from ..errors import (
    ArgumentError,
    OutOfPages,
    SequenceBusy,
    SequenceTooLong,
    StaleSequence,
)
from ..lifetime import Uncopyable
from .layout import num_pages
from .new_tokens import MAX_TOKENS, Counts, NewTokens, int64s
from .plan import Plan
from .pool import PagePool
from .rows import Rows
from .salts import NO_SALT

SEQUENCE_BUSY = lib.PKV_SEQUENCE_BUSY


@dataclass(frozen=True)
class Window:
    """What a token sees of its sequence: the last `size` tokens, itself among them, and the first sinks."""

    size: int
    num_sink_tokens: int
    max_step_tokens: int
    slack: int = 0  # tokens that are held beyond it

    def ring_pages(self, page_size: int) -> int:
        """Cells that never run out: the sinks' pages, window and step, and a page that is begun."""
        sinks = num_pages(self.num_sink_tokens, page_size)
        return sinks + num_pages(self.size + self.slack + self.max_step_tokens, page_size) + 1


@dataclass(frozen=True)
class Budget:
    """How much of a sequence is held between steps: pages in between are dropped."""

    num_tokens: int
    max_step_tokens: int
    num_sink_tokens: int
    recent_tokens: int  # the newest ones, which are never dropped
    needs_mass: bool  # is attention mass collected?
    is_pool: bool = False  # num_tokens is no limit: sequences are cut when the pool is full

    def cells(self, page_size: int) -> int:
        """That never run out: of a budget, what comes before the first cut, two steps (an interrupt may
        prevent the cut after one), and a page that is begun."""
        held = (self.num_tokens, self.recent_tokens, self.max_step_tokens, self.max_step_tokens, 1)
        return sum(num_pages(tokens, page_size) for tokens in held)


@dataclass(frozen=True)
class Packing:
    """Which pages of a sequence are packed: those that are neither of the newest tokens nor of the first.

    recent_tokens : of each format but the last: so many newest tokens keep their pages in it
    is_by_mass : of the last format but one, as many pages as that would be, those that get most attention
    """

    recent_tokens: tuple[int, ...]
    num_sink_tokens: int
    is_by_mass: bool = False

    @property
    def due_tokens(self) -> tuple[int, ...]:
        """Of each format but the last, how many newest tokens no packing looks at."""
        if not self.is_by_mass:
            return self.recent_tokens
        return (*self.recent_tokens[:-1], self.recent_tokens[-2])

    def num_attended(self, page_size: int) -> int:
        """Pages that keep the last format but one by their mass; -1: none."""
        return (self.recent_tokens[-1] - self.recent_tokens[-2]) // page_size if self.is_by_mass else -1


class BlockTables(Uncopyable):
    """The pages of a cache's rows, over one pool.

    num_layers : that a step has to write before it can be committed
    packing : None: no page is packed
    budget : None: no page is dropped; else there is no window
    """

    def __init__(
        self,
        pool: PagePool,
        rows: Rows,
        page_size: int,
        window: Window | None,
        num_layers: int = 0,
        packing: Packing | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.pool = pool
        self.budget = budget
        self.rows = rows
        self.page_size = page_size
        self.window = window
        max_sequences = rows.max_sequences
        ring_pages = num_pages(rows.max_seq_len, page_size)
        if window is not None:
            # No row holds more pages than the pool; after the sinks' cells there is at least one.  Where
            # sinks alone would fill the pool, no page ever leaves its cell.
            sinks = min(num_pages(window.num_sink_tokens, page_size), pool.num_pages)
            most = max(pool.num_pages, sinks + 1)
            ring_pages = min(ring_pages, window.ring_pages(page_size), most)
        if budget is not None:
            # A step that lacks pages is refused for that.
            most = pool.num_pages + num_pages(budget.max_step_tokens, page_size) + 1
            ring_pages = min(most, budget.cells(page_size))
        # Untouched zeros: the rows of sequences that never come cost no memory.
        self.page_ids = _table(max_sequences, ring_pages)
        self.tail_copies = np.zeros(max_sequences, np.int32)
        self.first_held = np.zeros(max_sequences, np.int32)
        self.page_salts = np.zeros(pool.num_ids, np.int64)
        self._filled = np.zeros(pool.num_ids, np.int32)
        #: [num_ids, page_size]: the id of the token in each slot, where it is known.
        self.token_ids = np.zeros((pool.num_ids, page_size), np.int32)
        self.packing = packing
        #: Of each format but the last, and each row, the first page that may have to leave it.
        num_packings = 0 if packing is None else len(packing.recent_tokens)
        self._packed_ends = np.zeros((num_packings, max_sequences), np.int32)
        self._page_marks = np.zeros(pool.num_ids, np.int32)
        is_by_mass = packing is not None and packing.is_by_mass
        is_compact = budget is not None or is_by_mass
        #: Of compact rows, the logical page of each cell, and how many pages a row has dropped.
        self.cell_pages = _table(max_sequences if is_compact else 0, ring_pages)
        self.num_dropped = np.zeros(max_sequences, np.int32)
        #: Of each cell, the attention mass of its page, and how many rows could see the page since.
        needs_mass = is_by_mass or (budget is not None and budget.needs_mass)
        self.mass = np.zeros((max_sequences if needs_mass else 0, ring_pages))
        self.mass_rows = np.zeros(self.mass.shape, np.int64)
        arrays = {
            "page_ids": self.page_ids,
            "tail_copies": self.tail_copies,
            "first_held": self.first_held,
            "filled": self._filled,
            "token_ids": self.token_ids,
            "page_marks": self._page_marks,
        }
        if packing is not None:
            arrays["packed_ends"] = self._packed_ends
        if is_compact:
            arrays |= {"cell_pages": self.cell_pages, "num_dropped": self.num_dropped}
        self._pointers = {name: ffi.from_buffer("int32_t[]", array) for name, array in arrays.items()}
        #: Of each page a number that changes whenever its slots are reserved.
        self.page_stamps = np.ones(pool.num_ids, np.uint32)
        self._pointers["page_stamps"] = ffi.from_buffer("uint32_t[]", self.page_stamps)
        self._pointers["page_salts"] = ffi.from_buffer("int64_t[]", self.page_salts)
        if needs_mass:
            self._pointers["mass"] = ffi.from_buffer("double[]", self.mass)
            self._pointers["mass_rows"] = ffi.from_buffer("int64_t[]", self.mass_rows)
        lib.pkv_pool_set_salts(pool.handle, self._pointers["page_salts"])
        # Filled and read under the cache's lock, so one of each is enough.
        self.size, self._refusal = ffi.new("pkv_step_size *"), ffi.new("pkv_refusal *")
        limited = window or budget
        self._tables = ffi.new(
            "pkv_tables *",
            {
                **self._pointers,
                "rows": rows.handle,
                "ring_pages": self.page_ids.shape[1],
                "page_size": page_size,
                "window": window.size if window else 0,
                "window_slack": window.slack if window else 0,
                "num_sink_tokens": window.num_sink_tokens if window else 0,
                "sink_pages": num_pages(window.num_sink_tokens, page_size) if window else 0,
                "max_step_tokens": limited.max_step_tokens if limited else MAX_TOKENS,
                "num_layers": num_layers,
                "num_packings": num_packings,
                "recent_tokens": list(packing.due_tokens) if packing else [],
                "num_attended": packing.num_attended(page_size) if packing else -1,
                "first_packed": num_pages(packing.num_sink_tokens, page_size) if packing else 0,
            },
        )

    # ---- rows

    @property
    def num_copies(self) -> int:
        """Of shared pages, by steps that were committed."""
        return int(self._tables.num_copies)

    @property
    def bytes_not_read(self) -> int:
        """Of shared pages, by the attention of steps that were committed."""
        return int(self._tables.bytes_not_read)

    def add(
        self, seq_ids: list[int], parent: int | None = None, at: object = None, salt: int = NO_SALT
    ) -> None:
        """Rows for new sequences: empty and of this salt, or sharing the first `at` tokens of `parent`."""
        row, length = -1, 0
        if parent is not None:
            row = self.rows.row(parent)
            length = seq_len = int(self.rows.seq_lens[row])
            if at is not None:
                length = integer("at", at, 0, seq_len)
        status = lib.pkv_tables_add(self.pool.handle, self._tables, len(seq_ids), seq_ids, salt, row, length)
        if status == lib.PKV_TOKENS_GONE:
            self._refuse_length("at", length, row)
        if status:
            check(status, "add")

    def add_pages(self, seq_id: int, salt: int, page_ids: list[int], seq_len: int) -> int:
        """A row for a new sequence of seq_len tokens that shares these pages.  Returns: the row.

        page_ids : those that a row of this length holds, in logical order
        """
        ids = ffi.new("int32_t[]", page_ids)
        check(lib.pkv_tables_add_pages(self.pool.handle, self._tables, seq_id, salt, ids, seq_len), "add")
        return self.rows.row(seq_id)

    def remove(self, seq_id: int) -> bool:
        """Release a sequence's row and pages, if there is one; False when it is in an open step."""
        status = lib.pkv_tables_remove(self.pool.handle, self._tables, seq_id)
        if status == SEQUENCE_BUSY:
            return False
        if status and status != lib.PKV_STALE_SEQUENCE:
            check(status, "free")
        return True

    def reset(self, seq_id: int) -> None:
        """Give a row's pages back; it is empty then."""
        check(lib.pkv_tables_reset(self.pool.handle, self._tables, self.rows.idle_row(seq_id)), "reset")

    def truncate(self, seq_id: int, length: object) -> None:
        """Forget a row's tokens from `length` on; ArgumentError when it has fewer."""
        row = self.rows.idle_row(seq_id)
        length = integer("length", length, 0, int(self.rows.seq_lens[row]))
        status = lib.pkv_tables_truncate(self.pool.handle, self._tables, row, length)
        if status == lib.PKV_TOKENS_GONE:
            self._refuse_length("length", length, row)
        check(status, "truncate")

    def _refuse_length(self, name: str, length: int, row: int) -> NoReturn:
        if self.budget is not None:
            raise ArgumentError(
                f"{name} is {length}, within page {length // self.page_size}, which was dropped; give a "
                f"multiple of page_size, {self.page_size}, or another length"
            )
        raise ArgumentError(
            f"at {name} {length} the window would need tokens whose pages were released; "
            f"keep more of the {self.rows.seq_lens[row]} tokens, reset the sequence, or build the cache with "
            "window_slack="
        )

    @property
    def sink_pages(self) -> int:
        """Pages of the sinks; 0 without a window."""
        return int(self._tables.sink_pages)

    def first_page_at(self, seq_len: int) -> int:
        """The first page behind the sinks that a row of this length must hold."""
        if self.window is None:
            return 0
        return max(max(0, seq_len - self.window.size) // self.page_size, self.sink_pages)

    def drop(self, row: int, numbers: NDArray[np.int32]) -> None:
        """Release these logical pages of a row, ascending, each full and held."""
        pages = ffi.from_buffer("int32_t[]", numbers)
        check(lib.pkv_tables_drop(self.pool.handle, self._tables, row, len(numbers), pages), "drop")

    def tail_page(self, row: int) -> int:
        """The page that a row's next token goes into, when that page holds tokens of the row."""
        page = int(self.rows.seq_lens[row]) // self.page_size
        return int(self.page_ids[row, self.cell(page - int(self.num_dropped[row]))])

    def cell(self, page: int) -> int:
        """Where a logical page is in a row; with a budget, before the first page that was dropped."""
        ring_pages = self.page_ids.shape[1]
        return (
            page
            if page < ring_pages
            else self.sink_pages + (page - self.sink_pages) % (ring_pages - self.sink_pages)
        )

    def held_pages(self, row: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The logical pages that a row holds, in order, and their ids."""
        seq_len = int(self.rows.seq_lens[row])
        end, first = num_pages(seq_len, self.page_size), int(self.first_held[row])
        if self.budget is not None:
            num_held = end - int(self.num_dropped[row])
            return self.cell_pages[row, :num_held].astype(np.int64), self.page_ids[row, :num_held]
        logical = np.concatenate([np.arange(min(self.sink_pages, end)), np.arange(first, end)])
        if self.window is None:
            return logical, self.page_ids[row, :end]
        return logical, self.page_ids[row, [self.cell(page) for page in logical.tolist()]]

    def page_id(self, row: int, page: int) -> int:
        """Where a logical page is that a row with a budget holds."""
        numbers, pages = self.held_pages(row)
        return int(pages[np.searchsorted(numbers, page)])

    def held_positions(self, row: int) -> NDArray[np.int32]:
        """Positions of a row's held tokens, oldest first: sinks and window, or what was not dropped."""
        seq_len = int(self.rows.seq_lens[row])
        if self.num_dropped[row]:
            starts = self.held_pages(row)[0][:, None] * self.page_size
            positions = (starts + np.arange(self.page_size)).reshape(-1).astype(np.int32)
            return positions[positions < seq_len]
        if self.window is None or seq_len <= self.window.size:
            return np.arange(seq_len, dtype=np.int32)
        start = seq_len - self.window.size
        sinks = np.arange(min(self.window.num_sink_tokens, start), dtype=np.int32)
        return np.concatenate([sinks, np.arange(start, seq_len, dtype=np.int32)])

    def slots(self, row: int) -> NDArray[np.int64]:
        """The slots of those, in the same order."""
        pages, offsets = np.divmod(self.held_positions(row), self.page_size)
        if self.budget is not None:
            cells = np.searchsorted(self.held_pages(row)[0], pages)
            held: NDArray[np.int64] = self.page_ids[row, cells] * np.int64(self.page_size) + offsets
            return held
        sinks = num_pages(self.window.num_sink_tokens, self.page_size) if self.window else 0
        ring = self.page_ids.shape[1] - sinks
        cells = np.where(pages < sinks, pages, sinks + (pages - sinks) % max(1, ring))
        slots: NDArray[np.int64] = self.page_ids[row, cells] * np.int64(self.page_size) + offsets
        return slots

    def known_ids(self, row: int) -> NDArray[np.int32]:
        """Ids of a row's first tokens, as far as they are known; without a window only."""
        num_known = int(self.rows.num_known[row])
        pages = self.page_ids[row, : num_pages(num_known, self.page_size)]
        ids: NDArray[np.int32] = self.token_ids[pages].reshape(-1)[:num_known]
        return ids

    @property
    def num_tokens(self) -> int:
        """Committed tokens, of all sequences; a slot that several share counts once."""
        return int(lib.pkv_tables_num_tokens(self._tables, self.pool.num_ids))

    # ---- steps

    def open(self, plan: Plan, seq_ids: list[int], new: NewTokens) -> None:
        """Reserve slots for the new tokens of each sequence: for all of them, or none.

        Raises: StaleSequence, SequenceBusy, SequenceTooLong, OutOfPages, ArgumentError.
        Cost: one C call; O(tokens + pages of the batch).
        """
        ids = has_ids = ffi.NULL
        if new.ids is not None and new.ids.size:
            ids, has_ids = ffi.from_buffer("int32_t[]", new.ids), ffi.from_buffer("uint8_t[]", new.has_ids)
        numbers = int64s(seq_ids, new.counts)
        batch, size = (self.pool.handle, self._tables, len(seq_ids), *numbers, ids, has_ids), self.size
        status = lib.pkv_step_open(*batch, plan.handle, plan.num_bytes, size, self._refusal)
        if status == lib.PKV_PLAN_TOO_SMALL:
            plan.take_memory(size.plan_bytes)
            status = lib.pkv_step_open(*batch, plan.handle, plan.num_bytes, size, self._refusal)
        if status != lib.PKV_OK:
            self._refuse(status, self._refusal)
        plan.num_tokens, plan.num_pages = size.num_tokens, size.num_pages

    def pages_needed(self, seq_ids: list[int], counts: Counts) -> int:
        """The pages that `open` would reserve, whether they are free or not."""
        batch = (self.pool.handle, self._tables, len(seq_ids), *int64s(seq_ids, counts))
        status = lib.pkv_step_measure(*batch, self.size, self._refusal)
        if status not in (lib.PKV_OK, lib.PKV_OUT_OF_PAGES):
            self._refuse(status, self._refusal)
        return int(self.size.num_new_pages)

    def commit(self, plan: Plan, counts: NDArray[np.int32] | None = None) -> None:
        """Append the first counts[i] new tokens of each sequence; None: all."""
        kept = ffi.NULL if counts is None else ffi.from_buffer("int32_t[]", counts)
        if status := lib.pkv_step_commit(self.pool.handle, self._tables, plan.handle, kept):
            check(status, "commit")

    def rollback(self, plan: Plan) -> None:
        """Nothing where the plan was never opened, or has ended."""
        if status := lib.pkv_step_rollback(self.pool.handle, self._tables, plan.handle):
            check(status, "rollback")

    def pack(
        self, layers: Any, rows: NDArray[np.int32], num_new: NDArray[np.int32]
    ) -> tuple[list[int], list[int]]:
        """Exchange old pages of these rows for packed ones, of the next format.

        layers : `pkv_pages *`, of all layers
        num_new : tokens that each row was given; it packs as many pages of a format as they fill
        Returns: open pages that got a packed twin, and the twins.  Where there is no room for one, or more
        are due, the row's exchange waits.
        """
        assert self.packing is not None
        due = np.array(self.packing.due_tokens)[:, None]
        has_more = (self.rows.seq_lens[rows] - due) // self.page_size > self._packed_ends[:, rows]
        has_old = has_more.any(axis=0)
        if not has_old.any():
            return [], []
        rows = np.ascontiguousarray(rows[has_old], np.int32)
        most = np.ascontiguousarray(-(-num_new[has_old] // self.page_size), np.int32)
        pairs = np.empty((2, int(most.sum()) * len(due)), np.int32)
        each, per_row, *into = (ffi.from_buffer("int32_t[]", array) for array in (rows, most, *pairs))
        count = lib.pkv_tables_pack(self.pool.handle, self._tables, layers, len(rows), each, per_row, *into)
        if count < 0:
            check(lib.PKV_INVARIANT, "pack")
        return pairs[0, :count].tolist(), pairs[1, :count].tolist()

    def pack_pages(self, layers: Any, row: int, numbers: list[int]) -> tuple[list[int], list[int]]:
        """Exchange these logical pages of a row, ascending, however old they are: each once, for one of the
        next format.  Returns: as `pack`."""
        pairs, num_made = np.empty((2, len(numbers)), np.int32), ffi.new("int64_t *")
        into = [ffi.from_buffer("int32_t[]", side) for side in pairs]
        pool, count = self.pool.handle, len(numbers)
        if lib.pkv_tables_pack_pages(pool, self._tables, layers, row, count, numbers, num_made, *into) < 0:
            check(lib.PKV_INVARIANT, "pack")
        return pairs[0, : num_made[0]].tolist(), pairs[1, : num_made[0]].tolist()

    def check(self) -> None:
        """Raise InvariantViolation unless every page's references are explained by the rows."""
        check(lib.pkv_tables_check(self.pool.handle, self._tables, self.pool.num_ids), "block tables")

    def _refuse(self, status: int, refusal: Any) -> NoReturn:
        requested, available = refusal.requested, refusal.available
        name = f"seqs[{refusal.index}]"
        if status == lib.PKV_STALE_SEQUENCE:
            raise StaleSequence(f"{name} was freed, or is another cache's")
        if status == lib.PKV_SEQUENCE_BUSY:
            raise SequenceBusy(f"{name} is in an open step; commit it or roll it back first")
        if status == lib.PKV_SEQUENCE_TWICE:
            raise ArgumentError(f"{name} is in this step twice; a step takes a sequence once")
        if status == lib.PKV_SEQUENCE_TOO_LONG:
            raise SequenceTooLong(
                f"{name} would hold {requested} tokens, max_seq_len is {available}; "
                "free it, or build a cache with a larger max_seq_len"
            )
        if status == lib.PKV_OUT_OF_PAGES:
            raise OutOfPages(
                f"the step needs {requested} new pages, "
                f"{self.pool.num_reclaimable + self.pool.num_trimmed} of {self.pool.num_pages} are free; "
                "free a sequence, step fewer, or build a larger pool"
                + (
                    f"; a step may have {self.pool.num_reclaimable * self.page_size} new tokens: give a long "
                    "prompt in several"
                    if self.packing
                    else ""
                )
            )
        if status == lib.PKV_NEGATIVE_ID:
            raise ArgumentError(f"new[{refusal.index}] holds an id outside [0, 2**31)")
        if status != lib.PKV_BAD_ARGUMENT:
            check(status, "step")
        if refusal.index < 0:
            raise ArgumentError(f"the step has {requested} new tokens or pages, {available} at most can be")
        raise ArgumentError(f"new[{refusal.index}] is {requested} tokens, outside 0 to {available}")


def _table(max_sequences: int, ring_pages: int) -> NDArray[np.int32]:
    try:
        return np.zeros((max_sequences, ring_pages), np.int32)
    except MemoryError:
        raise MemoryError(
            f"block tables of {max_sequences} sequences of {ring_pages} pages take "
            f"{max_sequences * ring_pages * 4:,} bytes; lower max_sequences or max_seq_len"
        ) from None
