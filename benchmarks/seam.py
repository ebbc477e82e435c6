"""What does a call from Python cost over the C function that it calls?

    python benchmarks/seam.py [--json] [--toy]

Rows: one call of a layer, on one sequence of one token so that next to nothing is computed; its time, that
of the C function with the same arguments, and the difference.  Two steps in turn are micro-batches: the time
of a call when the calls of two open steps alternate, and layers in turn have two scales.
"""

import functools
from collections.abc import Callable

import numpy as np
from harness import Timer, arguments, progress, show

import paged_kv
from paged_kv._binding import ffi, lib
from paged_kv.attention.arrays import array_of, fill_tensor

CALLS = 100  # that are timed together


def main() -> None:
    options = arguments(__doc__).parse_args()
    timer = Timer(0.2 if options.toy else min(options.budget, 10), 6)
    row = np.zeros((1, 1, 8), np.float32)
    out = np.zeros_like(row)
    rows = []
    with paged_kv.PagedKVCache(1, 1, 8, num_pages=2, page_size=16, num_threads=1) as cache:
        step, other = (cache.step([cache.sequence()], [count]) for count in (1, 2))
        rows_of_other = np.zeros((2, 1, 8), np.float32)

        def in_turn() -> None:
            step.attend(0, row, row, row)
            other.attend(0, rows_of_other, rows_of_other, rows_of_other)

        def scales_in_turn() -> None:
            step.attend(0, row, row, row, sm_scale=0.25)
            step.attend(0, row, row, row, sm_scale=0.5)

        step.attend(0, row, row, row)
        store = cache._store
        attention, pages = step._calls["write and attend"]._arguments, store.pages(0)
        given = ffi.new("pkv_tensor *")
        fill_tensor(given, array_of("row", row))
        attend = functools.partial(lib.pkv_step_attend, store.threads, pages, step._handle, attention)
        write = functools.partial(lib.pkv_step_write, pages, step._handle, given, given)
        calls: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
            ("attend(layer, q, k, v, out=)", lambda: step.attend(0, row, row, row, out=out), attend),
            ("attend(layer, q, k, v)", lambda: step.attend(0, row, row, row), attend),
            ("write(layer, k, v)", lambda: step.write(0, row, row), write),
        ]
        for name, python, c in progress(calls, "seam"):
            whole, inner = us_of(timer, python), us_of(timer, c)
            over = round(whole - inner, 2)
            rows.append({"call": name, "us": whole, "us_of_c": inner, "us_over_c": over, "of_apart": "-"})
        attend_of_other = functools.partial(other.attend, 0, rows_of_other, rows_of_other, rows_of_other)
        apart = (rows[1]["us"] + us_of(timer, attend_of_other)) / 2
        for name, both in (("two steps in turn", in_turn), ("two scales in turn", scales_in_turn)):
            us = round(us_of(timer, both) / 2, 2)
            ratio = round(us / apart, 2)
            rows.append(
                {"call": f"attend, {name}", "us": us, "us_of_c": "-", "us_over_c": "-", "of_apart": ratio}
            )
    show(rows, options.json)


def us_of(timer: Timer, call: Callable[[], object]) -> float:
    def calls() -> None:
        for _ in range(CALLS):
            call()

    return round(timer.us(calls)["us"] / CALLS, 2)


if __name__ == "__main__":
    main()
