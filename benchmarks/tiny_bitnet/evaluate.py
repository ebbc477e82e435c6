"""Judge tiny_bitnet.npz: do three implementations agree, how good is it, does it copy?

    python evaluate.py --work DIR                  needs DIR/corpus.npz and DIR/checkpoint.pt
    python evaluate.py --work DIR --only parity    or bits, induction, samples

The implementations: reference.py (numpy), transformers' BitNetForCausalLM on the exported file, and
the training model on its float weights.  Everything but parity is measured on transformers' model.
"""

import argparse
import copy
import itertools
import json
import math
import os
import tempfile
from pathlib import Path

# transformers compiles its rounding functions; for these few calls the compiler would take longest.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import bpe
import numpy as np
import reference
import torch
from corpus import HELD_OUT
from export import int8_rows, load_trained
from reference import MODEL
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import BitNetForCausalLM

WINDOW, STRIDE = 1024, 512
BEGIN_ID = 0


def main():
    args = parse_arguments()
    corpus = np.load(args.work / "corpus.npz")
    exported = load_transformers(args.model)
    trained = load_trained(args.work / "checkpoint.pt")
    parts = {
        "parity": lambda: report_parity(args.model, exported, trained, corpus),
        "bits": lambda: report_bits_per_byte(exported, trained, corpus),
        "induction": lambda: report_induction(exported, corpus),
        "samples": lambda: report_samples(exported, corpus),
    }
    with torch.no_grad():
        for part in [args.only] if args.only else parts:
            print(f"\n== {part}")
            parts[part]()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=MODEL / "tiny_bitnet.npz")
    parser.add_argument("--only", choices=("parity", "bits", "induction", "samples"))
    return parser.parse_args()


def load_transformers(path):
    """The exported file as BitNetForCausalLM: its ternary weights go in packed, as they are."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    config = json.loads(arrays.pop("config").tobytes())
    scales = arrays.pop("model.embed_tokens.weight_scale")
    arrays["model.embed_tokens.weight"] = arrays["model.embed_tokens.weight"] * scales[:, None]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        save_file(arrays, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        return BitNetForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# ---- parity


def report_parity(path, exported, trained, corpus):
    """Activations are rounded to int8: a last-bit difference moves one that lies halfway by a whole
    step.  So two right implementations differ by what one differs from itself when its embedding is
    off by 1e-7 of its value, the last line of each length; before the first such flip, by 1e-5."""
    config, weights = reference.load(path)
    trained.embed_tokens.weight.copy_(rounded_embedding(trained))
    nudged = copy.deepcopy(trained)
    nudged.embed_tokens.weight.mul_(1 + 1e-7 * torch.randn_like(nudged.embed_tokens.weight))
    for length in (8, 64, 256, 1024):
        ids = corpus["held_out_ids"][:length].astype(np.int64)
        batch = torch.from_numpy(ids)[None]
        by_numpy = reference.forward(config, weights, ids)
        by_transformers = exported(batch).logits[0].numpy()
        by_training = trained(batch)[0].numpy()
        print(f"{length} tokens")
        print(f"    numpy - transformers      {difference(by_numpy, by_transformers)}")
        print(f"    numpy - training          {difference(by_numpy, by_training)}")
        print(f"    training - transformers   {difference(by_training, by_transformers)}")
        print(f"    training - nudged         {difference(by_training, nudged(batch)[0].numpy())}")
    print(f"bpe.py gives the ids of `tokenizers` on all held-out text: {bpe_agrees(corpus)}")


def bpe_agrees(corpus):
    tokenizer = bpe.Tokenizer(MODEL / "tokenizer.json")
    documents = np.split(corpus["held_out_ids"], corpus["held_out_starts"][1:-1])
    texts = [document[1:-1].tolist() for document in documents]  # without the begin and end tokens
    return all(tokenizer.encode(tokenizer.decode(ids)) == ids for ids in texts)


def rounded_embedding(model):
    codes, scales = int8_rows(model.embed_tokens.weight.numpy())
    return torch.from_numpy(codes * scales[:, None])


def difference(a, b):
    distance = np.abs(a - b)
    same = np.mean(a.argmax(-1) == b.argmax(-1))
    return (
        f"median {np.median(distance):.1e}  largest {distance.max():.1e}  "
        f"of logits with deviation {a.std():.2f}; same likeliest token {100 * same:.1f} %"
    )


# ---- bits a byte


def report_bits_per_byte(exported, trained, corpus):
    print(f"exported file, by transformers: {bits_per_byte(lambda ids: exported(ids).logits, corpus)[0]:.4f}")
    print(f"training model, float embedding: {bits_per_byte(trained, corpus)[0]:.4f}")
    trained.embed_tokens.weight.copy_(rounded_embedding(trained))
    total, each = bits_per_byte(trained, corpus)
    print(f"training model, int8 embedding: {total:.4f}")
    for name, value in zip(HELD_OUT, each, strict=True):
        print(f"    {name:20s} {value:.3f}")


def bits_per_byte(logits_of, corpus):
    """Over all held-out modules, and for each; every token but the first few sees 512 to 1023 before it."""
    ids, starts, num_bytes = (corpus[f"held_out_{name}"] for name in ("ids", "starts", "bytes"))
    nats = [
        document_nats(logits_of, torch.from_numpy(ids[begin:end].astype(np.int64)))
        for begin, end in itertools.pairwise(starts)
    ]
    bits = np.array(nats) / math.log(2)
    return bits.sum() / num_bytes.sum(), bits / num_bytes


def document_nats(logits_of, ids):
    """Windows overlap by half; each token is counted in the first window that predicts it."""
    total, counted = 0.0, 1
    for begin in range(0, max(1, len(ids) - STRIDE), STRIDE):
        window = opened(ids[begin : begin + WINDOW + 1])
        losses = F.cross_entropy(logits_of(window[None, :-1])[0], window[1:], reduction="none")
        total += losses[counted - begin - 1 :].sum().item()
        counted = begin + len(window)
    return total


def opened(window):
    """Training rows begin with the begin token wherever they were cut; so do these."""
    return torch.cat((torch.tensor([BEGIN_ID]), window[1:]))


# ---- induction


def report_induction(model, corpus):
    first, second = repetition_loss(model, corpus)
    print(f"100 random tokens, twice: {first:.2f} nats a token the first time, {second:.2f} the second")
    for distance in (20, 50, 100, 200, 400, 600, 800):
        whole, tokens = planted_name_accuracy(model, corpus, distance)
        control, _ = planted_name_accuracy(model, corpus, distance, plant=False)
        print(
            f"a made-up name {distance} tokens back: {100 * whole:.0f} % completed whole from its first "
            f"token, {100 * tokens:.0f} % of its tokens (not planted: {100 * control:.0f} % whole)"
        )
    for begin, end, value in loss_by_position(model, corpus):
        print(f"held-out tokens at positions {begin} to {end}: {value:.3f} nats")


def repetition_loss(model, corpus, period=100, num_rows=32):
    rng = np.random.default_rng(0)
    rows = np.stack([np.tile(rng.integers(2, model.config.vocab_size, period), 2) for _ in range(num_rows)])
    rows = torch.from_numpy(np.pad(rows, ((0, 0), (1, 0)), constant_values=BEGIN_ID))
    losses = F.cross_entropy(model(rows[:, :-1]).logits.transpose(1, 2), rows[:, 1:], reduction="none")
    return losses[:, :period].mean().item(), losses[:, period + 1 :].mean().item()


def planted_name_accuracy(model, corpus, distance, num_trials=64, plant=True):
    """`self.NAME = value`, held-out code, `return self.N`: does the rest of NAME follow?

    NAME is five random pieces of two to four letters, so no text has it.  Returns the share of
    names and of their tokens that are the likeliest continuation throughout.
    """
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    pieces = [id for id in range(2, tokenizer.get_vocab_size()) if is_name_piece(tokenizer.id_to_token(id))]
    before = tokenizer.encode("\n\nclass Parser:\n    def __init__(self, value):\n        self.").ids
    after = tokenizer.encode(" = value\n").ids
    question = tokenizer.encode("\n\n    def get(self):\n        return self.").ids

    rng = np.random.default_rng(distance)
    rows, names = [], rng.choice(pieces, (num_trials, 5))
    for name in names:
        begin = rng.integers(len(corpus["held_out_ids"]) - distance)
        filler = corpus["held_out_ids"][begin : begin + distance]
        planted = name if plant else rng.choice(pieces, 5)
        rows.append(np.concatenate(([BEGIN_ID], before, planted, after, filler, question, name)))
    rows = torch.from_numpy(np.stack(rows).astype(np.int64))
    guesses = torch.cat([model(batch).logits[:, -5:-1].argmax(-1) for batch in rows.split(8)])
    right = guesses == torch.from_numpy(names[:, 1:])
    return right.all(-1).float().mean().item(), right.float().mean().item()


def is_name_piece(token):
    return token.isascii() and token.isalpha() and token.islower() and 2 <= len(token) <= 4


def loss_by_position(model, corpus, num_rows=64):
    ids = torch.from_numpy(corpus["held_out_ids"].astype(np.int64))
    begins = torch.linspace(0, len(ids) - WINDOW - 1, num_rows).long()
    losses = torch.zeros(WINDOW)
    for begin in begins:
        window = opened(ids[begin : begin + WINDOW + 1])
        losses += F.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="none") / num_rows
    for begin, end in ((0, 32), (32, 128), (128, 256), (256, 512), (512, 768), (768, 1024)):
        yield begin, end, losses[begin:end].mean().item()


# ---- samples


def report_samples(model, corpus, prompt_tokens=500, shown_tokens=120, num_tokens=160):
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    for name in ("queue.py", "shlex.py"):
        begin = corpus["held_out_starts"][HELD_OUT.index(name)]
        ids = torch.from_numpy(corpus["held_out_ids"][begin : begin + prompt_tokens].astype(np.int64))[None]
        print(f"\n-- {name}, the end of its first {prompt_tokens} tokens")
        print(tokenizer.decode(ids[0, -shown_tokens:].tolist()))
        for label, options in (
            ("greedy", {"do_sample": False}),
            ("temperature 0.8", {"do_sample": True, "temperature": 0.8, "top_k": 0}),
        ):
            torch.manual_seed(0)
            out = model.generate(ids, max_new_tokens=num_tokens, pad_token_id=1, **options)
            print(f"-- {label}\n{tokenizer.decode(out[0, prompt_tokens:].tolist())}")


if __name__ == "__main__":
    main()
