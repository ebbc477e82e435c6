import os
import subprocess
import sys

import pytest

import paged_kv
from paged_kv import PagedKVError, _binding


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


def test_the_best_kernel_is_active_and_portable_is_always_there():
    done = python("import paged_kv; print(*paged_kv.kernels().available)", PAGED_KV_KERNEL="")
    assert done.stdout.split()[-1] == "portable"
    done = python("import paged_kv; print(paged_kv.kernels().active)", PAGED_KV_KERNEL="")
    assert done.stdout.strip() == paged_kv.kernels().available[0]


def test_the_environment_forces_a_kernel():
    done = python("import paged_kv; print(paged_kv.kernels().active)", PAGED_KV_KERNEL="portable")
    assert done.stdout.strip() == "portable"


def test_an_unknown_kernel_is_an_error_that_names_the_known_at_first_use():
    code = "import paged_kv; print('imported'); paged_kv.PagedKVCache(1, 1, 32, num_pages=1)"
    done = python(code, PAGED_KV_KERNEL="avx9")
    assert "imported" in done.stdout
    assert 'PAGED_KV_KERNEL is "avx9"' in done.stderr and "portable" in done.stderr


def test_a_kernel_that_is_not_there_cannot_be_selected():
    before = paged_kv.kernels().active
    with pytest.raises(PagedKVError, match="kernel avx9"):
        _binding.select_kernel("avx9")
    assert paged_kv.kernels().active == before


def test_the_children_of_a_fork_attend_too():
    """The parent's threads are not in the child: it starts its own instead of waiting for them."""
    code = """
import os, sys
sys.path.insert(0, "tests")
import numpy as np
from conftest import fill, make_cache, rows
rng = np.random.default_rng(0)
cache = make_cache(num_layers=1, num_kv_heads=8, head_dim=64, page_size=64, num_pages=64, num_threads=2)
seq = cache.sequence()
fill(cache, [seq], [2000], rng)
step = cache.step([seq], [1])
q, k = rows(rng, 1, 8, 64), rows(rng, 1, 8, 64)
expected = step.attend(0, q, k, k)
for _ in range(3):
    child = os.fork()
    if child == 0:
        same = all(np.array_equal(step.attend(0, q, k, k), expected) for _ in range(20))
        cache.close()
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("same")
"""
    done = python(code)
    assert done.stdout.strip() == "same", done.stderr
