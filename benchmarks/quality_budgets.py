"""What a budget costs a real model: likelihood of text and planted sentences, once pages were dropped.

    make smollm2 && python benchmarks/quality_budgets.py [--quick] [--json F] [--plot F]

A prompt is computed exactly, in one step; its commit cuts it to 75, 50 or 25 %.  192 tokens that follow read
what is left, without a further cut, and are compared with the whole cache as in quality.py.  Policies:

    window      the first 4 tokens and the newest
    mean        the pages that got most attention, as the mean over all rows that could see them
    last rows   those that got most from the last 32 rows: what "attention" does at the end of a prompt
    both        those with the largest sum of the two, as shares
    top_pages   nothing is dropped; each token reads a share of the pages of 64 tokens, chosen by mean keys

Sentences are planted as in quality.py.  The question is in sight when it ends the prompt that is cut; it is
not when it comes after the cut.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine, packed
from quality import PLACES, Model, Scores, compared, needle_prompts, opened, texts

from paged_kv.pages.budgets import least_budget
from paged_kv.pages.eviction import KeepAttended, KeepNewest, PagesOfSequence

SHARES = (0.75, 0.5, 0.25)
NUM_SCORED = 192


class KeepByMean(KeepAttended):
    """As after single tokens, at the end of a prompt, too."""

    def drop(self, pages: PagesOfSequence, excess_tokens: int) -> Any:
        assert pages.mean_mass is not None
        candidates = pages.numbers[pages.can_be_dropped]
        order = np.argsort(pages.mean_mass[pages.can_be_dropped], kind="stable")
        return candidates[order[: -(-excess_tokens // pages.page_size)]].tolist()


class KeepByBoth(KeepAttended):
    """By the sum of a page's shares: of what the last rows give, and of the means over all rows."""

    def drop(self, pages: PagesOfSequence, excess_tokens: int) -> Any:
        assert pages.mean_mass is not None and pages.recent_mass is not None
        shares = [mass[pages.can_be_dropped] for mass in (pages.mean_mass, pages.recent_mass)]
        score = sum(mass / max(mass.sum(), 1e-30) for mass in shares)
        candidates = pages.numbers[pages.can_be_dropped]
        return candidates[np.argsort(score, kind="stable")[: -(-excess_tokens // pages.page_size)]].tolist()


POLICIES = {"window": KeepNewest, "mean": KeepByMean, "last rows": KeepAttended, "both": KeepByBoth}


class Continued:
    """A prompt that was cut, and what follows it."""

    def __init__(
        self, model: Model, prompt: list[int], policy: str | None, share: float, page_size: int = 64
    ) -> None:
        options: dict[str, Any] = {}
        if policy is not None:
            budget = max(int(share * len(prompt)) // page_size * page_size, least_budget(page_size, 4))
            options = {
                "eviction": POLICIES[policy](),
                "budget_tokens": budget,
                "max_step_tokens": len(prompt),
            }
        num_pages = -(-len(prompt) // page_size) + -(-1024 // page_size)
        self.model = model.model
        self.cache = self.model.new_cache(
            num_pages=num_pages, page_size=page_size, max_sequences=2, **options
        )
        self.seq = self.cache.sequence()
        with self.cache.step([self.seq], [len(prompt)]) as step:
            self.last = self._log_probs(prompt, step, np.array([len(prompt) - 1]))

    def _log_probs(self, ids: list[int], step: Any, rows: np.ndarray) -> np.ndarray:
        logits = self.model.forward(ids, step, rows).astype(np.float32)
        return logits - np.logaddexp.reduce(logits, 1)[:, None]

    def read(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities after each of these tokens, which are rolled back."""
        step = self.cache.step([self.seq], [len(ids)])
        scores = self._log_probs(ids, step, np.arange(len(ids)))
        step.rollback()
        return scores

    def go_on(self, ids: list[int]) -> np.ndarray:
        """The same, of tokens that are kept."""
        with self.cache.step([self.seq], [len(ids)]) as step:
            return self._log_probs(ids, step, np.arange(len(ids)))


def prompts_of(model: Model, length: int, count: int) -> Iterator[list[int]]:
    """Of each text, what it begins with, and the parts that follow."""
    for text in texts().values():
        ids = model.tokenizer.encode(text[: 16 * count * length])
        yield from (ids[at : at + length] for at in range(0, count * length, length))


def measure_texts(
    model: Model, lengths: list[int], num_scored: int, page_size: int, num_prompts: int
) -> list[dict[str, Any]]:
    parts: dict[tuple[str, float], list[tuple[int, Scores]]] = {}
    for length in lengths:
        for own in prompts_of(model, length, num_prompts):
            begin = time.perf_counter()
            prompt, rest = own[:-num_scored], own[-num_scored:]
            expected = Continued(model, prompt, None, 1.0, page_size).read(rest)
            for policy, share in itertools.product(POLICIES, SHARES):
                got = Continued(model, prompt, policy, share, page_size).read(rest)
                parts.setdefault((policy, share), []).append((length, compared(got, expected, own)))
            print(f"    {length} tokens: {time.perf_counter() - begin:.0f} s", flush=True)
    return [{"policy": policy, "share": share} | summed_up(own) for (policy, share), own in parts.items()]


def summed_up(parts: list[tuple[int, Scores]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for length in sorted({length for length, _ in parts}):
        own = [scores for at, scores in parts if at == length]
        row[f"kl_{length}"] = float(np.concatenate([scores.divergences for scores in own]).mean())
        change = sum(scores.bits for scores in own) / sum(scores.baseline_bits for scores in own) - 1
        row[f"bits_change_{length}"] = change
    divergences = np.concatenate([scores.divergences for _, scores in parts])
    top_1 = np.concatenate([scores.same for _, scores in parts]).mean()
    return row | {"tokens": len(divergences), "top_1": float(top_1)}


def finds(
    model: Model,
    prompt: list[int],
    question: int,
    answer: list[int],
    policy: str | None,
    share: float = 1.0,
    page_size: int = 64,
    is_in_sight: bool = True,
) -> bool:
    """Is each token of the answer the likeliest one?  question: how many tokens it has."""
    if is_in_sight:
        cut = Continued(model, prompt, policy, share, page_size)
        scores = np.concatenate([cut.last, cut.read(answer[:-1])])
    else:
        cut = Continued(model, prompt[:-question], policy, share, page_size)
        cut.go_on(prompt[-question:-1])
        scores = cut.read([prompt[-1], *answer[:-1]])
    return bool((scores.argmax(1) == answer).all())


class Reading:
    """A step whose attention reads some of its pages only."""

    def __init__(self, step: Any, share: float) -> None:
        self.step, self.positions = step, step.positions
        self.count = max(1, round(share * step.kv_indptr[-1]))

    def attend(self, *arrays: Any, **options: Any) -> Any:
        return self.step.attend(*arrays, **options, top_pages=self.count)


def measure_reading(
    model: Model, length: int, num_scored: int, page_size: int, num_prompts: int
) -> list[dict[str, Any]]:
    """Of `top_pages`: nothing is dropped, and each token is read by itself."""
    parts: dict[float, list[tuple[int, Scores]]] = {}
    for own in prompts_of(model, length, num_prompts):
        prompt, rest = own[:-num_scored], own[-num_scored:]
        whole = Continued(model, prompt, None, 1.0, page_size)
        expected = whole.read(rest)
        for share in SHARES[1:]:
            seq, scores = whole.seq.fork(), []
            for id in rest:
                with whole.cache.step([seq], [1]) as step:
                    scores.append(whole._log_probs([id], Reading(step, share), np.arange(1)))
            seq.free()
            got = compared(np.concatenate(scores), expected, own)
            parts.setdefault(share, []).append((length, got))
    return [{"policy": "top_pages", "share": share} | summed_up(own) for share, own in parts.items()]


def measure_sentences(model: Model, lengths: list[int]) -> list[dict[str, Any]]:
    prompts = []
    for length in lengths:
        for place, (prompt, answer) in zip(
            PLACES, needle_prompts(model, texts()["prose"], length), strict=True
        ):
            question = f"\nQuestion: What is the secret number of the {place}?\nAnswer: "
            prompts.append((prompt, len(model.tokenizer.encode(question)), answer))
    known = [one for one in prompts if finds(model, *one, None)]
    rows = []
    for policy, page_size in (
        *((policy, 64) for policy in POLICIES),
        *((policy, 16) for policy in ("last rows", "both")),
    ):
        for share in (0.5, 0.25):
            for is_in_sight in (True, False):
                found = sum(finds(model, *one, policy, share, page_size, is_in_sight) for one in known)
                named = {"policy": policy, "page_size": page_size, "share": share}
                rows.append(named | {"is_in_sight": is_in_sight, "found": found, "known": len(known)})
                print(f"    {rows[-1]}", flush=True)
    return rows


def show(kept: list[dict[str, Any]], sentences: list[dict[str, Any]]) -> None:
    lengths = sorted({int(name[3:]) for row in kept for name in row if name.startswith("kl_")})
    heads = "".join(f"   KL {length:5}    bits" for length in lengths)
    print(f"policy      kept{heads}    top-1")
    for row in kept:
        cells = "".join(
            f"   {row[f'kl_{length}']:8.4f} {100 * row[f'bits_change_{length}']:+6.2f}%"
            for length in lengths
            if f"kl_{length}" in row
        )
        print(f"{row['policy']:10} {100 * row['share']:3.0f} %{cells}   {100 * row['top_1']:5.1f}%")
    print("\npolicy     pages   kept   question   found")
    for row in sentences:
        sight = "in sight" if row["is_in_sight"] else "later"
        print(
            f"{row['policy']:10} {row['page_size']:5} {100 * row['share']:4.0f} %   {sight:8}   "
            f"{row['found']} of {row['known']}"
        )


def plot(rows: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("svg" if path.endswith(".svg") else "agg")
    from matplotlib import pyplot

    lengths = sorted(int(name[3:]) for name in rows[0] if name.startswith("kl_"))
    figure, panes = pyplot.subplots(
        1, len(lengths), figsize=(4 * len(lengths), 3.5), sharey=True, squeeze=False
    )
    for axes, length in zip(panes[0], lengths, strict=True):
        for policy in POLICIES:
            own = [row for row in rows if row["policy"] == policy]
            axes.plot(
                [100 * row["share"] for row in own], [row[f"kl_{length}"] for row in own], "o-", label=policy
            )
        axes.set(title=f"{length:,} tokens", xlabel="% of pages kept", yscale="log")
        axes.grid(visible=True, alpha=0.3)
    panes[0][0].set_ylabel("mean KL against the whole cache, nats")
    panes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few tokens of short texts, for a test")
    parser.add_argument("--lengths", default="2048,4096", help="of prompts of texts, with what follows")
    parser.add_argument("--prompts", type=int, default=1, help="of each length and text, one after the other")
    parser.add_argument("--parts", default="texts,reading,sentences", help="what is measured")
    parser.add_argument("--json", help="write the rows to a file")
    parser.add_argument("--plot", help="KL against what is kept, as .png or .svg")
    options = parser.parse_args()
    model = opened()
    lengths = (
        [576] if options.quick else [n for n in map(int, options.lengths.split(",")) if n <= model.max_length]
    )
    print(f"{model.name}, prompts of {lengths} tokens", flush=True)
    size = (32, 16) if options.quick else (NUM_SCORED, 64)
    parts = options.parts.split(",")
    read = measure_reading(model, lengths[0], *size, options.prompts) if "reading" in parts else []
    kept = measure_texts(model, lengths, *size, options.prompts) if "texts" in parts else []
    sizes = [length for length in (1024, 2048) if length <= model.max_length - 8]
    sentences = measure_sentences(model, sizes) if "sentences" in parts and not options.quick else []
    show([*kept, *read], sentences)
    if options.json:
        rows = [{"model": model.name, **row} for row in [*kept, *read]]
        measured = (("rows", rows), ("sentences", sentences))
        found = {"machine": machine(), **{name: own for name, own in measured if own}}
        Path(options.json).write_bytes(packed(found))
    if options.plot:
        plot(kept, options.plot)


if __name__ == "__main__":
    main()
