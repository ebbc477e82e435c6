"""Entries: what the prefix index knows of a page.

Imports token_keys.
"""

from .token_keys import SERIAL_BYTES

#: In place of a page id, of an entry whose page was taken.
HOLLOW = -1


class Entry:
    """An indexed page: the ids of its first tokens follow the serial number of what is before in `key`.

    before : the entry of the page before; the salt, of a first page
    digest : the page's hash in events, once one was read
    """

    __slots__ = ("before", "digest", "is_dropped", "key", "page_id", "serial")

    def __init__(self, key: bytes, page_id: int, serial: bytes, before: "Entry | bytes") -> None:
        self.key, self.page_id, self.serial, self.before = key, page_id, serial, before
        self.digest: bytes | None = None
        self.is_dropped = False

    @property
    def num_tokens(self) -> int:
        return (len(self.key) - SERIAL_BYTES) // 4
