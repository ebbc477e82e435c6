"""Attention: arrays as C sees them, calls validated and repeated, pages of other owners, parts merged."""

from .foreign import paged_attention
from .merge import merge_states

__all__ = ["merge_states", "paged_attention"]
