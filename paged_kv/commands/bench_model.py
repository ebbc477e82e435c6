"""How fast are models of real sizes here: `paged-kv bench-model`.

    shape 7b, batch 8, context 512      8 sequences that hold 512 tokens each take one more, again and again

Weights are random, of the real shape: the same bytes and the same work.  Caches are filled with random keys
and values up to the context, so that only steps are computed that are timed: prompts of up to 512 tokens,
then decoding.  The read ceiling is measured in the same run, and so is what the machine does without a cache.

Imports timing and info.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from .._binding import integer, kernels
from ..cache import PagedKVCache
from ..errors import ArgumentError
from ..machine import available_memory, num_cpus
from ..models.bitnet import SHAPES, BitNetModel
from ..pages.layout import num_pages, parse_memory
from ..sequence import Sequence
from .baselines import RecomputeStep
from .info import read_gb_per_s
from .live_line import LiveLine
from .model_options import page_bytes
from .timing import StepTimes, timed_step

#: Prompt tokens that are timed, of one sequence and in one step.
PREFILL_TOKENS = 512
#: A prompt is timed again until so much time was taken.
ENOUGH_PREFILL_MS = 10_000.0
PAGE_SIZE = 64
#: A larger batch must be faster by this much, or `--batch auto` stays.
WORTH = 1.05
CEILING_BYTES = 2**29


@dataclass(frozen=True)
class Row:
    """What was measured of one shape, batch and context; times are medians over steps."""

    shape: str
    batch: int
    context: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    ms_per_step: float
    weights_ms: float
    attention_ms: float
    rest_ms: float
    bytes_per_step: int  # weights and keys and values that a step reads
    read_fraction: float  # of the read ceiling
    cache_bytes: int
    recompute_speedup: float | None = None  # of `context` tokens from nothing, against no cache


def run(options: argparse.Namespace) -> int:
    live = LiveLine(sys.stderr)
    budget = None
    if options.memory is not None:
        budget = integer("--memory", parse_memory(options.memory), 1, 2**50)
    batches = None if options.batch == "auto" else numbers("--batch", options.batch)
    contexts, rows, notes = numbers("--context", options.context), list[Row](), list[str]()
    integer("--steps", options.steps, 1, 1000)
    for shape in options.shape.split(","):
        # Before the weights are made, which takes a while.
        check_contexts(shape, contexts, options.steps)
    for shape in options.shape.split(","):
        model = BitNetModel.random(shape, progress=partial(live.progress, f"{shape}, blocks"))
        bench = ModelBench(shape, model, options.kv_dtype, options.steps, live, options.recompute)
        for context in contexts:
            if batches is None:
                tried, why = bench.best_batch(context, budget)
                rows += tried
                notes.append(f"{shape}, context {context}: {why}")
            else:
                rows += [bench.measure(batch, context) for batch in batches]
        del bench, model
    live.clear()
    if options.json:
        print(json.dumps([{name: rounded(value) for name, value in asdict(row).items()} for row in rows]))
        for note in notes:
            print(note, file=sys.stderr)
    else:
        print(f"kernel {kernels().active}, {num_cpus()} threads; keys and values {options.kv_dtype}")
        print("\n".join([*table(rows), *notes]))
    return 0


def numbers(option: str, text: str) -> list[int]:
    """A list of positive integers, separated by commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 20 and int(part) for part in parts):
        raise ArgumentError(f"{option} is {text:.60}; it must be numbers, such as 1,8")
    return [int(part) for part in parts]


def check_contexts(shape: str, contexts: list[int], num_steps: int) -> None:
    if shape not in SHAPES:
        raise ArgumentError(f"--shape is {shape}; there are {', '.join(SHAPES)}")
    positions = SHAPES[shape].max_position_embeddings
    for context in contexts:
        if context + num_steps + 1 > positions:
            raise ArgumentError(
                f"--context {context} and {num_steps + 1} steps are more than the {positions} positions "
                f"of {shape}"
            )


class ModelBench:
    """A model and what it is measured with.

    kv_dtype : of the cache's pages
    num_steps : decode steps that are timed, after one that is not
    """

    def __init__(
        self,
        shape: str,
        model: BitNetModel,
        kv_dtype: str | tuple[str, str],
        num_steps: int,
        live: LiveLine,
        recompute: bool = False,
    ) -> None:
        self.shape, self.model, self.kv_dtype, self.num_steps = shape, model, kv_dtype, num_steps
        self.live, self.recompute = live, recompute
        self._rng = np.random.default_rng(0)
        self._prefill_ms: dict[int, float] = {}

    @property
    def token_bytes(self) -> int:
        """Of a token's keys and values in all layers."""
        return page_bytes(self.model.config, self.kv_dtype, PAGE_SIZE) // PAGE_SIZE

    def measure(self, batch: int, context: int) -> Row:
        """Raises: MemoryError when there is too little of it."""
        self.live.update(f"{self.shape}: batch {batch}, context {context}: filling the cache")
        pool_pages = batch * num_pages(context + self.num_steps + 1, PAGE_SIZE)
        with self.model.new_cache(
            num_pages=pool_pages, page_size=PAGE_SIZE, max_sequences=batch, dtype=self.kv_dtype
        ) as cache:
            prefill = self._prefill(cache, min(context, PREFILL_TOKENS))
            seqs = [self._filled(cache, context) for _ in range(batch)]
            times = list(self._decode(cache, seqs))
            stats = cache.stats()
            kv_bytes = sum(map(len, seqs)) * self.token_bytes
            ceiling = read_gb_per_s(CEILING_BYTES, num_cpus())
        times = times[1:]
        total = float(np.median([one.total_ms for one in times]))
        num_bytes = self.model.weight_bytes + kv_bytes
        row = Row(
            shape=self.shape,
            batch=batch,
            context=context,
            prefill_tokens_per_s=prefill,
            decode_tokens_per_s=1e3 * batch / total,
            ms_per_step=total,
            weights_ms=float(np.median([one.weights_ms for one in times])),
            attention_ms=float(np.median([one.attention_ms for one in times])),
            rest_ms=float(np.median([one.rest_ms for one in times])),
            bytes_per_step=num_bytes,
            read_fraction=num_bytes / total / 1e6 / ceiling,
            cache_bytes=stats.pool_bytes,
            recompute_speedup=self._against_recompute(context) if self.recompute and batch == 1 else None,
        )
        return row

    def best_batch(self, context: int, budget: int | None) -> tuple[list[Row], str]:
        """Double the batch while it pays and fits; what was tried, and which is best and why."""
        if budget is None:
            budget = (available_memory() or 2**33) // 2
        sequence_bytes = num_pages(context + self.num_steps + 1, PAGE_SIZE) * PAGE_SIZE * self.token_bytes
        if sequence_bytes > budget:
            raise ArgumentError(
                f"a sequence of {context} tokens takes {sequence_bytes / 2**20:,.0f} MiB of a budget of "
                f"{budget / 2**20:,.0f}; give --memory more"
            )
        rows = [self.measure(1, context)]
        most = budget // sequence_bytes
        while (batch := min(2 * rows[-1].batch, most)) > rows[-1].batch:
            row = self.measure(batch, context)
            best = rows[-1].decode_tokens_per_s
            if row.decode_tokens_per_s < WORTH * best:
                gain = 100 * (row.decode_tokens_per_s / best - 1)
                why = f"batch {rows[-1].batch}: {batch} sequences were {gain:+.0f} % of its tokens/s"
                return [*rows, row], why
            rows.append(row)
        return rows, (
            f"batch {rows[-1].batch}: more do not fit, {sequence_bytes / 2**20:,.0f} MiB a sequence "
            f"in a budget of {budget / 2**20:,.0f}"
        )

    def _prefill(self, cache: PagedKVCache, num_tokens: int) -> float:
        """Tokens a second of one prompt in one step, its last token's logits included.

        The median of up to three, after one that touches all memory first; of a slow model, that one.
        """
        ids = self._rng.integers(0, self.model.config.vocab_size, num_tokens)
        self.live.update(f"{self.shape}: a prompt of {num_tokens} tokens")
        times: list[float] = []
        while len(times) < 4 and sum(times) < ENOUGH_PREFILL_MS:
            with cache.sequence() as seq:
                one, _ = timed_step(self.model, cache.step([seq], [num_tokens]), ids, np.array([-1]))
            times.append(one.total_ms)
        return 1e3 * num_tokens / float(np.median(times[1:] or times))

    def _filled(self, cache: PagedKVCache, num_tokens: int) -> Sequence:
        """A sequence of random keys and values, all layers alike."""
        config = self.model.config
        seq, shape = cache.sequence(), (config.num_key_value_heads, config.head_dim)
        for begin in range(0, num_tokens, PREFILL_TOKENS):
            count = min(PREFILL_TOKENS, num_tokens - begin)
            k, v = self._rng.standard_normal((2, count, *shape), np.float32)
            with cache.step([seq], [count]) as step:
                for layer in range(config.num_hidden_layers):
                    step.write(layer, k, v)
        return seq

    def _decode(self, cache: PagedKVCache, seqs: list[Sequence]) -> Iterator[StepTimes]:
        rows = np.arange(len(seqs))
        ids = self._rng.integers(0, self.model.config.vocab_size, len(seqs))
        for i in range(self.num_steps + 1):
            self.live.update(f"{self.shape}: batch {len(seqs)}, step {i} of {self.num_steps}")
            begin = time.perf_counter()
            step = cache.step(seqs, [1] * len(seqs))
            times, logits = timed_step(self.model, step, ids, rows)
            ids = logits.argmax(axis=1)
            total = 1e3 * (time.perf_counter() - begin)
            yield StepTimes(total, times.weights_ms, times.attention_ms)

    def _against_recompute(self, num_tokens: int) -> float:
        """How much faster `num_tokens` are generated from nothing than where each step computes all again.

        Both from four steps at 1/8, 3/8, 5/8 and 7/8 of the context; their mean estimates all.
        """
        lengths = [max(1, num_tokens * i // 8) for i in (1, 3, 5, 7)]
        without, cached = [], []
        for length in lengths:
            self.live.update(f"{self.shape}: {length} tokens without a cache")
            ids = self._rng.integers(0, self.model.config.vocab_size, length)
            begin = time.perf_counter()
            self.model.forward(ids, RecomputeStep([length], num_cpus()), [-1])
            without.append(time.perf_counter() - begin)
            with self.model.new_cache(
                num_pages=num_pages(length + self.num_steps + 1, PAGE_SIZE),
                max_sequences=1,
                dtype=self.kv_dtype,
            ) as cache:
                times = list(self._decode(cache, [self._filled(cache, length)]))[1:]
            cached.append(np.median([one.total_ms for one in times]) / 1e3)
        return float(np.mean(without) / np.mean(cached))


def rounded(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(rows: list[Row]) -> list[str]:
    """Plain text, a line for each row."""
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("shape", lambda row: row.shape),
        ("batch", lambda row: str(row.batch)),
        ("context", lambda row: str(row.context)),
        ("prefill/s", lambda row: f"{row.prefill_tokens_per_s:,.1f}"),
        ("decode/s", lambda row: f"{row.decode_tokens_per_s:,.1f}"),
        ("ms/step", lambda row: f"{row.ms_per_step:,.1f}"),
        ("weights", lambda row: f"{row.weights_ms:,.1f}"),
        ("attention", lambda row: f"{row.attention_ms:,.1f}"),
        ("rest", lambda row: f"{row.rest_ms:,.1f}"),
        ("MiB/step", lambda row: f"{row.bytes_per_step / 2**20:,.0f}"),
        # More than memory gives comes from the CPU's cache, and is no share of memory's ceiling.
        ("of reads", lambda row: "cached" if row.read_fraction > 1 else f"{100 * row.read_fraction:.0f} %"),
        ("cache MiB", lambda row: f"{row.cache_bytes / 2**20:,.0f}"),
    ]
    if any(row.recompute_speedup is not None for row in rows):
        columns.append(
            (
                "no cache",
                lambda row: "-" if row.recompute_speedup is None else f"{row.recompute_speedup:,.0f}x",
            )
        )
    lines = ["".join(f"{name:>11}" for name, _ in columns)]
    return lines + ["".join(f"{show(row):>11}" for _, show in columns) for row in rows]
