"""A model on the command line: the options that name it and how it is kept, and what they open.

Imports live_line, texts, text.tokenizer and models.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..formats import Ageing
from ..models.bitnet import TINY_BITNET, BitNetModel
from ..models.config import DecoderConfig
from ..models.decoder import HEADS, DecoderModel
from ..models.model_files import PACKAGED, ModelFiles
from ..pages.layout import VALUE_DTYPES, PageLayout, stored_dtypes
from ..text.tokenizer import ModelTokenizer, open_tokenizer
from .live_line import LiveLine


def kv_dtype(text: str) -> str | tuple[str, str]:
    """What pages store, as PagedKVCache takes it: a dtype, or two with a comma, of keys and of values."""
    names = tuple(text.split(","))
    if len(names) > 2 or not set(names) <= set(VALUE_DTYPES):
        raise argparse.ArgumentTypeError(
            f'"{text}"; give one of {", ".join(VALUE_DTYPES)}, or two, of keys and values: int8,int4'
        )
    return names[0] if len(names) == 1 else (names[0], names[1])


def page_bytes(config: DecoderConfig, dtype: str | tuple[str, str], page_size: int) -> int:
    """Of a page of a model's cache, all layers."""
    shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim, config.head_dim)
    return PageLayout(*shape, stored_dtypes(dtype), page_size).page_bytes


def add_model_options(command: Any, *, default: str | None = None, has_cache: bool = True) -> None:
    """--model, and how its weights and its cache are kept."""
    command.add_argument(
        "--model",
        default=default,
        help=f"a folder of transformers, a .gguf file, or {' or '.join(PACKAGED)} "
        f"(default: {default or 'a small BitNet'})",
    )
    command.add_argument(
        "--weights", default="int8", choices=("int8", "bfloat16"), help="of projections that are not ternary"
    )
    command.add_argument("--head", default="int8", choices=HEADS, help="of the output (default int8)")
    if has_cache:
        usual = "default: bfloat16; a BitNet's: float32"
        command.add_argument(
            "--kv-dtype",
            type=kv_dtype,
            metavar="DTYPE",
            help=f"of pages: {', '.join(VALUE_DTYPES)}, or int8,int4 ({usual})",
        )
        command.add_argument(
            "--kv-recent", type=int, metavar="TOKENS", help="newest tokens that are kept in bfloat16"
        )
        command.add_argument(
            "--kv-ageing",
            nargs="?",
            const="age",
            choices=("age", "mass"),
            help="pages become int8 behind 64 tokens, int4 behind 512; mass: least attention first",
        )
        command.add_argument(
            "--kv-budget", type=int, metavar="TOKENS", help="a sequence holds those that get most attention"
        )
    else:
        command.set_defaults(kv_dtype=None, kv_recent=None, kv_ageing=None, kv_budget=None)


def add_sampling_options(command: Any, *, temperature: float = 0.0) -> None:
    """How tokens are chosen, under the names of transformers and llama.cpp."""
    command.add_argument(
        "--temperature", type=float, default=temperature, help=f"0 is greedy (default {temperature:g})"
    )
    command.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest of this share")
    command.add_argument("--top-k", type=int, default=0, help="keep so many of the likeliest; 0: all")
    command.add_argument("--min-p", type=float, default=0.0, help="drop what is less likely than this share")
    command.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: against loops")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends a text; repeatable"
    )


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_sampling_options` but for `stop`, as Sampler takes them."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    return {name: getattr(options, name) for name in names}


@dataclass
class Opened:
    """A model, its tokenizer, and the options of its cache."""

    model: DecoderModel
    tokenizer: ModelTokenizer
    cache_options: dict[str, Any]


def opened(options: argparse.Namespace, live: LiveLine) -> Opened:
    """What --model names; without it, the small model.  Raises: ArgumentError, ImportError, OSError."""
    given = {
        "dtype": options.kv_dtype,
        "recent_tokens": options.kv_recent,
        "precision_policy": Ageing(by=options.kv_ageing) if options.kv_ageing else None,
        "eviction": "attention" if options.kv_budget is not None else None,
        "budget_tokens": options.kv_budget,
    }
    cache_options = {name: value for name, value in given.items() if value is not None}
    if options.model is None:
        tiny = BitNetModel.tiny()
        begin = [] if tiny.config.bos_token_id is None else [tiny.config.bos_token_id]
        tokenizer = ModelTokenizer(open_tokenizer(TINY_BITNET / "tokenizer.json"), begin)
        return Opened(tiny, tokenizer, cache_options)
    files = ModelFiles.open(options.model)
    tokenizer = ModelTokenizer.from_pretrained(files)
    model = DecoderModel.from_pretrained(
        files,
        head=options.head,
        weights=options.weights,
        progress=partial(live.progress, "blocks"),
    )
    live.clear()
    return Opened(model, tokenizer, cache_options)
