"""What does a step cost before any attention: reserving for a batch and committing it?

    python benchmarks/planning.py [--json] [--toy]

Rows: num_sequences, the time of cache.step(seqs, [1, ...]) and commit together, and that for each sequence;
the same with ids, [[5], ...], over it.  The write that a commit needs is timed by itself and subtracted.
"""

import numpy as np
from harness import Timer, arguments, progress, show

import paged_kv


def main() -> None:
    options = arguments(__doc__).parse_args()
    sizes = [1, 8] if options.toy else [1, 8, 64, 512, 4096]
    timer = Timer(0.2 if options.toy else min(options.budget, 30), 3 * len(sizes))
    show([measure(size, timer) for size in progress(sizes, "planning")], options.json)


def measure(num_sequences: int, timer: Timer) -> dict[str, object]:
    num_pages = num_sequences * (2 + 2 * timer.most // 64)
    with paged_kv.PagedKVCache(
        1, 1, 8, num_pages=num_pages, page_size=64, max_sequences=num_sequences, num_threads=1
    ) as cache:
        seqs = [cache.sequence() for _ in range(num_sequences)]
        ones = [1] * num_sequences
        row = np.zeros((num_sequences, 1, 8), np.float32)

        def step_and_commit(new: list[object]) -> None:
            step = cache.step(seqs, new)
            step.write(0, row, row)
            step.commit()

        whole = timer.us(lambda: step_and_commit(ones))
        with_ids = timer.us(lambda: step_and_commit([[5]] * num_sequences))
        step = cache.step(seqs, ones)
        writing = timer.us(lambda: step.write(0, row, row))["us"]
        step.rollback()
    planning = whole["us"] - writing
    return {
        "num_sequences": num_sequences,
        "us": round(planning, 2),
        "us_per_sequence": round(planning / num_sequences, 3),
        "with_ids": round((with_ids["us"] - writing) / planning, 2),
        "us_with_write": whole["us"],
        "quartiles": f"{whole['us_low']} to {whole['us_high']}",
    }


if __name__ == "__main__":
    main()
