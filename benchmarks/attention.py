"""How near to the machine's limit is attention, and how does it compare?

    python benchmarks/attention.py [--json] [--toy]

Decode (one new token a sequence) is bound by memory: rows give its GB/s of keys and values, appends included,
as a share of a read-only walk of the same pages in the same order, and of a plain read of as much contiguous
memory, all by as many threads in the same run. Layers are walked in turn, so that none stays in a cache.
Prefill is bound by arithmetic: rows give GFLOP/s.
torch's scaled_dot_product_attention is measured on contiguous copies where torch is installed.

Shapes are q heads / kv heads / head_dim.
"""

import importlib.util
import itertools

import ceiling
import numpy as np
from harness import Timer, arguments, progress, show

import paged_kv
from paged_kv import _binding
from paged_kv.machine import num_cpus
from paged_kv.pages.layout import DTYPES


def filled_cache(shape, dtype, layers, batch, context, num_threads, seed=0):
    """A cache of `batch` sequences with context - 1 tokens each, their pages in random order."""
    rng = np.random.default_rng(seed)
    _, num_kv_heads, head_dim = shape
    pages_each = context // 64 + 1
    cache = paged_kv.PagedKVCache(
        layers, num_kv_heads, head_dim, dtype=dtype, num_pages=batch * pages_each, num_threads=num_threads
    )
    # Sequences that grow in turns, a page at a time and in random order, get scattered pages.
    seqs = [cache.sequence() for _ in range(batch)]
    block = rng.standard_normal((64, num_kv_heads, head_dim), np.float32)
    turns = rng.permutation(np.repeat(np.arange(batch), (context - 1) // 64))
    for i in [*turns, *range(batch)]:
        count = 64 if len(seqs[i]) + 64 < context else context - 1 - len(seqs[i])
        if count:
            with cache.step([seqs[i]], [count]) as step:
                for layer in range(layers):
                    step.write(layer, block[:count], block[:count])
    return cache, seqs


def decode(shape, dtype, batch, context, num_threads, timer, options) -> list[dict[str, object]]:
    num_q_heads, num_kv_heads, head_dim = shape
    case = ("decode", shape, dtype, batch, context, num_threads)
    token_bytes = 2 * num_kv_heads * head_dim * DTYPES[dtype]
    layer_bytes = batch * context * token_bytes
    layers = 1 if options.toy else max(2, min(64, 2**30 // layer_bytes))
    cache, seqs = filled_cache(shape, dtype, layers, batch, context, num_threads)
    rng = np.random.default_rng(1)
    q = rng.standard_normal((batch, num_q_heads, head_dim), np.float32)
    k, out = q[:, :num_kv_heads].copy(), np.empty_like(q)
    rows, turn = [], itertools.cycle(range(layers))
    with cache:
        step = cache.step(seqs, [1] * batch)
        page_share_bytes = cache._store.layout.page_share_bytes
        ids = step.block_table[step.block_table >= 0]
        order = np.concatenate([layer * cache.stats().num_pages + ids for layer in range(layers)])
        memory = cache._store.pool.data()
        walk = ceiling.gb_per_s(timer, memory, page_share_bytes, order, num_threads)
        plain = ceiling.gb_per_s(timer, memory, 2**16, np.arange(len(memory) // 2**16), num_threads)
        for kernel in paged_kv.kernels().available if options.kernels else [paged_kv.kernels().active]:
            before = paged_kv.kernels().active
            _binding.select_kernel(kernel)
            timed = timer.us(lambda: step.attend(next(turn), q, k, k, out=out))
            _binding.select_kernel(before)
            gb = layer_bytes / timed["us"] / 1e3
            rows.append(row(case, kernel, timed, gb, walk, plain))
        step.rollback()
    if importlib.util.find_spec("torch"):
        timed = sdpa(shape, dtype, layers, batch, context, 1, num_threads, timer)
        gb = layer_bytes / timed["us"] / 1e3
        rows.append(row(case, "torch", timed, gb, walk, plain))
    return rows


def row(case, kernel, timed, gb=0.0, walk=0.0, plain=0.0) -> dict[str, object]:
    work, shape, dtype, batch, context, threads = case
    return {
        "work": work,
        "shape": "/".join(map(str, shape)),
        "dtype": dtype,
        "batch": f"{batch}x{context}",
        "threads": threads,
        "kernel": kernel,
        **timed,
        "gb_per_s": round(gb, 1) if gb else 0.0,
        "of_walk": round(gb / walk, 2) if walk else 0.0,
        "of_read": round(gb / plain, 2) if plain else 0.0,
        "gflop_per_s": 0.0,
    }


def prefill(shape, dtype, context, num_threads, timer, options) -> list[dict[str, object]]:
    num_q_heads, num_kv_heads, head_dim = shape
    rng = np.random.default_rng(0)
    q = rng.standard_normal((context, num_q_heads, head_dim), np.float32)
    k, out = q[:, :num_kv_heads].copy(), np.empty_like(q)
    case = ("prefill", shape, dtype, 1, context, num_threads)
    flop = 4 * num_q_heads * head_dim * context * (context + 1) / 2
    rows = []
    with paged_kv.PagedKVCache(
        1, num_kv_heads, head_dim, dtype=dtype, num_pages=context // 64 + 1, num_threads=num_threads
    ) as cache:
        step = cache.step([cache.sequence()], [context])
        timed = timer.us(lambda: step.attend(0, q, k, k, out=out))
        kernel = paged_kv.kernels().active
        rows.append(row(case, kernel, timed))
        step.rollback()
    if importlib.util.find_spec("torch"):
        timed = sdpa(shape, dtype, 1, 1, context, context, num_threads, timer)
        rows.append(row(case, "torch", timed))
    for each in rows:
        each["gflop_per_s"] = round(flop / each["us"] / 1e3, 1)
    return rows


def sdpa(shape, dtype, layers, batch, context, num_new, num_threads, timer) -> dict[str, float]:
    """torch's attention over contiguous [batch, heads, context, head_dim], nothing appended."""
    import torch

    num_q_heads, num_kv_heads, head_dim = shape
    torch.set_num_threads(num_threads)
    kind = getattr(torch, dtype)
    k = [torch.randn(batch, num_kv_heads, context, head_dim).to(kind) for _ in range(layers)]
    q = torch.randn(batch, num_q_heads, num_new, head_dim).to(kind)
    attend = torch.nn.functional.scaled_dot_product_attention
    is_causal, turn = num_new > 1, itertools.cycle(k)
    if not is_causal:
        # A group's q heads as rows of its kv head: ten times faster than enable_gqa for one new token.
        q = q.view(batch, num_kv_heads, num_q_heads // num_kv_heads, head_dim)

    def call() -> None:
        keys = next(turn)
        attend(q, keys, keys, is_causal=is_causal, enable_gqa=q.shape[1] != num_kv_heads)

    with torch.no_grad():
        return timer.us(call)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--kernels", action="store_true", help="decode with each kernel of this machine")
    options = parser.parse_args()
    shapes = [(4, 2, 32)] if options.toy else [(32, 8, 128), (32, 32, 128)]
    dtypes = ["bfloat16"] if options.toy else list(DTYPES)
    batch, context, new = (2, 100, 100) if options.toy else (8, 2048, 2048)
    threads = sorted({1, num_cpus()})
    cases = [(shape, dtype, n) for shape in shapes for dtype in dtypes for n in threads]
    timer = Timer(0.2 if options.toy else options.budget, 5 * len(cases), most=40)
    rows = []
    for shape, dtype, num_threads in progress(cases, "attention"):
        rows += decode(shape, dtype, batch, context, num_threads, timer, options)
        if shape == shapes[0] and num_threads == threads[-1]:
            rows += prefill(shape, dtype, new, num_threads, timer, options)
    show(rows, options.json)


if __name__ == "__main__":
    main()
