"""What does a step cost before any attention: reserving for a batch and committing it?

    python benchmarks/planning.py [--sequences 1,64,1024] [--json]

Rows: num_sequences, the time of cache.step(seqs, [1, ...]) and commit together, and that for each sequence.
The pages' bytes are not touched.
"""

import numpy as np
from measure import arguments, show, time_us

import paged_kv


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sequences", default="1,8,64,512,4096", help="batch sizes, with commas")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sequences.split(",")]
    show([measure(size, options.repeats) for size in sizes], options.json)


def measure(num_sequences: int, repeats: int) -> dict[str, object]:
    num_pages = num_sequences * (2 + repeats // 64)
    with paged_kv.PagedKVCache(
        1, 1, 8, num_pages=num_pages, page_size=64, max_sequences=num_sequences, num_threads=1
    ) as cache:
        seqs = [cache.sequence() for _ in range(num_sequences)]
        ones = [1] * num_sequences
        row = np.zeros((num_sequences, 1, 8), np.float32)

        def step_and_commit() -> None:
            step = cache.step(seqs, ones)
            step.write(0, row, row)
            step.commit()

        def write() -> None:
            step.write(0, row, row)

        whole = time_us(step_and_commit, repeats)
        step = cache.step(seqs, ones)
        writing = time_us(write, repeats)["us"]
        step.rollback()
    planning = whole["us"] - writing
    return {
        "num_sequences": num_sequences,
        "us": round(planning, 2),
        "us_per_sequence": round(planning / num_sequences, 3),
        "us_with_write": whole["us"],
        "quartiles": f"{whole['us_low']} to {whole['us_high']}",
    }


if __name__ == "__main__":
    main()
