"""The command line: paged-kv demo and paged-kv info, also python -m paged_kv.

Imports demo and info.
"""

import argparse
import sys
from collections.abc import Sequence

from . import demo, info
from .errors import PagedKVError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        with demo.ended_cleanly():
            if options.command == "info":
                print("\n".join(info.lines()))
                return 0
            return demo.run(options)
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
        description="Serve prompts with a small BitNet, in three ways that must give the same tokens.",
    )
    command.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    command.add_argument("--file", action="append", metavar="PATH", help="the same, from a file")
    command.add_argument("--max-tokens", type=int, default=100, help="new tokens of each (default 100)")
    command.add_argument("--sequences", type=int, help="how many prompts (default 16, or those given)")
    command.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    command.add_argument("--seed", type=int, default=0, help="of the generators, one for each prompt")
    command.add_argument("--plot", metavar="FILE", help="draw pages and utilization over time")
    command.add_argument("--json", action="store_true", help="one line of JSON instead of texts and table")
    return parser
