"""A paged cache in a Hugging Face model: two lines, and `generate` attends over pages in place.

    cache = PagedCache.for_model(model, memory="1GiB", dtype="bfloat16")
    model.generate(**inputs, cache=cache)               past_key_values=cache before 5.24

transformers calls `cache.update(k, v, layer)` and then an attention function with what that returned.  Here
`update` stores nothing: it marks the keys, and the attention function, which finds the mark, opens a step at
the first layer of a forward pass, attends in place, and commits after the last one.  Padding is never stored.

A row of the batch is a sequence.  Beams, several returns and copies of a cache are forks; prompts begin with
what the cache has of them.

Imports latents.
"""

import operator
import weakref
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..errors import ArgumentError
from .latents import is_unpadded, latent_shape, write_and_gather
from .layer_pools import (
    LayerPool,
    Shape,
    commit_steps,
    free_rows,
    open_steps,
    pools_of,
    roll_back_steps,
    select_rows,
)

#: Of the attention function and of the mask function.
NAME = "paged_kv"
#: Kinds of layers whose attention is causal, over all tokens or over a window.
SUPPORTED_LAYERS = ("full_attention", "sliding_attention")


class _Length(int):
    """A length of keys that the mask function knows as ours: it is all of the cache that reaches it."""


class _Layer(CacheLayerMixin):
    """What transformers requires of a layer; the cache answers."""

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, cache: "PagedCache", index: int) -> None:
        super().__init__()
        # A reference to the cache would keep its memory until the next collection of cycles.
        self._weak_cache, self._index, self.is_initialized = weakref.ref(cache), index, True

    @property
    def _cache(self) -> "PagedCache":
        cache = self._weak_cache()
        assert cache is not None
        return cache

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        """There is nothing to allocate."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return self._cache._update(self._index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query_length, self._index)

    def get_seq_length(self) -> int:
        return self._cache.get_seq_length()

    def get_max_length(self) -> int:
        return -1


class PagedCache(Cache):
    """The keys and values of a model's batch, in pages; made by `for_model`.

    As transformers has it, the batch has columns: each forward pass adds as many as its inputs have, padding
    included.  Only tokens are stored.
    """

    def __init__(
        self,
        pools: list[LayerPool],
        places: list[tuple[int, int] | None],
        windows: list[int | None],
        salt: bytes = b"",
        has_latents: bool = False,
    ) -> None:
        self._pools, self._places, self._windows, self._salt = pools, places, windows, salt
        own = [layer for layer, place in enumerate(places) if place is not None]
        self._first_layer, self._last_layer = own[0], len(places) - 1
        #: Latent keys are gathered for the model: every column is stored, padding included.
        self._has_latents = has_latents
        #: Columns so far.
        self._seen = 0
        #: [batch, seen], False for padding; None: there was none.
        self._columns: NDArray[np.bool_] | None = None
        #: Tokens of each row; None: to be counted.
        self._lengths: list[int] | None = None
        #: Of the forward pass under way: which of its rows are tokens (None: all), its mask, its columns.
        self._open: tuple[Any, Any, int] | None = None
        #: Of the pass that comes next: ids, int64 [batch, columns], and positions, [batch or 1, columns].
        #: None: they are not known.
        self._ids: Any = None
        self._positions: Any = None
        super().__init__(layers=[_Layer(self, layer) for layer in range(len(places))])

    @classmethod
    def for_model(
        cls,
        model: Any,
        *,
        memory: int | str = "1GiB",
        dtype: Any = None,
        num_pages: int | None = None,
        max_sequences: int = 256,
        salt: bytes = b"",
        **options: Any,
    ) -> Self:
        """An empty cache for a model, which from then on attends with paged_kv where it is given one.

        Parameters
        ----------
        model : a PreTrainedModel whose attention is causal, over all tokens or over windows
        memory : bytes of all pages, or a text like "1GiB"
        dtype : of pages, as PagedKVCache takes it; None: the model's
        num_pages : of each shape of layers, instead of memory
        max_sequences : rows of a batch, those of copies of the cache included
        salt : prompts of caches with different salts share nothing
        options : as PagedKVCache: page_size, num_threads, ...; eviction wants max_step_tokens of a prompt

        Other caches of the model go to sdpa, as before.
        Raises: ArgumentError, which names the layer, for attention of another kind; MemoryError.
        """
        config = model.config.get_text_config(decoder=True)
        kinds, details = get_layer_types_and_kwargs(config)
        has_latents = getattr(config, "kv_lora_rank", None) is not None
        if has_latents and options.get("eviction") is not None:
            raise ArgumentError(
                "latent keys are read whole, whatever a sequence has dropped; leave eviction out"
            )
        shapes: list[Shape | None] = []
        windows: list[int | None] = []
        for layer, (kind, more) in enumerate(zip(kinds, details, strict=True)):
            if kind == "dummy":  # it reads the keys of another layer
                shapes.append(None)
                windows.append(None)
                continue
            if kind not in SUPPORTED_LAYERS or (has_latents and kind != "full_attention"):
                raise ArgumentError(
                    f"layer {layer} of {type(model).__name__} is {kind}"
                    f"{', with latent keys' if has_latents else ''}; a PagedCache takes "
                    f"{' and '.join(SUPPORTED_LAYERS)}, and full_attention alone where keys are latent"
                )
            if has_latents:
                shapes.append(latent_shape(config.kv_lora_rank, config.qk_rope_head_dim))
            else:
                shapes.append(_shape_of(config, layer))
            windows.append(more.get("sliding_window") or None)
        pools, places = pools_of(
            shapes,
            memory=memory,
            num_pages=num_pages,
            dtype=str(dtype or model.dtype).removeprefix("torch."),
            max_sequences=max_sequences,
            **options,
        )
        if model.config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)
        if not hasattr(model, "_paged_kv_hook"):
            model._paged_kv_hook = model.register_forward_pre_hook(_before_forward, with_kwargs=True)
        return cls(pools, places, windows, salt, has_latents)

    # ---- one forward pass

    def _update(self, layer: int, key: Any, value: Any) -> tuple[Any, Any]:
        """Mark keys for the attention function; or store latents, and return those of all tokens."""
        if not self._has_latents:
            key._paged_kv = (self, layer, key, value)
            return key, value
        if self._open is None or layer == self._first_layer:
            self._begin(key.shape[0], key.shape[2], None)
        place = self._places[layer]
        assert place is not None
        found = write_and_gather(self._pools[place[0]], place[1], key, value, self._seen)
        if layer == self._last_layer:
            self._end()
        return found

    def attend(
        self,
        layer: int,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        *,
        scaling: float | None,
        softcap: float | None,
        sinks: Any,
    ) -> Any:
        """query [batch, heads, columns, dim] to [batch, columns, heads, dim of values]; zeros for padding.

        key, value : None: those that the layer has stored, for a layer that reads another's
        """
        batch, _, num_columns, _ = query.shape
        if self._open is None or (key is not None and layer == self._first_layer):
            self._begin(batch, num_columns, attention_mask)
        assert self._open is not None
        place, rows = self._places[layer], self._open[0]
        assert place is not None
        step = self._pools[place[0]].step
        q, k, v = (None if x is None else _rows_of(x, rows) for x in (query, key, value))
        out = step.attend(
            place[1],
            *(q, k, v),
            sm_scale=scaling,
            logits_soft_cap=softcap or 0.0,
            sinks=sinks,
            window=self._windows[layer],
        )
        if rows is not None:
            whole = out.new_zeros(batch * num_columns, *out.shape[1:])
            whole[rows] = out
            out = whole
        return out.unsqueeze(1) if num_columns == 1 else out.view(batch, num_columns, *out.shape[1:])

    def _begin(self, batch: int, num_columns: int, attention_mask: Any) -> None:
        """Reserve what the pass adds, in all pools or in none."""
        if self._open is not None:
            self._abandon()  # of a pass that raised
        self._require_rows(batch)
        # In numpy, whose calls take a third of the time of torch's on arrays as small.
        mask = None if attention_mask is None else _numpy(attention_mask)[:, -num_columns:]
        mask = None if mask is None or mask.all() else mask != 0
        open_steps(self._pools, self._new_tokens(batch, mask, num_columns))
        rows = None if mask is None else torch.from_numpy(np.flatnonzero(mask))
        self._open = rows, mask, num_columns

    def _new_tokens(self, batch: int, mask: NDArray[np.bool_] | None, num_columns: int) -> list[Any]:
        """Ids of each row, where they are known; else how many.  Padding is none.

        Ids stand for keys that are rotated by their place in the row.  A pass that numbers its positions
        otherwise, as one with padding and without position_ids does, says how many.
        """
        ids, positions, self._ids, self._positions = self._ids, self._positions, None, None
        counts: list[Any] = [num_columns] * batch if mask is None else mask.sum(1).tolist()
        if ids is None or ids.shape != (batch, num_columns):
            return counts
        if num_columns == 1 and mask is None and positions is not None:  # a decode step, without numpy
            is_usual = positions.tolist() == [[length] for length in self._row_lengths()]
            return ids.tolist() if is_usual else counts
        if positions is None:
            numbers = np.arange(self._seen, self._seen + num_columns)[None]
        else:
            numbers = _numpy(positions)
        if numbers.ndim != 2 or numbers.shape[1] != num_columns or len(numbers) not in (1, batch):
            return counts
        before = np.array(self._row_lengths())[:, None]
        if mask is None:
            is_usual = (numbers == before + np.arange(num_columns)).all()
        else:
            is_usual = ((numbers == before + mask.cumsum(1) - 1) | ~mask).all()
        if not is_usual:
            return counts
        values = _numpy(ids)
        if mask is not None:
            return [values[row][mask[row]] for row in range(batch)]
        return list(values)

    def _row_lengths(self) -> list[int]:
        """Tokens of each row so far."""
        if self._lengths is None:
            self._lengths = list(map(len, self._pools[0].seqs))
        return self._lengths

    def _end(self) -> None:
        assert self._open is not None
        _, mask, num_columns = self._open
        commit_steps(self._pools)
        if self._lengths is not None:
            added = [num_columns] * len(self._lengths) if mask is None else mask.sum(1).tolist()
            self._lengths = list(map(operator.add, self._lengths, added))
        if mask is not None or self._columns is not None:
            batch = len(self._pools[0].seqs)
            before = self._columns if self._columns is not None else _all_true(batch, self._seen)
            new = mask if mask is not None else _all_true(batch, num_columns)
            self._columns = np.concatenate([before, new], 1)
        self._seen += num_columns
        self._open = None

    def _abandon(self) -> None:
        roll_back_steps(self._pools)
        self._open = None

    def _require_rows(self, batch: int) -> None:
        if not self._pools[0].seqs:
            self._begin_rows([None] * batch)
        held = len(self._pools[0].seqs)
        if held != batch:
            if batch % held:
                raise ArgumentError(
                    f"the cache holds {held} rows, the batch has {batch}; reset() begins anew"
                )
            self.batch_repeat_interleave(batch // held)  # the cache of a prompt, for several continuations

    def _begin_rows(self, prompts: list[Any]) -> None:
        """A sequence for each row in each pool; with a prompt's ids, it begins with what the pool has."""
        try:
            for pool in self._pools:
                for ids in prompts:
                    pool.seqs.append(pool.cache.sequence(ids, salt=self._salt))
        except BaseException:
            free_rows(self._pools)
            raise

    # ---- prefixes

    def start(self, input_ids: Any, attention_mask: Any = None) -> int:
        """Begin with what the pools have of some prompts; `generate` does it by itself on an empty cache.

        input_ids : int [batch, columns]
        attention_mask : [batch, columns]; 0 for padding, on the left

        Returns: how many columns need not be computed; at least one is left.  All rows then hold the tokens
        of these columns, so the row that matches least decides.
        Raises: ArgumentError unless the cache is empty.
        """
        if self._seen or self._pools[0].seqs:
            raise ArgumentError("the cache holds tokens already; reset() begins anew")
        batch, num_columns = input_ids.shape
        mask = _all_true(batch, num_columns) if attention_mask is None else _numpy(attention_mask) != 0
        if mask.shape != input_ids.shape or not mask[:, -1].all():
            raise ArgumentError(
                f"attention_mask is {list(mask.shape)} for ids {list(input_ids.shape)}; "
                "padding must be on the left"
            )
        counts = mask.sum(1)
        if not (mask == (np.arange(num_columns) >= num_columns - counts[:, None])).all():
            raise ArgumentError("attention_mask has padding between tokens; it must be on the left")
        padding = (num_columns - counts).tolist()
        self._begin_rows([input_ids[row, padding[row] :].tolist() for row in range(batch)])
        ends = [padding[row] + len(pool.seqs[row]) for pool in self._pools for row in range(batch)]
        start = min([num_columns - 1, *ends])
        for pool in self._pools:
            for row, seq in enumerate(pool.seqs):
                seq.truncate(max(0, min(len(seq), start - padding[row])))
        self._seen = int(start)
        self._lengths = None
        if not mask[:, :start].all():
            self._columns = mask[:, :start].copy()
        return self._seen

    # ---- what transformers does to a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns, padding included."""
        return self._seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        length = self._seen + query_length
        return length if self._has_latents else _Length(length), 0

    def reorder_cache(self, beam_idx: Any) -> None:
        """Beams that go on from others' tokens: forks."""
        indices = beam_idx.tolist()
        if indices != list(range(len(self._pools[0].seqs))) and self._seen:
            self._select(indices)

    def batch_select_indices(self, indices: Any) -> None:
        self._select(torch.arange(len(self._pools[0].seqs))[indices].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._seen:
            self._select([row for row in range(len(self._pools[0].seqs)) for _ in range(repeats)])

    def _select(self, indices: list[int]) -> None:
        select_rows(self._pools, indices)
        if self._columns is not None:
            self._columns = self._columns[indices]
        if self._lengths is not None:
            self._lengths = [self._lengths[index] for index in indices]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget columns at the end.

        tokens_to_remove : 0 or below: so many; above, as before 5.23: the columns that stay
        """
        if tokens_to_remove > 0:
            tokens_to_remove = min(tokens_to_remove - self._seen, 0)
        if not tokens_to_remove:
            return
        gone = [-tokens_to_remove] * len(self._pools[0].seqs)
        if self._columns is not None:
            gone = self._columns[:, tokens_to_remove:].sum(1).tolist()
            self._columns = self._columns[:, :tokens_to_remove]
        self._lengths = None
        for pool in self._pools:
            for seq, count in zip(pool.seqs, gone, strict=True):
                seq.truncate(len(seq) - count)
        self._seen += tokens_to_remove

    def reset(self) -> None:
        """Forget all tokens; prompts that come later still begin with what the pools have of them."""
        self._abandon()
        self._seen, self._columns, self._lengths, self._ids, self._positions = 0, None, None, None, None
        free_rows(self._pools)

    def __deepcopy__(self, memo: Any) -> "PagedCache":
        """The same tokens over the same pools: forks, of which no token is copied."""
        pools = [LayerPool(pool.cache, pool.shape) for pool in self._pools]
        twin = type(self)(pools, self._places, self._windows, self._salt, self._has_latents)
        twin._seen, twin._columns, twin._lengths = self._seen, self._columns, self._lengths
        try:
            for pool, own in zip(pools, self._pools, strict=True):
                for seq in own.seqs:
                    pool.seqs.append(seq.fork())
        except BaseException:
            free_rows(pools)
            raise
        return twin

    def stats(self) -> list[Any]:
        """CacheStats of each pool."""
        return [pool.cache.stats() for pool in self._pools]


# ---- what transformers calls


def _before_forward(model: Any, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Note the ids of a pass; on an empty cache, leave out what the pools have of the prompts.

    Columns are left out only where the last logits alone are wanted, as `generate` says.
    """
    cache = named.get("cache", named.get("past_key_values"))
    ids = named.get("input_ids", arguments[0] if arguments else None)
    if not isinstance(cache, PagedCache):
        return None
    if ids is None or named.get("inputs_embeds") is not None:
        cache._ids = cache._positions = None
        return None
    ids, mask, start = ids.detach(), named.get("attention_mask"), 0
    is_prompt = not cache._seen and not cache._pools[0].seqs and ids.shape[1] > 1 and not arguments
    is_whole = mask is None or (mask.dim() == 2 and mask.shape == ids.shape and bool(mask[:, -1].all()))
    if cache._has_latents and not is_unpadded(mask):
        is_prompt = False
    if is_prompt and is_whole and type(named.get("logits_to_keep")) is int and named["logits_to_keep"] == 1:
        try:
            start = cache.start(ids, mask)
        except ArgumentError:  # padding that is not on the left
            start = 0
    cache._ids = ids[:, start:]
    cache._positions = named.get("position_ids")
    if not start:
        return None
    cache._positions = None if cache._positions is None else cache._positions[..., start:]
    named = dict(named, input_ids=ids[:, start:])
    for name in ("position_ids", "cache_position", "token_type_ids"):
        if isinstance(named.get(name), torch.Tensor):
            named[name] = named[name][..., start:]
    return arguments, named


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
    **kwargs: Any,
) -> tuple[Any, None]:
    """transformers' attention function; keys of other caches go to sdpa."""
    mark = getattr(key, "_paged_kv", None)
    if mark is None:
        if softcap is not None or s_aux is not None:
            raise ArgumentError("attention with a soft cap or sinks needs a PagedCache; sdpa knows neither")
        found: tuple[Any, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return found
    cache, layer, key, value = mark
    own = getattr(module, "layer_idx", layer)
    if own != layer:  # this layer reads the keys of another
        key = value = None
    out = cache.attend(
        layer, query, key, value, attention_mask, scaling=scaling, softcap=softcap, sinks=s_aux
    )
    if own == cache._last_layer:
        cache._end()
    return out, None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Any = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Any:
    """transformers' mask function: the padding as it is, where the length is ours."""
    if not isinstance(kv_length, _Length):
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            use_vmap=use_vmap,
            **kwargs,
        )
    if use_vmap or (local_size is None and mask_function is not causal_mask_function):
        raise ArgumentError("a PagedCache takes masks that are causal, or a window; this one is neither")
    return attention_mask


def _shape_of(config: Any, layer: int) -> Shape:
    own = config.per_layer_config[layer] if hasattr(config, "per_layer_config") else config
    num_heads = own.num_attention_heads
    head_dim = getattr(own, "head_dim", None) or own.hidden_size // num_heads
    return Shape(getattr(own, "num_key_value_heads", None) or num_heads, head_dim)


def _rows_of(x: Any, rows: Any) -> Any:
    """[batch, heads, columns, dim] to [tokens, heads, dim]; a view wherever there is one."""
    x = x.squeeze(2) if x.shape[2] == 1 else x.transpose(1, 2).flatten(0, 1)
    return x if rows is None else x[rows]


def _numpy(tensor: Any) -> NDArray[Any]:
    """A tensor's values, in place where numpy has its dtype."""
    array: NDArray[Any] = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


def _all_true(batch: int, num_columns: int) -> NDArray[np.bool_]:
    return np.ones((batch, num_columns), np.bool_)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
