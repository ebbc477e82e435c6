"""What attention mass, budgets, ageing and reading less cost and save, against the same call without them.

    python benchmarks/budgets.py [--json] [--toy] [--recorded]

Decode over bfloat16 pages of 64 tokens, q heads / kv heads / head_dim 32/8/128, layers walked in turn so that
none stays in a cache.  Both ways are timed in turns of eight calls; `of_plain` is the median of the
ratios.
--recorded: skip_values_below on keys and queries of SmolLM2 (make smollm2), at 8,192 tokens of prose.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import arguments, progress, show

import paged_kv
from paged_kv.machine import num_cpus
from paged_kv.pages.eviction import KeepNewest

SHAPE = (32, 8, 128)
CALLS = 8  # of each way, before the other's turn


def in_turns(plain: Callable[[], object], other: Callable[[], object], seconds: float) -> dict[str, float]:
    """Medians of both in microseconds, and of their ratio."""
    plain(), other()
    pairs = []
    end = time.perf_counter() + seconds
    while len(pairs) < 5 or time.perf_counter() < end:
        times = []
        for call in (plain, other):
            begin = time.perf_counter_ns()
            for _ in range(CALLS):
                call()
            times.append((time.perf_counter_ns() - begin) / 1e3 / CALLS)
        pairs.append(times)
    ratios = sorted(other / plain for plain, other in pairs)
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "us_plain": round(statistics.median(plain for plain, _ in pairs), 1),
        "us": round(statistics.median(other for _, other in pairs), 1),
        "of_plain": round(median, 3),
        "low": round(low, 3),
        "high": round(high, 3),
    }


def filled(batch: int, context: int, layers: int, **options: Any) -> tuple[Any, list[Any]]:
    """Sequences of context - 1 tokens, grown in turns; the mean of keys moves, as that of a model's does."""
    _, heads, dim = SHAPE
    rng = np.random.default_rng(0)
    budget = options.get("budget_tokens")
    held = context if budget is None else budget
    pages = batch * (-(-(held + 2048) // 64) + 3)
    cache = paged_kv.PagedKVCache(
        layers, heads, dim, num_pages=pages, num_threads=num_cpus(), max_step_tokens=2048, **options
    )
    seqs = [cache.sequence() for _ in range(batch)]
    for begin in range(0, context - 1, 1024):
        count = min(1024, context - 1 - begin)
        k = rng.standard_normal((count, heads, dim), np.float32) + 2 * rng.standard_normal((1, heads, dim))
        for seq in seqs:
            with cache.step([seq], [count]) as step:
                for layer in range(layers):
                    step.write(layer, k.astype(np.float32), k.astype(np.float32))
    return cache, seqs


def inputs(batch: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(1)
    q = rng.standard_normal((batch, SHAPE[0], SHAPE[2]), np.float32)
    k = rng.standard_normal((batch, SHAPE[1], SHAPE[2]), np.float32)
    return q, k, np.empty_like(q)


def row(what: str, batch: int, context: int, timed: dict[str, float], **more: object) -> dict[str, object]:
    return {"what": what, "batch": f"{batch}x{context}", **timed, "bar": "", **more}


def layers_of(batch: int, context: int) -> int:
    return max(2, min(32, 2**30 // (batch * context * SHAPE[1] * SHAPE[2] * 4)))


class Collecting(KeepNewest):
    needs_mass = True


def collected(batch: int, context: int, seconds: float) -> dict[str, object]:
    """Mass for a policy that needs it, against one that does not."""
    layers = layers_of(batch, context)
    q, k, out = inputs(batch)
    caches = [
        filled(batch, context, layers, eviction=policy, budget_tokens=context + 64)
        for policy in (KeepNewest(), Collecting())
    ]
    with caches[0][0], caches[1][0]:
        steps = [cache.step(seqs, [1] * batch) for cache, seqs in caches]
        turn = itertools.cycle(range(layers))
        timed = in_turns(
            lambda: steps[0].attend(next(turn), q, k, k, out=out),
            lambda: steps[1].attend(next(turn), q, k, k, out=out),
            seconds,
        )
        for step in steps:
            step.rollback()
    return row("mass for a policy", batch, context, timed, bar=1.03)


def mass(batch: int, context: int, seconds: float) -> dict[str, object]:
    layers = layers_of(batch, context)
    cache, seqs = filled(batch, context, layers)
    q, k, out = inputs(batch)
    with cache:
        step = cache.step(seqs, [1] * batch)
        turn = itertools.cycle(range(layers))
        timed = in_turns(
            lambda: step.attend(next(turn), q, k, k, out=out),
            lambda: step.attend(next(turn), q, k, k, out=out, return_mass=True),
            seconds,
        )
        step.rollback()
    return row("return_mass", batch, context, timed, bar=1.03)


def budget(batch: int, context: int, tokens: int, seconds: float) -> dict[str, object]:
    """Tokens held against all of them: the ratio of times beside the ratio of tokens."""
    layers = layers_of(batch, context)
    q, k, out = inputs(batch)
    whole, seqs = filled(batch, context, layers)
    cut, own = filled(batch, context, layers, eviction="window", budget_tokens=tokens)
    with whole, cut:
        held = len(own[0].held_positions)
        steps = whole.step(seqs, [1] * batch), cut.step(own, [1] * batch)
        turns = [itertools.cycle(range(layers)) for _ in steps]
        timed = in_turns(
            lambda: steps[0].attend(next(turns[0]), q, k, k, out=out),
            lambda: steps[1].attend(next(turns[1]), q, k, k, out=out),
            seconds,
        )
        for step in steps:
            step.rollback()
    return row(f"budget_tokens={tokens}", batch, context, timed, bar=round(1.1 * held / context, 3))


def top(batch: int, context: int, share: float, seconds: float) -> dict[str, object]:
    layers = layers_of(batch, context)
    cache, seqs = filled(batch, context, layers)
    q, k, out = inputs(batch)
    with cache:
        step = cache.step(seqs, [1] * batch)
        turn = itertools.cycle(range(layers))
        count = int(share * context / 64)
        for layer in range(layers):
            step.attend(layer, q, k, k, top_pages=count)  # computes the means
        timed = in_turns(
            lambda: step.attend(next(turn), q, k, k, out=out),
            lambda: step.attend(next(turn), q, k, k, out=out, top_pages=count),
            seconds,
        )
        step.rollback()
    return row(f"top_pages={share:.0%}", batch, context, timed, bar=round(share * 1.3, 2))


def ageing(batch: int, context: int, seconds: float) -> dict[str, object]:
    """A step of one token each, of all layers, in which one sequence's pages age, against one in which none
    does."""
    layers = 4
    policy = paged_kv.Ageing()
    cache, seqs = filled(batch, context, layers, precision_policy=policy)
    q, k, out = inputs(batch)
    with cache:
        for i, seq in enumerate(seqs):  # none is at the end of a page
            with cache.step([seq], [1 + i % 63]) as step:
                rows = np.repeat(k[:1], 1 + i % 63, axis=0)
                for layer in range(layers):
                    step.write(layer, rows, rows)

        def whole() -> None:
            with cache.step(seqs, [1] * batch) as step:
                for layer in range(layers):
                    step.attend(layer, q, k, k, out=out)

        before, times = 0, {False: [], True: []}
        whole()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or min(map(len, times.values())) < 5:
            used = cache.stats().formats["int4"].num_pages
            begin = time.perf_counter_ns()
            whole()
            spent = (time.perf_counter_ns() - begin) / 1e3
            before = cache.stats().formats["int4"].num_pages
            times[before > used].append(spent)
            if cache.num_available_pages < 2 * batch:
                break
    plain, other = (statistics.median(times[kind]) for kind in (False, True))
    timed = {"us_plain": round(plain, 1), "us": round(other, 1), "of_plain": round(other / plain, 3)}
    return row("a page ages", batch, context, timed | {"low": 0.0, "high": 0.0}, bar=1.03)


def crowded(batch: int, context: int, seconds: float) -> dict[str, object]:
    """A step of one token each in a full pool, for which idle sequences give pages up, against one that lacks
    none."""
    layers, (_, heads, dim) = 4, SHAPE
    q, k, out = inputs(batch)
    whole = [1] * batch
    memory = 40 * batch * 64 * layers * heads * 2 * dim * 2  # bytes of as many open pages
    with paged_kv.PagedKVCache(
        layers, heads, dim, memory=memory, eviction="attention", max_sequences=1024
    ) as cache:

        def grow(seqs: list[Any], counts: list[int]) -> None:
            rows = np.repeat(k[:1], sum(counts), axis=0)
            with cache.step(seqs, counts) as step:
                for layer in range(layers):
                    step.write(layer, rows, rows)

        seqs = [cache.sequence() for _ in range(batch)]
        for i, seq in enumerate(seqs):  # in turns one of them begins a page
            grow([seq], [context + 64 * i // batch])
        idle: list[Any] = []

        def num_dropped() -> int:
            return cache.stats().num_dropped_pages

        def fill_up() -> None:
            for seq in idle:
                seq.free()
            idle.clear()
            before = num_dropped()
            while num_dropped() == before:
                idle.append(cache.sequence())
                grow(idle[-1:], [context])

        fill_up()
        times: dict[bool, list[float]] = {False: [], True: []}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or min(map(len, times.values())) < 5:
            before, begin = num_dropped(), time.perf_counter_ns()
            with cache.step(seqs, whole) as step:
                for layer in range(layers):
                    step.attend(layer, q, k, k, out=out)
            spent = (time.perf_counter_ns() - begin) / 1e3
            times[num_dropped() > before].append(spent)
            if len(seqs[0]) > 2 * context:
                for i, seq in enumerate(seqs):
                    seq.reset()
                    grow([seq], [context + 64 * i // batch])
                fill_up()
    plain, other = (statistics.median(times[kind]) for kind in (False, True))
    timed = {"us_plain": round(plain, 1), "us": round(other, 1), "of_plain": round(other / plain, 3)}
    return row("room is made", batch, context, timed | {"low": 0.0, "high": 0.0})


def recorded(share: float, seconds: float) -> dict[str, object]:
    """skip_values_below over a real model's cache: all layers of one token."""
    from quality import opened, texts

    model = opened()
    ids = model.tokenizer.encode(texts()["prose"][: 16 * 8192])[: min(8192, model.max_length) - 1]
    calls: list[tuple[int, tuple[Any, ...]]] = []

    class Recording:
        def __init__(self, step: Any) -> None:
            self.step, self.positions = step, step.positions

        def attend(self, layer: int, q: Any, *sides: Any, **options: Any) -> Any:
            calls.append((layer, tuple(np.array(one) for one in (q, *sides))))
            return self.step.attend(layer, q, *sides, **options)

    with model.model.new_cache(num_pages=len(ids) // 64 + 3, max_sequences=1) as cache:
        seq = cache.sequence()
        for begin in range(0, len(ids) - 1, 1024):
            chunk = ids[begin : min(begin + 1024, len(ids) - 1)]
            with cache.step([seq], [len(chunk)]) as step:
                model.model.forward(chunk, step, np.arange(1))
        step = cache.step([seq], [1])
        model.model.forward(ids[-1:], Recording(step), np.arange(1))

        def all_layers(**options: Any) -> None:
            for layer, arrays in calls:
                step.attend(layer, *arrays, **options)

        timed = in_turns(all_layers, lambda: all_layers(skip_values_below=share), seconds)
        skipped = step.values_not_read
        step.rollback()
    what = f"skip_values_below={share:g}, {skipped:.0%} not read"
    return row(what, 1, len(ids), timed, bar=0.92)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--recorded", action="store_true", help="only skip_values_below, on SmolLM2's keys")
    options = parser.parse_args()
    if options.recorded:
        show([recorded(share, options.budget / 3) for share in (1e-3, 1e-2, 0.1)], options.json)
        return
    each = 0.2 if options.toy else options.budget / 10
    long, short = (512, 256) if options.toy else (32768, 2048)
    cases: list[Callable[[], dict[str, object]]] = [
        lambda: collected(8 if not options.toy else 2, short, each),
        lambda: collected(1, long, each),
        lambda: mass(8 if not options.toy else 2, short, each),
        lambda: mass(1, long, each),
        lambda: budget(1, long, long // 2, each),
        lambda: budget(1, long, max(long // 16, 256), each),
        lambda: top(1, long, 0.5, each),
        lambda: top(1, long, 0.25, each),
        lambda: ageing(64 if not options.toy else 4, 600, each),
        lambda: crowded(8 if not options.toy else 2, 600, each),
    ]
    show([case() for case in progress(cases, "budgets")], options.json)


if __name__ == "__main__":
    main()
