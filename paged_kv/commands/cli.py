"""The command line, paged-kv or python -m paged_kv: demo, info, bench-model, generate, chat, perplexity,
serve, replay, top.

Imports the commands.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import PagedKVError
from ..models.bitnet import SHAPES
from . import bench_model, chat, demo, generate, info, perplexity, replay, serve, top
from .model_options import add_model_options, add_sampling_options, kv_dtype
from .texts import show_everything


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    options = _parser().parse_args(arguments)
    show_everything(sys.stdout)
    try:
        with demo.ended_cleanly():
            if options.command == "info":
                print("\n".join(info.lines()))
                return 0
            if options.command == "bench-model":
                return bench_model.run(options)
            if options.command == "generate":
                return generate.run(options)
            if options.command == "chat":
                return chat.run(options)
            if options.command == "serve":
                return serve.run(options)
            if options.command == "replay":
                return replay.run(options)
            if options.command == "top":
                return top.run(options)
            if options.command == "perplexity":
                return perplexity.run(options)
            return demo.run(options)
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`).  Python would flush again at exit, and report it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (PagedKVError, ImportError, OSError, MemoryError) as error:
        print(f"paged-kv: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="paged-kv", description="A paged KV cache for inference on CPUs.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="machine, kernel, memory and the read ceiling")
    command = commands.add_parser(
        "demo",
        help="serve many prompts at once, and compare with a concatenated cache and with none",
        description="Serve prompts in three ways that must give the same tokens: with a small BitNet, or "
        "with a model that answers 16 questions at once (--model smollm2).",
    )
    add_model_options(command, has_cache=False)
    command.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    command.add_argument("--file", action="append", metavar="PATH", help="the same, from a file")
    command.add_argument("--max-tokens", type=int, default=100, help="new tokens of each (default 100)")
    command.add_argument("--sequences", type=int, help="how many prompts (default 16, or those given)")
    command.add_argument("--temperature", type=float, help="0 is greedy (default: 0.8; of questions 0)")
    command.add_argument("--seed", type=int, default=0, help="of the generators, one for each prompt")
    command.add_argument("--plot", metavar="FILE", help="draw pages and utilization over time")
    command.add_argument("--json", action="store_true", help="one line of JSON instead of texts and table")
    _add_bench_model(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_perplexity(commands)
    _add_serve(commands)
    _add_replay(commands)
    _add_top(commands)
    return parser


def _add_bench_model(commands: Any) -> None:
    command = commands.add_parser(
        "bench-model",
        help="tokens a second of BitNets of real sizes, with random weights",
        description="Prompts, and decoding at several batches and contexts, beside the read ceiling.",
    )
    command.add_argument("--shape", default="2b-4t", help=f"of {', '.join(SHAPES)}; commas (default 2b-4t)")
    command.add_argument("--batch", default="1", help="sequences at once, as 1,8; or auto (default 1)")
    command.add_argument("--context", default="128", help="tokens that they hold, as 512,2048 (default 128)")
    command.add_argument("--memory", help="bytes that auto may give the cache, as 4GiB (default: half)")
    command.add_argument("--kv-dtype", default="bfloat16", type=kv_dtype, metavar="DTYPE", help="of pages")
    command.add_argument("--steps", type=int, default=12, help="decode steps that are timed (default 12)")
    command.add_argument("--recompute", action="store_true", help="also against no cache, at batch 1")
    command.add_argument("--json", action="store_true", help="one line of JSON: a list of rows")


def _add_generate(commands: Any) -> None:
    command = commands.add_parser(
        "generate",
        help="text from a model, and what it took",
        description="Go on with prompts, all at once; say where the time went, and what a cache is worth.",
    )
    add_model_options(command)
    command.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be repeated")
    command.add_argument("--chat", action="store_true", help="prompts are questions, by the chat template")
    command.add_argument(
        "--special-tokens", action="store_true", help="special tokens in prompts are tokens, not text"
    )
    command.add_argument("--max-tokens", type=int, default=64, help="new tokens of each (default 64)")
    add_sampling_options(command)
    command.add_argument("--stop-id", type=int, action="append", default=[], help="ends a text too")
    command.add_argument("--no-compare", action="store_true", help="leave the other caches out")
    command.add_argument("--json", action="store_true", help="one line of JSON")


def _add_chat(commands: Any) -> None:
    command = commands.add_parser(
        "chat",
        help="a conversation with a model",
        description="Answers as they come.  Earlier turns are remembered by the prefix cache.",
    )
    add_model_options(command, default="smollm2")
    command.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a message, instead of the terminal's; repeatable"
    )
    command.add_argument("--system", metavar="TEXT", help="the message before the first one")
    command.add_argument("--max-tokens", type=int, default=512, help="of an answer (default 512)")
    command.add_argument("--context", type=int, help="tokens of a conversation (default: at most 4096)")
    add_sampling_options(command)
    command.add_argument("--json", action="store_true", help="a line of JSON for each --prompt")


def _add_perplexity(commands: Any) -> None:
    command = commands.add_parser(
        "perplexity",
        help="how well a model predicts a text",
        description="exp of the mean negative log-likelihood of a file's tokens, but for the first.",
    )
    add_model_options(command, default="smollm2")
    command.add_argument("--file", required=True, metavar="TEXT", help="a text in UTF-8, as it is")
    command.add_argument("--json", action="store_true", help="one line of JSON")


def _add_serve(commands: Any) -> None:
    command = commands.add_parser(
        "serve",
        help="a model behind OpenAI's API",
        description="An HTTP server for many clients, over one pool.  Without --model: smollm2 if it is "
        f"installed, else a small BitNet.  A key may also stand in {serve.KEY_VARIABLE}.",
    )
    add_model_options(command)
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1)")
    command.add_argument("--port", type=int, default=8000, help="0: a free one (default 8000)")
    command.add_argument("--name", help="of the model, as clients call it (default: of its file)")
    command.add_argument("--api-key", action="append", metavar="KEY", help="clients need one; repeatable")
    command.add_argument(
        "--memory", help="bytes of the pool, as 4GiB (default: eight contexts, or half of the memory)"
    )
    command.add_argument("--context", type=int, help="tokens of a request (default: the model's)")
    command.add_argument("--max-sequences", type=int, default=256, help="that run at once (default 256)")
    command.add_argument("--max-waiting", type=int, default=256, help="requests that wait (default 256)")
    command.add_argument("--timeout", type=float, help="seconds for a request (default: any)")
    command.add_argument("--drain", type=float, default=30.0, help="seconds at the end (default 30)")


def _add_replay(commands: Any) -> None:
    command = commands.add_parser(
        "replay",
        help="the page of a pool that was recorded",
        description="Show what cache.record(FILE) has written, without a model.",
    )
    command.add_argument("file", metavar="FILE")
    command.add_argument("--port", type=int, default=8001, help="0: a free one (default 8001)")
    command.add_argument("--out", metavar="FILE", help="write a page that needs no server, and end")


def _add_top(commands: Any) -> None:
    command = commands.add_parser("top", help="a server's pool, in a terminal")
    command.add_argument("url", metavar="URL", help="of a server, as http://127.0.0.1:8000")
    command.add_argument("--api-key", metavar="KEY", help=f"or in {serve.KEY_VARIABLE}")
    command.add_argument("--frames", type=int, help="end after so many (default: with the server)")
