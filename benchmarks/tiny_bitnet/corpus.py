"""The text: the Python standard library, its tokenizer, and the tokens to train on.

    python corpus.py --work DIR        writes tokenizer.json, held_out.txt and DIR/corpus.npz

One document is one module, opened by its relative path as a comment:

    <|begin|># json/decoder.py\\n...source...<|end|>

Imported by train and evaluate.
"""

import argparse
import os
import re
from pathlib import Path

import numpy as np
from reference import MODEL
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 2048
BEGIN, END = "<|begin|>", "<|end|>"  # ids 0 and 1

# Never trained on: the evaluation set, and the demo's prompts.
HELD_OUT = (
    "bisect.py", "calendar.py", "colorsys.py", "configparser.py", "csv.py", "fnmatch.py",
    "fractions.py", "graphlib.py", "heapq.py", "json/decoder.py", "pprint.py", "queue.py",
    "reprlib.py", "sched.py", "shlex.py", "statistics.py", "string.py", "textwrap.py",
)  # fmt: skip

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "testmock", "site-packages", "pydoc_data", "__phello__"}

# Generated per machine (build paths and flags), or stubs that only warn.
SKIPPED_MODULES = re.compile(r"_sysconfigdata.*|sre_\w+\.py|this\.py|antigravity\.py")

# A newline takes its indentation along; a word takes the space before it.  Only ASCII classes, so
# that Python's own `re` splits text in the same way.
PIECES = r"\n+ *| ?[A-Za-z_]+| ?[0-9]| ?[^ \n\t\r\f\vA-Za-z0-9_]+| +|[\t\r\f\v]+"

TABLE_ROW = re.compile(r"""\s*[\[({]?\s*(0x|'|"|u'|b'|\(|\d|\\u)[^=]*,?\s*(#.*)?""")


def main():
    args = parse_arguments()
    modules = read_modules(args.stdlib)
    held_out = {name: modules.pop(name) for name in HELD_OUT}
    training = without_near_copies(without_tables(modules))

    tokenizer = train_tokenizer(training.values())
    tokenizer.save(str(MODEL / "tokenizer.json"))
    (MODEL / "held_out.txt").write_text("".join(f"{name}\n" for name in held_out))
    save_tokens(args.work / "corpus.npz", tokenizer, training, held_out)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for corpus.npz")
    parser.add_argument("--stdlib", type=Path, default=Path(os.__file__).parent)
    return parser.parse_args()


def read_modules(stdlib):
    """{relative path: document text} of every module worth reading, in path order."""
    modules = {}
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib)
        if SKIPPED_FOLDERS.intersection(name.parts) or SKIPPED_MODULES.fullmatch(name.name):
            continue
        if name.parts[0].startswith("config-"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # lib2to3 and friends keep a few files in other encodings
            continue
        if source.strip():
            modules[name.as_posix()] = f"# {name.as_posix()}\n{source}"
    return modules


def without_tables(modules):
    """Drop modules that are mostly rows of literals, such as encodings/cp1252.py."""

    def is_table(text):
        lines = [line for line in text.splitlines() if line.strip()]
        return sum(bool(TABLE_ROW.fullmatch(line)) for line in lines) > 0.5 * len(lines)

    return {name: text for name, text in modules.items() if not is_table(text)}


def without_near_copies(modules):
    """Drop modules more than half of whose runs of four lines stand in modules already kept."""
    seen, kept = set(), {}
    for name, text in modules.items():
        # The first line is the path, unique by construction.
        lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
        runs = {tuple(lines[i : i + 4]) for i in range(max(1, len(lines) - 3))}
        if len(runs & seen) <= 0.5 * len(runs):
            kept[name] = text
        seen |= runs
    return kept


def train_tokenizer(texts):
    """Byte-level BPE: all 256 bytes are tokens, so that every input can be written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokens(path, tokenizer, training, held_out):
    """Store both sets as token ids end to end; document i is `ids[starts[i]:starts[i + 1]]`."""
    arrays = {}
    for part, documents in (("training", training), ("held_out", held_out)):
        ids = [[0, *tokenizer.encode(text).ids, 1] for text in documents.values()]
        num_bytes = sum(len(text.encode()) for text in documents.values())
        arrays[f"{part}_ids"] = np.concatenate(ids).astype(np.uint16)
        arrays[f"{part}_starts"] = np.cumsum([0] + [len(document) for document in ids])
        arrays[f"{part}_bytes"] = np.array([len(text.encode()) for text in documents.values()])
        num_tokens = len(arrays[f"{part}_ids"])
        print(f"{part}: {len(ids)} modules, {num_bytes:,} bytes, {num_tokens:,} tokens, "
              f"{num_bytes / num_tokens:.3f} bytes a token")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


if __name__ == "__main__":
    main()
