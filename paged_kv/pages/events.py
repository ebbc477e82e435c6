"""Events of the prefix cache: which full pages can be found, for routers and indexers elsewhere.

Names and fields are vLLM's, which routers read.  A block is a page, and its hash is SHA-256 over fields that
begin with their lengths:

    SHA-256("paged_kv page", page_size, fingerprint, "salt", salt, ids)                    of a first page
    SHA-256("paged_kv page", page_size, fingerprint, "page", hash of the page before, ids)       of others

so the same tokens have the same hash in every process, and a hash shows a salt only to those that guess it.
Within the cache no hash decides anything: look-ups compare tokens.

Ids are consecutive, from 1.  The last events are kept in a ring; when what a caller needs has left it, the
answer begins with AllBlocksCleared and a BlockStored for each page that is there, so that replaying any
answer gives the state of now.

Imports entry and token_keys.  The caller holds the cache's lock.
"""

import hashlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from .entry import Entry
from .token_keys import ids_of

MAX_EVENTS = 16384
TAG = b"paged_kv page"


@dataclass(frozen=True)
class BlockStored:
    """A full page can be found."""

    event_id: int
    block_hashes: list[bytes]  # one
    parent_block_hash: bytes | None  # of the page before; None: it is a sequence's first
    token_ids: list[int]
    block_size: int
    medium: str = "CPU"


@dataclass(frozen=True)
class BlockRemoved:
    """A page can be found no more."""

    event_id: int
    block_hashes: list[bytes]  # one
    medium: str = "CPU"


@dataclass(frozen=True)
class AllBlocksCleared:
    """No page can be found."""

    event_id: int


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class Events:
    """The ring of one cache's events.  Hashes are computed when they are read."""

    def __init__(self, page_size: int, fingerprint: bytes, most: int = MAX_EVENTS) -> None:
        self.page_size = page_size
        self._head = _field(TAG) + _field(page_size.to_bytes(8)) + _field(fingerprint)
        self.last_id = 0
        #: (is it stored?, its entry); None: everything was cleared.
        self._ring: deque[tuple[bool, Entry] | None] = deque(maxlen=most)

    def stored(self, entry: Entry) -> None:
        """A full page can be found.  Cost: O(1)."""
        self._add((True, entry))

    def removed(self, entry: Entry) -> None:
        """A full page can be found no more.  Cost: O(1)."""
        self._add((False, entry))

    def cleared(self) -> None:
        """No page can be found."""
        self._add(None)

    def forget(self, num_there: int) -> None:
        """Events may be missing: let the next answer of each reader be a whole one.

        num_there : full pages that can be found
        """
        self._ring.clear()
        # An id that no reader has, and large enough that those of the pages are no smaller than 0.
        self.last_id = max(self.last_id + 1, num_there)

    def _add(self, record: tuple[bool, Entry] | None) -> None:
        self.last_id += 1
        self._ring.append(record)

    def since(self, event_id: int, there: Iterable[Entry]) -> list[Event]:
        """The events after this one.

        there : the entries of full pages, each after the one before it

        Cost: O(events + pages), and a SHA-256 for each page that was in no answer so far.
        """
        first_id = self.last_id - len(self._ring) + 1
        if first_id - 1 <= event_id <= self.last_id:
            records = list(self._ring)[event_id + 1 - first_id :]
            return [self._event(event_id + 1 + i, record) for i, record in enumerate(records)]
        snapshot: list[tuple[bool, Entry] | None] = [None, *((True, entry) for entry in there)]
        begin = self.last_id + 1 - len(snapshot)
        return [self._event(begin + i, record) for i, record in enumerate(snapshot)]

    def _event(self, event_id: int, record: tuple[bool, Entry] | None) -> Event:
        if record is None:
            return AllBlocksCleared(event_id)
        is_stored, entry = record
        digest = self.digest(entry)
        if not is_stored:
            return BlockRemoved(event_id, [digest])
        parent = None if isinstance(entry.before, bytes) else self.digest(entry.before)
        return BlockStored(event_id, [digest], parent, ids_of(entry.key).tolist(), self.page_size)

    def digest(self, entry: Entry) -> bytes:
        """A page's hash.  Cost: a SHA-256 for each page of its chain that has none yet."""
        chain = [entry]
        while chain[-1].digest is None and isinstance(chain[-1].before, Entry):
            chain.append(chain[-1].before)
        digest = b""
        for one in reversed(chain):
            if one.digest is None:
                before = (b"salt", one.before) if isinstance(one.before, bytes) else (b"page", digest)
                ids = ids_of(one.key).astype("<i4").tobytes()
                one.digest = hashlib.sha256(self._head + b"".join(map(_field, (*before, ids)))).digest()
            digest = one.digest
        return digest


def _field(content: bytes) -> bytes:
    return len(content).to_bytes(8) + content
