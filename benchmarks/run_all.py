"""Every benchmark, one after the other: benchmarks/results/<date>-<cpu>.json.

    python benchmarks/run_all.py [--toy] [--budget SECONDS]

The budget is for all of them together (default 480). Run it on a machine that has nothing else to do: the
load at the start is part of what is written.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
from pathlib import Path

from harness import machine, packed

from paged_kv.files import replace_files

FOLDER = Path(__file__).parent
BENCHMARKS = (
    "planning",
    "sharing",
    "cascade",
    "eviction",
    "seam",
    "append_latency",
    "requested_table",
    "utilization",
    "serving_overhead",
    "attention",
)
BENCHMARKS += ("bitnet", "matrices")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--budget", type=float, default=480.0)
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="folder for the file")
    options = parser.parse_args()
    results: dict[str, object] = {"machine": machine()}
    for name in BENCHMARKS:
        command = [sys.executable, str(FOLDER / f"{name}.py"), "--json"]
        command += ["--budget", str(options.budget / len(BENCHMARKS))] + ["--toy"] * options.toy
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout)
        print(f"{name}: {len(results[name])} rows", flush=True)
    cpu = re.sub(r"[^a-z0-9]+", "-", str(results["machine"]["cpu"]).lower()).strip("-")
    path = options.results / f"{datetime.date.today():%Y-%m-%d}-{cpu}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_files({path: lambda file: file.write(packed(results))})
    print(path)


if __name__ == "__main__":
    main()
