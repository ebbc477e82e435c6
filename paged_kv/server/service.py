"""A service: one engine behind the routes, and what a request's fields mean to it.

    body ── Prompt: ids, Sampling, salt, retention ── engine.submit ── Handle          in a worker thread

Tokenizing, templates and grammars take milliseconds and more, so they run beside the event loop.

Imports schemas, errors and serving.
"""

import asyncio
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ..errors import ArgumentError
from ..pages.match import Match
from ..pages.token_keys import num_common
from ..serving.engine import Engine
from ..serving.grammar import Grammar
from ..serving.handle import Handle
from ..serving.options import Sampling
from ..text.tokenizer import ModelTokenizer
from .errors import refused
from .schemas import Kept, Message, Sampled

T = TypeVar("T")

#: Requests of a ttl, or up to a breakpoint, stay about so many half-lives longer than others.
RETAINED_PRIORITY = 3
#: Units of a ttl that is text, in seconds.
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Defaults:
    """What requests that say nothing get: OpenAI's values, unless the model's makers advise others."""

    temperature: float = 1.0
    top_p: float = 1.0


@dataclass
class Prompt:
    """One prompt of a request, ready to be submitted."""

    ids: list[int]
    sampling: Sampling
    salt: bytes = b""
    priority: int = 0
    ttl: float | None = None
    #: Positions up to which pages are kept longer.
    retained: tuple[int, ...] = ()


@dataclass
class Submitted:
    """A prompt that is served, and what the cache had of it when it came."""

    handle: Handle
    ids: list[int]
    match: Match
    created: int = field(default_factory=lambda: int(time.time()))


class Service:
    """An engine, and how requests become its prompts.

    engine : with a tokenizer
    name : of the model, as clients call it
    timeout : seconds for a request, from its arrival; None: any
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        defaults: Defaults = Defaults(),
        timeout: float | None = None,
    ) -> None:
        if engine.tokenizer is None:
            raise ArgumentError("a server needs an engine with a tokenizer")
        self.engine, self.tokenizer, self.name = engine, engine.tokenizer, name
        self.defaults, self.timeout = defaults, timeout
        self.started = int(time.time())
        #: The server takes no new connections; what has no end of its own ends now.
        self.is_ending = False
        self._secret = secrets.token_bytes(32)

    tokenizer: ModelTokenizer

    async def run(self, work: Callable[[], T]) -> T:
        """What a function returns that runs in a worker thread.

        When the caller is cancelled meanwhile, a request that the function submits is cancelled, too.
        """
        future = asyncio.get_running_loop().run_in_executor(None, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_cancel_submitted)
            raise

    def salt(self, key: bytes, salt: str | None) -> bytes:
        """What separates a tenant's pages; it cannot be guessed, also where the tenant's salt is known."""
        message = len(key).to_bytes(8) + key + (b"" if salt is None else b"\x01" + salt.encode())
        return hmac.digest(self._secret, message, "sha256")

    def room(self, num_ids: int, n: int) -> int:
        """New tokens that fit behind a prompt, for each of n samples."""
        cache, config = self.engine.cache, self.engine.model.config
        positions = min(int(config.max_position_embeddings), cache.max_seq_len) - num_ids + 1
        if cache.window is None:
            slots = cache.stats().num_pages // n * cache.page_size - num_ids
            positions = min(positions, slots)
        return max(1, positions)

    def prompt(
        self,
        body: Kept,
        ids: list[int],
        key: bytes,
        max_tokens: int | None,
        *,
        logprobs: int | None = None,
        grammar: Grammar | None = None,
        retained: tuple[int, ...] = (),
    ) -> Prompt:
        """Raises: ApiError, ArgumentError."""
        sampled = body if isinstance(body, Sampled) else None
        n = (sampled.n if sampled else None) or 1
        stop: list[str] = []
        stop_ids = None
        if sampled is not None:
            stop = [sampled.stop] if isinstance(sampled.stop, str) else list(sampled.stop or [])
            if sampled.stop_token_ids or sampled.ignore_eos:
                own = () if sampled.ignore_eos else self.engine.model.config.stop_ids
                stop_ids = [*own, *(sampled.stop_token_ids or ())]
        defaults = self.defaults
        sampling = Sampling(
            max_tokens=max_tokens if max_tokens is not None else self.room(len(ids), n),
            temperature=defaults.temperature if body.temperature is None else body.temperature,
            top_p=defaults.top_p if body.top_p is None else body.top_p,
            top_k=max(0, body.top_k or 0),
            min_p=body.min_p or 0.0,
            repetition_penalty=body.repetition_penalty or 1.0,
            seed=None if body.seed is None else body.seed % 2**64,
            n=n,
            stop=stop,
            stop_ids=stop_ids,
            logprobs=logprobs,
            grammar=grammar,
        )
        ttl = self._ttl(body)
        explicit = body.prompt_cache_options is not None and body.prompt_cache_options.mode == "explicit"
        if not explicit and ttl is not None:
            retained = (*retained, len(ids))
        # vLLM's clients give what goes first the smaller number.
        priority = max(-body.priority, -(2**31))
        return Prompt(ids, sampling, self.salt(key, body.cache_salt), min(priority, 2**31 - 1), ttl, retained)

    def _ttl(self, body: Kept) -> float | None:
        """Seconds that a prompt is worth keeping; None: as long as others."""
        options = body.prompt_cache_options
        value = options.ttl if options is not None and options.ttl is not None else None
        name = "prompt_cache_options.ttl"
        if value is None:
            value, name = body.prompt_cache_retention, "prompt_cache_retention"
        if value is None or value in ("in_memory", "in-memory"):
            return None
        if isinstance(value, int):
            return float(value)
        number, unit = value[:-1], value[-1:]
        if not number.isascii() or not number.isdigit() or len(number) > 9 or unit not in UNITS:
            raise refused(f'{name} is {value!r:.40}; give seconds, or a text such as "30m" or "24h"', name)
        if not int(number):
            raise refused(f"{name} is {value!r}; it must be above 0", name)
        return float(int(number) * UNITS[unit])

    def submit(self, prompt: Prompt) -> Submitted:
        """Raises: as Engine.submit."""
        match = self.engine.cache.match(prompt.ids, prompt.salt)
        handle = self.engine.submit(
            prompt.ids,
            prompt.sampling,
            priority=prompt.priority,
            salt=prompt.salt,
            ttl=prompt.ttl,
            timeout=self.timeout,
            retained=tuple((at, RETAINED_PRIORITY, prompt.ttl) for at in prompt.retained),
        )
        return Submitted(handle, prompt.ids, match)

    # ---- conversations

    def chat_ids(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """The ids of a conversation, by the model's template."""
        return self.tokenizer.chat(messages, add_generation_prompt=add_generation_prompt, **variables)

    def breakpoints(self, messages: list[Message], ids: list[int], **variables: Any) -> tuple[int, ...]:
        """Positions behind the blocks that have a prompt_cache_breakpoint, of the four last of these."""
        marked = []
        for i, message in enumerate(messages):
            for j, block in enumerate(message.content if isinstance(message.content, list) else []):
                if block.get("prompt_cache_breakpoint") is not None:
                    marked.append((i, j))
        positions = []
        for i, j in marked[-4:]:
            content = messages[i].content
            assert isinstance(content, list)
            last = messages[i].model_copy(update={"content": content[: j + 1]})
            begun = [plain(message) for message in [*messages[:i], last]]
            part = self.chat_ids(begun, add_generation_prompt=False, **variables)
            positions.append(num_common(np.array(part, np.int32), np.array(ids, np.int32)))
        return tuple(sorted({at for at in positions if at}))


def plain(message: Message) -> dict[str, Any]:
    """A message as templates read it: its blocks are one text.  Raises: ApiError for what is no text."""
    found = message.model_dump(exclude_none=True)
    found["role"] = "system" if message.role == "developer" else message.role
    content = message.content
    if isinstance(content, list):
        texts = []
        for block in content:
            text = block.get("text")
            if block.get("type") not in ("text", "input_text", "output_text") or not isinstance(text, str):
                kind = str(block.get("type"))
                raise refused(
                    f"a block of type {kind!r:.40} is no text, and texts are all that is served", "messages"
                )
            texts.append(text)
        found["content"] = "".join(texts)
    elif content is None:
        found["content"] = ""
    return found


def _cancel_submitted(future: Any) -> None:
    if future.cancelled() or future.exception() is not None:
        return
    result = future.result()
    for one in result if isinstance(result, list) else [result]:
        if isinstance(one, Submitted):
            one.handle.cancel()
