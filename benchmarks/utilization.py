"""How much of its memory does a paged cache use, against reservation and against arrays that grow?

    python benchmarks/utilization.py [--json] [--toy] [--plot FILE]

Requests of a trace arrive one after the other and are served first come first served, each running one
getting a token a step, in memory for 16 sequences of the longest length. A request is admitted when its
prompt fits and 1 % of memory stays free; when memory runs full, the newest request is sent back, and starts
again later with what it had as its prompt. The paged cache is the real one, driven step by step.

    reserved   each request takes max_seq_len at once, contiguously
    grown      an array exactly as long as the sequence, copied to grow: then both are there
    paged      this library, pages of 16 to 128 tokens; requests that share the beginning of their prompts are
               forks of one sequence, which is held for as long as one of them runs; with a window, pages
               that leave it are given back

Rows: utilization   tokens held / slots in use, summed over steps; each sequence's tokens count, so that
                    sharing can take it beyond 1
      bound         the same if all held just the pages that they need, shared ones once
      of_all_memory tokens held / all slots, over the steps at which a request waited
      sequences_at_once, mean over these; bytes of memory, for 32 layers, 8 kv heads of 128, 16 bits

The lengths are lognormal. Means of chat and instructions are those that the PagedAttention paper (Kwon et
al., SOSP 2023, section 6.1) gives for ShareGPT and Alpaca: 161 and 338, 19 and 58 tokens. Those of the others
are this benchmark's own, as is every spread: summaries (long prompts, short outputs), samples (each prompt is
answered four times), assistant (questions behind one of eight long prompts), stories (long outputs, of which
a token sees 4 sinks and the last 512).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from harness import arguments, progress, show
from sortedcontainers import SortedList

import paged_kv

MAX_SEQ_LEN = 2048
NUM_RESERVED = 16
TOKEN_BYTES = 32 * 8 * 128 * 2 * 2
KEPT_FREE = 0.01
PAGE_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Trace:
    """Lognormal lengths: means in tokens, and the deviation of their logarithms."""

    name: str
    mean_prompt: float
    mean_output: float
    sigma: float
    num_samples: int = 1  # of each prompt, which they share
    num_common: int = 0  # tokens before each prompt, the same in every eighth
    window: int | None = None
    num_sinks: int = 0

    def num_held(self, length: int) -> int:
        """Tokens of a sequence that attention can still see."""
        return length if self.window is None else min(length, self.window + self.num_sinks)

    def num_pages(self, length: int, page_size: int) -> int:
        """Pages that a sequence of this length needs, without sharing."""
        end = -(-length // page_size)
        if self.window is None or length <= self.window:
            return end
        sinks, first = -(-self.num_sinks // page_size), (length - self.window) // page_size
        return end if first <= sinks else sinks + end - first

    def requests(self, count: int, seed: int = 0) -> list["Request"]:
        rng = np.random.default_rng(seed)

        def lengths(mean: float, most: int) -> np.ndarray:
            drawn = rng.lognormal(np.log(mean) - self.sigma**2 / 2, self.sigma, count)
            return np.clip(np.rint(drawn), 1, most).astype(int)

        half = (MAX_SEQ_LEN - self.num_common) // 2
        prompts, outputs = lengths(self.mean_prompt, half), lengths(self.mean_output, half)
        prompts = np.repeat(prompts[:: self.num_samples], self.num_samples)[:count] + self.num_common
        return [
            Request(i, int(prompt), int(prompt + output), *self.shared(i, int(prompt)))
            for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        ]

    def shared(self, arrival: int, prompt: int) -> tuple[int, int]:
        """Whose prompt begins like this one, and for how many tokens; its last one is its own."""
        if self.num_common:
            return arrival % 8, self.num_common
        return (arrival // self.num_samples, prompt - 1) if self.num_samples > 1 else (0, 0)


TRACES = (
    Trace("chat", 161, 338, 0.9),
    Trace("summaries", 700, 75, 0.6),
    Trace("instructions", 19, 58, 0.8),
    Trace("samples", 300, 200, 0.6, num_samples=4),
    Trace("assistant", 60, 150, 0.8, num_common=600),
    Trace("stories", 100, 800, 0.5, window=512, num_sinks=4),
)


@dataclass
class Request:
    """A place in the order of arrival, tokens now (the prompt at first), tokens at the end, and what of them
    is shared with the others of its family."""

    arrival: int
    length: int
    final_length: int
    family: int = 0
    num_shared: int = 0


# ---- memory, three ways; each counts in slots, one token each


class Reserved:
    """As many slots for each request as the longest holds."""

    def __init__(self, num_slots: int, trace: Trace) -> None:
        self.num_slots, self.trace, self.running = num_slots, trace, {}
        self.each = trace.num_held(MAX_SEQ_LEN)

    @property
    def used(self) -> int:
        return len(self.running) * self.each

    def fits(self, requests: list[Request]) -> bool:
        return self.used + len(requests) * self.each <= self.num_slots

    def extend(self, requests: list[tuple[Request, int]]) -> bool:
        """Hold so many tokens more of each request; False, and nothing changed, when they do not fit."""
        new = {request.arrival for request, _ in requests} - self.running.keys()
        if self.used + len(new) * self.each > self.num_slots:
            return False
        self.running.update(dict.fromkeys(new, 0))
        return True

    def release(self, request: Request) -> None:
        del self.running[request.arrival]


class Grown(Reserved):
    """Exactly the tokens, and the array under copy twice."""

    def needed(self, lengths: list[int]) -> int:
        held = [self.trace.num_held(length) for length in lengths]
        return sum(held) + max(held, default=0)

    @property
    def used(self) -> int:
        return self.needed(list(self.running.values()))

    def fits(self, requests: list[Request]) -> bool:
        lengths = [*self.running.values(), *(request.length for request in requests)]
        return self.needed(lengths) <= self.num_slots * (1 - KEPT_FREE)

    def extend(self, requests: list[tuple[Request, int]]) -> bool:
        lengths = self.running | {
            request.arrival: self.running.get(request.arrival, 0) + count for request, count in requests
        }
        if self.needed(list(lengths.values())) > self.num_slots:
            return False
        self.running = lengths
        return True


class Paged:
    """The real cache, with heads as small as can be: only how many tokens and pages there are matters."""

    def __init__(self, num_slots: int, trace: Trace, page_size: int) -> None:
        self.num_slots, self.trace, self.page_size = num_slots, trace, page_size
        num_pages = num_slots // page_size
        self.cache = paged_kv.PagedKVCache(
            *(1, 1, 8),
            num_pages=num_pages,
            page_size=page_size,
            max_sequences=2 * num_pages,
            num_threads=1,
            window=trace.window,
            num_sink_tokens=trace.num_sinks,
        )
        self.running: dict[int, paged_kv.Sequence] = {}
        self.families: dict[int, tuple[paged_kv.Sequence, set[int]]] = {}  # what they share, and who does

    @property
    def used(self) -> int:
        return self.cache.stats().num_used_pages * self.page_size

    def fits(self, requests: list[Request]) -> bool:
        pages, families = 0, set(self.families)
        for request in requests:
            pages += self.trace.num_pages(request.length, self.page_size)
            if request.num_shared:  # its full pages are there, or come once for all
                pages -= request.num_shared // self.page_size
                if request.family not in families:
                    pages += -(-request.num_shared // self.page_size)
                    families.add(request.family)
        return pages <= self.cache.stats().num_free_pages - KEPT_FREE * self.num_slots / self.page_size

    def extend(self, requests: list[tuple[Request, int]]) -> bool:
        new = [request for request, _ in requests if request.arrival not in self.running]
        begun: list[Request] = []
        try:
            for request in new:
                self.begin(request)
                begun.append(request)
            # A fork brings what is shared.
            counts = [count - request.num_shared * (request in new) for request, count in requests]
            self.grow([self.running[request.arrival] for request, _ in requests], counts)
        except paged_kv.OutOfPages:
            for request in begun:
                self.release(request)
            return False
        return True

    def begin(self, request: Request) -> None:
        if not request.num_shared:
            self.running[request.arrival] = self.cache.sequence()
            return
        if request.family not in self.families:
            shared = self.cache.sequence()
            try:
                self.grow([shared], [request.num_shared])
            except paged_kv.OutOfPages:
                shared.free()
                raise
            self.families[request.family] = shared, set()
        shared, members = self.families[request.family]
        self.running[request.arrival] = shared.fork()
        members.add(request.arrival)

    def grow(self, seqs: list[paged_kv.Sequence], counts: list[int]) -> None:
        with self.cache.step(seqs, counts) as step:
            rows = np.zeros((sum(counts), 1, 8), np.float32)
            step.write(0, rows, rows)

    def release(self, request: Request) -> None:
        self.running.pop(request.arrival).free()
        shared, members = self.families.get(request.family, (None, set()))
        members.discard(request.arrival)
        if shared is not None and not members:
            shared.free()
            del self.families[request.family]


# ---- serving


@dataclass(frozen=True)
class Moment:
    """One step, after it was taken."""

    num_running: int
    num_waiting: int
    num_tokens: int
    used_slots: int
    needed_slots: int  # of the pages that the lengths need, shared ones once


def needed_slots(trace: Trace, running: Iterable[Request], page_size: int) -> int:
    """One of a family appends in place to the page in which the shared prompt ends, the others to copies."""
    pages, families = 0, {}
    for request in running:
        pages += trace.num_pages(request.length, page_size) - request.num_shared // page_size
        families[request.family] = request.num_shared // page_size
    return (pages + sum(families.values())) * page_size


def serve(
    memory: Reserved | Grown | Paged, trace: Trace, requests: list[Request], page_size: int
) -> Iterator[Moment]:
    """First come first served, until all are done."""
    waiting = SortedList(requests, key=lambda request: request.arrival)
    running = SortedList(key=lambda request: request.arrival)
    while waiting or running:
        admitted = []
        while waiting and memory.fits([*admitted, waiting[0]]):
            admitted.append(waiting.pop(0))
        # Who runs gets a token; who is admitted brings its prompt.
        while not memory.extend([(r, 1) for r in running] + [(r, r.length) for r in admitted]):
            sent_back = admitted.pop() if admitted else running.pop()
            if not running and not admitted:
                raise MemoryError(f"a request of {sent_back.length} tokens does not fit by itself")
            if sent_back.arrival in memory.running:
                memory.release(sent_back)
            waiting.add(sent_back)
        for request in running:
            request.length += 1
        running.update(admitted)
        yield Moment(
            num_running=len(running),
            num_waiting=len(waiting),
            num_tokens=sum(trace.num_held(request.length) for request in running),
            used_slots=memory.used,
            needed_slots=needed_slots(trace, running, page_size),
        )
        for request in [r for r in running if r.length >= r.final_length]:
            running.remove(request)
            memory.release(request)


def measure(trace: Trace, policy: str, page_size: int, size: int) -> tuple[dict[str, object], list[Moment]]:
    num_slots = NUM_RESERVED * MAX_SEQ_LEN
    count = round(size * num_slots / (trace.num_common + trace.mean_prompt + trace.mean_output))
    memory = Paged(num_slots, trace, page_size) if policy == "paged" else POLICIES[policy](num_slots, trace)
    moments = list(serve(memory, trace, trace.requests(count), page_size))
    if policy == "paged":
        memory.cache.check()
        assert memory.cache.stats().num_used_pages == 0
        memory.cache.close()
    # Once no request waits, memory is not the limit.
    busy = [moment for moment in moments if moment.num_waiting] or moments
    tokens = sum(moment.num_tokens for moment in moments)
    row: dict[str, object] = {
        "trace": trace.name,
        "policy": policy,
        "page_size": page_size if policy == "paged" else 0,
        "utilization": round(tokens / sum(moment.used_slots for moment in moments), 4),
        "bound": 1.0,
        "of_all_memory": round(sum(m.num_tokens for m in busy) / len(busy) / num_slots, 4),
        "sequences_at_once": round(sum(m.num_running for m in busy) / len(busy), 1),
        "bytes": num_slots * TOKEN_BYTES,
    }
    if policy == "paged":
        row["bound"] = round(tokens / sum(moment.needed_slots for moment in moments), 4)
    return row, moments


POLICIES = {"reserved": Reserved, "grown": Grown}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--plot", metavar="FILE", help="tokens and pages of the chat trace over time")
    options = parser.parse_args()
    size = 1 if options.toy else 10  # how often the requests fill memory
    cases = [(trace, policy, 1) for trace in TRACES for policy in POLICIES]
    cases += [(trace, "paged", page_size) for trace in TRACES for page_size in PAGE_SIZES]
    rows, moments = [], {}
    for trace, policy, page_size in progress(cases, "utilization"):
        row, moments[trace.name, policy, page_size] = measure(trace, policy, page_size, size)
        rows.append(row)
    rows.sort(key=lambda row: [trace.name for trace in TRACES].index(row["trace"]))
    show(rows, options.json)
    if options.plot:
        plot(moments, options.plot)


def plot(moments: dict, path: str) -> None:
    from paged_kv.extras import require

    require("matplotlib", "demo").use("Agg")
    figure = require("matplotlib.figure", "demo").Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in ((("chat", "reserved", 1), "reserved"), (("chat", "paged", 16), "paged, 16 tokens")):
        line = axes.plot([m.used_slots for m in moments[key]], label=f"{label}: slots in use", alpha=0.5)
        tokens = [m.num_tokens for m in moments[key]]
        axes.plot(tokens, label=f"{label}: tokens", color=line[0].get_color(), linestyle=":")
    axes.axhline(NUM_RESERVED * MAX_SEQ_LEN, color="gray", linewidth=0.8)
    axes.set(xlabel="step", ylabel="slots", title="Chat: what memory holds while requests wait")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
