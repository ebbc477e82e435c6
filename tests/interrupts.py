"""A campaign of signals: SIGALRM at random moments over steps, forks, truncation, serving and the manager.

    python tests/interrupts.py --seconds 300 --seed 1

Some signals raise KeyboardInterrupt where they strike, some call the library from their handler.  After each,
every sequence holds what it held before the call or what it holds after it, token for token, and `check()` is
satisfied; when all handles are dropped, no page and no sequence is left.  A call that hangs ends the process.
"""

import argparse
import contextlib
import faulthandler
import gc
import signal
import time
from pathlib import Path

import numpy as np

import paged_kv
from paged_kv.models.bitnet import BitNetModel, DecoderConfig
from paged_kv.serving.generate import generate

HEAD_DIM = 8
NUM_PAGES, MAX_SEQUENCES = 40, 8


def rows_of(values):
    return np.repeat(np.asarray(values, np.float32), HEAD_DIM).reshape(-1, 1, HEAD_DIM)


class Signals:
    """A timer that strikes at a random moment of a call: it interrupts it, or does something of its own."""

    def __init__(self):
        self.num_raised = self.num_acted = 0
        self.act, self.is_armed = None, False
        signal.signal(signal.SIGALRM, self.strike)

    def during(self, call, rng, act=None, longest=150):
        """Strike once in the call, if it takes so long."""
        self.act, delay = act, float(rng.integers(5, longest)) * 1e-6
        try:
            self.is_armed = True
            signal.setitimer(signal.ITIMER_REAL, delay)
            call()
        except (KeyboardInterrupt, paged_kv.PagedKVError):
            pass
        # What comes after this line, as where another thread has taken the signal, does nothing.
        self.is_armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def strike(self, *_):
        if not self.is_armed:
            return
        if self.act is None:
            self.num_raised += 1
            raise KeyboardInterrupt
        self.num_acted += 1
        with contextlib.suppress(paged_kv.PagedKVError):  # typed, and nothing has happened
            self.act()


class Walk:
    """Sequences, and beside each the values of its tokens."""

    def __init__(self, rng, signals, **options):
        self.rng, self.signals = rng, signals
        self.cache = paged_kv.PagedKVCache(
            1,
            1,
            HEAD_DIM,
            dtype="float32",
            num_pages=NUM_PAGES,
            page_size=16,
            max_sequences=MAX_SEQUENCES,
            **options,
        )
        self.held, self.lengths = {}, {}
        self.next_value = 0.0

    def new_values(self, count):
        values = self.next_value + np.arange(count)
        self.next_value = (self.next_value + count) % 2**23
        return values.tolist()

    def choose(self):
        seqs = list(self.held)
        return seqs[self.rng.integers(len(seqs))] if seqs else None

    def create(self):
        seq = self.cache.sequence()
        self.held[seq] = []

    def fork(self):
        if (seq := self.choose()) is not None:
            for fork in seq.fork(2):
                self.held[fork] = list(self.held[seq])

    def truncate(self):
        if (seq := self.choose()) is not None and (values := self.held[seq]):
            length = int(self.rng.integers(max(0, len(values) - 10), len(values) + 1))
            self.lengths[seq] = {length, len(values)}
            seq.truncate(length)

    def free(self):
        if (seq := self.choose()) is not None:
            seq.free()

    def drop(self):
        if (seq := self.choose()) is not None:
            del self.held[seq]

    def step(self):
        seqs = [seq for seq in self.held if self.rng.random() < 0.6]
        new = [self.new_values(int(self.rng.integers(1, 30))) for _ in seqs]
        for seq, values in zip(seqs, new, strict=True):
            # What is there if it commits; `settle` cuts what did not come.
            self.lengths[seq] = {len(self.held[seq]), len(self.held[seq]) + len(values)}
            self.held[seq] = self.held[seq] + values
        with self.cache.step(seqs, [len(values) for values in new]) as step:
            k = rows_of([value for values in new for value in values])
            if self.rng.random() < 0.5:
                step.attend(0, k, k, k)
            else:
                step.write(0, k, -k)
                step.attend(0, k)
                step.write(0, k, k)
            if self.rng.random() < 0.2:
                step.rollback()

    def act(self):
        """What a handler may do: each of these works or raises a typed error."""
        cache, seq = self.cache, self.choose()
        calls = [
            cache.stats,
            cache.check,
            lambda: cache.sequence().free(),
            lambda: cache.step([], []).rollback(),
        ]
        if seq is not None:
            calls += [lambda: len(seq), lambda: seq.gather(0), lambda: seq.held_positions]
            calls += [lambda: seq.fork().free(), lambda: cache.pages_needed([seq], [1])]
        calls[self.rng.integers(len(calls))]()

    def reclaim_abandoned(self):
        """Hold every sequence against its values: those before the last call, or after it."""
        for seq in list(self.held):
            try:
                length = len(seq)
            except paged_kv.StaleSequence:
                del self.held[seq]
                continue
            allowed = self.lengths.get(seq, {len(self.held[seq])})
            assert length in allowed, (length, allowed)
            values = self.held[seq] = self.held[seq][:length]
            for side in seq.gather(0):
                np.testing.assert_array_equal(side, rows_of(values)[seq.held_positions])
        self.cache.check()

    def run(self, num_calls):
        calls = [self.create, self.fork, self.truncate, self.free, self.drop, *[self.step] * 4]
        for _ in range(num_calls):
            call = calls[self.rng.integers(len(calls))]
            self.lengths = {}
            self.signals.during(call, self.rng, self.act if self.rng.random() < 0.3 else None)
            self.reclaim_abandoned()
        self.held, self.lengths = {}, {}
        gc.collect()
        stats = self.cache.stats()
        assert stats.num_used_pages == stats.num_sequences == 0, stats
        assert not self.cache._store.open_plans and not self.cache._store.handles
        self.cache.close()


def serve(rng, signals, model):
    """Generation is interrupted; what it held comes back, and the next one gives the same tokens."""
    prompts = [rng.integers(3, 250, n).tolist() for n in (3, 40, 7)]
    options = {"max_new_tokens": 4, "n": 2, "temperature": 0.8, "stop_ids": ()}
    with model.new_cache(num_pages=20, page_size=16, max_sequences=8) as cache:
        expected = [ids.tolist() for ids in generate(model, prompts, cache=cache, **options).ids]
        for _ in range(20):
            signals.during(lambda: generate(model, prompts, cache=cache, **options), rng, longest=4000)
            stats = cache.stats()
            assert stats.num_used_pages == stats.num_sequences == 0, stats
            cache.check()
        assert [ids.tolist() for ids in generate(model, prompts, cache=cache, **options).ids] == expected


def build(rng, signals):
    """Caches and managers that are interrupted while they are built or closed leave no memory behind."""

    def cache():
        paged_kv.PagedKVCache(1, 1, HEAD_DIM, memory="4MiB", num_threads=1).close()

    def manager():
        paged_kv.KVCacheManager().allocate(2**14, 1, 64, 2)

    for make in (cache, manager):
        for i in range(150):
            signals.during(make, rng, longest=2500)
            if i == 50:
                gc.collect()
                before = resident_bytes()
    gc.collect()
    grown = resident_bytes() - before
    assert grown < 32 << 20, grown


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def append(rng, signals):
    """A manager's ring: every token is there whole, or not at all."""
    manager = paged_kv.KVCacheManager()
    manager.allocate(16, 1, HEAD_DIM, 1)
    count = 0
    for _ in range(300):

        def fill(row):
            while True:
                manager.append(row, row, manager.state(0).seq_len, 0)
                row = row + 1

        row = np.full(HEAD_DIM, count, np.float32)
        signals.during(lambda row=row: fill(row), rng)
        count = manager.state(0).seq_len
        k, v, cached_len = manager.get_cache(0)
        first = count - cached_len
        np.testing.assert_array_equal(k[0, :, 0], np.arange(first, count))
        np.testing.assert_array_equal(v[0, :, 0], np.arange(first, count))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faulthandler.dump_traceback_later(options.seconds + 60, exit=True)
    rng, signals = np.random.default_rng(options.seed), Signals()
    model = BitNetModel.random(DecoderConfig(256, 32, 32, 1, 2, 1, 16, 128, 10000.0, 1e-5, 1, 2))
    end, num_walks = time.monotonic() + options.seconds, 0
    while time.monotonic() < end:
        for window in ({}, {"window": 20, "num_sink_tokens": 3}):
            Walk(rng, signals, num_threads=2, **window).run(100)
        append(rng, signals)
        build(rng, signals)
        serve(rng, signals, model)
        num_walks += 1
    print(f"{num_walks} walks, {signals.num_raised} interrupts, {signals.num_acted} calls from a handler")


if __name__ == "__main__":
    main()
