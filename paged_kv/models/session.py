"""A session: one growing text of a model, in a cache of its own that grows with it.

    ids      every token so far
    seq      holds the first len(seq) of them; the next step feeds the rest

so a step that fails has changed nothing, and the next one feeds the same tokens.

Imports the cache.
"""

from collections.abc import Callable

from ..cache import PagedKVCache
from ..lifetime import OwnedLock, Uncopyable
from ..pages.layout import num_pages
from ..sequence import Sequence
from ..step import Step

PAGE_SIZE = 64
#: Pages of a session that begins; each further cache has twice as many.
FIRST_PAGES = 4


class Session(Uncopyable):
    """Ids, and the keys and values of those that the model has seen.

    Parameters
    ----------
    new_cache : makes a cache of the model's shape, from options of PagedKVCache
    most_tokens : the model's positions

    The caller holds `lock` while it extends the session.
    """

    def __init__(self, new_cache: Callable[..., PagedKVCache], most_tokens: int) -> None:
        self._new_cache, self._most_pages = new_cache, num_pages(most_tokens, PAGE_SIZE)
        self._held: tuple[PagedKVCache, Sequence] | None = None
        self.ids: list[int] = []
        self.lock = OwnedLock()

    @property
    def seq(self) -> Sequence:
        """The sequence, empty at first; another one when the cache has grown."""
        return self._reserved(0)[1]

    def step(self, ids: list[int]) -> Step:
        """A step that feeds these.  Raises: SequenceTooLong beyond the model's positions; MemoryError."""
        cache, seq = self._reserved(len(ids))
        return cache.step([seq], [ids])

    def unseen(self, prompt: list[int]) -> tuple[list[int], list[int]]:
        """All ids, followed by the prompt's, and those of them that the sequence does not hold."""
        if len(self.seq) > len(self.ids):  # a reset that was interrupted halfway
            self.seq.truncate(len(self.ids))
        ids = self.ids + prompt
        return ids, ids[len(self.seq) :]

    def reset(self) -> None:
        """Forget every token."""
        self.ids = []
        self.seq.reset()

    def _reserved(self, num_new: int) -> tuple[PagedKVCache, Sequence]:
        """Cache and sequence, with room for as many more tokens as the model has positions for."""
        held = 0 if self._held is None else len(self._held[1])
        held_pages = 0 if self._held is None else self._held[0].stats().num_pages
        needed = min(num_pages(held + num_new, PAGE_SIZE), self._most_pages)
        if self._held is None or needed > held_pages:
            larger = min(max(needed, 2 * held_pages, FIRST_PAGES), self._most_pages)
            self._held = self._moved(larger, held)
        return self._held

    def _moved(self, new_pages: int, num_tokens: int) -> tuple[PagedKVCache, Sequence]:
        """A larger cache, and a sequence in it that holds what the present one does."""
        cache = self._new_cache(num_pages=new_pages, page_size=PAGE_SIZE, max_sequences=1)
        seq = cache.sequence()
        if self._held is not None and num_tokens:
            with cache.step([seq], [num_tokens]) as step:
                for layer in range(cache.num_layers):
                    k, v = self._held[1].gather(layer)  # float32, as the pages are: nothing is rounded
                    step.write(layer, k, v)
        return cache, seq
