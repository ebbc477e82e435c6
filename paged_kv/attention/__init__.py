"""Attention: arrays as C sees them, calls validated and repeated, pages of other owners, parts merged."""

from .foreign import PagedBatch, paged_attention
from .merge import merge_states

__all__ = ["PagedBatch", "merge_states", "paged_attention"]
