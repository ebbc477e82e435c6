"""What does a decode step cost beside model and sampler: scheduling, the cache's step, text, delivery?

    python benchmarks/serving_overhead.py [--json] [--toy]

So many requests decode with a model and a sampler that do nothing; the time of the model's passes is taken
off each step.  Rows: the batch alone; an engine, which detokenizes and hands each piece over; the engine with
a coroutine for each request in the same process, which competes for the interpreter's lock (a model that
computes does not hold it); with a page of 10,000 squares that takes ten frames a second; and what one such
frame takes.
"""

import asyncio
import json
import threading
import time

import numpy as np
from harness import arguments, progress, show

import paged_kv
from paged_kv.frames import Frames
from paged_kv.models.bitnet import TINY_BITNET
from paged_kv.models.sampling import Sampler
from paged_kv.serving import Engine, Sampling
from paged_kv.serving import options as serving_options
from paged_kv.serving.admission import Admission
from paged_kv.serving.batch import Batch
from paged_kv.text.tokenizer import ModelTokenizer, open_tokenizer

VOCAB, PROMPT = 2048, list(range(40))


class Nothing:
    """A model whose passes write zeros and say token 300."""

    class config:
        vocab_size, max_position_embeddings, stop_ids = VOCAB, 2**20, ()

    def __init__(self) -> None:
        self.seconds, self._k = 0.0, np.zeros((4096, 1, 8), np.float32)
        self._logits = np.zeros((4096, VOCAB), np.float32)
        self._logits[:, 300] = 1

    def forward(self, ids: np.ndarray, step: paged_kv.Step, rows: np.ndarray) -> np.ndarray:
        begin = time.perf_counter()
        step.write(0, self._k[: len(ids)], self._k[: len(ids)])
        self.seconds += time.perf_counter() - begin
        return self._logits[: len(rows)]


class Constant(Sampler):
    """A sampler that costs nothing, so that its time need not be taken off."""

    def sample(self, logits, ids=()):
        return 300


def new_cache(num_sequences: int) -> paged_kv.PagedKVCache:
    shape = {"num_pages": 10_000, "page_size": 64, "max_sequences": num_sequences}
    return paged_kv.PagedKVCache(1, 1, 8, **shape, num_threads=1)


class Steps:
    """Times of a batch's decode steps, without the model and the sampler."""

    def __init__(self, batch: Batch, model: Nothing, num_sequences: int) -> None:
        self.us: list[float] = []  # of steps of all sequences
        self.us_of_some: list[float] = []  # of fewer: on a busy machine, some may end before others begin
        self._batch, self._model, self._num_sequences = batch, model, num_sequences

    def timed(self, step):
        """The same call, timed."""

        def call(*given):
            self._model.seconds, begin = 0.0, time.perf_counter()
            result = step(*given)
            elapsed = time.perf_counter() - begin - self._model.seconds
            if len(self._batch.sampled) == self._num_sequences and not self._batch.waiting:
                self.us.append(1e6 * elapsed)
            else:
                self.us_of_some.append(1e6 * elapsed)
            return result

        return call

    def row(self, name: str) -> dict[str, object]:
        times = self.us[5:] or self.us or self.us_of_some
        low, median, high = np.percentile(times, [25, 50, 75])
        return {
            "what": name,
            "num_sequences": self._num_sequences,
            "us": round(median, 1),
            "us_per_sequence": round(median / self._num_sequences, 2),
            "quartiles": f"{low:.1f} to {high:.1f}",
            "num_steps": len(times),
        }


def batch_alone(num_sequences: int, num_steps: int) -> dict[str, object]:
    model = Nothing()
    with new_cache(num_sequences) as cache:
        batch = Batch(model, cache, Admission.pages_of(cache))
        steps = Steps(batch, model, num_sequences)
        for i in range(num_sequences):
            batch.add([*PROMPT, i], num_steps, Constant())
        step = steps.timed(batch.step)
        while not batch.is_idle:
            step()
    return steps.row("batch")


def engine(num_sequences: int, num_steps: int, *, reads: bool, page: bool) -> dict[str, object]:
    model = Nothing()
    tokenizer = ModelTokenizer(open_tokenizer(TINY_BITNET / "tokenizer.json"))
    assert tokenizer.pieces
    with new_cache(num_sequences) as cache, Engine(model, cache, tokenizer=tokenizer) as served:
        steps = Steps(served._batch, model, num_sequences)
        served._take_step = steps.timed(served._take_step)
        is_over = threading.Event()

        def look_on() -> None:
            frames = Frames(cache._store)
            while not is_over.wait(0.1):
                frames.next()

        viewer = threading.Thread(target=look_on)
        if page:
            viewer.start()

        async def read(i: int) -> None:
            handle = served.submit([*PROMPT, i], Sampling(max_tokens=num_steps))
            async for _ in handle.batches():
                pass

        async def read_all() -> None:
            await asyncio.gather(*(read(i) for i in range(num_sequences)))

        if reads:
            asyncio.run(read_all())
        else:
            sampling = Sampling(max_tokens=num_steps)
            handles = [served.submit([*PROMPT, i], sampling) for i in range(num_sequences)]
            served.close(drain=600)
            assert all(handle.is_done for handle in handles)
        is_over.set()
        if page:
            viewer.join()
    name = "engine" + ", coroutines" * reads + ", page" * page
    return steps.row(name)


def frame(num_sequences: int, num_frames: int) -> dict[str, object]:
    """What the page's frame takes: 10,000 pages, most of them held, after a decode step."""
    model, times = Nothing(), []
    with new_cache(num_sequences) as cache:
        seqs, frames = [cache.sequence() for _ in range(num_sequences)], Frames(cache._store)
        num_tokens = min(2000, 600_000 // num_sequences)
        for seq in seqs:
            with cache.step([seq], [[7] * num_tokens]) as step:
                model.forward(np.zeros(num_tokens), step, np.zeros(1))
        for _ in range(num_frames):
            with cache.step(seqs, [[1]] * num_sequences) as step:
                model.forward(np.zeros(num_sequences), step, np.zeros(1))
            begin = time.perf_counter()
            event(frames.next())
            times.append(1e6 * (time.perf_counter() - begin))
    low, median, high = np.percentile(times[5:], [25, 50, 75])
    return {
        "what": "frame of the page",
        "num_sequences": num_sequences,
        "us": round(median, 1),
        "us_per_sequence": round(median / num_sequences, 2),
        "quartiles": f"{low:.1f} to {high:.1f}",
        "num_steps": num_frames,
    }


def event(data: dict[str, object]) -> bytes:
    """As the server sends it."""
    return json.dumps(data, separators=(",", ":")).encode()


def main() -> None:
    options = arguments(__doc__).parse_args()
    serving_options.Sampler = Constant  # what an engine draws with
    sizes, num_steps = ([4], 60) if options.toy else ([1, 64, 256], 300)
    rows = []
    for size in progress(sizes, "serving"):
        rows.append(batch_alone(size, num_steps))
        for reads, page in ((False, False), (True, False), (False, True)):
            rows.append(engine(size, num_steps, reads=reads, page=page))
        rows.append(frame(size, num_steps))
    show(rows, options.json)


if __name__ == "__main__":
    main()
