"""A model's chat template: messages of a conversation as the one text that the model was trained on.

Templates come with models and are programs in Jinja's language; they run in its sandbox, which lets them
change nothing and call nothing unsafe.

Imports extras.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ArgumentError
from ..extras import require

#: {"role": ..., "content": ...}
Message = Mapping[str, Any]


class ChatTemplate:
    """A template that can be rendered.

    source : in Jinja's language, as transformers has it
    tokens : texts of special tokens by the names that templates use, as bos_token

    Raises: ArgumentError for a template that is none; ImportError that names the extra.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        jinja2 = require("jinja2", "chat")
        sandbox = require("jinja2.sandbox", "chat")
        self.source, self._tokens = source, dict(tokens)
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _as_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ArgumentError(f"the chat template cannot be parsed: {error}") from None

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation.

        messages : each with "role" and "content", the oldest first
        add_generation_prompt : end with what begins an answer
        variables : what the template reads beside that, as `tools`

        Raises: ArgumentError with what the template says, where it takes no such conversation.
        """
        require_messages(messages)
        try:
            text: str = self._template.render(
                {"tools": None, "documents": None}
                | self._tokens
                | variables
                | {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
            )
        except Exception as error:  # a program of others may raise anything
            raise ArgumentError(f"the chat template refuses the messages: {error}") from None
        return text


def require_messages(messages: object) -> None:
    """ArgumentError that names the first of `messages` that is no message."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ArgumentError(f"messages is {messages!r:.60}; give a list of at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ArgumentError(f'messages[{i}] is {message!r:.60}; it must have a "role", a text')


def _as_json(value: object, indent: int | None = None, **others: Any) -> str:
    # Jinja's own filter escapes what HTML would read.
    return json.dumps(value, ensure_ascii=False, indent=indent, **others)


def _refuse(message: object) -> None:
    raise ValueError(str(message))
