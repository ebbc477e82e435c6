"""Latent keys (MLA) in pages: written as they come, gathered for each layer of a pass.

A model with latent keys caches a compressed row of each token and the rotated part of its key, and computes
keys and values of all heads from them in each pass.  There is nothing that a kernel could read in place: the
latents of all tokens are gathered into dense tensors, as other caches have them.  Pages give what they give
elsewhere: no growth, forks, prompts that begin alike.

Imports layer_pools.
"""

from typing import Any

import torch

from ..errors import ArgumentError
from .layer_pools import LayerPool, Shape

#: The widest head of a page.
MAX_HEAD_DIM = 256


def latent_shape(kv_lora_rank: int, rope_dim: int) -> Shape:
    """Latents as the fewest heads that pages can hold: [kv_lora_rank] as keys, [rope_dim] as values."""
    for num_heads in range(1, kv_lora_rank // 8 + 1):
        dims = kv_lora_rank // num_heads, rope_dim // num_heads
        is_whole = kv_lora_rank % num_heads == 0 and rope_dim % num_heads == 0
        if is_whole and max(dims) <= MAX_HEAD_DIM and not (dims[0] % 8 or dims[1] % 8):
            return Shape(num_heads, *dims)
    raise ArgumentError(
        f"latents of {kv_lora_rank} with {rope_dim} rotated have no shape that pages can hold: "
        f"equal heads of a multiple of 8, up to {MAX_HEAD_DIM}"
    )


def write_and_gather(pool: LayerPool, layer: int, k: Any, v: Any, seen: int) -> tuple[Any, Any]:
    """Store the new rows in the open step of a pool; returns those of all tokens, old and new.

    k, v : [batch, 1, columns, dim]; every sequence of the pool has `seen` tokens
    """
    heads = pool.shape.num_kv_heads
    new = [x.transpose(1, 2).reshape(-1, heads, x.shape[-1] // heads) for x in (k, v)]
    pool.step.write(layer, *new)
    batch, _, columns, _ = k.shape
    found = [rows.new_empty(batch, seen + columns, *rows.shape[1:]) for rows in new]
    pool.cache.gather(pool.seqs, layer, out=found)
    for rows, whole in zip(new, found, strict=True):
        whole[:, seen:] = rows.view(batch, columns, *rows.shape[1:])
    return found[0].flatten(2)[:, None], found[1].flatten(2)[:, None]


def is_unpadded(attention_mask: Any) -> bool:
    """Is every column a token?"""
    return attention_mask is None or bool(torch.as_tensor(attention_mask).bool().all())
