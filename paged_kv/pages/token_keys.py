"""Keys of the prefix index: the serial number of what goes before, and ids, as bytes that sort as ids do.

Keys that follow the same entry stand side by side, in the order of their tokens: of all of them, one that
agrees longest with some tokens is a neighbour of the place where those would stand.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

SERIAL_BYTES = 8


def key_of(ids: NDArray[np.int32]) -> bytes:
    """Ids as bytes, four of each, that sort as the ids do."""
    return ids.astype(">i4").tobytes()


def ids_of(key: bytes) -> NDArray[np.int32]:
    """The ids in a key, behind its serial number."""
    return np.frombuffer(key, ">i4", offset=SERIAL_BYTES).astype(np.int32)


def following(sorted_keys: Any, serial: bytes) -> Iterator[bytes]:
    """The keys of a SortedDict that follow an entry, or a salt, in order."""
    after = (int.from_bytes(serial) + 1).to_bytes(SERIAL_BYTES)
    keys: Iterator[bytes] = sorted_keys.irange(serial, after, (True, False))
    return keys


def longest(sorted_keys: Any, serial: bytes, ids: NDArray[np.int32]) -> tuple[Any, int]:
    """Of what follows `serial`, the value whose tokens agree longest with `ids`, and for how many.

    (None, 0) when nothing does.  Cost: O(log n).
    """
    best: tuple[Any, int] = (None, 0)
    place = sorted_keys.bisect_left(serial + key_of(ids))
    for index in (place - 1, place):
        if 0 <= index < len(sorted_keys):
            key, value = sorted_keys.peekitem(index)
            if key.startswith(serial) and (agreed := num_common(ids_of(key), ids)) > best[1]:
                best = (value, agreed)
    return best


def continues(sorted_keys: Any, prefix: bytes) -> bool:
    """Does a key begin with this one, and go on?"""
    place = sorted_keys.bisect_right(prefix)
    return place < len(sorted_keys) and bool(sorted_keys.peekitem(place)[0].startswith(prefix))


def num_common(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many first ids two arrays have in common."""
    shorter = min(len(a), len(b))
    differs = a[:shorter] != b[:shorter]
    return int(differs.argmax()) if differs.any() else shorter
