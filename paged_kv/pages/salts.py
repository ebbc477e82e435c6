"""Salts: what keeps the pages of some sequences apart from those of others.

Sequences of one salt share pages; of different salts, none.  C compares numbers: each salt in use has one.
A number is never used again, so a salt that was forgotten, and comes back, is a new one to every page.

The caller holds the cache's lock.
"""

import itertools
from collections.abc import Callable, Iterable

from ..errors import ArgumentError
from ..lifetime import Uncopyable

#: The number of b"", which is a salt like others.
NO_SALT = 1
#: So many salts without a sequence or a cached page are remembered before they are looked for.
MAX_UNUSED = 1024


class Salts(Uncopyable):
    """The numbers of one cache's salts, and the serial numbers of its index, all different."""

    def __init__(self) -> None:
        self.numbers = {b"": NO_SALT}
        self._names = {NO_SALT: b""}
        self.serials = itertools.count(NO_SALT + 1)
        self._limit = MAX_UNUSED

    def name(self, number: int) -> bytes:
        """The salt of a number."""
        return self._names[number]

    def number(self, salt: bytes) -> int:
        """The number of a salt, a new one if there is none."""
        number = self.numbers.get(salt)
        if number is None:
            number = next(self.serials)
            self._names[number] = salt
            self.numbers[salt] = number
        return number

    def forget_unused(self, in_rows: Callable[[], Iterable[int]], has_entries: Callable[[int], bool]) -> None:
        """Forget salts that neither a row nor the index has, when there are many.

        Cost: amortized O(1) for each new salt.
        """
        if len(self.numbers) <= self._limit:
            return
        used = {NO_SALT, *in_rows()}
        self.numbers = {
            salt: number for salt, number in self.numbers.items() if number in used or has_entries(number)
        }
        self._names = {number: salt for salt, number in self.numbers.items()}
        self._limit = 2 * len(self.numbers) + MAX_UNUSED


def bytes_of(name: str, value: object) -> bytes:
    """Raises: ArgumentError for what is not bytes."""
    if type(value) is not bytes:
        raise ArgumentError(f"{name} is {value!r:.60}; give bytes")
    return value
