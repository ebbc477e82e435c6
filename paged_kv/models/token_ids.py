"""Token ids as arguments: a vector of integers that a vocabulary holds.

Imports errors.  Imported by bitnet, session and generate.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._binding import integer
from ..errors import ArgumentError


def token_ids(name: str, ids: object, vocab_size: int) -> NDArray[np.int64]:
    """`ids` as int64 [num_ids]: a list, numpy array or torch tensor of integers from 0 to vocab_size - 1.

    Raises: ArgumentError that names the first id outside, or says what `ids` is.
    """
    try:
        array: NDArray[Any] = np.asarray(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ArgumentError(f"{name} is {ids!r:.60}; it must be a vector of token ids: {error}") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ArgumentError(f"{name} is {array.dtype} {list(array.shape)}; it must be a vector of token ids")
    outside = np.flatnonzero((array < 0) | (array >= vocab_size)) if array.size else array
    if outside.size:
        raise ArgumentError(
            f"{name}[{outside[0]}] is {array[outside[0]]}; ids lie outside 0 to {vocab_size - 1}"
        )
    return array.astype(np.int64)


def prompt_ids(name: str, prompt: object, vocab_size: int) -> list[int]:
    """The ids of one prompt, of at least one token; [1, num_ids], a batch of one, is taken as that one.

    Raises: ArgumentError.
    """
    one: Any = prompt
    if len(getattr(prompt, "shape", ())) == 2 and len(one) == 1:
        one = one[0]
    ids = token_ids(name, one, vocab_size)
    if not ids.size:
        raise ArgumentError(f"{name} is empty; give at least one token, such as the begin token")
    return [int(id) for id in ids]


def drawn_id(sampler: Any, logits: NDArray[np.float32]) -> int:
    """What a sampler draws from logits [vocab_size]; ArgumentError when that is no id of the vocabulary."""
    return integer("the id that the sampler drew", sampler.sample(logits), 0, len(logits) - 1)
