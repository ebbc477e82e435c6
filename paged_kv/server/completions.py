"""/v1/completions and /v1/chat/completions: answers whole and in pieces.

Imports service, tools and stream.
"""

import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

from ..models.sampling import LogProbability
from ..serving.grammar import Grammar
from ..serving.handle import Handle, Piece, Sample
from .errors import refused
from .schemas import ChatRequest, CompletionRequest, Sampled
from .service import Prompt, Service, Submitted, plain
from .stream import DONE, event
from .tools import CallReader, choice_of

#: How an answer ended, as clients read it.
REASONS = {"stop": "stop", "length": "length", "timeout": "length", "cancelled": "stop", "error": "stop"}


# ---- requests


def require_served(body: Sampled) -> None:
    """Raises: ApiError for what would change the answer and is not built."""
    for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
        if getattr(body, name):
            raise refused(f"{name} is not served; leave it out", name)
    if body.stream_options is not None and not body.stream:
        raise refused("stream_options need stream", "stream_options")


def grammar_of(form: dict[str, Any] | None, name: str = "response_format") -> Grammar | None:
    """The grammar of a response_format.  Raises: ApiError, ArgumentError."""
    kind = None if form is None else form.get("type", "text")
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return Grammar.of_json()
    if kind == "json_schema":
        inner = form.get("json_schema", form)
        schema = inner.get("schema") if isinstance(inner, dict) else None
        if not isinstance(schema, dict):
            raise refused(f"{name} has no schema", name)
        return Grammar.of_json_schema(schema)
    if kind == "regex" and isinstance(form.get("pattern"), str):
        return Grammar.of_regex(form["pattern"])
    raise refused(f"{name} is of type {kind!r:.40}; give text, json_object, json_schema or regex", name)


def chat_prompt(service: Service, body: ChatRequest, key: bytes) -> Prompt:
    """The prompt of a conversation.  Raises: ApiError, ArgumentError."""
    require_served(body)
    if body.modalities and body.modalities != ["text"]:
        raise refused("modalities other than text are not served", "modalities")
    if body.top_logprobs and not body.logprobs:
        raise refused("top_logprobs need logprobs", "top_logprobs")
    tools = body.tools or []
    choice, grammar = choice_of(tools, body.tool_choice)
    form = grammar_of(body.response_format)
    if grammar is not None and form is not None:
        raise refused(
            "response_format and a tool_choice that requires a call exclude each other", "tool_choice"
        )
    variables = dict(body.chat_template_kwargs or {})
    if variables.keys() & {"messages", "add_generation_prompt", "tools"}:
        raise refused("chat_template_kwargs may not replace the messages or tools", "chat_template_kwargs")
    if tools and choice != "none":
        variables["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    messages = [plain(message) for message in body.messages]
    ids = service.chat_ids(messages, add_generation_prompt=body.add_generation_prompt, **variables)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return service.prompt(
        body,
        ids,
        key,
        max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=grammar or form,
        retained=service.breakpoints(body.messages, ids, **variables),
    )


def completion_prompts(service: Service, body: CompletionRequest, key: bytes) -> list[Prompt]:
    """The prompts of a completion, in order.  Raises: ApiError, ArgumentError."""
    require_served(body)
    for name in ("echo", "suffix"):
        if getattr(body, name):
            raise refused(f"{name} is not served; leave it out", name)
    if body.best_of not in (None, 1) and body.best_of != body.n:
        raise refused("best_of is served where it equals n", "best_of")
    given = body.prompt
    texts: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
    prompts = []
    for text in texts:
        ids = service.tokenizer.encode(text) if isinstance(text, str) else text
        prompts.append(service.prompt(body, ids, key, body.max_tokens, logprobs=body.logprobs))
    return prompts


# ---- what both answers have


def usage_of(handles: list[Handle]) -> dict[str, Any]:
    """As the cache counted it."""
    usages = [handle.usage for handle in handles]
    num_prompt, num_new = sum(one.prompt_tokens for one in usages), sum(one.new_tokens for one in usages)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {
            "cached_tokens": sum(one.cached_tokens for one in usages),
            "cache_write_tokens": sum(one.written_tokens for one in usages),
        },
    }


def cache_headers(submitted: list[Submitted]) -> dict[str, str]:
    """What the cache had when the request came, and why it was not more."""
    parts = []
    for match in (one.match for one in submitted):
        fields = {"cached": match.num_tokens, "lost": match.num_lost, "at": match.at, "cause": match.cause}
        if match.age is not None:
            fields["age"] = f"{match.age:.1f}"
        shown = [f"{name}={value}" for name, value in fields.items() if value is not None]
        parts.append("; ".join([match.reason, *shown]))
    return {"x-paged-kv-cache": ", ".join(parts)[:4096]}


class Answer:
    """What all parts of one answer begin with."""

    def __init__(self, service: Service, submitted: list[Submitted], kind: str, prefix: str) -> None:
        self._service, self.submitted = service, submitted
        self.head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": submitted[0].created,
            "model": service.name,
        }
        self.handles = [one.handle for one in submitted]

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "choices": choices, "usage": usage_of(self.handles)}

    async def events(self, body: Sampled) -> AsyncIterator[bytes]:
        """The stream of an answer, whose parts `parts_of` makes."""
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        num_samples = len(self.handles[0].samples)
        extra: dict[str, Any] = {"usage": None} if with_usage else {}
        async for place, pieces in merged(self.handles):
            chunk = b""
            for piece in pieces:
                if piece.error is not None and piece.finish_reason == "error":
                    raise piece.error
                for choice in self.parts_of(place * num_samples + piece.index, piece):
                    chunk += event({**self.head, "choices": [choice], **extra})
            yield chunk
        if with_usage:
            yield event({**self.head, "choices": [], "usage": usage_of(self.handles)})
        yield DONE

    def parts_of(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        raise NotImplementedError


async def merged(handles: list[Handle]) -> AsyncIterator[tuple[int, list[Piece]]]:
    """(place of a handle, its next pieces), of several handles as they come."""
    if len(handles) == 1:
        async for pieces in handles[0].batches():
            yield 0, pieces
        return
    for place, handle in enumerate(handles):
        async for pieces in handle.batches():
            yield place, pieces


# ---- chat


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    def __init__(self, service: Service, submitted: list[Submitted], body: ChatRequest) -> None:
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        super().__init__(service, submitted, kind, "chatcmpl")
        choice, grammar = choice_of(body.tools or [], body.tool_choice)
        self._has_tools, self._is_call = choice != "none", grammar is not None
        self._with_logprobs = bool(body.logprobs)
        self._readers: dict[int, CallReader] = {}
        self._num_calls: dict[int, int] = {}

    def choices(self) -> list[dict[str, Any]]:
        """Of the whole answer."""
        return [self._choice(sample) for sample in self.handles[0].samples]

    def _choice(self, sample: Sample) -> dict[str, Any]:
        text, calls, reason = sample.text, list[dict[str, Any]](), REASONS[sample.finish_reason or "stop"]
        if self._has_tools:
            reader = CallReader(self._is_call)
            parts = [*reader.add(text), *reader.finish()]
            calls = [part for part in parts if isinstance(part, dict)]
            text = "".join(part for part in parts if isinstance(part, str))
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
            reason = "tool_calls"
        logprobs = [self._logprob(one) for one in sample.logprobs] if self._with_logprobs else None
        return {
            "index": sample.index,
            "message": message,
            "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
            "finish_reason": reason,
        }

    def _logprob(self, one: LogProbability) -> dict[str, Any]:
        return self._named(one.id, one.value) | {
            "top_logprobs": [self._named(id, value) for id, value in one.top]
        }

    def _named(self, id: int, value: float) -> dict[str, Any]:
        token = self._service.tokenizer.decode([id], special_tokens=True)
        return {"token": token, "logprob": max(value, -9999.0), "bytes": list(token.encode())}

    def parts_of(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """The choices of chunks that a piece becomes."""
        is_first = index not in self._num_calls
        if is_first:
            self._num_calls[index] = 0
            self._readers[index] = CallReader(self._is_call)
        parts: list[str | dict[str, Any]] = [piece.text] if piece.text else []
        if self._has_tools:
            reader = self._readers[index]
            parts = list(reader.add(piece.text))
            if piece.finish_reason is not None:
                parts += reader.finish()
        logprobs = None
        if self._with_logprobs and piece.logprob is not None:
            logprobs = {"content": [self._logprob(piece.logprob)], "refusal": None}
        deltas: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, str):
                deltas.append({"content": part})
            else:
                deltas.append({"tool_calls": [{"index": self._num_calls[index]} | part]})
                self._num_calls[index] += 1
        if is_first:
            deltas[:1] = [{"role": "assistant", "content": "", **(deltas[0] if deltas else {})}]
        if not deltas and (logprobs is not None or piece.finish_reason is not None):
            deltas = [{}]
        reason = None
        if piece.finish_reason is not None:
            reason = "tool_calls" if self._num_calls[index] else REASONS[piece.finish_reason]
        for i, delta in enumerate(deltas):
            is_last = i == len(deltas) - 1
            yield {
                "index": index,
                "delta": delta,
                "logprobs": logprobs if i == 0 else None,
                "finish_reason": reason if is_last else None,
            }


# ---- completions


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    def __init__(self, service: Service, submitted: list[Submitted], body: CompletionRequest) -> None:
        super().__init__(service, submitted, "text_completion", "cmpl")
        self._with_logprobs = body.logprobs is not None
        self._lengths: dict[int, int] = {}

    def choices(self) -> list[dict[str, Any]]:
        """Of the whole answer."""
        num_samples, choices = len(self.handles[0].samples), []
        for place, handle in enumerate(self.handles):
            for sample in handle.samples:
                logprobs = self._logprobs(sample.logprobs, 0) if self._with_logprobs else None
                choices.append(
                    {
                        "index": place * num_samples + sample.index,
                        "text": sample.text,
                        "logprobs": logprobs,
                        "finish_reason": REASONS[sample.finish_reason or "stop"],
                    }
                )
        return choices

    def _logprobs(self, given: list[LogProbability], offset: int) -> dict[str, Any]:
        decode = self._service.tokenizer.decode
        tokens, offsets = [decode([one.id], special_tokens=True) for one in given], []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [max(one.value, -9999.0) for one in given],
            "top_logprobs": [
                {decode([id], special_tokens=True): max(value, -9999.0) for id, value in one.top}
                for one in given
            ],
            "text_offset": offsets,
        }

    def parts_of(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """The choice of a chunk that a piece becomes; none where it has nothing to show."""
        logprobs, offset = None, self._lengths.get(index, 0)
        if self._with_logprobs and piece.logprob is not None:
            logprobs = self._logprobs([piece.logprob], offset)
            self._lengths[index] = offset + sum(map(len, logprobs["tokens"]))
        if not piece.text and logprobs is None and piece.finish_reason is None:
            return
        reason = None if piece.finish_reason is None else REASONS[piece.finish_reason]
        yield {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": reason}
