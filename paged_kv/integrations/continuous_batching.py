"""transformers' continuous batching, with attention that reads its pages in place.

    with install(model):
        model.generate_batch(prompts, ...)

    python -m paged_kv.integrations.continuous_batching serve MODEL --continuous-batching

The second is transformers' own command, whose models attend so.

As it comes, each layer of `generate_batch` gathers the keys and values of all requests into one dense array,
and multiplies them under a dense mask.  Here a layer over all tokens writes its new rows into transformers'
own pages and attends to them there, without gathering and without a mask.  Layers with a window, whose pages
are rings by token, are gathered as before (at most a window), and each request attends to its own rows.

What this takes hold of is internal to transformers (`PagedAttentionCache`, its allocators).  Where a version
has moved it, `install` says so once, and all layers are gathered: then the attention alone is ours.

Imports attention.foreign.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from ..attention.foreign import PagedBatch, paged_attention
from ..errors import ArgumentError

#: transformers builds no dense mask for names with "flash" in them.
NAME = "paged_kv_flash"
#: What transformers' allocators of layers over all tokens must have.
ALLOCATOR_PARTS = ("get_cache_for_block_table", "get_write_indices", "get_read_indices")


class _InPlace(NamedTuple):
    """Where a layer's keys are: it is on its new keys, which layers that read another's get of it."""

    batch: PagedBatch
    layer: int
    k_pages: Any
    v_pages: Any


class _Gathered(NamedTuple):
    """Keys and values of all requests [1, heads, tokens, dim], and where each request's begin."""

    key: Any
    value: Any
    first_tokens: Any


class InPlaceCache(PagedAttentionCache):
    """transformers' pages; layers over all tokens of a model that `install` has taken are not read out."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        self._is_ours = config._attn_implementation == NAME
        #: Of the step: each request, its tokens before and its new ones; and its lists, by allocator.
        self._requests: list[tuple[str, int, int]] = []
        self._batches: dict[int, PagedBatch] = {}
        #: Keys and values of each layer, in pages, as many for all layers of an allocator.
        self._pages: dict[int, tuple[Any, Any]] = {}
        super().__init__(config, *args, **kwargs)

    def extend_read_and_write_indices(
        self,
        request_id: str,
        past_length: int,
        query_length: int,
        read_index: list[list[int]] | None,
        write_index: list[list[int]],
    ) -> None:
        """As the base class, but that layers which are read in place have no list of reads."""
        if not self._is_ours:
            super().extend_read_and_write_indices(
                request_id, past_length, query_length, read_index, write_index
            )
            return
        if not write_index[0]:  # a step's first request
            self._requests, self._batches = [], {}
        self._requests.append((request_id, past_length, query_length))
        for i, allocator in enumerate(self.cache_allocators.values()):
            write_index[i].extend(allocator.get_write_indices(request_id, past_length, query_length))
            if read_index is not None and not _is_in_place(allocator):
                read_index[i].extend(allocator.get_read_indices(request_id, past_length, query_length))

    def update(
        self, key_states: Any, value_states: Any, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Hand pages and lists on to the attention function, which writes the new rows."""
        allocator = self.layer_to_allocator[layer_idx]
        if not self._is_ours or not _is_in_place(allocator) or kwargs.get("block_table") is not None:
            found: tuple[Any, Any] = super().update(key_states, value_states, layer_idx, kwargs)
            key_states._paged_kv = found[0]._paged_kv = _Gathered(*found, kwargs["cu_seq_lens_k"])
            return found
        batch = self._batches.get(allocator.index) or self._batch_of(allocator)
        key_states._paged_kv = _InPlace(batch, layer_idx, *self._pages[layer_idx])
        return key_states, value_states

    def _batch_of(self, allocator: Any) -> PagedBatch:
        """The step's lists over an allocator's pages, for all of its layers."""
        layers = allocator.layer_indices
        if layers[0] not in self._pages:
            sides = [allocator.get_cache_for_block_table(layer) for layer in layers]
            num_pages = min(len(side) for pair in sides for side in pair)
            for layer, (k, v) in zip(layers, sides, strict=True):
                self._pages[layer] = k[:num_pages], v[:num_pages]
        size = allocator.tokens_per_page
        pages: list[int] = []
        rows, counts, last = [0], [0], []
        for request_id, past_length, query_length in self._requests:
            length = past_length + query_length
            count = -(-length // size)
            pages += allocator.block_table[request_id][:count]
            rows.append(rows[-1] + query_length)
            counts.append(counts[-1] + count)
            last.append(length - (count - 1) * size)
        stride = allocator.block_physical_stride // size
        batch = self._batches[allocator.index] = PagedBatch(
            num_pages=len(self._pages[layers[0]][0]),
            page_size=size,
            qo_indptr=np.array(rows),
            kv_indptr=np.array(counts),
            kv_indices=np.array(pages) * stride,
            kv_last_page_len=np.array(last),
        )
        return batch


def _is_in_place(allocator: Any) -> bool:
    return bool(allocator.layer_type == "full_attention")


def _attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """query [1, heads, tokens, dim] of all requests; keys in pages, or gathered, request by request."""
    q = query[0].transpose(0, 1)
    options = {"sm_scale": scaling, "logits_soft_cap": softcap or 0.0, "sinks": s_aux}
    mark, cache = getattr(key, "_paged_kv", None), kwargs.get("cache")
    if mark is None and isinstance(cache, PagedAttentionCache):  # before 5.24 attention updates the cache
        key, value = cache.update(key, value, module.layer_idx, kwargs)
        mark = getattr(key, "_paged_kv", None)
    if isinstance(mark, _InPlace):
        is_own = getattr(module, "layer_idx", mark.layer) == mark.layer  # else its rows are written
        new = (key[0].transpose(0, 1), value[0].transpose(0, 1)) if is_own else ()
        return mark.batch.attend(q, mark.k_pages, mark.v_pages, *new, **options)[None], None
    if mark is None:
        mark = _Gathered(key, value, kwargs.get("cu_seq_lens_k"))
    if "cu_seq_lens_q" not in kwargs or mark.first_tokens is None:
        raise ArgumentError(
            "the model is installed for generate_batch; leave `with install(model)` for others"
        )
    out = torch.empty_like(q)
    k, v = mark.key[0].transpose(0, 1), mark.value[0].transpose(0, 1)
    rows, tokens = kwargs["cu_seq_lens_q"].tolist(), mark.first_tokens.tolist()
    for i in range(len(rows) - 1):
        if rows[i] == rows[i + 1]:
            continue
        own, held = slice(rows[i], rows[i + 1]), slice(tokens[i], tokens[i + 1])
        out[own] = paged_attention(  # one page of as many tokens as the request has
            q[own],
            k[None, held],
            v[None, held],
            qo_indptr=[0, rows[i + 1] - rows[i]],
            kv_indptr=[0, 1],
            kv_indices=[0],
            kv_last_page_len=[tokens[i + 1] - tokens[i]],
            window=sliding_window,
            **options,
        )
    return out[None], None


def install(model: Any = None) -> AbstractContextManager[None]:
    """Let `model.generate_batch`, and managers that are made meanwhile, attend with paged_kv.

    model : None: every model whose continuous batching begins from now on

    It holds from the call on; as a context manager, until the end of the block.
    """
    if model is None:
        return _install_in_all()
    before = model.config._attn_implementation
    # `set_attn_implementation` would look for a package of a name with "flash" in it.
    model.config._attn_implementation = NAME
    if _has_parts():
        continuous_api.PagedAttentionCache = InPlaceCache
    return _until_the_end(model, before)


def _install_in_all() -> AbstractContextManager[None]:
    begin = continuous_api.ContinuousMixin.init_continuous_batching

    @functools.wraps(begin)
    def begin_in_place(model: Any, *args: Any, **kwargs: Any) -> Any:
        install(model)
        return begin(model, *args, **kwargs)

    continuous_api.ContinuousMixin.init_continuous_batching = begin_in_place
    return _until_restored(begin)


@contextmanager
def _until_restored(begin: Any) -> Iterator[None]:
    try:
        yield
    finally:
        continuous_api.ContinuousMixin.init_continuous_batching = begin


@contextmanager
def _until_the_end(model: Any, before: str) -> Iterator[None]:
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _has_parts() -> bool:
    """Whether this version of transformers has what InPlaceCache takes hold of; a warning where not."""
    try:
        from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator

        parts = [
            hasattr(continuous_api, "PagedAttentionCache"),
            *(hasattr(PagedAttentionCache, name) for name in ("extend_read_and_write_indices", "update")),
            *(hasattr(FullAttentionCacheAllocator, name) for name in ALLOCATOR_PARTS),
        ]
    except ImportError:
        parts = [False]
    if not all(parts):
        warnings.warn(
            "this version of transformers keeps its pages in another way: generate_batch gathers keys and "
            "values, as it does by itself, and only its attention is paged_kv's",
            stacklevel=3,
        )
    return all(parts)


AttentionInterface.register(NAME, _attention)


if __name__ == "__main__":
    from transformers.cli.transformers import main

    # The module that transformers imports by this name is another one than __main__.
    from paged_kv.integrations import continuous_batching

    continuous_batching.install()
    main()
