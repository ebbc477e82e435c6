"""One team of threads, of which a call uses its num_threads; the same bits with any number of them."""

import ctypes.util
import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import make_cache, rows

import paged_kv
from paged_kv import ArgumentError, _binding

SWEEP = """
import os, numpy as np, paged_kv
def num_tasks():
    return len(os.listdir("/proc/self/task"))
before = num_tasks()
x = np.ones((200, 8, 64), np.float32)
lists = {"qo_indptr": [0, 200], "kv_indptr": [0, 200], "kv_indices": range(200), "kv_last_page_len": [1]}
lists = {name: list(values) for name, values in lists.items()}
for n in [*range(2, 65), *range(64, 1, -1)]:
    with paged_kv.PagedKVCache(1, 8, 64, num_pages=8, num_threads=n) as c, c.sequence() as s:
        with c.step([s], [200]) as step:
            step.attend(0, x, x, x)
    paged_kv.paged_attention(x, x[:, None], x[:, None], **lists, num_threads=n)
print(num_tasks() - before)
"""


def test_a_sweep_over_numbers_of_threads_leaves_no_more_than_the_largest():
    """onnxruntime #4093: pools of threads outlived their sessions; 64 numbers left 2,018 threads here."""
    done = subprocess.run([sys.executable, "-c", SWEEP], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 0 <= int(done.stdout) <= 63


def attended(cache, seed):
    rng = np.random.default_rng(seed)
    q, k, v = (rows(rng, 300, heads, 32) for heads in (4, 2, 2))
    with cache.sequence() as seq, cache.step([seq], [300]) as step:
        return step.attend(0, q, k, v)


def test_callers_with_different_numbers_have_the_same_bits_at_once(kernel):
    expected = [attended(make_cache(num_layers=1, num_pages=20, num_threads=1), i) for i in range(8)]
    caches = [make_cache(num_layers=1, num_pages=200, num_threads=2 + i % 3) for i in range(8)]
    failures = []

    def run(i):
        try:
            for _ in range(20):
                np.testing.assert_array_equal(attended(caches[i], i), expected[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures


def test_a_handle_lives_as_long_as_somebody_uses_it():
    number = 37
    handle = _binding.shared_threads(number)
    assert handle is _binding.shared_threads(number)
    del handle
    gc.collect()
    assert _binding._threads_of[number]() is None
    with make_cache(num_threads=number) as cache:
        assert _binding.shared_threads(number) is cache._store.threads


@pytest.mark.parametrize("number", [0, -1, 1025, 2**31 - 1])
def test_what_is_no_number_of_threads_is_refused(number):
    with pytest.raises(paged_kv.PagedKVError, match=f"{number} threads"):
        _binding.new_threads(number)


def test_a_system_without_more_threads_is_no_error(rng):
    """A container's limit on processes applies to the next thread that is started."""
    script = (
        "import resource, numpy as np, paged_kv\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, resource.RLIM_INFINITY))\n"
        "x = np.ones((600, 8, 64), np.float32)\n"
        "with paged_kv.PagedKVCache(1, 8, 64, num_pages=16, num_threads=1024) as c, c.sequence() as s:\n"
        "    with c.step([s], [600]) as step:\n"
        "        print(float(step.attend(0, x, x, x).sum()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 600 * 8 * 64


# ---- the threads of an OpenMP runtime

OPENMP = """
import ctypes, hashlib, os, sys, threading
import numpy as np, paged_kv

rng = np.random.default_rng(0)
q, k = rng.standard_normal((700, 8, 64), np.float32), rng.standard_normal((700, 2, 64), np.float32)

def attended():
    with paged_kv.PagedKVCache(1, 2, 64, num_pages=50, num_threads=3) as cache:
        with cache.step([cache.sequence()], [700]) as step:
            return hashlib.sha256(step.attend(0, q, k, k).tobytes()).hexdigest()

def num_tasks():
    return len(os.listdir("/proc/self/task"))

assert paged_kv.threads_in_use() == "own"
paged_kv.use_threads("own")
expected = attended()
ctypes.CDLL("libgomp.so.1")
assert paged_kv.threads_in_use() == "own"
own = num_tasks()
paged_kv.use_threads("auto")
assert paged_kv.threads_in_use() == "openmp"
assert all(attended() == expected for _ in range(40))
assert num_tasks() == own + 3, (num_tasks(), own)  # the runtime's four, the caller among them
same = []
threads = [threading.Thread(target=lambda: same.append(attended() == expected)) for _ in range(8)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
assert same == [True] * 8
child = os.fork()
if not child:
    os._exit(0 if paged_kv.threads_in_use() == "own" and attended() == expected else 1)
assert os.waitpid(child, 0)[1] == 0
assert attended() == expected
print("done")
"""


def test_an_openmp_runtime_that_is_loaded_does_the_jobs():
    """torch's threads spin on the cores that ours want; found at any time, and left in a forked child."""
    if ctypes.util.find_library("gomp") is None:
        pytest.skip("there is no libgomp")
    environment = os.environ | {"OMP_NUM_THREADS": "4", "PAGED_KV_THREADS": "auto"}
    command = [sys.executable, "-W", "ignore", "-c", OPENMP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout == "done\n", done.stderr


def test_threads_are_chosen_by_name():
    with pytest.raises(ArgumentError, match='threads are "openmp"; they may be auto or own'):
        paged_kv.use_threads("openmp")
    code = "import paged_kv"
    environment = os.environ | {"PAGED_KV_THREADS": "none"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert 'threads are "none"' in done.stderr
