"""JSON files of other programs: read with errors that name the file, fields taken with a type and a range.

Imports errors.
"""

import json
import math
from pathlib import Path
from typing import Any, Final

from .._binding import integer
from ..errors import ArgumentError

#: No configuration is longer; an index of a thousand shards is 10 MB.
MAX_BYTES = 100 << 20


class _Required:
    """The default of a field that has none."""


REQUIRED: Final = _Required()


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The object that a JSON text holds, in UTF-8 (with or without a mark), UTF-16 or UTF-32.

    Raises: ArgumentError that names `where` for anything else.
    """
    if not text:
        raise ArgumentError(f"{where} is empty")
    if text[:8] in (b"version ", "version "):
        raise ArgumentError(f"{where} is a pointer of git-lfs, not the file; fetch it with `git lfs pull`")
    try:
        # json detects the encoding from the first bytes.
        found = json.loads(text.removeprefix("\ufeff") if isinstance(text, str) else text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{where} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ArgumentError(f"{where} holds {_shown(found)}, not a JSON object")
    return found


def read_json_object(path: Path) -> dict[str, Any]:
    """The object of a file.  Raises: ArgumentError that names it; OSError when it is not there."""
    if path.stat().st_size > MAX_BYTES:
        raise ArgumentError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read")
    return json_object(path.read_bytes(), str(path))


class Fields:
    """Fields of a JSON object; a null counts as missing.

    Each method takes one field.  Raises: ArgumentError that names `where`, the field and what it holds.
    """

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self._fields, self.where = fields, where

    def __contains__(self, name: str) -> bool:
        return self._fields.get(name) is not None

    def _value(self, name: str, default: Any) -> Any:
        value = self._fields.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ArgumentError(f"{self.where} has no {name}")
        return default

    def _refuse(self, name: str, value: object, wanted: str) -> ArgumentError:
        return ArgumentError(f"{self.where}: {name} is {_shown(value)}; it must be {wanted}")

    def integer(self, name: str, low: int, high: int = 2**31 - 1, default: Any = REQUIRED) -> Any:
        value = self._value(name, default)
        if value is default:
            return value
        if type(value) is not int or not low <= value <= high:
            raise self._refuse(name, value, f"an integer from {low} to {high}")
        return integer(name, value, low, high)

    def number(self, name: str, above: float, most: float = 3.4e38, default: Any = REQUIRED) -> Any:
        """A number above `above`, and at most `most`."""
        value = self._value(name, default)
        if value is default:
            return value
        is_number = type(value) in (int, float) and abs(value) < 2**1000 and math.isfinite(value)
        if not is_number or not above < value <= most:
            raise self._refuse(name, value, f"a number above {above:g}, at most {most:g}")
        return float(value)

    def text(self, name: str, choices: tuple[str, ...], default: Any = REQUIRED) -> Any:
        value = self._value(name, default)
        if value is not default and value not in choices:
            raise self._refuse(name, value, f"one of {', '.join(choices)}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if type(value) is not bool:
            raise self._refuse(name, value, "true or false")
        return value

    def fields(self, name: str) -> "Fields":
        """An object within the object; an empty one when it is missing."""
        value = self._value(name, {})
        if not isinstance(value, dict):
            raise self._refuse(name, value, "an object")
        return Fields(value, f"{self.where}: {name}")

    def texts(self, name: str) -> dict[str, str]:
        """An object of texts."""
        value = self._value(name, REQUIRED)
        if not isinstance(value, dict) or not all(type(text) is str for text in value.values()):
            raise self._refuse(name, value, "an object of texts")
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """A token id, or a list of them; none when it is missing.  Ids beyond the vocabulary are
        never seen.
        """
        value = self._value(name, [])
        values = value if isinstance(value, list) else [value]
        if not all(type(id) is int and -(2**31) <= id < 2**31 for id in values):
            raise self._refuse(name, value, "a token id, or a list of them")
        return tuple(values)

    def numbers(self, name: str, choices: tuple[int, ...]) -> list[int]:
        """A list of these integers; an empty one when it is missing."""
        value = self._value(name, [])
        if not isinstance(value, list) or not all(type(n) is int and n in choices for n in value):
            raise self._refuse(name, value, f"a list of {', '.join(map(str, choices))}")
        return value

    def is_null(self, name: str) -> bool:
        """Whether the field is there, as null."""
        return name in self._fields and self._fields[name] is None

    def plain(self) -> dict[str, Any]:
        """All fields of the file."""
        return {name: value for name, value in self._fields.items() if value is not None}


def _shown(value: object) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = repr(type(value).__name__)
    return text if len(text) <= 60 else f"{text[:57]}..."
