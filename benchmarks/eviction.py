"""In which order should cached pages give way?  Prompt tokens computed under each policy, on one trace.

    python benchmarks/eviction.py [--json] [--toy]

1,000 prompts of chats that come and go: one of eight system prompts, one of four sets of examples, a
question, and up to eight turns, each of which begins with all that was said before.  The pool has a third, a
fifth and a tenth of the pages that all prompts together need.  Time is simulated, so figures are the same
everywhere.

    LRU          the page that was not used for longest goes
    cost-aware   last use, raised for pages that were found often and are dear to compute again
    bound        the page whose next use is farthest goes: the whole future is known
    nothing      no prefix caching
"""

import heapq
import itertools
from collections import defaultdict

import numpy as np
from harness import arguments, progress, show

import paged_kv

PAGE_SIZE = 64


class Request:
    """A prompt and the answer that follows it, as ids, at a moment."""

    def __init__(self, seconds: float, prompt: list[int], answer: list[int]) -> None:
        self.seconds, self.prompt, self.answer = seconds, prompt, answer

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.answer


def trace(num_prompts: int, seed: int = 0) -> list[Request]:
    """Chats that begin at random; a turn comes some time after the answer to the one before it."""
    rng = np.random.default_rng(seed)
    fresh = itertools.count(1)

    def text(low: int, high: int) -> list[int]:
        return list(itertools.islice(fresh, int(rng.integers(low, high))))

    systems = [text(200, 900) for _ in range(8)]
    examples = [[text(200, 1500) for _ in range(4)] for _ in systems]
    popular = 1 / np.arange(1, 9)
    popular /= popular.sum()
    queue: list[tuple[float, int, list[int], int]] = []
    requests: list[Request] = []
    arrival, chats = 0.0, itertools.count()
    while len(requests) < num_prompts:
        if not queue or arrival < queue[0][0]:
            system = int(rng.choice(8, p=popular))
            before = systems[system] + examples[system][int(rng.choice(4, p=[0.5, 0.25, 0.15, 0.1]))]
            heapq.heappush(queue, (arrival, next(chats), before, int(rng.geometric(0.35))))
            arrival += float(rng.exponential(8))
            continue
        seconds, chat, before, turns_left = heapq.heappop(queue)
        request = Request(seconds, before + text(20, 250), text(30, 400))
        requests.append(request)
        if turns_left > 1 and len(request.tokens) < 6000:
            think = float(rng.lognormal(3.6, 0.9))
            heapq.heappush(queue, (seconds + think, chat, request.tokens, min(turns_left, 8) - 1))
    return requests


class Future:
    """A policy that knows all requests: a page's key falls with the time of its next use."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests, self.now = requests, 0
        self._uses: dict[int, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            for prefix in self._prefixes(request.prompt):
                self._uses[prefix].append(index)
        self._of_tokens: list[int] = []

    @staticmethod
    def _prefixes(tokens: list[int]) -> list[int]:
        """One number for each page of a sequence: of all tokens up to its first."""
        ids = np.asarray(tokens, np.int64)
        starts = range(0, len(tokens), PAGE_SIZE)
        return [hash(ids[: start + 1].tobytes()) for start in starts]

    def begin(self, index: int) -> None:
        self.now, self._of_tokens = index, self._prefixes(self.requests[index].tokens)

    def key(self, page: paged_kv.KeptPage) -> float:
        uses = self._uses[self._of_tokens[page.position // PAGE_SIZE]]
        later = next((index for index in uses if index > self.now), None)
        return -float("inf") if later is None else -float(later)


def replay(requests: list[Request], num_pages: int, policy: object, prefix_caching: bool) -> dict[str, int]:
    """Serve the requests one after the other.  Returns: prompt tokens, and how many were computed."""
    now, computed = [0.0], 0
    empty = np.zeros((max(len(request.tokens) for request in requests), 1, 8), np.float32)
    options = {"keep_policy": policy} if prefix_caching else {"prefix_caching": False}
    with paged_kv.PagedKVCache(
        1, 1, 8, num_pages=num_pages, page_size=PAGE_SIZE, max_sequences=2, clock=lambda: now[0], **options
    ) as cache:
        for index, request in enumerate(requests):
            now[0] = request.seconds
            if isinstance(policy, Future):
                policy.begin(index)
            seq = cache.sequence(request.prompt)
            computed += len(request.prompt) - len(seq)
            for new in (request.prompt[len(seq) :], request.answer):
                with cache.step([seq], [new]) as step:
                    step.write(0, empty[: len(new)], empty[: len(new)])
            seq.free()
        stats = cache.stats()
    given = sum(len(request.prompt) for request in requests)
    return {"given": given, "computed": computed, "evictions": stats.num_evictions}


def pages_of_all(requests: list[Request]) -> int:
    """Pages that all requests together need, each shared beginning once."""
    return len({prefix for request in requests for prefix in Future._prefixes(request.tokens)})


def main() -> None:
    options = arguments(__doc__).parse_args()
    requests = trace(60 if options.toy else 1000)
    all_pages = pages_of_all(requests)
    rows = []
    shares = [1 / 3] if options.toy else [1 / 3, 1 / 5, 1 / 10]
    policies = {
        "LRU": lambda: None,
        "cost-aware": paged_kv.CostAware,
        "bound": lambda: Future(requests),
        "nothing": lambda: None,
    }
    for share, (name, policy) in progress(list(itertools.product(shares, policies.items())), "eviction"):
        num_pages = max(int(all_pages * share), 120)
        result = replay(requests, num_pages, policy(), name != "nothing")
        rows.append({"policy": name, "pages": num_pages, "of_all": round(num_pages / all_pages, 2), **result})
    for row in rows:
        same = next(r for r in rows if r["pages"] == row["pages"] and r["policy"] == "bound")
        row["of_bound"] = round(row["computed"] / same["computed"], 3)
    show(rows, options.json)


if __name__ == "__main__":
    main()
