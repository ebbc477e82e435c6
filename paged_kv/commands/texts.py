"""Texts on their way in and out of the command line: arguments, files, terminals.

Imports errors.
"""

import os
from pathlib import Path
from typing import TextIO

from ..errors import ArgumentError


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
        return path.read_bytes().decode("utf-8-sig")  # line ends stay what they are
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path} is no text in UTF-8: {error}") from None


def show_everything(stream: TextIO) -> None:
    """Let a stream escape what its encoding lacks, where it would raise after the work is done."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
