"""What does append + attend cost for one new token of each sequence, with each kernel and dtype?

    python benchmarks/decode.py [--shape 32/8/128] [--batch 8] [--context 2048] [--json]

Rows: kernel, dtype, threads, time, the bytes of keys and values read for it a second, and the share of the
ceiling: a plain read of as much memory with as many threads, by numpy's bitwise or, in the same run.
"""

import threading

import numpy as np
from measure import arguments, show, time_us

import paged_kv
from paged_kv import _binding
from paged_kv.layout import DTYPES
from paged_kv.machine import num_cpus


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", default="32/8/128", help="q heads / kv heads / head_dim")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8, help="walked in turn, so that none stays in a cache")
    options = parser.parse_args()
    rows = []
    active = paged_kv.kernels().active
    for num_threads in sorted({1, num_cpus()}):
        for dtype in DTYPES:
            ceiling = read_ceiling(num_threads, pool_bytes(options, dtype), options.repeats)
            for kernel in paged_kv.kernels().available:
                _binding.select_kernel(kernel)
                rows.append(measure(options, kernel, dtype, num_threads, ceiling))
    _binding.select_kernel(active)
    show(rows, options.json)


def pool_bytes(options, dtype: str) -> int:
    _, num_kv_heads, head_dim = map(int, options.shape.split("/"))
    token_bytes = 2 * num_kv_heads * head_dim * DTYPES[dtype]
    return options.layers * options.batch * options.context * token_bytes


def measure(options, kernel: str, dtype: str, num_threads: int, ceiling: float) -> dict[str, object]:
    num_q_heads, num_kv_heads, head_dim = map(int, options.shape.split("/"))
    rng = np.random.default_rng(0)
    num_pages = options.batch * (options.context // 64 + 1)
    with paged_kv.PagedKVCache(
        options.layers, num_kv_heads, head_dim, dtype=dtype, num_pages=num_pages, num_threads=num_threads
    ) as cache:
        seqs = [cache.sequence() for _ in range(options.batch)]
        num_old = options.context - 1
        with cache.step(seqs, [num_old] * options.batch) as step:
            k = rng.standard_normal((num_old * options.batch, num_kv_heads, head_dim), np.float32)
            for layer in range(options.layers):
                step.write(layer, k, k)
        q = rng.standard_normal((options.batch, num_q_heads, head_dim), np.float32)
        k, out = q[:, :num_kv_heads].copy(), np.empty_like(q)
        step = cache.step(seqs, [1] * options.batch)
        layers = [*range(options.layers)] * (options.repeats + 1)
        timed = time_us(lambda: step.attend(layers.pop(), q, k, k, out=out), options.repeats)
        step.rollback()
    gb_per_s = pool_bytes(options, dtype) / options.layers / timed["us"] / 1e3
    return {
        "kernel": kernel,
        "dtype": dtype,
        "threads": num_threads,
        **timed,
        "gb_per_s": round(gb_per_s, 1),
        "of_ceiling": round(gb_per_s / ceiling, 2),
    }


def read_ceiling(num_threads: int, num_bytes: int, repeats: int) -> float:
    """GB/s of a plain read, each thread its own part."""
    parts = np.array_split(np.ones(max(num_bytes, 2**20) // 8, np.int64), num_threads)

    def read() -> None:
        threads = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return sum(part.nbytes for part in parts) / time_us(read, min(repeats, 10))["us"] / 1e3


if __name__ == "__main__":
    main()
