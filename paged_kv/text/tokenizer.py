"""A model's tokenizer: text to token ids and back, and conversations, as the model was trained.

    tokenizer = ModelTokenizer.from_pretrained("smollm2")
    ids = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])

Special tokens, such as the one that ends a turn, are written by templates and by the model.  What a person
types is text, also where it looks like a special token.

Imports chat_template, gguf_vocabulary, stop_strings and models.model_files.
"""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Self

from ..errors import ArgumentError
from ..extras import require
from ..models.json_file import Fields, read_json_object
from ..models.model_files import ModelFiles
from .chat_template import ChatTemplate, Message, require_messages
from .gguf_vocabulary import GGUFVocabulary
from .stop_strings import StopStrings

UTF8_DECODER = codecs.getincrementaldecoder("utf-8")
#: Characters without a meaning, one of which marks special tokens that a person typed.
MARKS = [chr(code) for code in range(0xF8F0, 0xF8FF)]


class ModelTokenizer:
    """Text to token ids and back.

    tokenizer : a tokenizers.Tokenizer, which belongs to this object from now on
    begin_ids : what stands before every text
    chat_template : None: the model has none

    Threads may share one.
    """

    def __init__(
        self, tokenizer: Any, begin_ids: Sequence[int] = (), chat_template: ChatTemplate | None = None
    ) -> None:
        self._tokenizer, self._lock = tokenizer, Lock()
        self.begin_ids, self.chat_template = list(begin_ids), chat_template
        self._vocabularies: dict[tuple[int, ...], Any] = {}
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token.content: id for id, token in added.items() if token.special and token.content}
        patterns = [
            (r"\s*" if token.lstrip else "")
            + f"({re.escape(token.content)})"
            + (r"\s*" if token.rstrip else "")
            for token in sorted(added.values(), key=lambda token: -len(token.content))
            if token.content in self._special
        ]
        self._special_pattern = re.compile("|".join(patterns)) if patterns else None

    @classmethod
    def from_pretrained(cls, path: Path | str | ModelFiles) -> Self:
        """Of a folder with tokenizer.json, of a .gguf file, or of "smollm2"; as DecoderModel.from_pretrained.

        Raises: ArgumentError that names the file; ImportError that names the extra; OSError.
        """
        files = ModelFiles.open(path)
        if files.gguf is None:
            return cls._from_folder(files.path, files.config.bos_token_id)
        vocabulary = GGUFVocabulary(files.gguf.metadata, str(files.path))
        source = files.gguf.metadata.get("tokenizer.chat_template")
        names = {f"{name}_token": vocabulary.token(name) for name in ("bos", "eos")}
        tokens = {name: text for name, text in names.items() if text is not None}
        template = ChatTemplate(source, tokens) if isinstance(source, str) else None
        return cls(vocabulary.tokenizer(), vocabulary.begin_ids, template)

    @classmethod
    def _from_folder(cls, folder: Path, bos_token_id: int | None) -> Self:
        tokenizer = open_tokenizer(folder / "tokenizer.json")
        begin = begin_ids(folder, tokenizer, bos_token_id)
        path = folder / "tokenizer_config.json"
        settings = read_json_object(path) if path.is_file() else {}
        source = _template_source(folder, settings)
        if source is None:
            return cls(tokenizer, begin)
        tokens = {}
        for name, value in settings.items():
            content = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(content, str):
                tokens[name] = content
        return cls(tokenizer, begin, ChatTemplate(source, tokens))

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """The ids of a text, behind `begin_ids`.

        special_tokens : True: special tokens in it are what they look like, for text that no person typed
        """
        return [*self.begin_ids, *self._encode(text, special_tokens)]

    def _encode(self, text: str, special_tokens: bool) -> list[int]:
        try:
            with self._lock:
                self._tokenizer.encode_special_tokens = not special_tokens
                ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise ArgumentError(f"{text!r:.60} is no text: {error}") from None
        return ids

    def decode(self, ids: Iterable[int], *, special_tokens: bool = False) -> str:
        """The text of ids; special tokens have none unless `special_tokens`."""
        text: str = self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=not special_tokens)
        return text

    def chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The ids of a conversation, by the model's template.

        messages, add_generation_prompt, variables : as ChatTemplate.render
        Raises: ArgumentError when the model has no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ArgumentError("the model has no chat template; it continues texts (encode)")
        require_messages(messages)
        mark = self._mark_for(messages)
        marked = messages if mark is None else [self._marked(message, mark) for message in messages]
        text = self.chat_template.render(marked, add_generation_prompt=add_generation_prompt, **variables)
        if mark is None or self._special_pattern is None:
            return self._encode(text, True)
        ids, end = [], 0
        for match in self._special_pattern.finditer(text):
            ids += self._encode(text[end : match.start()].replace(mark, ""), False)
            ids.append(self._special[match[match.lastindex or 0]])
            end = match.end()
        return ids + self._encode(text[end:].replace(mark, ""), False)

    def _mark_for(self, messages: Sequence[Message]) -> str | None:
        """A character for `_marked`; None where no special token was typed."""
        typed = "\0".join(text for message in messages for text in _texts(message))
        if self._special_pattern is None or not self._special_pattern.search(typed):
            return None
        for mark in MARKS:
            if mark not in typed:
                return mark
        raise ArgumentError("the messages hold special tokens and all of U+F8F0 to U+F8FE; leave one out")

    def _marked(self, value: Any, mark: str) -> Any:
        """The value, with the mark inside of every special token, so that no pattern finds it."""
        if isinstance(value, str) and self._special_pattern is not None:
            return self._special_pattern.sub(
                lambda match: match[0].replace(
                    (token := match[match.lastindex or 0]), f"{token[0]}{mark}{token[1:]}"
                ),
                value,
            )
        if isinstance(value, dict):
            return {key: self._marked(part, mark) for key, part in value.items()}
        return [self._marked(part, mark) for part in value] if isinstance(value, (list, tuple)) else value

    def grammar_vocabulary(self, stop_ids: Iterable[int]) -> Any:
        """The vocabulary as llguidance reads it, made once for each set of ids that end a text."""
        key = tuple(sorted(stop_ids))
        with self._lock:
            if key not in self._vocabularies:
                tokenizer = require("llguidance", "grammar").LLTokenizer
                size = self._tokenizer.get_vocab_size()
                ends = [id for id in key if id < size]
                self._vocabularies[key] = tokenizer(self._tokenizer.to_str(), size, ends)
            return self._vocabularies[key]

    @cached_property
    def pieces(self) -> list[bytes] | None:
        """The bytes of each token; None where tokens are no bytes."""
        return _byte_pieces(self._tokenizer)

    def stream(self, stop: Sequence[str] = ()) -> "TextStream":
        """For the text of ids that come one by one, up to the first of some stop strings."""
        return TextStream(self, stop)


class TextStream:
    """The text of ids that come one by one, in whole characters.

    stop : texts that end the text, and are not part of it

    Where tokens are bytes, their bytes are decoded as they come; else the last tokens are decoded again with
    each new one.
    """

    def __init__(self, tokenizer: ModelTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._ids = tokenizer, list[int]()
        self._stops = StopStrings(stop)
        #: Whether there are stop strings.
        self.has_stops = bool(self._stops.stops)
        self._pieces: list[bytes] | None = getattr(tokenizer, "pieces", None)
        self._utf8_decode = UTF8_DECODER("replace").decode
        #: Ids from `_from` on are decoded again with each new one, and those before `_shown` have been given:
        #: how a token reads can depend on the one before it.
        self._from = self._shown = 0

    @property
    def has_stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.found is not None

    def add(self, id: int) -> str:
        """The text that this id adds.

        It is empty while a character waits for its other bytes, or while the text might become a stop string.
        Cost: O(1).
        """
        pieces = self._pieces
        if pieces is not None:
            text = self._utf8_decode(pieces[id] if id < len(pieces) else b"")
            return self._stops.add(text) if text and self.has_stops else text
        self._ids.append(id)
        given, text = self._decoded()
        if len(text) <= len(given) or text.endswith("\ufffd"):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return self._stops.add(text[len(given) :])

    def finish(self) -> str:
        """What is left at the end, bytes of half a character as U+FFFD."""
        if self._pieces is not None:
            return self._stops.add(self._utf8_decode(b"", True)) + self._stops.finish()
        given, text = self._decoded()
        self._from = self._shown = len(self._ids)
        return self._stops.add(text[len(given) :]) + self._stops.finish()

    def _decoded(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        return decode(self._ids[self._from : self._shown]), decode(self._ids[self._from :])


def _byte_pieces(tokenizer: Any) -> list[bytes] | None:
    """The bytes of each token, none of special ones; None where tokens are no bytes.

    Tokens of such vocabularies are written in characters that stand for bytes, as GPT-2 introduced it.
    """
    decoder = json.loads(tokenizer.to_str()).get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        return None
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
    vocabulary = tokenizer.get_vocab()
    pieces = [b""] * (1 + max(vocabulary.values(), default=-1))
    for token, id in vocabulary.items():
        is_mapped = all(letter in byte_of for letter in token)
        pieces[id] = bytes(byte_of[letter] for letter in token) if is_mapped else token.encode()
    for id, added in tokenizer.get_added_tokens_decoder().items():
        if added.special:
            pieces[id] = b""
    return pieces


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _template_source(folder: Path, settings: dict[str, Any]) -> str | None:
    """Of chat_template.jinja, or of tokenizer_config.json, where it may be a list of several by name."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8-sig")
    source = settings.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def open_tokenizer(path: Path) -> Any:
    """The tokenizer of a tokenizer.json.  Raises: ArgumentError that names the file; ImportError."""
    tokenizers = require("tokenizers", "chat")
    if not path.is_file():
        raise ArgumentError(
            f"there is no {path}; a model's folder has config.json, tokenizer.json and safetensors"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises no other type
        raise ArgumentError(f"{path} is no tokenizer: {error}") from None


def begin_ids(folder: Path, tokenizer: Any, bos_token_id: int | None) -> list[int]:
    """What stands before every prompt of a folder's model, as it was trained.

    `add_bos_token` of tokenizer_config.json decides; where it is silent, the tokenizer's own post-processor
    does, and a tokenizer that adds nothing means that nothing is added.
    Raises: ArgumentError for a file that is not what it should be.
    """
    path = folder / "tokenizer_config.json"
    fields = Fields(read_json_object(path) if path.is_file() else {}, str(path))
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    processed = tokenizer.encode("a").ids
    length = next((i for i in range(len(processed)) if processed[i : i + len(plain)] == plain), 0)
    added = list(processed[:length])
    if not added and fields.flag("add_bos_token", False) and bos_token_id is not None:
        return [bos_token_id]
    return added if fields.flag("add_bos_token", True) else []
