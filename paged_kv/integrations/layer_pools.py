"""Pools for the layers of another library's model: one cache for each shape of keys and values.

A model's layers may differ in kv heads and head size; those that are alike share a pool.  A row of the batch
has a sequence in each pool, and a forward pass opens a step in each: in all of them, or in none.

Imports cache.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .._binding import integer
from ..cache import PagedKVCache
from ..pages.layout import parse_memory


class Shape(NamedTuple):
    """Of a layer's keys and values."""

    num_kv_heads: int
    head_dim: int
    head_dim_v: int | None = None  # where it differs


@dataclass
class LayerPool:
    """The cache of layers of one shape, a sequence for each row of the batch, and the step that is open."""

    cache: PagedKVCache
    shape: Shape
    seqs: list[Any] = field(default_factory=list)
    step: Any = None


def pools_of(
    shapes: Rows[Shape | None], *, memory: int | str, num_pages: int | None, **options: Any
) -> tuple[list[LayerPool], list[tuple[int, int] | None]]:
    """A pool for each shape among the layers, and each layer's place: (pool, layer of it).

    shapes : of each layer; None: it has no keys and values of its own
    memory : of all pools, divided by what their tokens take
    num_pages : of each pool, instead
    """
    layers_of: dict[Shape, int] = {}
    places: list[tuple[int, int] | None] = []
    for shape in shapes:
        if shape is None:
            places.append(None)
            continue
        layer = layers_of.get(shape, 0)
        layers_of[shape] = layer + 1
        places.append((list(layers_of).index(shape), layer))
    sizes = [
        count * shape.num_kv_heads * (shape.head_dim + (shape.head_dim_v or shape.head_dim))
        for shape, count in layers_of.items()
    ]
    total = integer("memory", parse_memory(memory), 1, 2**63 - 1)
    pools = []
    for (shape, count), size in zip(layers_of.items(), sizes, strict=True):
        own = {"num_pages": num_pages} if num_pages is not None else {"memory": total * size // sum(sizes)}
        named: dict[str, Any] = own | options | {"head_dim_v": shape.head_dim_v}
        cache = PagedKVCache(count, shape.num_kv_heads, shape.head_dim, **named)
        pools.append(LayerPool(cache, shape))
    return pools, places


def open_steps(pools: Rows[LayerPool], new: list[Any]) -> None:
    """A step in each pool, or in none: for each row its new ids or their count, which may be 0."""
    try:
        for pool in pools:
            pool.step = pool.cache.step(pool.seqs, new)
    except BaseException:
        roll_back_steps(pools)
        raise


def roll_back_steps(pools: Rows[LayerPool]) -> None:
    for pool in pools:
        if pool.step is not None:
            pool.step.rollback()
            pool.step = None


def commit_steps(pools: Rows[LayerPool]) -> None:
    for pool in pools:
        if pool.step is not None:
            pool.step.commit()
            pool.step = None


def select_rows(pools: Rows[LayerPool], indices: list[int]) -> None:
    """Row i becomes what row indices[i] was: the first that names a row takes it, the others fork it."""
    for pool in pools:
        pool.seqs = pool.cache.select(pool.seqs, indices)


def free_rows(pools: Rows[LayerPool]) -> None:
    for pool in pools:
        seqs, pool.seqs = pool.seqs, []
        for seq in seqs:
            seq.free()
