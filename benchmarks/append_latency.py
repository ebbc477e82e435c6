"""What does one token's keys and values cost to store?

    python benchmarks/append_latency.py [--json] [--toy] [--plot FILE]

ns a token and head (K and V of 128), from Python (step.write: one call for the batch) and from C (one call
for many tokens), warm (the same slots again) and streaming (through a pool larger than the caches); against
numpy's fancy indexing into a preallocated array, against np.concatenate, and against the bytes that a plain
write moves in that time: of_write, its share of the write ceiling.

Rows at position 1, 2, ... 32,768 of one sequence: an append costs the same wherever it is. Their last over
first is `over_first`.
"""

import functools

import ceiling
import numpy as np
from harness import Timer, arguments, progress, show

import paged_kv
from paged_kv._binding import ffi, lib
from paged_kv.attention.arrays import array_of, fill_tensor
from paged_kv.extras import require
from paged_kv.pages.layout import DTYPES

HEADS, HEAD_DIM = 8, 128
POSITIONS = [2**i for i in range(16)]


def random_rows(num_tokens: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((num_tokens, HEADS, HEAD_DIM), np.float32)


def row(what: str, dtype: str, batch: int, position: int, us: float, write_ceiling: float = 0.0) -> dict:
    num_heads = batch * HEADS
    num_bytes = num_heads * 2 * HEAD_DIM * DTYPES[dtype]
    return {
        "what": what,
        "dtype": dtype,
        "batch": batch,
        "position": position,
        "us": round(us, 2),
        "ns_per_token_and_head": round(us * 1e3 / num_heads, 1),
        "of_write": round(num_bytes / us / 1e3 / write_ceiling, 2) if write_ceiling else 0.0,
        "over_first": 0.0,
    }


def by_position(timer: Timer, positions: list[int]) -> list[dict]:
    """One sequence, one token: step, write, commit at each position, and the write alone."""
    rows, k = [], random_rows(1)
    with paged_kv.PagedKVCache(
        1, HEADS, HEAD_DIM, num_pages=positions[-1] // 64 + 2, page_size=64, num_threads=1
    ) as cache:
        seq = cache.sequence()
        filler = random_rows(256)
        for position in positions:
            while len(seq) < position - 1:
                count = min(256, position - 1 - len(seq))
                with cache.step([seq], [count]) as step:
                    step.write(0, filler[:count], filler[:count])

            def step_write_roll_back() -> None:
                step = cache.step([seq], [1])
                step.write(0, k, k)
                step.rollback()

            step = cache.step([seq], [1])
            writing = timer.us(lambda step=step: step.write(0, k, k))["us"]
            step.rollback()
            rows.append(row("write", "bfloat16", 1, position, writing))
            whole = timer.us(step_write_roll_back)["us"]
            rows.append(row("step + write + rollback", "bfloat16", 1, position, whole))
    for each in rows:
        first = next(other for other in rows if other["what"] == each["what"])
        each["over_first"] = round(each["us"] / first["us"], 3)
    return rows


def by_batch(dtype: str, batch: int, timer: Timer, write_ceiling: float, pool_tokens: int) -> list[dict]:
    """One token of each sequence, warm and streaming through the pool, from Python and from C."""
    rows, k = [], random_rows(batch)
    num_pages = max(pool_tokens // 64, 2 * batch)
    with paged_kv.PagedKVCache(
        1, HEADS, HEAD_DIM, dtype=dtype, num_pages=num_pages, page_size=64, max_sequences=batch, num_threads=1
    ) as cache:
        seqs = [cache.sequence() for _ in range(batch)]
        step = cache.step(seqs, [1] * batch)
        rows.append(
            row("python, warm", dtype, batch, 1, timer.us(lambda: step.write(0, k, k))["us"], write_ceiling)
        )
        pages, rng = cache._store.layer_pages, np.random.default_rng(1)
        warm, everywhere = step.slot_mapping.copy(), rng.permutation(num_pages * 64)
        step.rollback()
        for what, slots in (("C, warm", warm), ("C, streaming", everywhere)):
            slots = np.resize(slots, max(batch, 4096 if what == "C, streaming" else batch))
            values = np.resize(k, (len(slots), HEADS, HEAD_DIM))
            given = ffi.new("pkv_tensor *")
            fill_tensor(given, array_of("k", values))
            call = functools.partial(
                lib.pkv_append, pages, len(slots), ffi.from_buffer("int64_t[]", slots), given, given
            )
            timed = timer.us(call)
            rows.append(row(what, dtype, batch, 1, timed["us"] * batch / len(slots), write_ceiling))
    return rows


def rivals(batch: int, timer: Timer, pool_tokens: int) -> list[dict]:
    """float32 arrays of numpy: written in place by fancy indices, and made anew by concatenation."""
    k, length = random_rows(batch), max(2, pool_tokens // batch)
    arrays = np.zeros((2, batch, length, HEADS, HEAD_DIM), np.float32)
    index = np.arange(batch)
    positions = np.random.default_rng(0).integers(0, length, batch)

    def fancy() -> None:
        arrays[0, index, positions] = k
        arrays[1, index, positions] = k

    old = np.zeros((batch, min(length, 2048), HEADS, HEAD_DIM), np.float32)
    return [
        row("numpy, fancy index", "float32", batch, 1, timer.us(fancy)["us"]),
        row(
            "np.concatenate at 2,048",
            "float32",
            batch,
            old.shape[1],
            2 * timer.us(lambda: np.concatenate([old, k[:, None]], axis=1))["us"],
        ),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--plot", metavar="FILE", help="ns over position")
    options = parser.parse_args()
    positions = POSITIONS[:4] if options.toy else POSITIONS
    batches = [1, 4] if options.toy else [1, 8, 64]
    pool_tokens = 1024 if options.toy else 2**15
    num_rows = 2 * len(positions) + 5 * len(batches) * len(DTYPES)
    timer = Timer(0.2 if options.toy else options.budget, num_rows)
    memory = np.ones(2**20 if options.toy else 2**28, np.uint8)
    write_ceiling = ceiling.gb_per_s(timer, memory, 2**16, np.arange(len(memory) // 2**16), 1, "write")
    rows = by_position(timer, positions)
    for batch in progress(batches, "append"):
        for dtype in DTYPES:
            rows += by_batch(dtype, batch, timer, write_ceiling, pool_tokens)
        rows += rivals(batch, timer, pool_tokens)
    show(rows, options.json)
    if options.plot:
        plot(rows, options.plot)


def plot(rows: list[dict], path: str) -> None:
    figure = require("matplotlib.figure", "demo").Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for what in ("write", "step + write + rollback"):
        chosen = [each for each in rows if each["what"] == what]
        axes.plot([e["position"] for e in chosen], [e["us"] for e in chosen], "o-", label=what)
    axes.set(xscale="log", xlabel="position in the sequence", ylabel="us a token, 8 heads", ylim=(0, None))
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
