"""The same requests alone, together, and in any order: the same greedy tokens."""

import os

import numpy as np
import pytest
from conftest import SEED
from pure_model import VOCAB, PureModel

from paged_kv import ArgumentError
from paged_kv.models.decoder import DecoderModel
from paged_kv.serving import Engine, Sampling

#: With the real small model, if it is installed: 0 in `make test`, 200 in `make test-serving`.
NUM_REQUESTS = int(os.environ.get("PAGED_KV_NUM_REQUESTS", 0))


def prompts(rng, count, vocab_size, longest):
    """Some begin with one of four texts; of various lengths."""
    beginnings = [rng.integers(3, vocab_size, longest // 2).tolist() for _ in range(4)]
    own = [rng.integers(3, vocab_size, rng.integers(1, longest // 2)).tolist() for _ in range(count)]
    return [beginnings[i % 4] * (i % 3 > 0) + part for i, part in enumerate(own)]


def together(model, given, order, num_tokens, **cache_options):
    """New ids of each prompt, submitted in this order at once."""
    sampling = Sampling(max_tokens=num_tokens, stop_ids=())
    with model.new_cache(**cache_options) as cache, Engine(model, cache, max_waiting=len(given)) as engine:
        handles = {i: engine.submit(given[i], sampling) for i in order}
        ids = [handles[i].result(timeout=600)[0].ids for i in range(len(given))]
        num_preemptions = engine.report.num_preemptions
        engine.close(drain=10)
        cache.check()
        assert cache.stats().num_used_pages == 0
    return ids, num_preemptions


def alone(model, given, num_tokens, **cache_options):
    sampling, found = Sampling(max_tokens=num_tokens, stop_ids=()), []
    with model.new_cache(prefix_caching=False, **cache_options) as cache, Engine(model, cache) as engine:
        for prompt in given:
            found.append(engine.submit(prompt, sampling).result(timeout=600)[0].ids)
    return found


def test_200_requests_have_the_tokens_that_they_have_alone_in_any_order():
    rng, model = np.random.default_rng(SEED), PureModel()
    given = prompts(rng, 200, VOCAB, 120)
    expected = alone(model, given, 24, num_pages=20)
    for order in (range(200), reversed(range(200)), rng.permutation(200).tolist()):
        num_pages = int(rng.integers(20, 200))
        assert together(model, given, order, 24, num_pages=num_pages)[0] == expected


@pytest.mark.skipif(not NUM_REQUESTS, reason="make test-serving")
def test_the_real_model_does_so_too():
    try:
        model = DecoderModel.from_pretrained("smollm2")
    except ArgumentError:
        pytest.skip("smollm2 is not installed")
    rng = np.random.default_rng(SEED)
    given = prompts(rng, NUM_REQUESTS, 20_000, 200)
    expected = alone(model, given, 24, num_pages=16)
    # The second pool is too small for what runs in it.
    for order, num_pages in ((range(NUM_REQUESTS), 2000), (rng.permutation(NUM_REQUESTS).tolist(), 40)):
        ids, num_preemptions = together(model, given, order, 24, num_pages=num_pages)
        assert ids == expected
        print(f"{NUM_REQUESTS} requests, {num_pages} pages: {num_preemptions} preemptions")
