"""Serving: requests, their admission, continuous batching, and an engine that threads share."""

from .engine import Engine
from .grammar import Grammar
from .handle import Handle, Piece, Sample, Usage
from .options import Sampling

__all__ = ["Engine", "Grammar", "Handle", "Piece", "Sample", "Sampling", "Usage"]
