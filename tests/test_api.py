"""The public names and their parameters in order, as design and documents say."""

import inspect

import numpy as np
import pytest
from conftest import make_cache, rows

import paged_kv

SCORES = ["sm_scale", "logits_soft_cap", "sinks", "alibi_slopes"]
ATTEND = [*SCORES, "out", "return_lse"]

#: Positional parameters, then those that are named.
SIGNATURES = {
    paged_kv.PagedKVCache: (
        ["num_layers", "num_kv_heads", "head_dim"],
        [
            *("head_dim_v", "dtype", "num_pages", "memory", "page_size", "max_sequences", "max_seq_len"),
            *(
                "max_step_tokens",
                "window",
                "num_sink_tokens",
                "window_slack",
                "recent_tokens",
                "open_dtype",
                "precision_policy",
                "eviction",
                "budget_tokens",
                "prefix_caching",
                "fingerprint",
            ),
            *("keep_policy", "retention_half_life", "pin_budget", "clock", "num_threads"),
        ],
    ),
    paged_kv.PagedKVCache.sequence: (["tokens"], ["salt", "priority", "budget_tokens"]),
    paged_kv.PagedKVCache.select: (["seqs", "indices"], []),
    paged_kv.PagedKVCache.match: (["tokens", "salt"], ["also"]),
    paged_kv.PagedKVCache.reset_prefix_cache: ([], []),
    paged_kv.PagedKVCache.events: (["since"], []),
    paged_kv.PagedKVCache.pin: (["match", "ttl"], []),
    paged_kv.PagedKVCache.record: (["path"], ["every"]),
    paged_kv.PagedKVCache.step: (["seqs", "new"], []),
    paged_kv.PagedKVCache.pages_needed: (["seqs", "new"], []),
    paged_kv.PagedKVCache.stats: ([], []),
    paged_kv.PagedKVCache.trim: ([], ["cached"]),
    paged_kv.PagedKVCache.check: ([], []),
    paged_kv.PagedKVCache.close: ([], []),
    paged_kv.Sequence.retain: ([], ["priority", "ttl"]),
    paged_kv.Sequence.truncate: (["length"], []),
    paged_kv.Sequence.reset: ([], []),
    paged_kv.Sequence.free: ([], []),
    paged_kv.Sequence.gather: (["layer"], []),
    paged_kv.Step.attend: (
        ["layer", "q", "k", "v"],
        [
            *SCORES,
            *("window", "num_sink_tokens", "out", "return_lse", "return_mass"),
            *("top_pages", "skip_values_below"),
        ],
    ),
    paged_kv.Step.write: (["layer", "k", "v"], []),
    paged_kv.PagedKVCache.gather: (["seqs", "layer"], ["dtype", "out"]),
    paged_kv.Step.commit: (["counts"], []),
    paged_kv.Step.rollback: ([], []),
    paged_kv.paged_attention: (
        ["q", "k_pages", "v_pages"],
        [
            *("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len", "k", "v", "slots"),
            *("k_scales", "v_scales", "window", "num_sink_tokens", "causal", *ATTEND, "num_threads"),
        ],
    ),
    paged_kv.PagedBatch: (
        [],
        [
            *("num_pages", "page_size", "qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len", "slots"),
            *("causal", "num_tokens", "num_threads"),
        ],
    ),
    paged_kv.PagedBatch.attend: (
        ["q", "k_pages", "v_pages", "k", "v"],
        ["k_scales", "v_scales", "window", "num_sink_tokens", *ATTEND],
    ),
    paged_kv.merge_states: (["outputs", "lses"], []),
    paged_kv.reference.attend: (
        ["q", "k", "v", "positions"],
        [
            *("window", "num_sink_tokens", "causal", "sm_scale", "logits_soft_cap", "sinks"),
            *("alibi_slopes", "return_lse", "return_probabilities"),
        ],
    ),
    paged_kv.reference.quantise_int8: (["x"], []),
    paged_kv.reference.quantise_int4: (["x"], []),
    paged_kv.kernels: ([], []),
    paged_kv.use_threads: (["which"], []),
    paged_kv.threads_in_use: ([], []),
    paged_kv.KVCacheManager.allocate: (["max_seq_len", "batch_size", "hidden_dim", "num_heads"], []),
    paged_kv.KVCacheManager.append: (["K", "V", "seq_pos", "batch_idx"], []),
    paged_kv.KVCacheManager.get_cache: (["batch_idx"], []),
    paged_kv.KVCacheManager.get_segments: (["batch_idx"], []),
    paged_kv.KVCacheManager.reset: (["batch_idx"], []),
    paged_kv.KVCacheManager.state: (["batch_idx"], []),
    paged_kv.KVCacheManager.metrics: ([], []),
}


@pytest.mark.parametrize("call", SIGNATURES, ids=lambda call: call.__qualname__)
def test_a_call_has_the_parameters_that_the_documents_give_it(call):
    parameters = [p for p in inspect.signature(call).parameters.values() if p.name != "self"]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert (positional, named) == SIGNATURES[call]
    assert call.__doc__


ATTRIBUTES = {
    "Sequence": ["held_positions", "fork"],
    "Step": ["positions", "qo_indptr", "seq_lens", "slot_mapping", "block_table", "first_page"],
    "PagedKVCache": ["page_size"],
    "KVCacheManager": ["storage"],
    "Kernels": ["active", "available"],
    "CacheState": ["seq_len", "ring_pos", "full_count"],
}


@pytest.mark.parametrize("owner", ATTRIBUTES)
def test_an_attribute_is_there_and_documented(owner):
    for name in ATTRIBUTES[owner]:
        where = getattr(paged_kv, owner)
        assert name in dir(where) or name in getattr(where, "__dataclass_fields__", ())


ERRORS = [
    *("OutOfPages", "OutOfSequences", "SequenceTooLong", "SequenceBusy", "ArgumentError", "StaleSequence"),
    *("StepClosed", "LayerNotWritten", "CacheClosed", "InvariantViolation", "RequestCancelled"),
]


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_has_its_type(name):
    error = getattr(paged_kv, name)
    assert issubclass(error, paged_kv.PagedKVError) and error.__doc__
    assert issubclass(error, ValueError) == (name == "ArgumentError")


def test_the_types_and_dtypes_of_what_a_step_tells(rng):
    cache = make_cache(num_layers=1)
    a, b = cache.sequence(), cache.sequence()
    with cache.step([a, b], [[1, 2, 3], 2]) as step:
        step.write(0, rows(rng, 5, 2, 32), rows(rng, 5, 2, 32))
        shapes = {"positions": 5, "qo_indptr": 3, "seq_lens": 2, "slot_mapping": 5, "first_page": 2}
        for name, size in shapes.items():
            array = getattr(step, name)
            assert array.dtype == (np.int64 if name == "slot_mapping" else np.int32)
            assert array.shape == (size,)
        assert step.block_table.dtype == np.int32 and step.block_table.shape == (2, 1)
    assert a.held_positions.dtype == np.int32 and len(a) == 3
    assert [part.dtype for part in a.gather(0)] == [np.float32] * 2
    fork, forks = a.fork(), a.fork(2)
    assert isinstance(fork, paged_kv.Sequence) and [type(f) for f in forks] == [paged_kv.Sequence] * 2
    stats = cache.stats()
    assert stats.num_pages == stats.num_used_pages + stats.num_kept_pages + stats.num_free_pages
