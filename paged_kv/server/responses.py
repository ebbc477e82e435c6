"""/v1/responses: the same answers in the form of OpenAI's newer API, which this server keeps none of.

Imports completions.
"""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from ..serving.handle import Handle
from .completions import grammar_of, merged
from .errors import refused
from .schemas import Message, ResponsesRequest, Tool
from .service import Prompt, Service, Submitted, plain
from .stream import event
from .tools import CallReader, choice_of


def messages_of(body: ResponsesRequest) -> list[Message]:
    """The conversation of a request.  Raises: ApiError for an item that is none."""
    messages = []
    if body.instructions is not None:
        messages.append(Message(role="system", content=body.instructions))
    if isinstance(body.input, str):
        return [*messages, Message(role="user", content=body.input)]
    for i, item in enumerate(body.input):
        kind = item.get("type", "message")
        content, role = item.get("content"), item.get("role")
        if kind == "message" and isinstance(role, str) and role and isinstance(content, (str, list)):
            blocks: Any = content
            if isinstance(content, list) and not all(isinstance(block, dict) for block in content):
                raise refused(f"input[{i}].content holds what is no block", "input")
            messages.append(Message(role=role[:64], content=blocks))
        elif kind == "function_call_output":
            messages.append(
                Message(role="tool", content=str(item.get("output", "")), tool_call_id=_text(item, "call_id"))
            )
        elif kind == "function_call":
            function = {"name": _text(item, "name"), "arguments": _text(item, "arguments")}
            call = {"id": _text(item, "call_id"), "type": "function", "function": function}
            messages.append(Message(role="assistant", content=None, tool_calls=[call]))
        else:
            raise refused(f"input[{i}] is of type {kind!r:.40}, which is not served", "input")
    return messages


def _text(item: dict[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise refused(f"an item of input has no {name}", "input")
    return value


def tools_of(body: ResponsesRequest) -> list[Tool]:
    """The functions of a request.  Raises: ApiError for another kind of tool."""
    tools = []
    for i, tool in enumerate(body.tools or []):
        if tool.get("type") != "function" or not isinstance(tool.get("name"), str) or not tool["name"]:
            raise refused(f"tools[{i}] is no function, and functions are all that is served", "tools")
        parameters = tool.get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise refused(f"tools[{i}].parameters is no object", "tools")
        description = tool.get("description")
        function = {
            "name": tool["name"][:256],
            "description": description if isinstance(description, str) else None,
            "parameters": parameters,
        }
        tools.append(Tool.model_validate({"type": "function", "function": function}))
    return tools


def response_prompt(service: Service, body: ResponsesRequest, key: bytes) -> Prompt:
    """Raises: ApiError, ArgumentError."""
    for name in ("previous_response_id", "conversation", "background", "store", "prompt"):
        if getattr(body, name):
            raise refused(f"{name} needs answers that are kept, and this server keeps none", name)
    tools = tools_of(body)
    choice, grammar = choice_of(tools, body.tool_choice)
    form = body.text.get("format") if body.text is not None else None
    if form is not None and not isinstance(form, dict):
        raise refused("text.format is no object", "text")
    whole = grammar_of(form, "text.format")
    if grammar is not None and whole is not None:
        raise refused("text.format and a tool_choice that requires a call exclude each other", "tool_choice")
    variables: dict[str, Any] = {}
    if tools and choice != "none":
        variables["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    messages = messages_of(body)
    ids = service.chat_ids([plain(message) for message in messages], **variables)
    return service.prompt(
        body,
        ids,
        key,
        body.max_output_tokens,
        grammar=grammar or whole,
        retained=service.breakpoints(messages, ids, **variables),
    )


class ResponseAnswer:
    """Of one request."""

    def __init__(self, service: Service, submitted: Submitted, body: ResponsesRequest) -> None:
        self._service, self.submitted, self._body = service, submitted, body
        self.handle: Handle = submitted.handle
        choice, grammar = choice_of(tools_of(body), body.tool_choice)
        self._has_tools, self._is_call = choice != "none", grammar is not None
        self._id, self._message_id = f"resp_{secrets.token_hex(16)}", f"msg_{secrets.token_hex(16)}"

    def whole(self) -> dict[str, Any]:
        """The answer when it is done."""
        sample = self.handle.samples[0]
        parts: list[str | dict[str, Any]] = [sample.text]
        if self._has_tools:
            reader = CallReader(self._is_call)
            parts = [*reader.add(sample.text), *reader.finish()]
        return self._response(self._output(parts), sample.finish_reason)

    def _output(self, parts: list[str | dict[str, Any]]) -> list[dict[str, Any]]:
        text = "".join(part for part in parts if isinstance(part, str))
        calls = [self._call(part) for part in parts if isinstance(part, dict)]
        return [*([self._message(text)] if text or not calls else []), *calls]

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        return {
            "type": "function_call",
            "id": f"fc_{secrets.token_hex(16)}",
            "call_id": call["id"],
            "status": "completed",
            **call["function"],
        }

    def _message(self, text: str, status: str = "completed") -> dict[str, Any]:
        content = [self._part(text)] if status == "completed" else []
        return {
            "type": "message",
            "id": self._message_id,
            "role": "assistant",
            "status": status,
            "content": content,
        }

    @staticmethod
    def _part(text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _response(self, output: list[dict[str, Any]], reason: str | None) -> dict[str, Any]:
        body, usage = self._body, self.handle.usage
        is_cut = reason in ("length", "timeout")
        status = "in_progress" if reason is None else "incomplete" if is_cut else "completed"
        counts = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.cached_tokens,
                "cache_write_tokens": usage.written_tokens,
            },
            "output_tokens": usage.new_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.new_tokens,
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self.submitted.created,
            "completed_at": None if reason is None else int(time.time()),
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._service.name,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if reason is None else counts,
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The stream of the answer."""
        number = -1

        def numbered(kind: str, **fields: Any) -> bytes:
            nonlocal number
            number += 1
            return event({"type": kind, "sequence_number": number, **fields}, kind)

        place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        begun = self._response([], None)
        reader = CallReader(self._is_call)
        parts: list[str | dict[str, Any]] = []
        has_text = False
        async for _, pieces in merged([self.handle]):
            chunk = b""
            if number < 0:
                chunk += numbered("response.created", response=begun)
                chunk += numbered("response.in_progress", response=begun)
            for piece in pieces:
                if piece.error is not None and piece.finish_reason == "error":
                    raise piece.error
                new: list[str | dict[str, Any]] = [piece.text] if piece.text else []
                if self._has_tools:
                    new = list(reader.add(piece.text))
                    if piece.finish_reason is not None:
                        new += reader.finish()
                parts += new
                for part in new:
                    if isinstance(part, str):
                        if not has_text:
                            has_text = True
                            item = self._message("", "in_progress")
                            chunk += numbered("response.output_item.added", output_index=0, item=item)
                            chunk += numbered("response.content_part.added", **place, part=self._part(""))
                        chunk += numbered("response.output_text.delta", **place, delta=part, logprobs=[])
            if chunk:
                yield chunk
        output = self._output(parts)
        chunk = b""
        for index, item in enumerate(output):
            if item["type"] == "message":
                text = item["content"][0]["text"]
                if not has_text:
                    empty = self._message("", "in_progress")
                    chunk += numbered("response.output_item.added", output_index=index, item=empty)
                    chunk += numbered("response.content_part.added", **place, part=self._part(""))
                chunk += numbered("response.output_text.done", **place, text=text, logprobs=[])
                chunk += numbered("response.content_part.done", **place, part=item["content"][0])
            else:
                unfinished = item | {"status": "in_progress", "arguments": ""}
                chunk += numbered("response.output_item.added", output_index=index, item=unfinished)
                where = {"item_id": item["id"], "output_index": index}
                arguments = item["arguments"]
                chunk += numbered("response.function_call_arguments.delta", **where, delta=arguments)
                chunk += numbered(
                    "response.function_call_arguments.done", **where, name=item["name"], arguments=arguments
                )
            chunk += numbered("response.output_item.done", output_index=index, item=item)
        final = self._response(output, self.handle.samples[0].finish_reason)
        kind = "response.incomplete" if final["status"] == "incomplete" else "response.completed"
        yield chunk + numbered(kind, response=final)
