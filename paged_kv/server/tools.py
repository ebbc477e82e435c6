"""Tools: functions that a model may call, as texts that it writes.

    tool_choice "auto"      the model writes <tool_call>{"name": ..., "arguments": {...}}</tool_call>, or not
    "required", or a name   a grammar makes the whole answer {"name": ..., "arguments": {...}} of a tool

Imports serving.grammar.
"""

import json
import secrets
from collections.abc import Iterator
from typing import Any

from ..serving.grammar import Grammar
from .errors import refused
from .schemas import Tool

BEGIN, END = "<tool_call>", "</tool_call>"


def choice_of(tools: list[Tool], choice: object) -> tuple[str, Grammar | None]:
    """("none", "auto" or "required", the grammar of an answer that must be a call).

    Raises: ApiError for a choice that is none.
    """
    names = [tool.function.name for tool in tools]
    if choice is None:
        choice = "auto" if tools else "none"
    if choice in ("none", "auto"):
        return ("none" if not tools else str(choice)), None
    if choice == "required":
        if not tools:
            raise refused("tool_choice is required, and there are no tools", "tool_choice")
        return "required", _grammar(tools)
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, dict) else None
        chosen = [tool for tool in tools if tool.function.name == name]
        if not chosen:
            raise refused(f"tool_choice names {name!r:.60}; the tools are {names!r:.200}", "tool_choice")
        return "required", _grammar(chosen)
    raise refused(f"tool_choice is {choice!r:.60}; give none, auto, required or a function", "tool_choice")


def _grammar(tools: list[Tool]) -> Grammar:
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return Grammar.of_json_schema(calls[0] if len(calls) == 1 else {"anyOf": calls})


def call_of(text: str) -> dict[str, Any] | None:
    """A call as clients read it, of the JSON that a model wrote; None when it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": found["name"], "arguments": arguments},
    }


class CallReader:
    """Takes a model's text piece by piece, and passes on what is text and what is a call.

    is_call : the whole text is one call
    """

    def __init__(self, is_call: bool = False) -> None:
        self._is_call, self._is_inside = is_call, is_call
        self._held = ""

    def add(self, piece: str) -> Iterator[str | dict[str, Any]]:
        """Texts, and calls."""
        self._held += piece
        while True:
            if self._is_inside:
                at = -1 if self._is_call else self._held.find(END)
                if at < 0:
                    return
                inner, self._held = self._held[:at], self._held[at + len(END) :].lstrip("\n")
                yield call_of(inner) or BEGIN + inner + END
                self._is_inside = False
            else:
                at = self._held.find(BEGIN)
                if at < 0:
                    num_held = _num_begun(self._held)
                    text, self._held = (
                        self._held[: len(self._held) - num_held],
                        self._held[len(self._held) - num_held :],
                    )
                    if text:
                        yield text
                    return
                text, self._held = self._held[:at], self._held[at + len(BEGIN) :]
                if text.strip():
                    yield text
                self._is_inside = True

    def finish(self) -> Iterator[str | dict[str, Any]]:
        """What is left at the end."""
        text, self._held = self._held, ""
        if self._is_inside:
            call = call_of(text)
            if call is not None:
                yield call
                return
            text = text if self._is_call else BEGIN + text
        if text:
            yield text


def _num_begun(text: str) -> int:
    """How many characters at the end of the text begin a call."""
    for count in range(min(len(text), len(BEGIN) - 1), 0, -1):
        if text.endswith(BEGIN[:count]):
            return count
    return 0
