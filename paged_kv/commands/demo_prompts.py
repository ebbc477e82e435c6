"""What the demo serves: questions to a model that answers, beginnings of modules to the small BitNet.

Imports model_options and texts.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .._binding import integer
from ..errors import ArgumentError
from ..models.bitnet import TINY_BITNET
from .model_options import Opened
from .texts import read_text, require_text

STANDARD_LIBRARY = Path(os.__file__).parent
#: What all modules begin with: 128 tokens.
SYSTEM_PROMPT = '''"""A module of Python's standard library.

It is written as all of them are: a docstring says what the module is for; imports, constants in capitals,
then classes and functions with docstrings of their own.  Names are words, lines are short, errors are raised
where they are found.  What is private begins with an underscore, and __all__ lists what is not.
"""
'''
QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Write three short sentences about the sea.",
    "Why is the sky blue?",
    "Give me a simple recipe for pancakes.",
    "What is the difference between a list and a tuple in Python?",
    "Why do leaves change colour in autumn?",
    "Name five animals that live in Africa.",
    "How do I boil an egg?",
    "Write a polite email that requests a day off.",
    "What does photosynthesis mean?",
    "Who was Albert Einstein?",
    "Give me a title for a story about a lost dog.",
    "What should I pack for a week in the mountains?",
    "How does a bicycle stay upright?",
    "Explain gravity to a child.",
    "What is the boiling point of water?",
)


@dataclass
class Prompt:
    """A prompt's ids, and what is shown of it.

    source : where the text comes from
    shown : the text before the new one
    """

    source: str
    ids: list[int]
    shown: str


def choose_prompts(options: argparse.Namespace, found: Opened) -> list[Prompt]:
    """The user's texts, or those of the demo: questions where the model has a chat template."""
    positions = found.model.config.max_position_embeddings
    room = positions - options.max_tokens
    if not 1 <= options.max_tokens < positions - 1:
        raise ArgumentError(f"--max-tokens is {options.max_tokens}; the model has {positions} positions")
    texts = [("--prompt", require_text("--prompt", text)) for text in options.prompt or []]
    texts += [(path, read_text(Path(path))) for path in options.file or []]
    count = options.sequences if options.sequences is not None else len(texts) or 16
    integer("--sequences", count, 1, 2**16)
    if found.tokenizer.chat_template is not None:
        return _questions(found, texts, count, room)
    lengths, system = [room] * count, ""
    if not texts:
        system = SYSTEM_PROMPT
        texts = list(held_out_texts())
        # In an order that mixes short and long.
        lengths = [max(1, round(room * (i * 7 % count + 1) / count)) for i in range(count)]
    prompts = []
    for i, length in enumerate(lengths):
        source, text = texts[i % len(texts)]
        ids = found.tokenizer.encode(system + text)[:length]
        last_lines = "\n".join(found.tokenizer.decode(ids).splitlines()[-3:])
        prompts.append(Prompt(f"{source}, after {len(ids)} tokens", ids, last_lines))
    return prompts


def _questions(found: Opened, texts: list[tuple[str, str]], count: int, room: int) -> list[Prompt]:
    questions = [text for _, text in texts] or QUESTIONS
    prompts = []
    for i in range(count):
        question = questions[i % len(questions)]
        ids = found.tokenizer.chat([{"role": "user", "content": question}])
        if len(ids) > room:
            raise ArgumentError(f"a question has {len(ids)} tokens, the model has room for {room}")
        prompts.append(Prompt(question, ids, ""))
    return prompts


def held_out_texts() -> Iterator[tuple[str, str]]:
    """(source, text) of the modules that training held out, as the interpreter at hand has them."""
    own = sorted(Path(__file__).parent.rglob("*.py"))
    for i, name in enumerate((TINY_BITNET / "held_out.txt").read_text().split()):
        path, source = STANDARD_LIBRARY / name, name
        if not path.exists():
            path = own[i % len(own)]
            source = f"{path.name} of paged_kv instead of {name}, which this Python lacks"
        yield source, f"# {name}\n{path.read_text(encoding='utf-8')}"
