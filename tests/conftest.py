"""What the tests share: caches whose free bytes are poison, and the kernels of this machine."""

import os
import secrets
import sys
import zlib

import hypothesis
import numpy as np
import pytest

import paged_kv
from paged_kv import _binding

#: Inputs are fresh in every run; to see one again, set PAGED_KV_SEED to what it printed when it failed.
SEED = int(os.environ.get("PAGED_KV_SEED") or secrets.randbits(32))
KERNELS = paged_kv.kernels().available

# How long an example takes says nothing about its result.
hypothesis.settings.register_profile("paged_kv", deadline=None)
hypothesis.settings.load_profile("paged_kv")


#: Of calls that are made to raise, one after the other: in `make test-long`, every one.
STRIDE = 1 if "PAGED_KV_INTERRUPT_SECONDS" in os.environ else 41


class Tripwire:
    """`with tripwire:` raises at the `at`-th call of a Python function of the library, counted over all such
    blocks.

    It keeps what was raised, and so every frame that was on the way; the block ends silently then.
    """

    def __init__(self, at, error=KeyboardInterrupt):
        self.count, self.at, self.error, self.raised = 0, at, error, []

    def __call__(self, frame, event, argument):
        path = frame.f_code.co_filename
        if event == "call" and "paged_kv" in path and "/tests/" not in path:
            self.count += 1
            if self.count == self.at:
                raise self.error("on purpose")

    def __enter__(self):
        self.before = sys.getprofile()
        sys.setprofile(self)
        return self

    def __exit__(self, kind, error, trace):
        sys.setprofile(self.before)
        if kind is self.error:
            self.raised.append(error)
            return True
        return False


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.stats.get("failed"):
        terminalreporter.write_line(f"the inputs of this run: PAGED_KV_SEED={SEED}")


def poison(cache):
    """NaN in every byte of every page: what is not written must not reach a result."""
    cache._store.pool.data()[:] = 0xFF


def make_cache(**options):
    """A small cache, poisoned; any parameter of PagedKVCache can be given."""
    shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 32, "dtype": "float32"}
    shape |= {"num_pages": 16, "page_size": 16, "num_threads": 1} | options
    cache = paged_kv.PagedKVCache(
        shape.pop("num_layers"), shape.pop("num_kv_heads"), shape.pop("head_dim"), **shape
    )
    poison(cache)
    return cache


def rows(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def fill(cache, seqs, counts, rng):
    """A committed step of random keys and values; returns them, [layer][k or v], ragged rows."""
    layout = cache._store.layout
    shapes = [(sum(counts), layout.num_kv_heads, dim) for dim in (layout.head_dim, layout.head_dim_v)]
    written = [tuple(rows(rng, *shape) for shape in shapes) for _ in range(layout.num_layers)]
    with cache.step(seqs, counts) as step:
        for layer, (k, v) in enumerate(written):
            step.write(layer, k, v)
    return written


@pytest.fixture
def rng(request):
    return np.random.default_rng([SEED, zlib.crc32(request.node.name.encode())])


def pages_come_from(place, monkeypatch):
    """Caches built from now on have their pages in a "cache" or in "memory", however many."""
    monkeypatch.setattr("paged_kv.store.shared_cache_bytes", lambda: {"cache": 2**60, "memory": 0}[place])


@pytest.fixture(params=KERNELS)
def kernel(request):
    """Runs the test once with each kernel of this machine."""
    before = paged_kv.kernels().active
    _binding.select_kernel(request.param)
    yield request.param
    _binding.select_kernel(before)
