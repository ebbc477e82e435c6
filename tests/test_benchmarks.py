"""The benchmarks at toy size, so that they never rot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "options", "num_rows"),
    [
        ("planning.py", ["--sequences", "1,8"], 2),
        ("decode.py", ["--shape", "4/2/32", "--batch", "2", "--context", "100", "--layers", "2"], None),
    ],
)
def test_a_benchmark_prints_rows(script, options, num_rows):
    command = [sys.executable, str(FOLDER / script), "--repeats", "3", *options]
    done = subprocess.run([*command, "--json"], capture_output=True, check=True, timeout=60)
    rows = json.loads(done.stdout)
    assert len(rows) == num_rows or (num_rows is None and len(rows) >= 6)
    assert all(row["us"] > 0 for row in rows)
    table = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert len(table.splitlines()) == len(rows) + 2
