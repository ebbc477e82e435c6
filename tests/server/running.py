"""A server on 127.0.0.1 with a model without weights, for tests that speak HTTP to it."""

# ruff: noqa: E402
import contextlib
import threading
import time

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "tokenizers", "jinja2", "httpx", "llguidance"):
    pytest.importorskip(package)

import tokenizers
import uvicorn
from pure_model import PureModel

from paged_kv.server.app import create_app
from paged_kv.server.limits import MAX_HEADER_BYTES, TimedProtocol
from paged_kv.server.service import Service
from paged_kv.serving import Engine
from paged_kv.text.chat_template import ChatTemplate
from paged_kv.text.tokenizer import ModelTokenizer

END, TURN = 0, 1
TEMPLATE = (
    "{% if tools %}<turn>tools {{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<turn>{{ m.role }} {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant {% endif %}"
)
NAME = "pure"


def byte_tokenizer():
    """Bytes, <end> and <turn>."""
    vocabulary = {"<end>": END, "<turn>": TURN}
    for token in sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[token] = len(vocabulary)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<end>", "<turn>"])
    return ModelTokenizer(made, (), ChatTemplate(TEMPLATE, {}))


TOKENIZER = byte_tokenizer()


def pure_model(**options):
    return PureModel(vocab_size=258, stop_ids=(END,), max_position_embeddings=2048, **options)


class Running:
    """A server in a thread of this process.

    url, port : where it is
    """

    def __init__(self, service, **options):
        self.service = service
        app = create_app(service, **options)
        protocol = type("Protocol", (TimedProtocol,), {"max_seconds": options.get("max_seconds", 30.0)})
        config = uvicorn.Config(
            app,
            host="127.0.0.1",
            port=0,
            http=protocol,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            ws="none",
            loop="asyncio",
            log_level="critical",
            timeout_graceful_shutdown=5,
            timeout_keep_alive=1,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *error):
        self.service.is_ending = self.server.should_exit = True
        self.thread.join()


@contextlib.contextmanager
def served(
    model=None, *, num_pages=512, api_keys=(), max_seconds=30.0, max_waiting=256, timeout=None, **cache
):
    """A Running server, its engine and its cache; at the end nothing may be left of its requests."""
    model = model or pure_model()
    with model.new_cache(num_pages=num_pages, **cache) as cache:
        engine = Engine(model, cache, tokenizer=TOKENIZER, max_waiting=max_waiting)
        with engine:
            service = Service(engine, NAME, timeout=timeout)
            with Running(service, api_keys=api_keys, max_seconds=max_seconds) as running:
                yield running
            engine.close(drain=10)
        cache.check()
        stats = cache.stats()
        assert stats.num_used_pages == stats.num_sequences == 0
