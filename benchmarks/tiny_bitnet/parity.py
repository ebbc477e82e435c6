"""Does paged_kv's BitNet give what transformers' BitNetForCausalLM gives on the same weights?

    make parity                                    installs the extra hf, then runs this
    python parity.py [--record FILE]

Teacher-forced on the beginnings of the held-out modules: transformers all at once, paged_kv whole, in a
ragged batch with chunks, and token by token, which must be the same bits.  int8 rounding is a step function,
so two right implementations differ by what one differs from itself when its embedding is off by 1e-6
(`jitter`, the largest of three seeds): no logit may be farther off, and the likeliest token is the same
wherever its lead is more than twice that.

--record writes transformers' logits for a few prompts of our own: what `make test` holds the model against.
"""

import argparse
import copy
import os
import sys
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import numpy as np
import torch
from evaluate import load_transformers
from reference import MODEL
from tokenizers import Tokenizer

from paged_kv.commands.demo_prompts import held_out_texts
from paged_kv.models.bitnet import BitNetModel

#: Prompts of the recorded logits; ours, so that they can be shipped.
OWN_PROMPTS = (
    "def append(self, key, value):\n    self.length += 1\n",
    '"""Pages of a pool, and who owns them."""\n\nimport sys\n\n\nclass Page:\n'
    "    def __init__(self, size):\n        self.size = size\n        self.owners = []\n\n"
    "    def free(self):\n        if self.owners:\n"
    '            raise ValueError("page is in use")\n        return self.size\n\n\n'
    'class Pool:\n    """A list of',
    "#",
)
NUM_RECORDED = 8  # last positions of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    theirs, ours = load_transformers(MODEL / "tiny_bitnet.npz"), BitNetModel.tiny()
    if args.record:
        record(theirs, [[0, *tokenizer.encode(text).ids] for text in OWN_PROMPTS], args.record)
        return
    texts = list(held_out_texts())
    lengths = [60 + 55 * i for i in range(len(texts))]
    prompts = [
        np.array([0, *tokenizer.encode(text).ids][:length])
        for (_, text), length in zip(texts, lengths, strict=True)
    ]
    sys.exit(0 if compare(theirs, ours, prompts) else 1)


@torch.no_grad()
def logits_of(model, prompts) -> list[np.ndarray]:
    return [model(torch.tensor(np.asarray(ids))[None]).logits[0].numpy() for ids in prompts]


def jitter_of(model, prompts, expected, num_seeds: int = 3) -> float:
    """How far the model is from itself with an embedding that is off by 1e-6."""
    largest = 0.0
    for seed in range(num_seeds):
        noise = torch.Generator().manual_seed(seed)
        off = copy.deepcopy(model)
        weight = off.model.embed_tokens.weight
        with torch.no_grad():
            weight.mul_(1 + 1e-6 * torch.randn(weight.shape, generator=noise))
        pairs = zip(logits_of(off, prompts), expected, strict=True)
        largest = max(largest, *(np.abs(a - b).max() for a, b in pairs))
    return float(largest)


def compare(theirs, ours, prompts) -> bool:
    expected = logits_of(theirs, prompts)
    jitter = jitter_of(theirs, prompts, expected)
    got = whole(ours, prompts)
    distance = np.concatenate([np.abs(a - b).max(axis=1) for a, b in zip(got, expected, strict=True)])
    a, b = np.concatenate(got), np.concatenate(expected)
    second, first = np.partition(b, -2, axis=1)[:, -2:].T
    is_clear, is_same = first - second > 2 * jitter, a.argmax(1) == b.argmax(1)
    batched = all(np.array_equal(x, y) for x, y in zip(ragged(ours, prompts), got, strict=True))
    single = all(np.array_equal(x, y[-8:]) for x, y in zip(token_by_token(ours, prompts), got, strict=True))
    print(f"{len(prompts)} prompts, {len(a):,} tokens")
    print(f"largest difference {distance.max():.3f}, jitter {jitter:.3f}; median {np.median(distance):.4f}")
    print(f"same likeliest token {100 * is_same.mean():.2f} %, where the lead is clear "
          f"({100 * is_clear.mean():.0f} % of tokens) {100 * is_same[is_clear].mean():.2f} %")  # fmt: skip
    print(f"ragged batches in chunks give the same bits: {batched}; token by token: {single}")
    return bool(distance.max() <= jitter and is_same[is_clear].all() and batched and single)


def whole(model, prompts) -> list[np.ndarray]:
    """Each prompt by itself, in one step."""
    logits = []
    for ids in prompts:
        with model.new_cache(num_pages=20) as cache, cache.step([cache.sequence()], [ids]) as step:
            logits.append(model.forward(ids, step, np.arange(len(ids))))
    return logits


def ragged(model, prompts) -> list[np.ndarray]:
    """All prompts at once, in chunks of other lengths for each."""
    logits, fed = [[] for _ in prompts], [0] * len(prompts)
    with model.new_cache(num_pages=20 * len(prompts)) as cache:
        seqs = [cache.sequence() for _ in prompts]
        while chosen := [i for i, ids in enumerate(prompts) if fed[i] < len(ids)]:
            new = [prompts[i][fed[i] : fed[i] + 37 + 13 * i] for i in chosen]
            with cache.step([seqs[i] for i in chosen], new) as step:
                rows = model.forward(np.concatenate(new), step, np.arange(len(step.positions)))
                for i, ids, part in zip(chosen, new, np.split(rows, step.qo_indptr[1:-1]), strict=True):
                    logits[i].append(part)
                    fed[i] += len(ids)
    return [np.concatenate(parts) for parts in logits]


def token_by_token(model, prompts) -> list[np.ndarray]:
    """All but the last 8 tokens first, then one of each prompt a step."""
    with model.new_cache(num_pages=20 * len(prompts)) as cache:
        seqs = [cache.sequence() for _ in prompts]
        heads = [ids[:-8] for ids in prompts]
        with cache.step(seqs, heads) as step:
            model.forward(np.concatenate(heads), step, [])
        steps = []
        for j in range(-8, 0):
            ids = [prompt[j] for prompt in prompts]
            with cache.step(seqs, [1] * len(seqs)) as step:
                steps.append(model.forward(ids, step, np.arange(len(ids))))
    return list(np.stack(steps, axis=1))


def record(theirs, prompts, path: Path) -> None:
    expected = logits_of(theirs, prompts)
    arrays = {f"ids_{i}": np.array(ids, np.int16) for i, ids in enumerate(prompts)}
    arrays |= {f"logits_{i}": rows[-NUM_RECORDED:] for i, rows in enumerate(expected)}
    np.savez_compressed(path, jitter=np.float32(jitter_of(theirs, prompts, expected)), **arrays)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
