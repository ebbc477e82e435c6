"""What does a call from Python cost over the C function that it calls?

    python benchmarks/seam.py [--json] [--toy]

Rows: one call of a layer, on one sequence of one token so that next to nothing is computed; its time, that
of the C function with the same arguments, and the difference.
"""

import functools
from collections.abc import Callable

import numpy as np
from harness import Timer, arguments, progress, show

import paged_kv
from paged_kv._binding import ffi, lib
from paged_kv.arrays import array_of, set_rows

CALLS = 100  # that are timed together


def main() -> None:
    options = arguments(__doc__).parse_args()
    timer = Timer(0.2 if options.toy else min(options.budget, 10), 6)
    row = np.zeros((1, 1, 8), np.float32)
    out = np.zeros_like(row)
    rows = []
    with paged_kv.PagedKVCache(1, 1, 8, num_pages=1, page_size=16, num_threads=1) as cache:
        step = cache.step([cache.sequence()], [1])
        step.attend(0, row, row, row)
        store = cache._store
        attention, pages = store.repeatable[-1]._arguments, store.pages_of[0]
        given = ffi.new("pkv_rows *")
        set_rows(given, array_of("row", row))
        attend = functools.partial(lib.pkv_attend, store.threads, pages, step._batch, attention)
        write = functools.partial(lib.pkv_append, pages, 1, step._slots, given, given)
        calls: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
            ("attend(layer, q, k, v, out=)", lambda: step.attend(0, row, row, row, out=out), attend),
            ("attend(layer, q, k, v)", lambda: step.attend(0, row, row, row), attend),
            ("write(layer, k, v)", lambda: step.write(0, row, row), write),
        ]
        for name, python, c in progress(calls, "seam"):
            whole, inner = us_of(timer, python), us_of(timer, c)
            over = round(whole - inner, 2)
            rows.append({"call": name, "us": whole, "us_of_c": inner, "us_over_c": over})
        step.rollback()
    show(rows, options.json)


def us_of(timer: Timer, call: Callable[[], object]) -> float:
    def calls() -> None:
        for _ in range(CALLS):
            call()

    return round(timer.us(calls)["us"] / CALLS, 2)


if __name__ == "__main__":
    main()
