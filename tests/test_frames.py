"""Frames: what they say of a pool is what the cache says, and deltas add up to a full frame."""

import json
import time

import numpy as np
import pytest
from conftest import SEED, make_cache

from paged_kv import ArgumentError, CacheClosed, PagedKVCache
from paged_kv.frames import FREE, KEPT, NONE, OPEN, OWNED, PINNED, Frames


def new_cache(**options):
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "num_pages": 24, "page_size": 16}
    return PagedKVCache(**(shape | {"max_sequences": 8} | options))


def feed(cache, seq, ids):
    k = np.zeros((len(ids), 1, 8), np.float32)
    with cache.step([seq], [ids]) as step:
        step.write(0, k, k)


class Reader:
    """What a page of frames holds."""

    def __init__(self):
        self.pages, self.seqs = {}, {}

    def take(self, frame):
        frame = json.loads(json.dumps(frame))
        if frame["kind"] == "full":
            self.pages, self.seqs = {}, {}
        for page, *values in zip(*[iter(frame["pages"])] * 5, strict=True):
            self.pages[page] = tuple(values)
        for row in frame["gone"]:
            del self.seqs[row]
        for row, serial, length, pages in frame["seqs"]:
            self.seqs[row] = serial, length, self.seqs[row][2] if pages is None else pages
        self.stats = frame["stats"]
        return self

    def used(self):
        return {page: values for page, values in self.pages.items() if values[0] != FREE}


def test_a_page_is_free_owned_shared_open_pinned_or_kept():
    cache = new_cache()
    frames = Frames(cache._store)
    reader = Reader().take(frames.next())
    assert reader.used() == {} and reader.seqs == {}
    seq = cache.sequence()
    feed(cache, seq, list(range(40)))
    fork = seq.fork(at=32)
    reader.take(frames.next())
    (serial, length, pages), (_, other_length, others) = (reader.seqs[row] for row in (0, 1))
    assert (length, other_length) == (40, 32) and serial > 0 and pages[:2] == others
    assert reader.used() == {
        pages[0]: (OWNED, 2, 0, NONE),
        pages[1]: (OWNED, 2, 0, pages[0]),
        pages[2]: (OWNED, 1, 0, NONE),
    }
    step = cache.step([seq], [30])
    reader.take(frames.next())
    grown = reader.seqs[0][2]
    assert grown[:3] == pages and len(grown) == 5
    assert [reader.pages[page][0] for page in grown] == [OWNED, OWNED, *[OWNED | OPEN] * 3]
    step.rollback()
    pin = cache.pin(cache.match([*range(16), 99]))
    seq.free()
    fork.free()
    reader.take(frames.next())
    assert [reader.pages[page][0] for page in pages] == [OWNED | PINNED, KEPT, KEPT]
    pin.release()
    reader.take(frames.next())
    assert [reader.pages[page][0] for page in pages] == [KEPT] * 3 and reader.seqs == {}
    cache.reset_prefix_cache()
    assert reader.take(frames.next()).used() == {}


@pytest.mark.parametrize(
    "options", [{}, {"prefix_caching": False}, {"window": 20, "num_sink_tokens": 3}], ids=str
)
def test_deltas_add_up_to_a_full_frame_on_a_random_walk(options):
    rng, cache, seqs = np.random.default_rng(SEED), new_cache(num_pages=60, **options), []
    deltas, reader = Frames(cache._store), Reader()
    shared = rng.integers(0, 99, 40).tolist()
    for _ in range(150):
        act = rng.integers(5)
        if act == 0 and len(seqs) < 6:
            seqs.append(cache.sequence([*shared[: rng.integers(1, 40)], 7]))
        elif act == 1 and seqs:
            seqs.pop(rng.integers(len(seqs))).free()
        elif act == 2 and 0 < len(seqs) < 6:
            seqs.append(seqs[rng.integers(len(seqs))].fork())
        elif seqs:
            seq = seqs[rng.integers(len(seqs))]
            if len(seq) > 90:
                seq.reset()
            new = shared[len(seq) :][: rng.integers(1, 20)] or rng.integers(0, 99, 9).tolist()
            feed(cache, seq, new)
        if rng.random() < 0.3:
            continue
        reader.take(deltas.next())
        whole = Reader().take(Frames(cache._store).next())
        assert reader.used() == whole.used() and reader.seqs == whole.seqs
        stats = cache.stats()
        kinds = [state & (KEPT | OWNED) for state, *_ in reader.used().values()]
        assert kinds.count(OWNED) == stats.num_used_pages == reader.stats["used"]
        assert kinds.count(KEPT) == stats.num_kept_pages == reader.stats["kept"]
        assert sorted(length for _, length, _ in reader.seqs.values()) == sorted(map(len, seqs))
        references = [page for _, _, pages in reader.seqs.values() for page in pages]
        assert all(references.count(page) == values[1] for page, values in reader.used().items())
        assert reader.stats["tokens"] == stats.num_tokens


def test_a_page_is_below_the_page_before_it():
    cache = new_cache()
    seq = cache.sequence()
    feed(cache, seq, list(range(60)))
    other = cache.sequence([*range(32), 99])
    feed(cache, other, [99] * 20)
    reader = Reader().take(Frames(cache._store).next())
    pages, others = (reader.seqs[row][2] for row in (0, 1))
    assert others[:2] == pages[:2] and [reader.pages[page][3] for page in pages] == [NONE, *pages[:2], NONE]
    assert reader.pages[others[2]][3] == pages[1]
    seq.free()  # its open page is cached, too
    reader = Reader().take(Frames(cache._store).next())
    assert reader.pages[pages[3]][3] == pages[2]


def test_a_frame_may_be_whole_again():
    cache = new_cache()
    frames = Frames(cache._store)
    frames.next()
    seq = cache.sequence()
    feed(cache, seq, [1, 2, 3])
    assert frames.next()["kind"] == "delta"
    assert frames.next()["pages"] == []
    frame = frames.next(full=True)
    assert frame["kind"] == "full" and len(frame["pages"]) == 5 and len(frame["seqs"]) == 1


def test_a_recording_has_frames_until_it_is_closed(tmp_path):
    path, cache = tmp_path / "pool.jsonl", new_cache()
    with cache.record(path, every=0.005) as recording:
        seq = cache.sequence()
        for i in range(20):
            feed(cache, seq, [i] * 5)
            time.sleep(0.005)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == recording.num_frames >= 3 and lines[0]["kind"] == "full"
    times = [line["t"] for line in lines]
    assert times == sorted(times)
    reader = Reader()
    for line in lines:
        reader.take(line)
    assert reader.used() == Reader().take(Frames(cache._store).next()).used()
    recording.close()


def test_a_recording_ends_with_its_cache(tmp_path):
    cache = new_cache()
    recording = cache.record(tmp_path / "pool.jsonl", every=0.01)
    cache.close()
    recording.close()
    with pytest.raises(CacheClosed):
        cache.record(tmp_path / "other.jsonl")
    with pytest.raises(CacheClosed):
        Frames(cache._store).next()


@pytest.mark.parametrize("every", [0, -1, "x", float("nan"), None])
def test_a_time_between_frames_that_is_none_is_refused(every, tmp_path):
    with pytest.raises(ArgumentError, match="every"):
        make_cache().record(tmp_path / "pool.jsonl", every=every)
    assert not list(tmp_path.iterdir())
