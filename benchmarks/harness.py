"""What the benchmarks share: options, repeated timing within a budget, the machine, and how rows are shown.

Every script prints rows: a table for people, or with --json one list on one line.  --toy runs at a size
that the tests can afford.

Imported by the scripts beside it.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import paged_kv
from paged_kv.commands.demo import LiveLine
from paged_kv.machine import num_cpus


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one line: a list of rows")
    parser.add_argument("--toy", action="store_true", help="a size that takes a second")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds in all, about (default 60)")
    return parser


class Timer:
    """Times calls, as often as the budget of seconds allows: at least `least` times, at most `most`."""

    def __init__(self, budget: float, num_rows: int, least: int = 5, most: int = 200) -> None:
        self.seconds_per_row, self.least, self.most = budget / num_rows, least, most

    def us(self, call: Callable[[], object]) -> dict[str, float]:
        """Median and quartiles in microseconds, after one call that does not count."""
        call()
        times: list[float] = []
        end = time.perf_counter() + self.seconds_per_row
        while len(times) < self.most and (len(times) < self.least or time.perf_counter() < end):
            begin = time.perf_counter_ns()
            call()
            times.append((time.perf_counter_ns() - begin) / 1e3)
        low, median, high = statistics.quantiles(times, n=4)
        return {"us": round(median, 2), "us_low": round(low, 2), "us_high": round(high, 2)}


def progress(items: Iterable, name: str) -> Iterator:
    """The items, with a line on a terminal that says how far it is."""
    items, live = list(items), LiveLine(sys.stderr)
    for i, item in enumerate(items):
        live.update(f"{name}: {i} of {len(items)}")
        yield item
    live.clear()


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def machine() -> dict[str, object]:
    """What a figure depends on."""
    return {
        "cpu": cpu_name(),
        "cpus": num_cpus(),
        "kernel": paged_kv.kernels().active,
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "paged_kv": version("paged_kv"),
    }


def packed(results: dict[str, Any]) -> bytes:
    """JSON for a results file: lists of rows become the names of columns, and a line of values per row."""
    parts = []
    for name, part in results.items():
        text = json.dumps(part)
        if isinstance(part, list) and part:
            columns = list(dict.fromkeys(column for row in part for column in row))
            lines = ",\n".join(json.dumps([row.get(column) for column in columns]) for row in part)
            text = f'{{"columns": {json.dumps(columns)}, "rows": [\n{lines}\n]}}'
        parts.append(f"{json.dumps(name)}: {text}")
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode()


def unpacked(text: str | bytes) -> dict[str, Any]:
    """What `packed` was given: rows are dictionaries, without what a row does not have."""

    def rows(part: Any) -> Any:
        if not isinstance(part, dict) or part.keys() != {"columns", "rows"}:
            return part
        pairs = [zip(part["columns"], row, strict=True) for row in part["rows"]]
        return [{column: value for column, value in row if value is not None} for row in pairs]

    return {name: rows(part) for name, part in json.loads(text).items()}


def show(rows: Sequence[dict[str, object]], as_json: bool) -> None:
    """A line of JSON, or the machine and a table."""
    if as_json:
        print(json.dumps(rows))
        return
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    names = list(rows[0])
    cells = [names, *([_text(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
