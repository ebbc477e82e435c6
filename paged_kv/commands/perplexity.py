"""`paged-kv perplexity`: how well a model predicts a text.

It is exp of the mean negative log-likelihood of the text's tokens, but for the first.

Imports model_options and live_line.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from ..errors import ArgumentError
from ..models.decoder import DecoderModel
from ..models.token_ids import prompt_ids
from ..pages.layout import num_pages
from .live_line import LiveLine
from .model_options import opened
from .texts import read_text

PAGE_SIZE = 64
#: Tokens of a step: of so many, logits are held at once.
STEP_TOKENS = 256


def run(options: argparse.Namespace) -> int:
    """The command."""
    text = read_text(Path(options.file))
    live = LiveLine(sys.stderr)
    found = opened(options, live)
    ids = found.tokenizer.encode(text)
    likelihoods = log_likelihoods(found.model, ids, live, **found.cache_options)
    perplexity = float(np.exp(-likelihoods.mean()))
    if options.json:
        print(json.dumps({"perplexity": round(perplexity, 6), "tokens": len(ids)}))
    else:
        print(f"perplexity {perplexity:.4f} of {len(ids)} tokens")
    return 0


def log_likelihoods(
    model: DecoderModel, ids: list[int], live: LiveLine | None = None, **cache_options: object
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Natural logarithms of the probability of each token after the first, float64 [num_ids - 1].

    Raises: ArgumentError for fewer than two ids, and for more than the model has positions.
    """
    ids = prompt_ids("ids", ids, model.config.vocab_size)
    positions = model.config.max_position_embeddings
    if not 2 <= len(ids) <= positions:
        raise ArgumentError(f"the text has {len(ids)} tokens; give 2 to the model's {positions} positions")
    found = np.empty(len(ids) - 1)
    with model.new_cache(
        num_pages=num_pages(len(ids), PAGE_SIZE), page_size=PAGE_SIZE, max_sequences=1, **cache_options
    ) as cache:
        seq = cache.sequence()
        for begin in range(0, len(ids) - 1, STEP_TOKENS):
            new = ids[begin : min(begin + STEP_TOKENS, len(ids) - 1)]
            with cache.step([seq], [len(new)]) as step:
                logits = model.forward(new, step, np.arange(len(new))).astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(len(new)), ids[begin + 1 : begin + 1 + len(new)]]
            found[begin : begin + len(new)] = chosen - np.log(np.exp(logits).sum(axis=1))
            if live is not None:
                live.progress("tokens", begin + len(new), len(ids) - 1)
    if live is not None:
        live.clear()
    return found
