"""Plots of what compare.py wrote: decode as a share of the page walk, prefill and append.

    python benchmarks/plot_rivals.py RESULTS.json FOLDER

Writes FOLDER/decode.png (a panel for each shape and dtype, a group of bars for each cell), prefill.png
(GFLOP/s) and append.png (nanoseconds for each token and kv head).
"""

import argparse
from pathlib import Path

from harness import unpacked

from paged_kv.extras import require

TITLES = {
    "decode": ("of_walk", "share of a read-only walk of the same pages"),
    "prefill": ("gflop_per_s", "GFLOP/s"),
    "append": ("ns_per_token_and_head", "ns for each token and kv head"),
}


def plot(rows, work, path):
    """One panel for each shape and dtype, one group of bars for each cell, one bar for each rival."""
    figure_of, label = TITLES[work]
    panels = list(dict.fromkeys((row["shape"], row["dtype"]) for row in rows))
    rivals = list(dict.fromkeys(row["rival"] for row in rows if row["rival"] != "walk"))
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    size = (5.5 * columns, 3.4 * height)
    figure = require("matplotlib.figure", "demo").Figure(figsize=size, layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        own = [row for row in rows if (row["shape"], row["dtype"]) == panel]
        cells = list(dict.fromkeys(row["cell"] for row in own))
        for i, rival in enumerate(rivals):
            heights = {row["cell"]: row[figure_of] for row in own if row["rival"] == rival}
            at = [j + 0.8 * (i / len(rivals) - 0.5) for j in range(len(cells))]
            axis.bar(at, [heights.get(cell, 0) for cell in cells], 0.8 / len(rivals), label=rival)
        axis.set_xticks(range(len(cells)), cells)
        axis.set_title(" ".join(panel), fontsize=9)
        axis.set_ylabel(label, fontsize=7)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    axes[0][0].legend(fontsize=6)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    rows = unpacked(options.results.read_text())["rows"]
    options.folder.mkdir(parents=True, exist_ok=True)
    for work in TITLES:
        if own := [row for row in rows if row["work"] == work]:
            plot(own, work, options.folder / f"{work}.png")
            print(options.folder / f"{work}.png")


if __name__ == "__main__":
    main()
