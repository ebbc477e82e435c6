"""How fast are ternary matrices here: those of BitNet 2B-4T, all layers, from memory.

    python benchmarks/matrices.py [--json] [--toy]

Rows: tokens that go through at once, tokens/s if these matrices were all there is, ms, products a second, and
the weights' bytes a second as a fraction of the read ceiling, measured in the same run. Up to two or three
rows memory is the limit, beyond that arithmetic.
"""

import time

import numpy as np
from harness import arguments, progress, show

from paged_kv.commands.info import read_gb_per_s
from paged_kv.machine import num_cpus
from paged_kv.models.bitnet import SHAPES
from paged_kv.models.matrix import random_matrix


def main() -> None:
    options = arguments(__doc__).parse_args()
    num_layers, repeats = (1, 1) if options.toy else (30, 5)
    config, rng = SHAPES["2b-4t"], np.random.default_rng(0)
    hidden, inter = config.hidden_size, config.intermediate_size
    q_out = config.num_attention_heads * config.head_dim
    qkv_out = q_out + 2 * config.num_key_value_heads * config.head_dim
    shapes = ((qkv_out, hidden), (hidden, q_out), (2 * inter, hidden), (hidden, inter))
    matrices = [random_matrix(*shape, rng) for _ in range(num_layers) for shape in shapes]
    num_bytes = sum(matrix.num_bytes for matrix in matrices)
    ceiling = read_gb_per_s(2**29, num_cpus())
    rows = []
    for num_rows in progress((1, 2, 4, 8, 128, 512), "matrices"):
        x = {width: rng.standard_normal((num_rows, width), np.float32) for width in (hidden, inter)}
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            for matrix in matrices:
                matrix(x[matrix.num_in])
            times.append(time.perf_counter() - begin)
        seconds = float(np.median(times))
        rows.append(
            {
                "rows": num_rows,
                "tokens_per_s": round(num_rows / seconds * num_layers / config.num_hidden_layers, 1),
                "ms": round(1e3 * seconds, 2),
                "g_products_per_s": round(4 * num_bytes * num_rows / seconds / 1e9),
                "of_read_ceiling": round(num_bytes / seconds / 1e9 / ceiling, 2),
            }
        )
    show(rows, options.json)


if __name__ == "__main__":
    main()
