"""What the prefix index has evicted, so that a miss can be explained, in bounded memory.

A record has its entry's serial number.  An entry that comes back takes the number again, so that records of
the pages behind it can still be found.

Imports token_keys.  The caller holds the cache's lock.
"""

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sortedcontainers import SortedDict

from .token_keys import key_of, longest


class Eviction(NamedTuple):
    """Why and when a page left the index.

    cause : "pressure": a step needed room; "time": its ttl was over; "limit": the cache was trimmed
    when : seconds of the cache's clock
    """

    serial: bytes
    cause: str
    when: float


class Evicted:
    """The last `most` evictions, by the keys of their entries."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._records: Any = SortedDict()
        self._by_age: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def remember(self, key: bytes, serial: bytes, cause: str, when: float) -> None:
        """Record an entry that is evicted; those behind it come first, so that they are forgotten first."""
        self._by_age[key] = None
        self._records[key] = Eviction(serial, cause, when)
        while len(self._by_age) > self.most:
            self._records.pop(self._by_age.popitem(last=False)[0], None)

    def take(self, key: bytes) -> bytes | None:
        """The serial number of an entry that comes back, whose record goes."""
        self._by_age.pop(key, None)
        record: Eviction | None = self._records.pop(key, None)
        return None if record is None else record.serial

    def clear(self) -> None:
        self._by_age.clear()
        self._records.clear()

    def longest(self, serial: bytes, ids: NDArray[np.int32], page_size: int) -> tuple[int, Eviction | None]:
        """How many of these ids, from the page that follows `serial` on, were there; the first eviction."""
        num_tokens, first = 0, None
        while num_tokens + page_size <= len(ids):
            record = self._records.get(serial + key_of(ids[num_tokens : num_tokens + page_size]))
            if record is None:
                break
            first, serial = first or record, record.serial
            num_tokens += page_size
        record, num_more = longest(self._records, serial, ids[num_tokens : num_tokens + page_size])
        return num_tokens + num_more, first or record
