"""`generate` of a small llama with transformers' caches and ours; and with an attention that costs nothing.

    pip install -e ".[hf]" && python benchmarks/transformers_cache.py [--dtypes bfloat16,float32]
                                                                      [--cells 1x512,8x2048] [--rounds 3]
                                                                      [--parts steps,bookkeeping,beams,...]

A llama of 12 layers, 768 wide, 12 heads of queries and 4 of keys and values of 64, random.  Contexts are
filled with random keys and values, and 20 steps are timed: the median of each, and of the rounds, in which
contenders take turns.  The floor is the same model with an attention that does nothing and a cache that
stores nothing: what no cache can be faster than.  `own threads` is ours with threads beside torch's.  Then
beams, 16 prompts that begin alike, and generate_batch, where ours attends in place: all of it, and a decode
step.  `bookkeeping` is what begin and commit of a step take inside `generate`.
"""

import argparse
import statistics
import time
import warnings
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
import transformers
from harness import machine
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import paged_kv
from paged_kv.integrations.continuous_batching import install
from paged_kv.integrations.transformers import PagedCache

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
KEY = "cache" if "cache" in transformers.LlamaForCausalLM.forward.__annotations__ else "past_key_values"
STEPS, PREFIX_TOKENS = 20, 1000
KINDS = ("DynamicCache", "StaticCache", "PagedCache", "own threads", "floor")
CONFIG = transformers.LlamaConfig(
    **{"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12},
    **{"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 8192},
    **{"tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
)


def no_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[Any, None]:
    return query.transpose(1, 2), None


class NoCache(transformers.DynamicCache):
    """Counts columns, and stores nothing."""

    seen = 0

    def update(self, k: Any, v: Any, layer: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.seen += k.shape[2] if layer == 0 else 0
        return k, v

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.seen + query_length, 0


class Clock(transformers.StoppingCriteria):
    """Notes when each token has come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def new_cache(kind: str, model: Any, batch: int, length: int) -> Any:
    paged_kv.use_threads("own" if kind == "own threads" else "auto")
    model.set_attn_implementation({"floor": "no_attention"}.get(kind, "sdpa"))
    if kind == "floor":
        return NoCache(config=CONFIG)
    if kind == "DynamicCache":
        return transformers.DynamicCache(config=CONFIG)
    if kind == "StaticCache":
        return transformers.StaticCache(config=CONFIG, max_cache_len=length)
    return PagedCache.for_model(model, num_pages=batch * (length // 64 + 2), page_size=64)


def filled(kind: str, model: Any, batch: int, context: int) -> Any:
    cache = new_cache(kind, model, batch, context + STEPS + 8)
    k = torch.randn(batch, 4, context, 64).to(model.dtype)
    if kind == "floor":
        cache.seen = context
        return cache
    if not isinstance(cache, PagedCache):
        for layer in range(CONFIG.num_hidden_layers):
            cache.update(k, k, layer)
        return cache
    cache._begin(batch, context, None)
    rows = k.transpose(1, 2).flatten(0, 1)
    for layer in range(CONFIG.num_hidden_layers):
        cache._pools[0].step.write(layer, rows, rows)
    cache._end()
    return cache


def generate(model: Any, ids: Any, cache: Any, **how: Any) -> list[float]:
    """When each token came."""
    clock = Clock()
    named = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, KEY: cache} | how
    begin = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=[clock], **named)
    return [begin, *clock.times]


def decode_ms(kind: str, model: Any, batch: int, context: int) -> float:
    ids = torch.randint(3, 32000, (batch, context + 1))
    times = generate(model, ids, filled(kind, model, batch, context))[1:]
    return 1e3 * statistics.median(b - a for a, b in pairwise(times))


def beams_ms(kind: str, model: Any, batch: int = 8, context: int = 512) -> float:
    """A step of 4 beams of each row."""
    ids = torch.randint(3, 32000, (batch, context))
    times = generate(model, ids, new_cache(kind, model, 4 * batch, context + STEPS + 8), num_beams=4)[1:]
    return 1e3 * statistics.median(b - a for a, b in pairwise(times))


def prefix_ms(kind: str, model: Any) -> float:
    """16 prompts in turn: 1,000 tokens that are the same and 20 that are not; 8 new tokens."""
    torch.manual_seed(1)
    shared, total = torch.randint(3, 32000, (1, PREFIX_TOKENS)), 0.0
    cache = new_cache(kind, model, 4, PREFIX_TOKENS + 64)
    for _ in range(16):
        ids = torch.cat([shared, torch.randint(3, 32000, (1, 20))], 1)
        if isinstance(cache, PagedCache):
            cache.reset()
        else:
            cache = new_cache(kind, model, 1, PREFIX_TOKENS + 64)
        times = generate(model, ids, cache, max_new_tokens=8)
        total += times[-1] - times[0]
    return 1e3 * total


def bookkeeping_us(model: Any, batch: int, context: int) -> float:
    """What begin and commit of a step take inside `generate`."""
    cache, times = filled("PagedCache", model, batch, context), []
    begin, end = cache._begin, cache._end

    def timed(call: Any, *arguments: Any) -> None:
        start = time.perf_counter()
        call(*arguments)
        times.append(time.perf_counter() - start)

    cache._begin, cache._end = (lambda *a: timed(begin, *a)), (lambda *a: timed(end, *a))
    generate(model, torch.randint(3, 32000, (batch, context + 1)), cache)
    return 1e6 * statistics.median(a + b for a, b in zip(times[2::2], times[3::2], strict=True))


def batch_step_ms(way: str, model: Any, batch: int, context: int) -> float:
    """A decode step: what 32 tokens more take."""
    long, short = (batch_ms(way, model, batch, context, num_new) for num_new in (40, 8))
    return (long - short) / 32


def batch_ms(way: str, model: Any, batch: int, context: int, num_new: int = 32) -> float:
    """All of generate_batch, prompts included."""
    torch.manual_seed(2)
    prompts = torch.randint(3, 32000, (batch, context)).tolist()
    pages = batch * (-(-(context + 40) // 256) + 1)
    config = ContinuousBatchingConfig(page_size=256, num_blocks=pages, max_batch_tokens=1024)
    how = transformers.GenerationConfig(
        max_new_tokens=num_new, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    model.set_attn_implementation("sdpa")
    with install(model) if way == "in place" else nullcontext():
        begin = time.perf_counter()
        model.generate_batch(
            prompts, generation_config=how, continuous_batching_config=config, progress_bar=False
        )
        return 1e3 * (time.perf_counter() - begin)


def show(what: str, kinds: tuple[str, ...], rounds: int, measure: Any) -> None:
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            times[kind].append(measure(kind))
    ms = {kind: statistics.median(values) for kind, values in times.items()}
    cells = [f"{kind} {ms[kind]:.1f}" for kind in kinds]
    ours = "in place" if "in place" in kinds else "PagedCache"
    against = [
        f"{kind} {statistics.median(a / b for a, b in zip(times[kind], times[ours], strict=True)):.2f}x"
        for kind in kinds
        if kind not in (ours, "floor")
    ]
    if "floor" in ms:
        share = (ms["StaticCache"] - ms[ours]) / (ms["StaticCache"] - ms["floor"])
        against.append(f"{share:.2f} of what any attention could gain over StaticCache")
    print(f"{what}, ms: {', '.join(cells)}; {ours} against {', '.join(against)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--cells", default="1x512,1x2048,8x512,8x2048", help="batch x context")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default="steps,bookkeeping,beams,prefix,batch")
    options = parser.parse_args()
    transformers.AttentionInterface.register("no_attention", no_attention)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    for name in options.dtypes.split(","):
        torch.manual_seed(0)
        dtype = getattr(torch, name)
        model = transformers.AutoModelForCausalLM.from_config(CONFIG, dtype=dtype).eval()
        parts = options.parts.split(",")
        for cell in options.cells.split(","):
            batch, context = map(int, cell.split("x"))
            where = model, batch, context
            if "steps" in parts:
                show(
                    f"{name}, {cell}, a step",
                    KINDS,
                    options.rounds,
                    lambda kind, w=where: decode_ms(kind, *w),
                )
            if "bookkeeping" in parts:
                print(
                    f"{name}, {cell}, begin and commit of a step: {bookkeeping_us(*where):.0f} us", flush=True
                )
            if "batch" in parts and batch > 1:
                ways, rounds = ("as it comes", "in place"), options.rounds
                show(f"{name}, {cell}, generate_batch", ways, rounds, lambda way, w=where: batch_ms(way, *w))
                what = f"{name}, {cell}, a step of generate_batch"
                show(what, ways, rounds, lambda way, w=where: batch_step_ms(way, *w))
        few = ("DynamicCache", "PagedCache")
        if "beams" in parts:
            what = f"{name}, 8 x 512, 4 beams, a step"
            show(what, few, options.rounds, lambda kind, m=model: beams_ms(kind, m, 8, 512))
        if "prefix" in parts:
            what = f"{name}, 16 prompts that begin alike"
            show(what, few, options.rounds, lambda kind, m=model: prefix_ms(kind, m))


if __name__ == "__main__":
    main()
