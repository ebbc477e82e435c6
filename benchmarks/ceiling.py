"""What this machine's memory can do: the C of walk.c, compiled when it is first needed.

Imported by the benchmarks that hold a figure against a ceiling.
"""

import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cffi import FFI
from harness import Timer

SOURCE = Path(__file__).parent / "walk.c"


@functools.cache
def _walk() -> tuple:
    ffi = FFI()
    for verb in ("float walk_read", "void walk_write"):
        ffi.cdef(f"{verb}(char *, int64_t, const int64_t *, int64_t, int64_t);")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "walk.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        subprocess.run(["cc", *flags, str(SOURCE), "-o", str(library)], check=True)
        return ffi, ffi.dlopen(str(library))


def reader(memory: np.ndarray, chunk_bytes: int, order: np.ndarray, num_threads: int) -> Callable[[], float]:
    """A call that reads these chunks of memory, uint8, in this order."""
    ffi, lib = _walk()
    offsets = np.ascontiguousarray(order, np.int64) * chunk_bytes
    base, at = ffi.from_buffer("char[]", memory), ffi.from_buffer("int64_t[]", offsets)
    return lambda: lib.walk_read(base, chunk_bytes, at, len(offsets), num_threads)


def gb_per_s(
    timer: Timer,
    memory: np.ndarray,
    chunk_bytes: int,
    order: np.ndarray,
    num_threads: int,
    verb: str = "read",
) -> float:
    """Memory, uint8, read or written in chunks in this order by so many threads."""
    ffi, lib = _walk()
    offsets = np.ascontiguousarray(order, np.int64) * chunk_bytes
    base, at = ffi.from_buffer("char[]", memory), ffi.from_buffer("int64_t[]", offsets)
    call = getattr(lib, f"walk_{verb}")
    timed = timer.us(lambda: call(base, chunk_bytes, at, len(offsets), num_threads))
    return len(offsets) * chunk_bytes / timed["us"] / 1e3
