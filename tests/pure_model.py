"""A model without weights, for tests of schedules: what it says next depends on every token and its position.

A token's value is a random vector of its id and position; attention with a query of zeros averages them over
the sequence, as the pages hold it.  So logits are those of the whole text, whatever its chunks, pages and
neighbours, and a token that was fed twice, left out or read from another sequence's page changes them.
"""

import numpy as np

from paged_kv import PagedKVCache

VOCAB, DIM, MAX_POSITIONS = 64, 16, 512


class Config:
    vocab_size = VOCAB
    max_position_embeddings = MAX_POSITIONS
    stop_ids = ()


class PureModel:
    config = Config

    def __init__(self, seed=0, vocab_size=VOCAB, **config):
        rng = np.random.default_rng(seed)
        self.config = type("Config", (Config,), {"vocab_size": vocab_size, **config})
        self._of_id = rng.standard_normal((vocab_size, DIM), np.float32)
        self._of_position = rng.standard_normal((self.config.max_position_embeddings, DIM), np.float32)
        self._head = rng.standard_normal((DIM, vocab_size), np.float32)
        self.num_tokens = 0

    def new_cache(self, **options):
        return PagedKVCache(1, 1, DIM, **({"dtype": "float32", "page_size": 16, "num_threads": 1} | options))

    def forward(self, ids, step, rows):
        positions = step.positions
        self.num_tokens += len(ids)
        values = (self._of_id[ids] * self._of_position[positions])[:, None]
        zeros = np.zeros_like(values)
        mean = step.attend(0, zeros, zeros, values)[:, 0]
        # A product per row: one of several rows would add in another order.
        logits = np.empty((len(rows), self._head.shape[1]), np.float32)
        for i, row in enumerate(mean[rows]):
            np.dot(np.sin(300 * row), self._head, out=logits[i])
        return logits
