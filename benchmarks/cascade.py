"""What does it save to read shared pages once for all sequences that begin with them?

    python benchmarks/cascade.py [--json] [--toy]

Each row is one layer's attention of a step, bfloat16, 32 q heads / 8 kv heads / 128: with shared pages read
once, and read for each sequence (`plain`), in turns.  `of_bound`: over the larger of two times, measured in
the same run: all bytes read once at the ceiling of a plain read, and all products at the rate of numpy's
float32 matrix product.  Layers are walked in turn, so that none stays in a cache.
"""

import itertools
import statistics
import time

import ceiling
import numpy as np
from harness import Timer, arguments, progress, show

import paged_kv
from paged_kv import _binding
from paged_kv.machine import num_cpus

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
TOKEN_BYTES = 2 * NUM_KV_HEADS * HEAD_DIM * 2
LEAST_BYTES = 192 << 20
NONE, WHAT_PAYS = _binding.lib.PKV_SHARE_NONE, _binding.lib.PKV_SHARE_WHAT_PAYS

#: What, sequences, tokens that they share, tokens of their own, new tokens of each.
CASES = [
    ("decode", 32, 4096, 128, 1),
    ("decode", 8, 4096, 128, 1),
    ("decode", 2, 4096, 128, 1),
    ("decode, nothing shared", 8, 0, 4096, 1),
    ("prompts of 512", 8, 16384, 64, 512),
]
TOYS = [("decode", 4, 512, 64, 1), ("decode, nothing shared", 2, 0, 100, 1)]


def main() -> None:
    options = arguments(__doc__).parse_args()
    cases = TOYS if options.toy else CASES
    timer = Timer(0.5 if options.toy else options.budget, 3 * len(cases))
    limits = (read_bytes_per_us(timer, options.toy), products_per_us(timer, options.toy))
    rows = [measure(*case, timer, *limits) for case in progress(cases, "cascade")]
    show(rows, options.json)


def read_bytes_per_us(timer: Timer, is_toy: bool) -> float:
    memory = np.ones(8 << 20 if is_toy else 512 << 20, np.uint8)
    chunk = 1 << 20
    return 1e3 * ceiling.gb_per_s(timer, memory, chunk, np.arange(len(memory) // chunk), num_cpus())


def products_per_us(timer: Timer, is_toy: bool) -> float:
    size = 128 if is_toy else 1536
    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    return size**3 / timer.us(lambda: a @ a)["us"]


def filled(num_seqs: int, num_shared: int, num_own: int) -> tuple[paged_kv.PagedKVCache, list]:
    layer_bytes = (num_shared + num_seqs * num_own) * TOKEN_BYTES
    num_layers = max(2, min(16, LEAST_BYTES // layer_bytes))
    pages = (num_shared + num_seqs * (num_own + 512)) // 64 + 2 * num_seqs + 2
    cache = paged_kv.PagedKVCache(
        num_layers, NUM_KV_HEADS, HEAD_DIM, num_pages=pages, page_size=64, max_sequences=num_seqs + 1
    )
    base, rng = cache.sequence(), np.random.default_rng(0)
    for seqs, count in (([base], num_shared), (None, num_own)):
        seqs = seqs or base.fork(num_seqs)
        if count:
            tokens = rng.standard_normal((count * len(seqs), NUM_KV_HEADS, HEAD_DIM), np.float32)
            with cache.step(seqs, [count] * len(seqs)) as step:
                for layer in range(num_layers):
                    step.write(layer, tokens, tokens)
    return cache, seqs


def measure(
    what: str,
    num_seqs: int,
    num_shared: int,
    num_own: int,
    num_new: int,
    timer: Timer,
    bytes_per_us: float,
    products_us: float,
) -> dict[str, object]:
    cache, seqs = filled(num_seqs, num_shared, num_own)
    rng = np.random.default_rng(1)
    with cache:
        step = cache.step(seqs, [num_new] * num_seqs)
        q = rng.standard_normal((num_seqs * num_new, NUM_Q_HEADS, HEAD_DIM), np.float32)
        q = _bfloat16(q)
        k, out = q[:, :NUM_KV_HEADS].copy(), np.empty_like(q)
        times: dict[int, list[float]] = {NONE: [], WHAT_PAYS: []}
        layers = itertools.cycle(range(cache.num_layers))
        end = time.perf_counter() + timer.seconds_per_row * 3
        while time.perf_counter() < end or len(times[NONE]) < 2 * cache.num_layers:
            layer = next(layers)
            for may_share in times:
                step._plan.batch.may_share = may_share
                begin = time.perf_counter_ns()
                step.attend(layer, q, k, k, out=out)
                times[may_share].append((time.perf_counter_ns() - begin) / 1e3)
        step.rollback()
    us, plain = (statistics.median(times[may_share]) for may_share in (WHAT_PAYS, NONE))
    low, _, high = statistics.quantiles(times[WHAT_PAYS], n=4)
    once = (num_shared + num_seqs * (num_own + num_new)) * TOKEN_BYTES / bytes_per_us
    seen = num_shared + num_own + (num_new + 1) / 2
    products = 2 * num_seqs * num_new * NUM_Q_HEADS * HEAD_DIM * seen / products_us
    return {
        "what": what,
        "sequences": num_seqs,
        "shared": num_shared,
        "own": num_own,
        "us": round(us),
        "quartiles": f"{low:.0f} to {high:.0f}",
        "plain": round(plain),
        "faster": round(plain / us, 2),
        "bytes_once": round(once),
        "products": round(products),
        "of_bound": round(us / max(once, products), 2),
    }


def _bfloat16(array: np.ndarray) -> np.ndarray:
    import ml_dtypes

    return array.astype(ml_dtypes.bfloat16)


if __name__ == "__main__":
    main()
