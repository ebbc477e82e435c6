"""The pool, seen: a page that draws every page of the pool, live or from a recording.

    Feed: ten frames a second for each viewer ── events ──▶ its page; without a viewer no frame is made

Imports service, stream and frames.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, CacheClosed
from ..frames import Frames
from .errors import ApiError
from .service import Service
from .stream import event

SECONDS_BETWEEN_FRAMES = 0.1
#: Viewers at once; each has its own record of what it has seen.
MAX_VIEWERS = 16
#: Bytes of a recording that a page is made of, at most.
MAX_RECORDING = 64 * 2**20
#: Nothing from outside, and nothing that a recording could bring.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
PLACE = '<script id="recording" type="application/x-ndjson">'


def page(recording: str = "") -> str:
    """The page's HTML: live, or with the lines of a recording in it."""
    html = resources.files(__package__).joinpath("pool.html").read_text(encoding="utf-8")
    # A recording has numbers only; should it be another file, it ends no element of the page.
    return html.replace(PLACE, PLACE + recording.replace("<", "\\u003c"), 1)


def read_recording(path: Path) -> str:
    """The lines of a file that `cache.record` wrote.

    A last line that is cut off is left out.  Raises: ArgumentError for another file; OSError.
    """
    if path.stat().st_size > MAX_RECORDING:
        raise ArgumentError(f"{path} has more than {MAX_RECORDING / 2**20:.0f} MiB; record fewer frames")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    good = list[str]()
    for i, line in enumerate(lines):
        try:
            frame = json.loads(line)
            is_frame = (
                isinstance(frame, dict) and {"t", "kind", "pages", "seqs", "gone", "stats"} <= frame.keys()
            )
        except ValueError:
            is_frame = False
        if not is_frame and i == len(lines) - 1 and good:
            break
        if not is_frame:
            raise ArgumentError(f"{path}:{i + 1} is no frame; give a file that cache.record(path) wrote")
        good.append(line)
    if not good:
        raise ArgumentError(f"{path} is empty; give a file that cache.record(path) wrote")
    return "\n".join(good)


class Feed:
    """Frames of a service's pool for its viewers."""

    def __init__(self, service: Service) -> None:
        self._service, self._engine, self._num_viewers = service, service.engine, 0

    def frames(self) -> AsyncIterator[bytes]:
        """Events for one viewer, until it goes away.  Raises: ApiError when there are too many."""
        if self._num_viewers >= MAX_VIEWERS:
            raise ApiError(503, f"{MAX_VIEWERS} viewers are there already")
        return self._frames()

    async def _frames(self) -> AsyncIterator[bytes]:
        frames, loop = Frames(self._engine.cache._store), asyncio.get_running_loop()
        self._num_viewers += 1
        try:
            with suppress(CacheClosed):
                while self._engine.is_open and not self._service.is_ending:
                    begin = loop.time()
                    yield await asyncio.to_thread(self._event, frames)
                    await asyncio.sleep(max(0.0, begin + SECONDS_BETWEEN_FRAMES - loop.time()))
        finally:
            self._num_viewers -= 1

    def _event(self, frames: Frames) -> bytes:
        frame = frames.next()
        frame["stats"] |= self.counts()
        return event(frame)

    def counts(self) -> dict[str, Any]:
        """What the engine adds to a frame's stats."""
        engine = self._engine
        return {
            "running": engine.num_running,
            "waiting": engine.num_waiting,
            "new_tokens": engine.counters.num_new_tokens,
            "preemptions": engine.report.num_preemptions,
        }
