"""What the benchmarks share: repeated timing, the machine's name, and how rows are shown.

Imported by the scripts beside it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import paged_kv
from paged_kv.machine import num_cpus


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of each row (default 30)")
    parser.add_argument("--json", action="store_true", help="one line: a list of rows")
    return parser


def time_us(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median and the quartiles around it, in microseconds, after one call that does not count."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begin) / 1e3)
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {"us": round(median, 2), "us_low": round(low, 2), "us_high": round(high, 2)}


def machine() -> str:
    """The CPU's name, how many there are, and the kernel in use."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    else:
        name = "unknown CPU"
    return f"{name}, {num_cpus()} CPUs, kernels {', '.join(paged_kv.kernels().available)}"


def show(rows: Sequence[dict[str, object]], as_json: bool) -> None:
    """A line of JSON, or the machine and a table."""
    if as_json:
        print(json.dumps(rows))
        return
    print(machine())
    names = list(rows[0])
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
