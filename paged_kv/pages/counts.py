"""Counts: what the prefix cache was given, what it found, and what it let go.

Imports nothing.
"""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """What happened since the cache was built; CacheStats describes it."""

    num_queries: int = 0
    num_queried_tokens: int = 0
    num_hits: int = 0
    num_hit_tokens: int = 0
    num_unused_evictions: int = 0
    misses: Counter[str] = field(default_factory=Counter)
    evictions: Counter[str] = field(default_factory=Counter)

    def count(self, num_tokens: int, num_hit_tokens: int, reason: str) -> None:
        """A new sequence was given so many tokens, and found so many."""
        self.num_queries += 1
        self.num_queried_tokens += num_tokens
        self.num_hits += num_hit_tokens > 0
        self.num_hit_tokens += num_hit_tokens
        if reason != "full":
            self.misses[reason] += 1
