"""What does sharing cost: a match of a cached prompt, and a fork?

    python benchmarks/sharing.py [--json] [--toy]

Rows: what is done, tokens, the time of it (a sequence is made and freed), and the same over a sequence that
is made empty and freed.  Prompts are int32 arrays, pages have 64 tokens.  The last rows are of a step that
takes 100 pages among so many kept tokens, and evicts as many: microseconds a page.
"""

import statistics
import time

import numpy as np
from harness import Timer, arguments, progress, show

import paged_kv

PAGE_SIZE = 64


def main() -> None:
    options = arguments(__doc__).parse_args()
    sizes = [100] if options.toy else [1_000, 32_000]
    timer = Timer(0.2 if options.toy else min(options.budget, 20), 5 * len(sizes))
    rows = [row for size in progress(sizes, "sharing") for row in measure(size, timer)]
    kept_pages = [1000] if options.toy else [1000, 1_000_000]
    rows += [evict(num_pages) for num_pages in progress(kept_pages, "eviction")]
    show(rows, options.json)


def measure(num_tokens: int, timer: Timer) -> list[dict[str, object]]:
    prompt = np.random.default_rng(0).integers(0, 100_000, num_tokens, np.int32)
    with paged_kv.PagedKVCache(
        1, 1, 8, num_pages=2 * num_tokens // PAGE_SIZE + 2, page_size=PAGE_SIZE, prefix_caching=True
    ) as cache:
        seq = cache.sequence()
        with cache.step([seq], [prompt]) as step:
            rows = np.zeros((num_tokens, 1, 8), np.float32)
            step.write(0, rows, rows)
            step.commit()
        empty = timer.us(lambda: cache.sequence().free())["us"]
        calls = {
            "match of a running sequence": lambda: cache.sequence(prompt).free(),
            "fork at the end": lambda: seq.fork().free(),
            "fork at a position": lambda: seq.fork(at=num_tokens - 100).free(),
        }
        results = [row_of(what, num_tokens, timer.us(call), empty) for what, call in calls.items()]
        seq.free()
        with cache.sequence(prompt) as again:
            assert again.num_cached_tokens == num_tokens - 1
        freed = timer.us(lambda: cache.sequence(prompt).free())
        return [*results, row_of("match of kept pages", num_tokens, freed, empty)]


def evict(num_pages: int) -> dict[str, object]:
    """Many prompts of ten pages, kept; then steps that take 100 pages each, and roll back."""
    page_size, rng, times = 16, np.random.default_rng(0), []
    tokens = 10 * page_size
    with paged_kv.PagedKVCache(1, 1, 8, num_pages=num_pages, page_size=page_size) as cache:
        rows = np.zeros((tokens, 1, 8), np.float32)
        for _ in range(num_pages // 10):
            with cache.sequence() as seq, cache.step([seq], [rng.integers(0, 2**31, tokens)]) as step:
                step.write(0, rows, rows)
                step.commit()
        assert cache.stats().num_kept_pages == num_pages
        seq, num_taken = cache.sequence(), 0
        for _ in range(min(50, num_pages // 200)):
            num_taken += 100
            begin = time.perf_counter_ns()
            cache.step([seq], [num_taken * page_size]).rollback()
            times.append((time.perf_counter_ns() - begin) / 1e3 / 100)
            assert cache.stats().num_evictions == num_taken
    low, median, high = statistics.quantiles(times, n=4)
    return {
        "what": "eviction, a page",
        "num_tokens": num_pages * page_size,
        "us": round(median, 2),
        "of_empty": "",
        "quartiles": f"{low:.2f} to {high:.2f}",
    }


def row_of(what: str, num_tokens: int, timed: dict[str, float], empty: float) -> dict[str, object]:
    return {
        "what": what,
        "num_tokens": num_tokens,
        "us": round(timed["us"], 1),
        "of_empty": round(timed["us"] / empty, 1),
        "quartiles": f"{timed['us_low']} to {timed['us_high']}",
    }


if __name__ == "__main__":
    main()
