"""The table that came with the request, measured: its configuration, its loop, our machine.

    python benchmarks/requested_table.py [--json] [--toy]

One layer, 32 heads of 128, float32, rings of 2,048 tokens, 8 batch entries; the loop appends 256 tokens to
each entry and takes its cache out after every one (614 ms in the request, so its "1.6 tokens/s" are loops a
second). Three baselines, so that no ratio misleads:

    naive         concatenate by one token, and copy the whole cache out: what the request started from
    concatenated  the same without the copy
    preallocated  a numpy array written in place, and a view of it: what one would write today

Rows: claim_before and claim_after are the request's; each baseline and ours are measured here; over_... is
how many times faster ours is (for memory: smaller). With attention, all sides call the same kernel.
"""

import time

import numpy as np
from harness import arguments, progress, show

import paged_kv

HEADS, HEAD_DIM, RING, BATCH, TOKENS = 32, 128, 2048, 8, 256
ONE = np.array([0, 1])  # one sequence: one row, one page


def attend_to(q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray) -> None:
    """Attention of one token over plain arrays [tokens, heads, head_dim], as one page."""
    lists = {"qo_indptr": ONE, "kv_indptr": ONE, "kv_indices": ONE[:1], "kv_last_page_len": [len(k)]}
    paged_kv.paged_attention(q, k[None], v[None], **lists, out=out)


class Concatenated:
    """Arrays [tokens, heads, head_dim] that are made anew, one token longer."""

    def __init__(self, ring: int) -> None:
        self.k = [np.empty((0, HEADS, HEAD_DIM), np.float32) for _ in range(BATCH)]
        self.v = list(self.k)

    def append(self, k: np.ndarray, v: np.ndarray, position: int, b: int) -> None:
        self.k[b], self.v[b] = np.concatenate([self.k[b], k[None]]), np.concatenate([self.v[b], v[None]])

    def get_cache(self, b: int) -> tuple:
        return self.k[b], self.v[b]

    def attend(self, q: np.ndarray, b: int, out: np.ndarray) -> None:
        attend_to(q, *self.get_cache(b), out)

    @property
    def num_bytes(self) -> int:
        held = sum(array.nbytes for array in (*self.k, *self.v))
        return held + self.k[0].nbytes  # one of them twice, while it is copied


class Naive(Concatenated):
    """And copied as a whole whenever it is read."""

    def get_cache(self, b: int) -> tuple:
        return self.k[b].copy(), self.v[b].copy()

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + 2 * self.k[0].nbytes


class Preallocated(Concatenated):
    """Written in place."""

    def __init__(self, ring: int) -> None:
        self.arrays = np.zeros((2, BATCH, ring, HEADS, HEAD_DIM), np.float32)
        self.arrays.fill(0)  # take the memory now, as ours does
        self.lengths = [0] * BATCH

    def append(self, k: np.ndarray, v: np.ndarray, position: int, b: int) -> None:
        self.arrays[0, b, position], self.arrays[1, b, position] = k, v
        self.lengths[b] = position + 1

    def get_cache(self, b: int) -> tuple:
        return self.arrays[0, b, : self.lengths[b]], self.arrays[1, b, : self.lengths[b]]

    @property
    def num_bytes(self) -> int:
        return self.arrays.nbytes


class Ours:
    """KVCacheManager."""

    def __init__(self, ring: int) -> None:
        self.manager = paged_kv.KVCacheManager()
        self.manager.allocate(ring, BATCH, HEADS * HEAD_DIM, HEADS)
        self.append, self.get_cache = self.manager.append, self.manager.get_cache

    def attend(self, q: np.ndarray, b: int, out: np.ndarray) -> None:
        """Where the ring is: heads before tokens, seen the other way round."""
        k, v, _ = self.get_cache(b)
        attend_to(q, k.transpose(1, 0, 2), v.transpose(1, 0, 2), out)

    @property
    def num_bytes(self) -> int:
        return self.manager.storage.num_bytes


CONTENDERS = {"naive": Naive, "concatenated": Concatenated, "preallocated": Preallocated, "ours": Ours}


def measure(contender: type, tokens: int, ring: int, repeats: int) -> dict[str, float]:
    """Medians over repeats of the loop, in milliseconds, by what it does; and bytes held at its end."""
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, tokens, HEADS, HEAD_DIM), np.float32)
    q, out = k[:1].copy(), np.empty((1, HEADS, HEAD_DIM), np.float32)
    times: dict[str, list[float]] = {"append": [], "get_cache": [], "with_attention": []}
    for _ in range(repeats):
        # By itself, then with attention: reading the cache in between makes each append a cold one.
        cache, append, get_cache = contender(ring), 0.0, 0.0
        for position in range(tokens):
            for b in range(BATCH):
                begin = time.perf_counter()
                cache.append(k[position], v[position], position, b)
                appended = time.perf_counter()
                cache.get_cache(b)
                append, get_cache = append + appended - begin, get_cache + time.perf_counter() - appended
        num_bytes = cache.num_bytes
        del cache
        cache = contender(ring)
        begin = time.perf_counter()
        for position in range(tokens):
            for b in range(BATCH):
                cache.append(k[position], v[position], position, b)
                cache.attend(q, b, out)
        for part, seconds in zip(times, (append, get_cache, time.perf_counter() - begin), strict=True):
            times[part].append(seconds * 1e3)
        del cache
    return {part: float(np.median(values)) for part, values in times.items()} | {"bytes": num_bytes}


def main() -> None:
    options = arguments(__doc__).parse_args()
    tokens, ring, repeats = (8, 64, 1) if options.toy else (TOKENS, RING, 5)
    measured = {}
    for name, contender in progress(CONTENDERS.items(), "requested table"):
        slow = name in ("naive", "concatenated")
        measured[name] = measure(contender, tokens, ring, 1 if slow else repeats)
    appends = tokens * BATCH
    loop = {name: m["append"] + m["get_cache"] for name, m in measured.items()}

    def each(part: str, factor: float) -> dict[str, float]:
        return {name: m[part] * factor for name, m in measured.items()}

    figures = [
        ("loop, append + get_cache, ms", 614, 20.5, loop),
        ("per token, us", 300, 10, {name: 1e3 * ms / appends for name, ms in loop.items()}),
        ("loops a second", 1.6, 48, {name: 1e3 / ms for name, ms in loop.items()}),
        ("append, us a token", 10 * HEADS, 0.095 * HEADS, each("append", 1e3 / appends)),
        ("append, ns a token and head", 10_000, 95, each("append", 1e6 / appends / HEADS)),
        ("get_cache, us", None, None, each("get_cache", 1e3 / appends)),
        ("loop with attention, ms", None, None, each("with_attention", 1)),
        ("memory, MB", 536, 536, each("bytes", 1e-6)),
    ]
    rows = []
    for figure, before, after, values in figures:
        row = {"figure": figure, "claim_before": before, "claim_after": after}
        row |= {name: float(f"{value:.4g}") for name, value in values.items()}
        for name in ("naive", "concatenated", "preallocated"):
            more = values["ours"] / values[name] if "second" in figure else values[name] / values["ours"]
            row[f"over_{name}"] = float(f"{more:.3g}")
        rows.append(row)
    show(rows, options.json)


if __name__ == "__main__":
    main()
