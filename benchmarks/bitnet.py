"""How fast is a BitNet here: the small one that ships, served to 16 sequences, against its numpy form.

    python benchmarks/bitnet.py [--json] [--toy]

Real sizes: `paged-kv bench-model`. Rows: way, tokens/s of decoding (all sequences together, after their
prompts), ms a step, and how many times faster the kernels are. Both ways attend through the same cache.
"""

import sys
import time
from pathlib import Path

import numpy as np
from harness import arguments, progress, show

from paged_kv.models.bitnet import BitNetModel

sys.path.insert(0, str(Path(__file__).parent / "tiny_bitnet"))
from numpy_form import NumpyBitNet

NUM_SEQUENCES, PROMPT_TOKENS = 16, 64
PAUSE_S = 0.3  # numpy's BLAS goes on spinning for a while, on cores that the next one needs


def main() -> None:
    options = arguments(__doc__).parse_args()
    num_steps, repeats = (4, 1) if options.toy else (64, 5)
    kernels, numpy_form = BitNetModel.tiny(), NumpyBitNet()
    times: dict[str, list[float]] = {"numpy form": [], "kernels": []}
    for _ in progress(range(repeats), "bitnet"):
        for way, model in (("numpy form", numpy_form), ("kernels", kernels)):
            time.sleep(PAUSE_S)
            times[way].append(seconds_a_step(kernels, model, num_steps))
    medians = {way: float(np.median(values)) for way, values in times.items()}
    rows = [
        {
            "way": way,
            "sequences": NUM_SEQUENCES,
            "decode_tokens_per_s": round(NUM_SEQUENCES / seconds, 1),
            "ms_per_step": round(1e3 * seconds, 3),
            "faster": round(medians["numpy form"] / seconds, 2),
        }
        for way, seconds in medians.items()
    ]
    show(rows, options.json)


def seconds_a_step(shape: BitNetModel, model: BitNetModel | NumpyBitNet, num_steps: int) -> float:
    rng = np.random.default_rng(0)
    pages = NUM_SEQUENCES * -(-(PROMPT_TOKENS + num_steps) // 64)
    with shape.new_cache(num_pages=pages) as cache:
        seqs = [cache.sequence() for _ in range(NUM_SEQUENCES)]
        prompts = rng.integers(0, 2048, (NUM_SEQUENCES, PROMPT_TOKENS))
        with cache.step(seqs, list(prompts)) as step:
            logits = model.forward(prompts.ravel(), step, step.qo_indptr[1:] - 1)
        begin = time.perf_counter()
        for _ in range(num_steps):
            ids = logits.argmax(1)
            with cache.step(seqs, [1] * NUM_SEQUENCES) as step:
                logits = model.forward(ids, step, np.arange(NUM_SEQUENCES))
        return (time.perf_counter() - begin) / num_steps


if __name__ == "__main__":
    main()
