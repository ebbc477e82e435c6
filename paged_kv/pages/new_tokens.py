"""New tokens: how many each sequence of a step gets, from what a caller gives, and as C takes it.

Imports attention.arrays.
"""

import itertools
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .._binding import ffi
from ..attention.arrays import numpy_of
from ..errors import ArgumentError

#: How many new tokens each sequence of a step gets.
Counts: TypeAlias = list[int] | NDArray[np.int64]
#: Up to so many numbers, cffi makes an array faster than numpy.
FEW = 32
INT64_ARRAY = ffi.typeof("int64_t[]")
#: Positions are int32.
MAX_TOKENS = 2**31 - 1


class NewTokens(NamedTuple):
    """What each sequence of a step gets.

    counts : how many tokens, of each sequence
    ids : int32, the ids of sequences that were given ids, one after the other; None: there are none
    has_ids : a byte for each sequence, 1 where its ids are in `ids`
    """

    counts: Counts
    ids: NDArray[np.int32] | None = None
    has_ids: bytes = b""


def new_tokens_of(new: object, num_seqs: int) -> NewTokens:
    """What each sequence gets: from lists of ids, counts, or an integer array of counts.

    Raises: ArgumentError for what is neither, and for ids from 2**31 on.  Negative counts and
    negative ids are left for the plan to refuse.
    """
    if isinstance(new, (list, tuple)):
        if len(new) != num_seqs:
            raise ArgumentError(f"new has {len(new)} entries for {num_seqs} sequences; give one for each")
        types = list(map(type, new))
        if types.count(int) == num_seqs:
            return NewTokens(new if isinstance(new, list) else list(new))
        alike = types[0] if types and types.count(types[0]) == num_seqs else None
        ids = _ids_of_lists(new) if alike is list else _ids_of_arrays(new) if alike is np.ndarray else None
        if ids is not None:
            return NewTokens(list(map(len, new)), ids, b"\x01" * num_seqs)
        return _mixed([_entry(f"new[{i}]", entry) for i, entry in enumerate(new)])
    new = numpy_of("new", new)
    if not isinstance(new, np.ndarray):
        raise ArgumentError(f"new is {type(new).__name__}; give a list with ids or a count for each sequence")
    if new.ndim != 1 or not np.issubdtype(new.dtype, np.integer) or len(new) != num_seqs:
        raise ArgumentError(
            f"new is {new.dtype} {list(new.shape)}; give an integer for each of {num_seqs} sequences"
        )
    # What does not fit an int64 must not wrap into what does.
    counts = np.minimum(new, MAX_TOKENS + 1) if new.dtype == np.uint64 else new
    return NewTokens(np.ascontiguousarray(counts, np.int64))


def counts_of(new: object, num_seqs: int) -> Counts:
    """How many new tokens each sequence gets.  Raises: as new_tokens_of."""
    return new_tokens_of(new, num_seqs).counts


def token_ids_of(name: str, tokens: object) -> NDArray[np.int32]:
    """Ids of one sequence, int32 [n].  Raises: ArgumentError for what holds no ids in [0, 2**31)."""
    ids = None
    if type(tokens) is list:
        ids = _ids_of_lists([tokens])
    if ids is None or (ids.size and ids.min() < 0):
        entry = _entry(name, tokens)
        if isinstance(entry, int) and hasattr(tokens, "__len__"):
            return np.empty(0, np.int32)
        if isinstance(entry, int):
            raise ArgumentError(f"{name} is {entry}; give the tokens' ids, not their count")
        ids = entry
    return ids


def _ids_of_lists(new: Any) -> NDArray[np.int32] | None:
    """All ids of lists of integers, which may be negative; None when one has to be named in an error."""
    flat = list(itertools.chain.from_iterable(new))
    if list(map(type, flat)).count(int) != len(flat):
        return None
    try:
        return np.array(flat, np.int32)
    except OverflowError:
        return None


def _ids_of_arrays(new: Any) -> NDArray[np.int32] | None:
    """The same of arrays."""
    if not all(array.ndim == 1 and array.dtype.kind in "iu" for array in new):
        return None
    ids = np.concatenate(new)
    if ids.size and not 0 <= ids.min() <= ids.max() <= MAX_TOKENS:
        return None
    return ids.astype(np.int32)


def _entry(name: str, entry: object) -> int | NDArray[np.int32]:
    """A count, or ids."""
    if isinstance(entry, (int, np.integer)) and not isinstance(entry, bool):
        return int(entry)
    if hasattr(entry, "__len__") and not isinstance(entry, (str, bytes)):
        ids = np.asarray(numpy_of(name, entry))
        if ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer) and ids.size:
            if ids.min() < 0 or ids.max() > MAX_TOKENS:
                raise ArgumentError(f"{name} holds an id outside [0, 2**31)")
            return ids.astype(np.int32)
        if ids.ndim == 1 and not ids.size:
            return 0
    raise ArgumentError(f"{name} is {entry!r:.60}; give token ids, or how many there are")


def _mixed(entries: list[int | NDArray[np.int32]]) -> NewTokens:
    given = [entry for entry in entries if not isinstance(entry, int)]
    counts = [entry if isinstance(entry, int) else len(entry) for entry in entries]
    if not given:
        return NewTokens(counts)
    return NewTokens(counts, np.concatenate(given), bytes(not isinstance(entry, int) for entry in entries))


def int64s(seq_ids: list[int], counts: Counts) -> tuple[Any, Any]:
    """Sequences and counts as C takes them; a count that does not fit becomes one that the plan refuses.

    The second may be a part of the first: keep both alive.
    """
    if not isinstance(counts, list):
        return int64_array(seq_ids), ffi.from_buffer("int64_t[]", counts)
    try:
        both = int64_array(seq_ids + counts)
    except OverflowError:
        both = int64_array(seq_ids + [min(max(count, -1), MAX_TOKENS + 1) for count in counts])
    return both, both + len(seq_ids)


def int64_array(values: list[int]) -> Any:
    if len(values) <= FEW:
        return ffi.new(INT64_ARRAY, values)
    return ffi.from_buffer("int64_t[]", np.fromiter(values, np.int64, len(values)))
