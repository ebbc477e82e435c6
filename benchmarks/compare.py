"""How does paged_kv compare with the other attention kernels for cached keys and values, on this machine?

    python benchmarks/compare.py [--work decode,prefill,append,low_bit] [--shapes 32/8/128]
                                 [--dtypes bfloat16] [--cells 8x2048] [--json FILE] [--toy]

`make bench-rivals` runs all of it, in an environment that has the rivals. Each case gives all of them the
same random q, k and v. All are set up first and then take turns, so that a noisy moment affects all;
caches are copied until a gigabyte is walked through in turn, and huge pages are for everyone. Rows:
microseconds (median and quartiles of all turns), GB/s of keys and values, as a share of a read-only walk
of our pages in the same turns, GFLOP/s, `ours`: how many times as long as paged_kv it took, and the
largest error against float64. paged_kv, OpenVINO, ONNX Runtime, vLLM and transformers append the new
token in the same call.

Decode: one new token for each of `batch` sequences. Prefill: new tokens at the end of one sequence. Append:
keys and values of one token for each of 64 sequences, nanoseconds for each token and kv head. Low bit: decode
over keys and values of 8 and 4 bits (low_bit_rivals.py), beside ours of 16.
"""

import os

# Before torch is imported: huge pages for its tensors.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import gc
import itertools
import statistics
import sys
import time
from pathlib import Path

import ceiling
import numpy as np
import torch
from harness import machine, packed, progress, show
from low_bit_rivals import LOW_BIT
from rivals import NAMES, RIVALS, available

from paged_kv.files import replace_files
from paged_kv.machine import num_cpus

DTYPES = {name: dtype for dtype, name in NAMES.items()}
WALKED_BYTES = 2**30
TOY_CELLS = {"decode": "2x64", "prefill": "32+32", "append": "2x64", "low_bit": "2x64"}
SHAPES = "32/8/128,32/32/128,20/5/128"
CELLS = {"decode": "1x2048,8x2048,32x1024,1x32768", "prefill": "2048+0,512+4096,128+16384"}
CELLS["append"] = "64x16"
CELLS["low_bit"] = "8x2048"


def reference(q, k, v):
    """q [q heads, dim], k and v [tokens, kv heads, dim]: attention in float64."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    group = q.shape[0] // k.shape[1]
    out = np.empty_like(q)
    for head in range(q.shape[0]):
        scores = k[:, head // group] @ q[head] * q.shape[1] ** -0.5
        weights = np.exp(scores - scores.max())
        out[head] = weights @ v[:, head // group] / weights.sum()
    return out


def set_up(work, inputs, copies, num_threads, expected, among=RIVALS):
    """The calls of each rival, and its error; what cannot be set up is reported on stderr."""
    calls, errors, rivals = {}, {}, {}
    there, _ = available(among)
    for name, rival in there.items():
        if inputs[0].dtype not in rival.dtypes or not hasattr(rival, work):
            continue
        try:
            rivals[name] = rival(num_threads)
            each = getattr(rivals[name], work)(*inputs, copies)
            result = rivals[name].result(each[0]())
            errors[name] = max(float(np.abs(result[row] - out).max()) for row, out in expected.items())
            calls[name] = each
        except Exception as error:
            what = f"{name}, {work}, {NAMES[inputs[0].dtype]}"
            print(f"{what}: {type(error).__name__}: {error!s:.120}", file=sys.stderr)
    return calls, errors, rivals


def take_turns(calls, seconds, rounds=5):
    """Microseconds of each call's every turn, by name."""
    times = {name: [] for name in calls}
    cycles = {name: itertools.cycle(each) for name, each in calls.items()}
    for name in calls:
        next(cycles[name])()
    for _ in range(rounds):
        for name in calls:
            end = time.perf_counter() + seconds / rounds
            count = 0
            while count < 2 or time.perf_counter() < end:
                call = next(cycles[name])
                begin = time.perf_counter_ns()
                call()
                times[name].append((time.perf_counter_ns() - begin) / 1e3)
                count += 1
    return times


def rows_of(case, times, errors, num_bytes, flop):
    walk = statistics.median(times["walk"]) if "walk" in times else None
    ours = statistics.median(times["paged_kv"])
    for name in times:
        low, median, high = statistics.quantiles(times[name], n=4)
        yield {
            **case,
            "rival": name,
            "us": round(median, 1),
            "us_low": round(low, 1),
            "us_high": round(high, 1),
            "gb_per_s": round(num_bytes / median / 1e3, 1),
            "of_walk": round(walk / median, 2) if walk else 0.0,
            "gflop_per_s": round(flop / median / 1e3, 1),
            "ours": round(median / ours, 2),
            "error": float(f"{errors.get(name, 0):.1e}"),
        }


def low_bit(shape, dtype, batch, context, options):
    """Decode over pages of fewer bits, beside our own of 16."""
    return decode(shape, dtype, batch, context, options, LOW_BIT, "low_bit")


def decode(shape, dtype, batch, context, options, among=RIVALS, work="decode"):
    num_q_heads, num_kv_heads, dim = shape
    q = torch.randn(batch, num_q_heads, dim).to(dtype)
    k, v = (torch.randn(batch, context, num_kv_heads, dim).to(dtype) for _ in "kv")
    num_bytes = 2 * k.numel() * k.element_size()
    copies = 1 if options.toy or options.hot else max(1, min(256, WALKED_BYTES // num_bytes))
    expected = {row: reference(q[row], k[row], v[row]) for row in {0, batch - 1}}
    calls, errors, rivals = set_up("decode", (q, k, v), copies, options.threads, expected, among)
    cache = rivals["paged_kv"].cache
    memory, block = cache._store.pool.data(), cache._store.layout.page_share_bytes
    pages, num_pages = rivals["paged_kv"].pages, cache.stats().num_pages
    calls["walk"] = [
        ceiling.reader(memory, block, layer * num_pages + pages, options.threads) for layer in range(copies)
    ]
    times = take_turns(calls, options.seconds)
    case = {"work": f"hot {work}" if options.hot else work, "shape": "/".join(map(str, shape))}
    case |= {"dtype": NAMES[dtype], "cell": f"{batch}x{context}", "threads": options.threads}
    return rows_of(case, times, errors, num_bytes, 4 * batch * context * num_q_heads * dim)


def prefill(shape, dtype, new, past, options):
    num_q_heads, num_kv_heads, dim = shape
    q = torch.randn(new, num_q_heads, dim).to(dtype)
    k, v = (torch.randn(new + past, num_kv_heads, dim).to(dtype) for _ in "kv")
    expected = {
        row: reference(q[row], k[: past + row + 1], v[: past + row + 1]) for row in (0, new // 2, new - 1)
    }
    calls, errors, _ = set_up("prefill", (q, k, v), 1, options.threads, expected)
    times = take_turns(calls, options.seconds)
    case = {"work": "prefill", "shape": "/".join(map(str, shape)), "dtype": NAMES[dtype]}
    case |= {"cell": f"{new}+{past}", "threads": options.threads}
    flop = 4 * num_q_heads * dim * (new * past + new * (new + 1) // 2)
    return rows_of(case, times, errors, 2 * k.numel() * k.element_size(), flop)


def append(shape, dtype, batch, context, options):
    _, num_kv_heads, dim = shape
    k, v = (torch.randn(batch, context, num_kv_heads, dim).to(dtype) for _ in "kv")
    copies = 1 if options.toy else max(2, WALKED_BYTES // (2 * k.numel() * k.element_size()))
    calls = {}
    for name, rival in available()[0].items():
        if dtype in rival.dtypes and hasattr(rival, "append"):
            calls[name] = rival(options.threads).append(k, v, copies)
    times = take_turns(calls, options.seconds)
    case = {"work": "append", "shape": "/".join(map(str, shape)), "dtype": NAMES[dtype]}
    case |= {"cell": f"{batch}x{context}", "threads": options.threads}
    for row in rows_of(case, times, {}, 2 * batch * num_kv_heads * dim * k.element_size(), 0):
        yield row | {"ns_per_token_and_head": round(1e3 * row["us"] / batch / num_kv_heads, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", default="decode,prefill,append,low_bit")
    parser.add_argument("--shapes", default=SHAPES, help=f"q heads/kv heads/head_dim (default {SHAPES})")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--cells", help="decode: batch x context; prefill: new + past")
    parser.add_argument("--threads", type=int, default=num_cpus())
    parser.add_argument("--seconds", type=float, default=1.0, help="of each rival in each case (default 1)")
    parser.add_argument("--hot", action="store_true", help="one copy: what fits stays in the shared cache")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.add_argument("--toy", action="store_true", help="a size that takes seconds")
    options = parser.parse_args()
    if options.toy:
        options.shapes, options.dtypes, options.seconds = "4/2/32", "float32", 0.05
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    for name, reason in available()[1].items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    rows = []
    for work in options.work.split(","):
        cells = options.cells or (TOY_CELLS if options.toy else CELLS)[work]
        dtypes = options.dtypes.split(",")
        if work == "low_bit":  # inputs that all of them take
            dtypes = [dtype for dtype in dtypes if dtype == "bfloat16"]
        lists = (options.shapes.split(","), dtypes, cells.split(","))
        cases = list(itertools.product(*lists))
        for shape, dtype, cell in progress(cases, work):
            sizes = [int(size) for size in cell.replace("+", "x").split("x")]
            run = {"decode": decode, "prefill": prefill, "append": append, "low_bit": low_bit}[work]
            shape = tuple(int(size) for size in shape.split("/"))
            rows += run(shape, DTYPES[dtype], *sizes, options)
            gc.collect()
            if options.json:
                text = packed({"machine": machine(), "rows": rows})
                replace_files({Path(options.json): lambda file, text=text: file.write(text)})
    for work in options.work.split(","):
        of_work = [row for row in rows if row["work"].endswith(work)]
        if of_work:
            show(of_work, False)


if __name__ == "__main__":
    main()
