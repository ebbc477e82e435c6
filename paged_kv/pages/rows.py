"""Rows: the sequences of a cache, and how long they are.

    seq_lens[r]       committed tokens
    reserved_lens[r]  and those of an open step: more than seq_lens[r] only while the row is in one
    num_known[r]      first committed tokens whose ids are known
    salts[r]          the number of its salt

A sequence has an id: a serial number that no other sequence of the process has, and its row.  numpy owns the
arrays, and C works on them in place.  Which pages a row holds is in the block tables.

Imports _binding, errors and lifetime.  The caller holds the cache's lock.
"""

import itertools

import numpy as np

from .._binding import ffi, lib
from ..errors import OutOfSequences, SequenceBusy, StaleSequence
from ..lifetime import Uncopyable

#: The low bits of a seq_id are the row, the others the serial number, which repeats after 2**39 - 1
#: sequences: six days at a million a second.
ROW_BITS = int(lib.PKV_ROW_BITS)
MAX_SERIAL = 2 ** (63 - ROW_BITS) - 1

_serials = itertools.count()


class Rows(Uncopyable):
    """The rows of `max_sequences` sequences of `max_seq_len` tokens at most."""

    def __init__(self, max_sequences: int, max_seq_len: int) -> None:
        self.max_sequences, self.max_seq_len = max_sequences, max_seq_len
        # Untouched zeros: the rows of sequences that never come cost no memory.
        self.seq_lens = np.zeros(max_sequences, np.int32)
        self.reserved_lens = np.zeros(max_sequences, np.int32)
        self.num_known = np.zeros(max_sequences, np.int32)
        self.seq_ids = np.zeros(max_sequences, np.int64)
        self.salts = np.zeros(max_sequences, np.int64)
        self._next_free = np.zeros(max_sequences, np.int32)
        arrays = {
            "seq_lens": self.seq_lens,
            "reserved_lens": self.reserved_lens,
            "num_known": self.num_known,
            "next_free": self._next_free,
        }
        self._pointers = {name: ffi.from_buffer("int32_t[]", array) for name, array in arrays.items()}
        self._pointers["seq_ids"] = ffi.from_buffer("int64_t[]", self.seq_ids)
        self._pointers["salts"] = ffi.from_buffer("int64_t[]", self.salts)
        self._one_row = ffi.new("int32_t[1]")
        self.handle = ffi.new(
            "pkv_rows *",
            {
                **self._pointers,
                "free_row": -1,
                "max_sequences": max_sequences,
                "max_seq_len": max_seq_len,
            },
        )

    @property
    def num_sequences(self) -> int:
        return int(self.handle.num_sequences)

    @property
    def num_rows(self) -> int:
        """Rows that were used so far; those behind are untouched."""
        return int(self.handle.num_rows)

    def salts_in_use(self) -> list[int]:
        """The salts of all sequences, with repetitions."""
        num_rows = self.num_rows
        salts: list[int] = self.salts[:num_rows][self.seq_ids[:num_rows] > 0].tolist()
        return salts

    def next_seq_ids(self, count: int) -> list[int]:
        """Ids for `count` new sequences, for which `add` takes rows; OutOfSequences when too few are free."""
        num_free = self.max_sequences - self.num_sequences
        if count > num_free:
            what = f"requested {count} forks, {num_free} of {self.max_sequences} sequences are free"
            if count == 1:
                what = f"all {self.max_sequences} sequences are in use"
            raise OutOfSequences(f"{what}; free one, or build a cache with a larger max_sequences")
        rows = self._one_row if count == 1 else ffi.new("int32_t[]", count)
        lib.pkv_rows_next(self.handle, count, rows)
        return [(next(_serials) % MAX_SERIAL + 1) << ROW_BITS | rows[i] for i in range(count)]

    def row(self, seq_id: int) -> int:
        """The row of a sequence; StaleSequence when there is none of this id."""
        row = int(lib.pkv_rows_find(self.handle, seq_id))
        if row < 0:
            raise StaleSequence("the sequence was freed, or is another cache's")
        return row

    def idle_row(self, seq_id: int) -> int:
        """The row of a sequence that is in no open step; StaleSequence, SequenceBusy."""
        row = self.row(seq_id)
        if self.reserved_lens[row] != self.seq_lens[row]:
            raise SequenceBusy("the sequence is in an open step; commit it or roll it back first")
        return row

    def is_idle(self, seq_id: int) -> bool:
        """Is there a sequence of this id, and in no open step?"""
        row = int(lib.pkv_rows_find(self.handle, seq_id))
        return row >= 0 and bool(self.reserved_lens[row] == self.seq_lens[row])
