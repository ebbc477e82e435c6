"""Texts on their way in and out of the command line: arguments, files, tokenizers, terminals.

Imports extras and models.json_file.
"""

import os
from pathlib import Path
from typing import Any, TextIO

from ..errors import ArgumentError
from ..extras import require
from ..models.json_file import Fields, read_json_object


def require_text(option: str, text: str) -> str:
    """An argument of the command line as text; ArgumentError where its bytes are none.

    Bytes beyond the system's encoding come as surrogates; they may be UTF-8, as where the locale is "C".
    """
    try:
        return text.encode().decode()
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise ArgumentError(f"{option} is no text in UTF-8: {text[:60]!a}") from None


def read_text(path: Path) -> str:
    """A file in UTF-8, with or without a mark.  Raises: ArgumentError that names it; OSError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path} is no text in UTF-8: {error}") from None


def open_tokenizer(path: Path) -> Any:
    """The tokenizer of a tokenizer.json.  Raises: ArgumentError that names the file; ImportError."""
    tokenizers = require("tokenizers", "demo")
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


def show_everything(stream: TextIO) -> None:
    """Let a stream escape what its encoding lacks, where it would raise after the work is done."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
