"""Text from a model in a folder, and what it took: `paged-kv generate`.

    prompts ── tokenizer ── generate_stream ── text, as it comes
                                │
                                └── report: tokens/s, ms a step and where they go, bytes against the read
                                    ceiling, memory; and the same without a cache, and with one that grows,
                                    measured on a few steps at the lengths that the texts have reached

Imports bench_model, model_options and generate.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .._binding import integer, kernels
from ..cache import PagedKVCache
from ..errors import ArgumentError
from ..machine import num_cpus
from ..models.decoder import DecoderModel
from ..models.report import GenerationReport, Stopwatch
from ..models.ternary import FloatArray
from ..pages.layout import num_pages
from ..pages.pool import mebibytes
from ..serving.generate import Batch, generate_stream
from ..text.tokenizer import ModelTokenizer
from .baselines import ConcatenatedCache, RecomputeStep
from .bench_model import CEILING_BYTES, PAGE_SIZE, rounded
from .info import read_gb_per_s
from .live_line import LiveLine
from .model_options import opened, sampling_of
from .texts import require_text
from .timing import TimedCache, timed_matrices

#: Steps that are measured without a cache, and with a concatenated one.
STEPS_WITHOUT_CACHE, STEPS_CONCATENATED = 1, 8


@dataclass
class Report:
    """What a generation took; per step: the median over those that held no prompt tokens."""

    prompt_tokens: int
    cached_tokens: int  # of the prompts, that another one had computed
    new_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    ms_per_step: float
    weights_ms: float
    attention_ms: float
    rest_ms: float
    bytes_per_step: int
    read_fraction: float
    weight_bytes: int
    cache_bytes: int
    no_cache_tokens_per_s: float | None = None
    concatenated_tokens_per_s: float | None = None


def run(options: argparse.Namespace) -> int:
    """The command; 0 when it went well, 1 when a prompt failed on its way."""
    live = LiveLine(sys.stderr)
    texts = [require_text("--prompt", text) for text in options.prompt]
    integer("--seed", options.seed, 0, 2**64)
    found = opened(options, live)
    model, tokenizer = found.model, found.tokenizer
    if options.chat:
        prompts = [tokenizer.chat([{"role": "user", "content": text}]) for text in texts]
    else:
        prompts = [tokenizer.encode(text, special_tokens=options.special_tokens) for text in texts]
    longest = max(map(len, prompts)) + options.max_tokens
    if options.max_tokens < 1 or longest > model.config.max_position_embeddings:
        raise ArgumentError(
            f"a prompt of {max(map(len, prompts))} tokens and --max-tokens {options.max_tokens}; at least 1, "
            f"and together at most the model's {model.config.max_position_embeddings} positions"
        )
    pool_pages = sum(num_pages(len(ids) + options.max_tokens, PAGE_SIZE) for ids in prompts)
    with model.new_cache(
        num_pages=pool_pages, page_size=PAGE_SIZE, max_sequences=len(prompts), **found.cache_options
    ) as cache:
        show = ShownTexts(tokenizer, len(prompts), options.stop, options.json)
        watch = Watch(model, cache)
        new_ids: list[list[int]] = [[] for _ in prompts]
        failed: dict[int, Exception] = {}
        with watch.timed():
            for index, id in generate_stream(
                model,
                prompts,
                max_new_tokens=options.max_tokens,
                **sampling_of(options),
                tokenizer=tokenizer,
                stop=options.stop,
                stop_ids=(*model.config.stop_ids, *options.stop_id),
                cache=watch.cache,
                progress=watch.count,
            ):
                if isinstance(id, Exception):
                    failed[index] = id
                    continue
                new_ids[index].append(id)
                show.add(index, id)
                live.progress("tokens", sum(map(len, new_ids)), options.max_tokens * len(prompts))
        live.clear()
        show.finish()
        for index, error in failed.items():
            print(f"paged-kv: prompt {index + 1} ended early: {error}", file=sys.stderr)
        report = watch.report(sum(map(len, prompts)), sum(map(len, new_ids)))
    if not options.no_compare:
        lengths = [len(ids) + len(new) for ids, new in zip(prompts, new_ids, strict=True)]
        live.update("the same without a cache")
        report.no_cache_tokens_per_s = without_cache(model, lengths)
        live.update("the same with a concatenated cache")
        report.concatenated_tokens_per_s = concatenated(model, lengths)
        live.clear()
    if options.json:
        fields = {name: rounded(value) for name, value in asdict(report).items()}
        print(json.dumps({"kernel": kernels().active, "texts": show.texts, **fields}))
        return 1 if failed else 0
    show.show(texts)
    print("\n".join(lines_of(report, len(prompts))))
    return 1 if failed else 0


# ---- text as it comes


class ShownTexts:
    """Prints one text while it grows; several when they are whole."""

    def __init__(
        self, tokenizer: ModelTokenizer, num_texts: int, stop: Sequence[str], is_quiet: bool
    ) -> None:
        self._streams = [tokenizer.stream(stop) for _ in range(num_texts)]
        self._is_live = num_texts == 1 and not is_quiet
        self.texts = [""] * num_texts

    def add(self, index: int, id: int) -> None:
        self._show(index, self._streams[index].add(id))

    def _show(self, index: int, text: str) -> None:
        self.texts[index] += text
        if self._is_live:
            print(text, end="", flush=True)

    def finish(self) -> None:
        """All ids have come."""
        for index, stream in enumerate(self._streams):
            self._show(index, stream.finish())

    def show(self, prompts: list[str]) -> None:
        """What has not been printed yet."""
        if self._is_live:
            print()
            return
        for prompt, text in zip(prompts, self.texts, strict=True):
            print(f"--- {prompt}\n{text}")


# ---- what it took


class Watch:
    """Times the steps of a generation, prompts and decoding apart."""

    def __init__(self, model: DecoderModel, cache: PagedKVCache) -> None:
        self.model, self.pages = model, cache
        self._attention, self._weights = Stopwatch(), Stopwatch()
        self.cache: Any = TimedCache(cache, self._attention)
        stats = cache.stats()
        self._token_bytes = stats.pool_bytes // (stats.num_pages * cache.page_size)
        self._before = GenerationReport()
        self._weights_s = self._attention_s = 0.0
        self._decoded = 0
        self._steps: list[tuple[float, float, float, float]] = []

    def timed(self) -> AbstractContextManager[None]:
        return timed_matrices(self.model, self._weights)

    def count(self, batch: Batch) -> None:
        """After a step: take its times; what is done between steps is not in them."""
        before, self._before = self._before, replace(batch.report)
        weights, attention = (
            self._weights.seconds - self._weights_s,
            self._attention.seconds - self._attention_s,
        )
        self._weights_s, self._attention_s = self._weights.seconds, self._attention.seconds
        if self._before.decode_ns > before.decode_ns:
            self._decoded += self._before.num_new_tokens - before.num_new_tokens
            kv_bytes = self.pages.stats().num_tokens * self._token_bytes
            total = (self._before.decode_ns - before.decode_ns) / 1e9
            self._steps.append((total, weights, attention, kv_bytes))

    def report(self, prompt_tokens: int, new_tokens: int) -> Report:
        steps = np.array(self._steps or [(0.0,) * 4])
        total, weights, attention, _ = (float(value) for value in np.median(steps, axis=0))
        num_bytes = int(self.model.weight_bytes + np.mean(steps[:, 3])) if self._steps else 0
        ceiling, decode_ns = read_gb_per_s(CEILING_BYTES, num_cpus()), self._before.decode_ns
        return Report(
            prompt_tokens=prompt_tokens,
            cached_tokens=self._before.num_cached_tokens,
            new_tokens=new_tokens,
            prefill_tokens_per_s=1e9 * self._before.num_prompt_tokens / self._before.prefill_ns,
            decode_tokens_per_s=1e9 * self._decoded / decode_ns if decode_ns else 0.0,
            ms_per_step=1e3 * total,
            weights_ms=1e3 * weights,
            attention_ms=1e3 * attention,
            rest_ms=1e3 * (total - weights - attention),
            bytes_per_step=num_bytes,
            read_fraction=num_bytes / total / 1e9 / ceiling if total else 0.0,
            weight_bytes=self.model.weight_bytes,
            cache_bytes=self.pages.stats().pool_bytes,
        )


def without_cache(model: DecoderModel, lengths: list[int]) -> float:
    """Tokens/s of one sequence after the other, all computed again; at the lengths they have reached."""
    begin = time.perf_counter()
    for length in lengths:
        for _ in range(STEPS_WITHOUT_CACHE):
            ids = np.arange(length) % model.config.vocab_size
            model.forward(ids, RecomputeStep([length], num_cpus()), [-1])
    return STEPS_WITHOUT_CACHE * len(lengths) / (time.perf_counter() - begin)


def concatenated(model: DecoderModel, lengths: list[int]) -> float:
    """Tokens/s of all sequences at once, over float32 arrays that grow from those lengths."""
    config, rng = model.config, np.random.default_rng(0)
    shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    cache = ConcatenatedCache(*shape, num_threads=num_cpus())
    seqs = [cache.sequence() for _ in lengths]
    for seq, length in zip(seqs, lengths, strict=True):
        rows: FloatArray = rng.standard_normal((length, *shape[1:]), np.float32)
        seq.k, seq.v = [rows.copy() for _ in seq.k], [rows.copy() for _ in seq.v]
    ids, rows_of = np.ones(len(seqs), np.int64), np.arange(len(seqs))
    begin = time.perf_counter()
    for _ in range(STEPS_CONCATENATED):
        with cache.step(seqs, [1] * len(seqs)) as step:
            model.forward(ids, step, rows_of)
    return STEPS_CONCATENATED * len(seqs) / (time.perf_counter() - begin)


def share_of_reads(fraction: float) -> str:
    """What was read, as a share of what memory gives; more than that comes from the CPU's cache."""
    if fraction > 1:
        return "from the CPU's cache: faster than memory gives them"
    return f"{100 * fraction:.0f} % of the read ceiling"


def lines_of(report: Report, num_prompts: int) -> list[str]:
    """Plain text."""
    lines = [
        "",
        f"kernel {kernels().active}, {num_cpus()} threads, {num_prompts} sequences",
        f"prompt      {report.prompt_tokens:,} tokens, {report.cached_tokens:,} of them shared, the others "
        f"{report.prefill_tokens_per_s:,.1f} a second",
        f"decode      {report.new_tokens:,} tokens, {report.decode_tokens_per_s:,.1f} a second",
        f"a step      {report.ms_per_step:,.1f} ms: weights {report.weights_ms:,.1f}, attention "
        f"{report.attention_ms:,.1f}, rest {report.rest_ms:,.1f}",
        f"reads       {mebibytes(report.bytes_per_step)} a step, {share_of_reads(report.read_fraction)}",
        f"memory      weights {mebibytes(report.weight_bytes)}, cache {mebibytes(report.cache_bytes)}",
    ]
    for way, per_s, num_steps in (
        ("no cache", report.no_cache_tokens_per_s, STEPS_WITHOUT_CACHE),
        ("concatenated cache", report.concatenated_tokens_per_s, STEPS_CONCATENATED),
    ):
        if per_s is not None and report.decode_tokens_per_s:
            lines.append(
                f"against     {way}: {report.decode_tokens_per_s / per_s:,.2f}x its {per_s:,.2f} tokens/s "
                f"at the last length (from {num_steps})"
            )
    return lines
