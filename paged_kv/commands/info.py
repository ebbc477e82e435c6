"""What paged_kv finds on this machine: `paged-kv info`.

Imports machine and _binding.
"""

import platform
import sys
import threading
import time
from importlib.metadata import version

import numpy as np

from .._binding import kernels
from ..machine import available_memory, num_cpus
from ..pages.pool import PagePool, mebibytes


def lines() -> list[str]:
    """Machine, kernel, memory and the read ceiling, as text.

    Cost: a second, and 512 MiB of memory (half of what there is, where that is less).
    """
    available = available_memory()
    memory = "unknown" if available is None else mebibytes(available)
    found = kernels()
    num_bytes = min(2**29, (available or 2**30) // 2) // 2**21 * 2**21
    alone, together = read_gb_per_s(num_bytes, 1), read_gb_per_s(num_bytes, num_cpus())
    return [
        f"paged_kv      {version('paged_kv')}, Python {platform.python_version()}, numpy {np.__version__}",
        f"machine       {platform.machine()}, {sys.platform}, {num_cpus()} CPUs for this process",
        f"kernel        {found.active} (of {', '.join(found.available)}; PAGED_KV_KERNEL names another)",
        f"memory        {memory} available",
        f"read ceiling  {alone:.1f} GB/s with 1 thread, {together:.1f} with {num_cpus()}, "
        f"over a pool of {mebibytes(num_bytes)}",
    ]


def read_gb_per_s(num_bytes: int, num_threads: int, repeats: int = 5) -> float:
    """The best of a few plain reads of a pool by numpy, each thread its own part."""
    pool = PagePool(num_bytes // 2**21, 2**21)
    parts = np.array_split(pool.data().view(np.uint64), num_threads)

    def read() -> float:
        readers = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts[1:]]
        begin = time.perf_counter()
        for reader in readers:
            reader.start()
        np.bitwise_or.reduce(parts[0])
        for reader in readers:
            reader.join()
        return time.perf_counter() - begin

    seconds = min(read() for _ in range(repeats))
    pool.close()
    return num_bytes / seconds / 1e9
