"""The main job, to watch: many prompts served at once by a model whose attention reads pages in place.

The same prompts are served three ways, with the same model, kernel and generators, so that they must give the
same tokens:

    paged          a pool that holds about 10 of 16 prompts; who fits is admitted
    concatenated   arrays that grow by a copy for each token, given the same bytes
    no cache       everything computed again for every token; measured on a few tokens

All prompts begin with the same text, as those of an assistant do; the paged cache computes it once.

Imports generate, baselines and timing.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .._binding import integer, kernels
from ..errors import ArgumentError
from ..extras import require
from ..files import replace_files
from ..machine import num_cpus
from ..models.decoder import DecoderModel
from ..models.report import Stopwatch
from ..models.sampling import Sampler, seed_of
from ..pages.layout import num_pages
from ..serving.admission import Admission
from ..serving.batch import Batch, ServingCache
from .baselines import ConcatenatedCache, RecomputeStep
from .demo_prompts import Prompt, choose_prompts
from .live_line import LiveLine
from .model_options import opened
from .timing import TimedCache, TimedStep

PAGE_SIZE = 64
TOP_P = 0.95
#: The pool holds this share of what all prompts would take.
POOL_SHARE = 10 / 16
#: New tokens of each prompt that are measured without a cache: a few seconds' worth.
TOKENS_WITHOUT_CACHE = 2
NUM_TEXTS_SHOWN, NUM_ANSWERS_SHOWN = 3, 6  # spread over the prompts


@dataclass
class Served:
    """One way of serving, measured."""

    way: str
    prompt_tokens: int
    prompt_tokens_computed: int
    new_tokens: int
    tokens_per_s: float  # end to end, prompts included
    attend_ms_per_step: float  # append + attend, all layers
    attend_share: float  # of the time
    sequences_at_once: int
    bytes_held: int  # at most, a copy under way counted
    utilization: float  # tokens' bytes / bytes in use, mean over steps
    new_ids: list[list[int]] = field(repr=False)
    moments: list["Moment"] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Moment:
    """A cache after one step."""

    seconds: float
    held: float  # pages, or MiB
    utilization: float
    num_running: int


def run(options: argparse.Namespace) -> int:
    """The demo; 0 when all ways gave the same tokens, else 1."""
    integer("--seed", options.seed, 0, 2**64)
    if options.plot:
        require_plot(options.plot)
    found = opened(options, LiveLine(sys.stderr))
    model, tokenizer = found.model, found.tokenizer
    prompts = choose_prompts(options, found)
    live = LiveLine(sys.stderr if options.json else sys.stdout)
    say: Callable[..., None] = (lambda *_: None) if options.json else print
    need = [num_pages(len(prompt.ids) + options.max_tokens, PAGE_SIZE) for prompt in prompts]
    # At least the longest sequence with one of its arrays twice, as while it is concatenated.
    smallest = max(need) + -(-max(need) // (2 * model.config.num_hidden_layers))
    pool_pages = max(smallest, round(sum(need) * POOL_SHARE))
    say(
        f"{len(prompts)} prompts of {min(len(p.ids) for p in prompts)} to {max(len(p.ids) for p in prompts)} "
        f"tokens, {options.max_tokens} new tokens each, a pool of {pool_pages} pages for {sum(need)}\n"
        f"kernel {kernels().active}, {num_cpus()} threads"
    )
    for note in sorted({prompt.source for prompt in prompts if " instead of " in prompt.source}):
        say(f"prompt from {note}")
    is_chat = tokenizer.chat_template is not None
    serve = Serving(model, prompts, options, live, stop_ids=model.config.stop_ids if is_chat else ())
    paged = serve.paged(pool_pages)
    show_texts(say, tokenizer, prompts, paged)
    ways = [serve.recomputed(), serve.concatenated(pool_pages), paged]
    same = all(
        mine[: len(theirs)] == theirs
        for way in ways
        for mine, theirs in zip(paged.new_ids, way.new_ids, strict=True)
    )
    if options.plot:
        plot(paged, pool_pages, options.plot)
    if options.json:
        rows = [asdict(replace(way, new_ids=[], moments=[])) for way in ways]
        rows = [{name: value for name, value in row.items() if value != []} for row in rows]
        print(json.dumps({"kernel": kernels().active, "ways": rows, "same_tokens": same}))
    else:
        print(table(ways))
        print(f"same tokens: {'yes' if same else 'no'}")
    return 0 if same else 1


# ---- serving


class Serving:
    """The same prompts, served in different ways."""

    def __init__(
        self,
        model: DecoderModel,
        prompts: list[Prompt],
        options: argparse.Namespace,
        live: LiveLine,
        stop_ids: tuple[int, ...] = (),
    ) -> None:
        self.model, self.prompts, self.options, self.live = model, prompts, options, live
        self.stop_ids = stop_ids
        #: Text that people judge is the likeliest; the small model's is livelier when it is drawn.
        usual = 0.0 if stop_ids else 0.8
        self.temperature = usual if options.temperature is None else options.temperature

    def paged(self, pool_pages: int) -> Served:
        with self.model.new_cache(
            # float32, as the arrays of the other ways: all draw the same tokens.
            **{"num_pages": pool_pages, "page_size": PAGE_SIZE, "max_sequences": len(self.prompts)},
            dtype="float32",
        ) as cache:

            def state() -> tuple[str, float, float]:
                stats = cache.stats()
                held = stats.num_used_pages
                return f"{held}/{stats.num_pages} pages", held, stats.utilization

            admission, pool_bytes = Admission.pages_of(cache), cache.stats().pool_bytes
            return self._serve("paged", cache, admission, state, lambda: pool_bytes)

    def concatenated(self, pool_pages: int) -> Served:
        config = self.model.config
        shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        cache = ConcatenatedCache(*shape, num_threads=num_cpus())
        row_bytes = config.num_key_value_heads * config.head_dim * 4
        token_bytes = 2 * config.num_hidden_layers * row_bytes
        # One array of the longest sequence exists twice while it grows.
        longest = max(len(prompt.ids) for prompt in self.prompts) + self.options.max_tokens
        capacity = pool_pages * PAGE_SIZE * token_bytes - longest * row_bytes

        def state() -> tuple[str, float, float]:
            num_bytes, held = cache.num_bytes, cache.num_bytes / 2**20
            return f"{held:.1f} MiB", held, num_bytes / (num_bytes + cache.copy_bytes or 1)

        admission = Admission(capacity, lambda num_tokens: num_tokens * token_bytes)
        return self._serve("concatenated", cache, admission, state, lambda: cache.peak_bytes)

    def recomputed(self) -> Served:
        """Each sequence by itself, from its first token on, for every new token."""
        num_tokens = min(TOKENS_WITHOUT_CACHE, self.options.max_tokens)
        begin, clock, new_ids, num_computed = time.perf_counter(), Stopwatch(), [], 0
        for i, prompt in enumerate(self.prompts):
            ids, sampler = list(prompt.ids), self._sampler(i)
            for _ in range(num_tokens):
                step = TimedStep(RecomputeStep([len(ids)], num_cpus()), clock)
                num_computed += len(prompt.ids)
                ids.append(sampler.sample(self.model.forward(ids, step, [-1])[0]))
                if ids[-1] in self.stop_ids:
                    break
            new_ids.append(ids[len(prompt.ids) :])
            self.live.update(f"no cache: {i + 1} of {len(self.prompts)} prompts, {num_tokens} tokens each")
        self.live.clear()
        elapsed, count = time.perf_counter() - begin, sum(map(len, new_ids))
        return Served(
            way="no cache",
            prompt_tokens=sum(len(prompt.ids) for prompt in self.prompts),
            prompt_tokens_computed=num_computed,
            new_tokens=count,
            tokens_per_s=count / elapsed,
            attend_ms_per_step=clock.seconds / count * 1e3,
            attend_share=clock.seconds / elapsed,
            sequences_at_once=1,
            bytes_held=0,
            utilization=0.0,
            new_ids=new_ids,
        )

    def _sampler(self, index: int) -> Sampler:
        return Sampler(self.temperature, TOP_P, seed_of(self.options.seed, index))

    def _serve(
        self,
        way: str,
        cache: ServingCache,
        admission: Admission,
        state: Callable[[], tuple[str, float, float]],
        bytes_held: Callable[[], int],
    ) -> Served:
        clock, at_once, moments = Stopwatch(), 0, list[Moment]()
        batch = Batch(self.model, TimedCache(cache, clock), admission, stop_ids=self.stop_ids)
        begin = time.perf_counter()
        try:
            requests = [
                batch.add(prompt.ids, self.options.max_tokens, self._sampler(i))
                for i, prompt in enumerate(self.prompts)
            ]
            while batch.waiting or batch.running:
                num_done = len(batch.step())
                at_once = max(at_once, len(batch.running) + num_done)
                text, held, utilization = state()
                if batch.running:
                    elapsed = time.perf_counter() - begin
                    moments.append(Moment(elapsed, held, utilization, len(batch.running)))
                report = batch.report
                self.live.update(
                    f"{way}: {report.num_new_tokens} tokens, {report.tokens_per_s:.0f} tokens/s, "
                    f"{len(batch.running)} running, {len(batch.waiting)} waiting, {text}, "
                    f"utilization {100 * utilization:.0f} %"
                )
        finally:
            batch.close()
            self.live.clear()
        elapsed = time.perf_counter() - begin
        return Served(
            way=way,
            prompt_tokens=sum(len(prompt.ids) for prompt in self.prompts),
            prompt_tokens_computed=batch.report.num_prompt_tokens,
            new_tokens=batch.report.num_new_tokens,
            tokens_per_s=batch.report.num_new_tokens / elapsed,
            attend_ms_per_step=clock.seconds / batch.report.num_steps * 1e3,
            attend_share=clock.seconds / elapsed,
            sequences_at_once=at_once,
            bytes_held=bytes_held(),
            utilization=float(np.mean([moment.utilization for moment in moments])) if moments else 1.0,
            new_ids=[request.new_ids for request in requests],
            moments=moments,
        )


# ---- what is shown


def show_texts(say: Callable[..., None], tokenizer: Any, prompts: list[Prompt], served: Served) -> None:
    """The end of a few prompts and what the model wrote after it, or questions and answers."""
    parts = 1 + (NUM_TEXTS_SHOWN if prompts[0].shown else NUM_ANSWERS_SHOWN)
    for i in sorted({len(prompts) * i // parts for i in range(1, parts)}):
        prompt, text = prompts[i], tokenizer.decode(served.new_ids[i]).rstrip()
        say(f"\n--- {prompt.source}")
        say(f"{prompt.shown}«{text}»" if prompt.shown else text)


def table(ways: list[Served]) -> str:
    """Plain text, a column for each way; the last one is ours."""
    paged = ways[-1]
    rows: list[tuple[str, Callable[[Served], str]]] = [
        ("prompt tokens given", lambda way: f"{way.prompt_tokens:,}"),
        ("prompt tokens computed", lambda way: f"{way.prompt_tokens_computed:,}"),
        ("new tokens measured", lambda way: f"{way.new_tokens:,}"),
        ("tokens/s, end to end", lambda way: f"{way.tokens_per_s:,.1f}"),
        ("paged is faster by", lambda way: f"{paged.tokens_per_s / way.tokens_per_s:,.2f}x"),
        ("append + attend, ms a step", lambda way: f"{way.attend_ms_per_step:,.2f}"),
        ("append + attend, of the time", lambda way: f"{100 * way.attend_share:.0f} %"),
        ("sequences at once", lambda way: f"{way.sequences_at_once}"),
        ("bytes held at most", lambda way: f"{way.bytes_held / 2**20:.1f} MiB"),
        ("utilization of them", lambda way: f"{100 * way.utilization:.0f} %" if way.bytes_held else "-"),
    ]
    lines = [f"\n{'':30}" + "".join(f"{way.way:>14}" for way in ways)]
    lines += [f"{name:30}" + "".join(f"{show(way):>14}" for way in ways) for name, show in rows]
    return "\n".join(lines)


def require_plot(path: str) -> None:
    """ArgumentError where no picture can be drawn there, before there is one to draw."""
    known = require("matplotlib.backend_bases", "demo").FigureCanvasBase.get_supported_filetypes()
    suffix = Path(path).suffix.removeprefix(".") or "png"
    if suffix not in known:
        raise ArgumentError(f"--plot is {path}; pictures are {', '.join(sorted(known))}")
    if not Path(path).parent.is_dir():
        raise ArgumentError(f"--plot is {path}; there is no folder {Path(path).parent}")


def plot(served: Served, pool_pages: int, path: str) -> None:
    """Pages in use, sequences and utilization while the prompts were served."""
    figure = require("matplotlib.figure", "demo").Figure(figsize=(8, 4), layout="constrained")
    pages, shares = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    seconds = [moment.seconds for moment in served.moments]
    pages.step(seconds, [moment.held for moment in served.moments], where="post", label="pages in use")
    pages.axhline(pool_pages, color="gray", linewidth=0.8, label="pages of the pool")
    pages.step(seconds, [moment.num_running for moment in served.moments], where="post", label="sequences")
    pages.set(ylabel="count", ylim=(0, None), title="Prompts served at once from one pool")
    pages.legend(loc="lower left")
    shares.plot(seconds, [100 * moment.utilization for moment in served.moments])
    shares.set(xlabel="seconds", ylabel="utilization, %", ylim=(0, 100))
    suffix = Path(path).suffix.removeprefix(".") or "png"
    replace_files({Path(path): lambda file: figure.savefig(file, format=suffix)})


@contextmanager
def ended_cleanly() -> Iterator[None]:
    """Ctrl-C ends the demo with a line and not with a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None
