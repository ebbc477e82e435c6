"""What this process may use of the machine: memory, CPUs, caches, with the container's limits counted in.

A container is killed, not refused, when it crosses its memory limit, so limits are read before memory is
taken.  Where a file is missing (another system, no container) the limit it would state does not apply.

Imported by pool (memory), store (caches), cache and info (CPUs).
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def available_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> int | None:
    """Bytes that can be taken now: the smaller of MemAvailable and what each control group above us leaves.

    A group leaves its limit minus its use, plus the file cache that the kernel gives back first.
    None where the system does not tell.
    """
    limits = [_meminfo_available(proc), *map(_cgroup_left, _cgroups(proc, cgroup))]
    return min((limit for limit in limits if limit is not None), default=None)


def num_cpus(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """CPUs in this process's affinity mask, capped by the control groups' quotas; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for quota in map(_cgroup_quota, _cgroups(proc, cgroup)) if quota is not None]
    return max(1, min([allowed, *quotas]))


def shared_cache_bytes(cpus: Path = CPUS) -> int:
    """Size of the third-level cache that CPUs share; 0 where the system tells of none.

    Read where the kernel lists it: within virtual machines, libc's sysconf names ten times as much.
    """
    size = _read(cpus / "cpu0/cache/index3/size").strip()
    return int(size[:-1]) * 1024 if size[:-1].isdigit() and size.endswith("K") else 0


def _meminfo_available(proc: Path) -> int | None:
    for line in _read(proc / "meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _cgroups(proc: Path, cgroup: Path) -> Iterator[Path]:
    """Folders of this process's control groups, innermost first, up to the root; versions 2 and 1."""
    for line in _read(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        roots = [cgroup / name for name in controllers.split(",")] if controllers else [cgroup]
        for root in roots:
            # Inside a container the path may be the host's; then only the root of the mount exists.
            inner = root / path.lstrip("/")
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(root))


def _cgroup_left(folder: Path) -> int | None:
    for limit_name, usage_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is not None and usage is not None:
            return max(0, limit - usage + _inactive_file(folder / "memory.stat"))
    return None


def _inactive_file(stat: Path) -> int:
    fields = dict(line.split() for line in _read(stat).splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def _cgroup_quota(folder: Path) -> int | None:
    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us")
    if quota in ("", "max", "-1") or not period.strip():
        return None
    return math.ceil(int(quota) / int(period))


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
