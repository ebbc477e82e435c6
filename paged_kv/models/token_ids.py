"""Token ids as arguments: a vector of integers that a vocabulary holds.

Imports errors.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._binding import integer
from ..attention.arrays import numpy_of
from ..errors import ArgumentError


def integer_vector(name: str, values: object) -> NDArray[Any]:
    """`values` as a vector of some integer dtype; ArgumentError for what is none."""
    try:
        array: NDArray[Any] = np.asarray(numpy_of(name, values))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ArgumentError(f"{name} is {values!r:.60}; it must be a vector of integers: {error}") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ArgumentError(f"{name} is {array.dtype} {list(array.shape)}; it must be a vector of integers")
    return array if array.size else np.empty(0, np.int64)


def token_ids(name: str, ids: object, vocab_size: int) -> NDArray[np.int64]:
    """`ids` as int64 [num_ids]: a list, numpy array or torch tensor of integers from 0 to vocab_size - 1.

    Raises: ArgumentError that names the first id outside, or says what `ids` is.
    """
    vector = integer_vector(name, ids)
    outside = np.flatnonzero((vector < 0) | (vector >= vocab_size))
    if outside.size:
        raise ArgumentError(
            f"{name}[{outside[0]}] is {vector[outside[0]]}; ids lie outside 0 to {vocab_size - 1}"
        )
    return vector.astype(np.int64)


def indices(name: str, values: object, size: int) -> NDArray[np.int64]:
    """Indices into an axis of `size`, int64 [num]; negative ones count from its end.  Raises:
    ArgumentError.
    """
    vector = integer_vector(name, values)
    outside = np.flatnonzero((vector < -size) | (vector >= size))
    if outside.size:
        raise ArgumentError(f"{name}[{outside[0]}] is {vector[outside[0]]}, outside {-size} to {size - 1}")
    return vector.astype(np.int64)


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


def drawn_id(sampler: Any, logits: NDArray[np.float32], ids: Iterable[int]) -> int:
    """What a sampler draws from logits [vocab_size].

    ids : of the text so far; read for samplers whose `reads_ids` is true
    Raises: ArgumentError when that is no id of the vocabulary; what the sampler raises.
    """
    reads_ids = getattr(sampler, "reads_ids", False)
    drawn = sampler.sample(logits, list(ids)) if reads_ids else sampler.sample(logits)
    return integer("the id that the sampler drew", drawn, 0, len(logits) - 1)
