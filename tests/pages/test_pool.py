import subprocess
import sys

import numpy as np
import pytest

from paged_kv import ArgumentError, OutOfPages, PagedKVError
from paged_kv.pages.pool import PagePool


def test_release_makes_the_page_available_again():
    pool = PagePool(4, 4096)
    page_ids = pool.acquire(4)
    with pytest.raises(OutOfPages, match="requested 1 pages, 0 of 4 are free"):
        pool.acquire(1)
    pool.release(page_ids)
    assert pool.num_free == 4
    pool.check()


@pytest.mark.parametrize("count", [-1, 2**31, 2**63, True, 1.0, "2", None])
def test_a_count_that_cannot_be_is_refused(count):
    pool = PagePool(4, 4096)
    with pytest.raises(ArgumentError, match="count"):
        pool.acquire(count)
    assert pool.num_free == 4


def test_ids_of_another_width_are_refused_and_a_page_is_not_released_twice():
    pool = PagePool(4, 4096)
    page_ids = pool.acquire(2)
    with pytest.raises(ArgumentError, match="int32"):
        pool.release(page_ids.astype(np.int64))
    with pytest.raises(PagedKVError, match="release"):
        pool.release(np.repeat(page_ids, 2))
    pool.release(page_ids)
    assert pool.num_free == 4
    pool.check()


def test_a_shared_page_is_free_only_after_its_last_owner_let_go():
    pool = PagePool(4, 4096)
    page_ids = pool.acquire(2)
    pool.share(page_ids)
    pool.release(page_ids)
    assert pool.num_free == 2
    pool.release(page_ids)
    assert pool.num_free == 4
    with pytest.raises(PagedKVError, match="share"):
        pool.share(page_ids)
    pool.check()


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1, -(2**31)])
def test_ids_that_are_no_pages_change_nothing(bad):
    pool = PagePool(4, 4096)
    owned = pool.acquire(3)
    with pytest.raises(PagedKVError, match="release"):
        pool.release(np.array([owned[0], bad], np.int32))
    with pytest.raises(PagedKVError, match="share"):
        pool.share(np.array([owned[0], bad], np.int32))
    assert pool.num_free == 1
    pool.release(owned)  # each had one owner still
    assert pool.num_free == 4
    pool.check()


def test_too_little_memory_is_an_error_that_names_both_sizes(monkeypatch):
    monkeypatch.setattr("paged_kv.machine.available_memory", lambda: 3 * 2**20)
    with pytest.raises(MemoryError, match=r"requested a pool of 4\.0 MiB, 3\.0 MiB are available"):
        PagePool(4, 2**20)


def test_more_memory_than_there_is_is_an_error_and_not_a_signal():
    with pytest.raises(MemoryError, match="MiB"):
        PagePool(2**20, 2**30)


def test_pages_are_aligned_and_their_bytes_can_be_reached():
    pool = PagePool(3, 4096)
    data = pool.data()
    assert data.shape == (3 * 4096,)
    assert data.ctypes.data % 2**21 == 0
    data[:] = 0xFF
    assert pool.num_free == 3
    pool.check()
    pool.close()


def test_the_pool_is_held_against_a_limit_on_address_space():
    """reliability 33: a mapping that succeeds and dies later on touch; here the system itself refuses."""
    code = (
        "import resource; from paged_kv.pages.pool import PagePool\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "try: PagePool(2, 2**29)\n"
        "except MemoryError as error: print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "refused: a pool of 2 pages of 536870912 bytes (1,024.0 MiB)" in done.stdout
