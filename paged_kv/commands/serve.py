"""`paged-kv serve`: a model behind OpenAI's API, one process, one pool.

    uvicorn, 127.0.0.1 ── app ── engine's thread ── model, cache

SIGTERM and SIGINT: no new connections; what runs may end within --drain seconds.

Imports model_options and server.
"""

import argparse
import asyncio
import os
import signal
import sys
from typing import Any

from .._binding import integer, kernels, real
from ..errors import ArgumentError
from ..extras import require
from ..machine import available_memory, num_cpus
from ..models.model_files import PACKAGED, found_path
from ..pages.layout import num_pages, parse_memory
from ..serving.engine import Engine
from ..serving.generate import PAGE_SIZE
from ..text.chat_template import ChatTemplate
from .live_line import LiveLine
from .model_options import Opened, opened, page_bytes

#: For models that continue texts and were trained on no conversations.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
#: The name of the small model.
TINY = "tiny-bitnet"
#: Temperature and top_p that the makers of a packaged model advise.
ADVISED = {"smollm2": (0.2, 0.9)}
#: Whole contexts that the pool holds, unless --memory says more or less.
CONTEXTS = 8
#: Where a key is read, so that it does not stand in the list of processes.
KEY_VARIABLE = "PAGED_KV_API_KEY"


def run(options: argparse.Namespace) -> int:
    """The command; 0 when it was ended by a signal."""
    uvicorn = require("uvicorn", "serve")
    for package in ("fastapi", "prometheus_client"):
        require(package, "serve")
    from ..server.app import create_app
    from ..server.limits import MAX_HEADER_BYTES, TimedProtocol
    from ..server.service import Defaults, Service

    integer("--port", options.port, 0, 65535)
    integer("--max-sequences", options.max_sequences, 1, 2**16)
    drain, keys = real("--drain", options.drain, 0.0), _api_keys(options)
    if options.memory is not None:
        parse_memory(options.memory)
    if options.model is None:
        options.model = _installed()
    elif options.model == TINY:
        options.model = None
    found = opened(options, LiveLine(sys.stderr))
    if found.tokenizer.chat_template is None:
        found.tokenizer.chat_template = ChatTemplate(PLAIN_TEMPLATE, {})
    defaults = Defaults(*ADVISED.get(options.model, (1.0, 1.0)))
    name = options.name or _name_of(options.model)
    with (
        found.model.new_cache(**_cache_options(options, found)) as cache,
        Engine(found.model, cache, tokenizer=found.tokenizer, max_waiting=options.max_waiting) as engine,
    ):
        service = Service(engine, name, defaults, options.timeout)
        app = create_app(service, api_keys=keys)
        config = uvicorn.Config(
            app,
            host=options.host,
            port=options.port,
            http=TimedProtocol,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_graceful_shutdown=max(1, int(drain)),
            ws="none",
            loop="asyncio",
            access_log=False,
            server_header=False,
            log_level="warning",
        )

        class Server(uvicorn.Server):  # type: ignore[name-defined,misc]
            def handle_exit(self, number: int, frame: Any) -> None:
                service.is_ending = True
                super().handle_exit(number, frame)

        server = Server(config)
        # When it has ended, uvicorn raises the signal again; what is below has to be closed then.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: None)
        asyncio.run(_serve(server, name, found, engine, options))
        engine.close(drain=0.0)
    return 0


async def _serve(server: Any, name: str, found: Opened, engine: Engine, options: argparse.Namespace) -> None:
    task = asyncio.create_task(server.serve())
    while not server.started and not task.done():
        await asyncio.sleep(0.01)
    if server.started:
        port = server.servers[0].sockets[0].getsockname()[1]
        host = f"[{options.host}]" if ":" in options.host else options.host
        stats = engine.cache.stats()
        print(
            f"{name} at http://{host}:{port}/v1 (kernel {kernels().active}, {num_cpus()} threads, "
            f"{stats.num_pages} pages of {engine.cache.page_size} tokens, "
            f"{stats.pool_bytes / 2**20:,.0f} MiB). Ctrl-C ends it.",
            flush=True,
        )
    await task


def _installed() -> str | None:
    """The packaged model, if it is installed; None: the small one."""
    for name in PACKAGED:
        try:
            found_path(name)
        except ArgumentError:
            continue
        return name
    print(
        "smollm2 is not installed (make smollm2), so this is a small BitNet without sense.", file=sys.stderr
    )
    return None


def _name_of(model: str | None) -> str:
    if model is None:
        return TINY
    return os.path.splitext(os.path.basename(os.path.normpath(model)))[0] or "model"


def _cache_options(options: argparse.Namespace, found: Opened) -> dict[str, Any]:
    positions = found.model.config.max_position_embeddings
    context = integer("--context", positions if options.context is None else options.context, 1, positions)
    kept = {
        "memory": options.memory,
        "page_size": PAGE_SIZE,
        "max_sequences": options.max_sequences,
        "max_seq_len": context,
    }
    kept |= found.cache_options
    if options.memory is None:
        kept |= {"num_pages": _usual_pages(found, context, kept)}
    return kept


def _usual_pages(found: Opened, context: int, kept: dict[str, Any]) -> int:
    """Those of eight whole contexts, of which most requests take a small part; in half of the free memory."""
    pages, available = CONTEXTS * num_pages(context, PAGE_SIZE), available_memory()
    config = found.model.config
    usual = "float32" if config.model_type == "bitnet" else "bfloat16"
    if available is not None:
        pages = min(pages, available // 2 // page_bytes(config, kept.get("dtype", usual), PAGE_SIZE))
    return max(1, pages)


def _api_keys(options: argparse.Namespace) -> list[str]:
    keys = [*(options.api_key or []), *filter(None, [os.environ.get(KEY_VARIABLE)])]
    if not all(key.isascii() and key.strip() == key and key for key in keys):
        raise ArgumentError("an API key must be of ASCII characters, without spaces at its ends")
    return keys
