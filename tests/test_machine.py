import os

import pytest

from paged_kv import _binding
from paged_kv.machine import available_memory, num_cpus, shared_cache_bytes

MEMINFO = "MemTotal: 900 kB\nMemAvailable:    800 kB\n"


def machine_of(tmp_path, *, cgroups="0::/\n", files=None):
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(MEMINFO)
    (proc / "self/cgroup").write_text(cgroups)
    for name, text in (files or {}).items():
        (cgroup / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroup / name).write_text(text)
    return proc, cgroup


def test_this_machine_has_memory_and_a_cpu():
    assert available_memory() > 2**20
    assert 1 <= num_cpus() <= len(os.sched_getaffinity(0))


def test_without_a_control_group_the_system_decides(tmp_path):
    assert available_memory(*machine_of(tmp_path)) == 800 * 1024


GROUP = {"memory.max": "1000", "memory.current": "900"}


@pytest.mark.parametrize(
    ("stat", "others", "expected"),
    [
        ("anon 1\ninactive_file 300\n", {}, 400),
        ("active_file 800\n", {}, 900),
        ("active_file 500\ninactive_file 200\nslab_reclaimable 50\n", {}, 850),
        ("file 800\nshmem 800\n", {}, 100),
        ("active_file 5000\n", {}, 1000),
        ("active_file 300\n", {"memory.high": "700"}, 100),
        ("active_file 300\n", {"memory.high": "max"}, 400),
        ("", {"memory.max": "max", "memory.high": "950"}, 50),
        ("", {"memory.high": "500"}, 0),
    ],
)
def test_a_group_leaves_what_the_kernel_would_give(tmp_path, stat, others, expected):
    """ollama #15474, #15704, buildbuddy PR #12792: hot file cache counted as memory in use."""
    machine = machine_of(tmp_path, files=GROUP | {"memory.stat": stat} | others)
    assert available_memory(*machine) == expected


def test_the_tightest_group_on_the_way_up_counts(tmp_path):
    files = {
        "a/b/memory.max": "max\n",
        "a/b/memory.current": "10",
        "a/memory.max": "1000\n",
        "a/memory.current": "400\n",
    }
    machine = machine_of(tmp_path, cgroups="0::/a/b\n", files=files)
    assert available_memory(*machine) == 600


def test_version_1_groups_are_read_too(tmp_path):
    files = {
        "memory/x/memory.limit_in_bytes": "5000",
        "memory/x/memory.usage_in_bytes": "4000",
        "memory/x/memory.stat": "total_inactive_file 4\ninactive_file 1\ntotal_active_file 3\n",
        "cpu/x/cpu.cfs_quota_us": "100000",
        "cpu/x/cpu.cfs_period_us": "100000",
    }
    machine = machine_of(tmp_path, cgroups="4:memory:/x\n3:cpu,cpuacct:/x\n", files=files)
    assert available_memory(*machine) == 1007
    assert num_cpus(*machine) == 1


def test_a_quota_of_half_a_cpu_is_one_thread_and_no_quota_is_no_cap(tmp_path):
    assert num_cpus(*machine_of(tmp_path / "half", files={"cpu.max": "50000 100000\n"})) == 1
    assert num_cpus(*machine_of(tmp_path / "none", files={"cpu.max": "max 100000\n"})) == num_cpus()


def test_unreadable_files_are_no_limit(tmp_path):
    assert available_memory(tmp_path, tmp_path) is None
    assert num_cpus(tmp_path, tmp_path) == len(os.sched_getaffinity(0))


def test_caches_and_models_share_their_threads():
    """Two sets of threads for the same CPUs would take them from each other."""
    threads = _binding.shared_threads()
    assert threads is _binding.shared_threads(None) is _binding.shared_threads(num_cpus())
    assert _binding.shared_threads(num_cpus() + 1) is not threads


@pytest.mark.parametrize(("size", "num_bytes"), [("32768K\n", 32 << 20), ("", 0), ("K", 0), ("many", 0)])
def test_the_shared_cache_is_as_large_as_the_system_says(tmp_path, size, num_bytes):
    (tmp_path / "cpu0/cache/index3").mkdir(parents=True)
    (tmp_path / "cpu0/cache/index3/size").write_text(size)
    assert shared_cache_bytes(tmp_path) == num_bytes


def test_without_a_shared_cache_nothing_is_said_to_lie_there(tmp_path):
    assert shared_cache_bytes(tmp_path) == 0


BROKEN = {
    "no colons": {"self/cgroup": "nonsense\n"},
    "one colon": {"self/cgroup": "0:\n"},
    "a path that is no UTF-8": {"self/cgroup": b"0::/\xff\xfe\n"},
    "NUL in a path": {"self/cgroup": b"0::/a\0b\n"},
    "an empty file": {"self/cgroup": ""},
    "three words": {"memory.stat": "active_file 5 6\nx\n\ninactive_file\nslab_reclaimable y\n"},
    "no text": {"memory.stat": b"\xff\xff"},
    "a limit of words": {"memory.max": "a lot"},
    "a limit beyond 64 bits": {"memory.max": "9" * 40},
    "digits of another script": {"memory.max": "\u0661\u0662"},
    "a negative use": {"memory.current": "-5"},
    "a period of 0": {"cpu.max": "100 0"},
    "a quota of 0": {"cpu.max": "0 100"},
    "no period": {"cpu.max": "100"},
    "words": {"cpu.max": "many a"},
    "meminfo without numbers": {"meminfo": "MemAvailable:\n"},
    "meminfo of words": {"meminfo": "MemAvailable: lots kB\nx\n"},
    "meminfo that is no text": {"meminfo": b"\xfe"},
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_not_what_it_should_be_is_no_limit(tmp_path, broken):
    """Kernels, containers and emulations of them write what they like."""
    proc, cgroup = machine_of(tmp_path, files=GROUP | {"memory.stat": "", "cpu.max": "max 100000"})
    for name, text in broken.items():
        path = (proc if name in ("self/cgroup", "meminfo") else cgroup) / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    available = available_memory(proc, cgroup)
    assert available is None or 0 <= available <= 800 * 1024
    assert 1 <= num_cpus(proc, cgroup) <= len(os.sched_getaffinity(0))


def test_folders_where_files_should_be_are_no_limit(tmp_path):
    proc, cgroup = machine_of(tmp_path)
    for path in (cgroup / "memory.max", cgroup / "cpu.max", cgroup / "memory.stat"):
        path.mkdir(parents=True)
    assert available_memory(proc, cgroup) == 800 * 1024
