"""Events: replaying them gives the state of now, and hashes are the same in every process."""

import hashlib
from collections import deque

import numpy as np
import pytest
from test_prefix_index import PAGE_SIZE, PROMPT, Replica, extend, prefix_cache, start

from paged_kv import AllBlocksCleared, ArgumentError, BlockRemoved, BlockStored, CacheClosed


def test_full_pages_are_reported_when_they_can_be_found_and_when_not():
    with prefix_cache(num_pages=3) as cache:
        assert cache.events() == []
        seq, _ = start(cache, PROMPT)
        first, second = cache.events()
        assert isinstance(first, BlockStored) and (first.event_id, second.event_id) == (1, 2)
        assert first.token_ids + second.token_ids == PROMPT[:32]
        assert first.parent_block_hash is None and [second.parent_block_hash] == first.block_hashes
        assert (first.block_size, first.medium) == (PAGE_SIZE, "CPU")
        seq.free()  # the open page is indexed then, and is no block
        assert len(cache.events()) == 2 and cache.events(2) == []
        extend(cache, cache.sequence(), [], [99] * 32).commit()
        removed, *stored = cache.events(since=2)
        assert removed == BlockRemoved(3, second.block_hashes)
        assert [event.token_ids for event in stored] == [[99] * 16] * 2


def test_a_step_that_rolls_back_reports_nothing():
    with prefix_cache() as cache:
        extend(cache, cache.sequence(), [], PROMPT).rollback()
        assert cache.events() == []


def field(content):
    return len(content).to_bytes(8) + content


def test_a_hash_is_what_the_module_says():
    with prefix_cache(fingerprint=b"model") as cache:
        extend(cache, cache.sequence(salt=b"tenant"), [], PROMPT[:32]).commit()
        first, second = cache.events()
        head = field(b"paged_kv page") + field(PAGE_SIZE.to_bytes(8)) + field(b"model")
        ids = [np.array(part, "<i4").tobytes() for part in (PROMPT[:16], PROMPT[16:32])]
        expected = hashlib.sha256(head + field(b"salt") + field(b"tenant") + field(ids[0])).digest()
        assert first.block_hashes == [expected]
        expected = hashlib.sha256(head + field(b"page") + field(expected) + field(ids[1])).digest()
        assert second.block_hashes == [expected]


#: Pairs of fields that give the same bytes when they are put together without their lengths.
ALIKE = {
    "fingerprint and salt": ((b"org_1", b"2345"), (b"org_12345", b"")),
    "the other way round": ((b"a", b"b"), (b"b", b"a")),
    "a salt that looks like a page": ((b"", b"page"), (b"page", b"")),
    "other ids": ((b"", b""), (b"", b"\x00")),
}


@pytest.mark.parametrize("pair", ALIKE.values(), ids=ALIKE)
def test_swapped_fields_give_other_hashes(pair):
    hashes = []
    for fingerprint, salt in pair:
        with prefix_cache(fingerprint=fingerprint) as cache:
            extend(cache, cache.sequence(salt=salt), [], PROMPT[:16]).commit()
            hashes += cache.events()[0].block_hashes
    assert hashes[0] != hashes[1]


def test_the_same_tokens_have_the_same_hash_in_another_cache_and_after_eviction():
    hashes = []
    for _ in range(2):
        with prefix_cache(num_pages=2) as cache:
            start(cache, PROMPT[:17])[0].free()
            extend(cache, cache.sequence(), [], [9] * 17).rollback()  # which evicts it
            start(cache, PROMPT[:17])[0].free()
            hashes += [event.block_hashes for event in cache.events() if isinstance(event, BlockStored)]
    assert len(hashes) == 4 and hashes == hashes[:1] * 4


@pytest.mark.parametrize("since", [0, 3, 7, 10, 50, 2**40])
def test_what_has_left_the_ring_is_replaced_by_all_that_is_there(since):
    with prefix_cache() as cache:
        cache._store.index.events._ring = deque(maxlen=4)
        for first in range(10):
            start(cache, [first] * 16)[0].free()
        events = cache.events(since)
        if 6 <= since <= 10:
            assert [event.event_id for event in events] == list(range(since + 1, 11))
        else:
            assert isinstance(events[0], AllBlocksCleared)
            assert [event.event_id for event in events] == list(range(11))
        assert cache.events(10) == []


def test_a_reset_clears_everything_and_nothing_old_comes_back():
    with prefix_cache() as cache:
        replica = Replica()
        kept, _ = start(cache, PROMPT)
        kept.free()
        running, _ = start(cache, [5] * 20)
        waiting = cache.sequence([*PROMPT, 1])
        step = extend(cache, cache.sequence(), [], [6] * 32)
        replica.read(cache)
        assert cache.reset_prefix_cache() == 0  # `waiting` has all of its pages
        assert isinstance(cache.events()[-1], AllBlocksCleared)
        step.commit()
        extend(cache, running, [5] * 20, [5] * 30).commit()
        extend(cache, waiting, PROMPT, [1] * 30).commit()
        for tokens in (PROMPT, [5] * 50, [6] * 32):
            assert cache.match([*tokens, 1, 2]).reason == "first"
        running.free()
        waiting.free()
        assert cache.stats().num_kept_pages == 0
        replica.read(cache)
        assert replica.blocks == {}
        # What begins anew is offered again.
        start(cache, PROMPT)[0].free()
        assert cache.match(PROMPT).reason == "full"
        assert cache.reset_prefix_cache() == 3
        cache.check()


def test_a_change_without_its_event_makes_the_next_answers_whole():
    with prefix_cache() as cache:
        start(cache, PROMPT)
        index = cache._store.index
        original, index.events._add = index.events._add, None  # an interrupt in the call
        with pytest.raises(TypeError):
            start(cache, [7] * 16)
        index.events._add = original
        cache.check()
        events = cache.events(2)
        assert isinstance(events[0], AllBlocksCleared) and len(events) == 4
        assert cache.events(events[-1].event_id) == []
        assert isinstance(cache.events(0)[0], AllBlocksCleared)


def test_counts_say_what_was_found_and_why_not():
    with prefix_cache(num_pages=4) as cache:
        start(cache, PROMPT)[0].free()
        start(cache, PROMPT)[0].free()
        start(cache, [*PROMPT[:20], 99, 98])[0].free()
        cache.sequence([77, 78]).free()
        stats = cache.stats()
        assert (stats.num_queries, stats.num_hits) == (4, 2)
        assert (stats.num_queried_tokens, stats.num_hit_tokens) == (40 + 40 + 22 + 2, 39 + 20)
        assert stats.misses == {"first": 2, "diverged": 1}
        assert stats.bytes_saved == 59 * stats.pool_bytes // (4 * PAGE_SIZE)
        extend(cache, cache.sequence(), [], [55] * 64).rollback()
        stats = cache.stats()
        assert stats.evictions == {"pressure": 4} and stats.num_evictions == 4
        assert stats.num_unused_evictions == 1  # the page that begins with 99


@pytest.mark.parametrize("since", [-1, 1.5, "1", None, True])
def test_bad_input_is_refused(since):
    with prefix_cache() as cache, pytest.raises(ArgumentError, match="since"):
        cache.events(since)
    with pytest.raises(ArgumentError, match="fingerprint"):
        prefix_cache(fingerprint="model")


def test_without_prefix_caching_there_are_none():
    with prefix_cache(prefix_caching=False) as cache:
        start(cache, PROMPT)
        assert cache.events() == [] and cache.reset_prefix_cache() == 0
    with pytest.raises(CacheClosed):
        cache.events()
