"""What this process may use of the machine: memory, CPUs, caches, with the container's limits counted in.

A container is killed, not refused, when it crosses its memory limit, so limits are read before memory is
taken.  Where a file is missing (another system, no container) or is not what it should be, the limit it would
state does not apply.
"""

import os
from collections.abc import Iterator
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def available_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> int | None:
    """Bytes that can be taken now: the smaller of MemAvailable and what each control group above us leaves.

    A group leaves its limit minus its use, the file cache that the kernel gives back first not counted in.
    None when the system does not say.
    """
    limits = [_meminfo_available(proc), *map(_cgroup_left, _cgroups(proc, cgroup))]
    return min((limit for limit in limits if limit is not None), default=None)


def num_cpus(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """CPUs in this process's affinity mask, capped by the control groups' quotas; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for quota in map(_cgroup_quota, _cgroups(proc, cgroup)) if quota is not None]
    return max(1, min([allowed, *quotas]))


def shared_cache_bytes(cpus: Path = CPUS) -> int:
    """Size of the third-level cache that CPUs share; 0 when the system reports none.

    Read where the kernel lists it: within virtual machines, libc's sysconf names ten times as much.
    """
    size = _read(cpus / "cpu0/cache/index3/size").strip()
    kib = _whole(size[:-1]) if size.endswith("K") else None
    return 0 if kib is None else kib * 1024


def _meminfo_available(proc: Path) -> int | None:
    kib = _fields(_read(proc / "meminfo"), ":").get("MemAvailable")
    return None if kib is None else kib * 1024


def _cgroups(proc: Path, cgroup: Path) -> Iterator[Path]:
    """Folders of this process's control groups, innermost first, up to the root; versions 2 and 1."""
    for line in _read(proc / "self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if not separator or "\0" in line:
            continue
        roots = [cgroup / name for name in controllers.split(",")] if controllers else [cgroup]
        for root in roots:
            # Inside a container the path may be the host's; then only the root of the mount exists.
            inner = root / path.lstrip("/")
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(root))


def _cgroup_left(folder: Path) -> int | None:
    for limit_names, usage_name in (
        # Above memory.high the kernel does not kill, but slows the process down to a crawl.
        (("memory.max", "memory.high"), "memory.current"),
        (("memory.limit_in_bytes",), "memory.usage_in_bytes"),
    ):
        limits = [limit for name in limit_names if (limit := _number(folder / name)) is not None]
        usage = _number(folder / usage_name)
        if limits and usage is not None:
            in_use = max(0, usage - _reclaimable(folder / "memory.stat"))
            return max(0, min(limits) - in_use)
    return None


def _reclaimable(stat: Path) -> int:
    """Bytes that the kernel gives back before it kills: file pages, hot or not, and caches of its own.

    Shared memory is counted with neither.  Version 1 has the same fields with the groups below counted in.
    """
    fields = _fields(_read(stat))
    return sum(
        max(0, fields.get(f"total_{name}", fields.get(name, 0)))
        for name in ("active_file", "inactive_file", "slab_reclaimable")
    )


def _cgroup_quota(folder: Path) -> int | None:
    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us")
    numbers = [_whole(quota), _whole(period)]
    if None in numbers or 0 in numbers:
        return None
    return -(-int(quota) // int(period))


def _fields(text: str, separator: str = " ") -> dict[str, int]:
    """Numbers by name, of lines such as "name 5" or "name: 5 kB"; lines that are no such thing
    are left out.
    """
    fields = {}
    for line in text.splitlines():
        name, _, rest = line.partition(separator)
        if (number := _whole(rest.strip().partition(" ")[0])) is not None:
            fields[name] = number
    return fields


def _whole(text: str) -> int | None:
    """A number of decimal digits; None for "max", "-1" and whatever else it may be."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


def _number(path: Path) -> int | None:
    return _whole(_read(path))


def _read(path: Path) -> str:
    """A file's text; paths in it may be no UTF-8.  Nothing of one that cannot be read."""
    try:
        return os.fsdecode(path.read_bytes())
    except (OSError, ValueError):
        return ""
