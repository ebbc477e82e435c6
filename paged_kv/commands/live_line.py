"""A line of a terminal that is written over again while something takes its time.

Imports nothing.
"""

import time
from typing import TextIO

BAR_WIDTH = 24


class LiveLine:
    """One line that is written over again on a terminal, a few times a second; nothing elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._is_live, self._last = stream, stream.isatty(), 0.0

    def update(self, text: str) -> None:
        if self._is_live and time.monotonic() - self._last > 0.1:
            self._last = time.monotonic()
            self._stream.write(f"\r\033[K{text[:118]}")
            self._stream.flush()

    def progress(self, what: str, done: int, of: int) -> None:
        """The same with a bar."""
        full = BAR_WIDTH * done // max(1, of)
        self.update(f"{what} {'█' * full}{'░' * (BAR_WIDTH - full)} {done} of {of}")

    def clear(self) -> None:
        if self._is_live:
            self._stream.write("\r\033[K")
            self._stream.flush()
