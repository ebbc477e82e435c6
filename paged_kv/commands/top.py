"""`paged-kv top URL`: a server's pool in a terminal.

    /pool/frames ── frames ── View ── text, a cell for each page or for several

Imports nothing of the cache: it reads what the server sends.
"""

import argparse
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from ..errors import ArgumentError
from ..extras import require

#: Okabe and Ito's colours, as the page has them.
HUES = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#f0e442", "#7f6fc9")
FREE, KEPT, OWNED, PINNED, OPEN = 0, 1, 2, 4, 8
#: Of a state, what is drawn: (free, kept, owned, shared, pinned).
MARKS = ("·", "▫", "■", "▣", "◆")
#: Seconds to wait for a server.
PATIENCE = 10.0


class View:
    """A pool as its frames say it is."""

    def __init__(self) -> None:
        self.num_pages = self.page_size = 0
        #: Of each page: state, references, owner, parent.
        self.pages: list[tuple[int, int, int, int]] = []
        #: Of each row: serial number, tokens.
        self.seqs: dict[int, tuple[int, int]] = {}
        self.stats: dict[str, Any] = {}
        self.seconds = 0.0
        self.tokens_per_s = 0.0

    def take(self, frame: dict[str, Any]) -> None:
        """Change as a frame says."""
        if frame["kind"] == "full":
            self.num_pages, self.page_size = frame["num_pages"], frame["page_size"]
            self.pages, self.seqs = [(FREE, 0, -1, -1)] * self.num_pages, {}
        values = frame["pages"]
        for i in range(0, len(values), 5):
            self.pages[values[i]] = tuple(values[i + 1 : i + 5])
        for row in frame["gone"]:
            self.seqs.pop(row, None)
        for row, serial, length, _ in frame["seqs"]:
            self.seqs[row] = serial, length
        elapsed = frame["t"] - self.seconds
        new = frame["stats"].get("new_tokens", 0) - self.stats.get("new_tokens", 0)
        if elapsed > 0 and self.stats:
            share = min(1.0, elapsed / 2)  # of the last two seconds
            self.tokens_per_s += share * (new / elapsed - self.tokens_per_s)
        self.stats, self.seconds = frame["stats"], frame["t"]

    def numbers(self) -> str:
        """One line."""
        stats = self.stats
        slots = stats["used"] * self.page_size
        found = stats["hits"] / stats["queried"] if stats["queried"] else 0.0
        parts = [
            f"{stats['used']} used, {stats['kept']} kept, {stats['free']} free of {self.num_pages} pages",
            f"utilization {100 * stats['tokens'] / slots if slots else 0:.0f} %",
            f"hits {100 * found:.0f} %",
            f"{stats.get('running', stats['sequences'])} running, {stats.get('waiting', 0)} waiting",
            f"{self.tokens_per_s:,.0f} tokens/s",
            f"{stats['evictions']} evictions, {stats.get('preemptions', 0)} preemptions",
        ]
        return " · ".join(parts)

    def cells(self, count: int) -> list[tuple[str, str]]:
        """(mark, colour) of at most `count` cells; a cell of several pages shows the fullest of them."""
        each = max(1, -(-self.num_pages // max(1, count)))
        cells = []
        for begin in range(0, self.num_pages, each):
            state, refs, owner, _ = max(self.pages[begin : begin + each], key=lambda page: page[0] & 3)
            cells.append(self._cell(state, refs, owner))
        return cells

    def _cell(self, state: int, refs: int, owner: int) -> tuple[str, str]:
        if state & 3 == FREE:
            return MARKS[0], "grey42"
        if state & 3 == KEPT:
            return MARKS[1], "grey62"
        serial = self.seqs.get(owner, (0, 0))[0]
        mark = MARKS[4] if state & PINNED else MARKS[3] if refs > 1 else MARKS[2]
        return mark, HUES[serial % len(HUES)]


def frames_of(url: str, key: str | None) -> Iterator[dict[str, Any]]:
    """A server's frames as they come.  Raises: ArgumentError that says why there are none."""
    address = url.rstrip("/").removesuffix("/v1") + "/pool/frames"
    if not address.startswith(("http://", "https://")):
        raise ArgumentError(f"{url} is no address; give one such as http://127.0.0.1:8000")
    request = urllib.request.Request(address)
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    frame = json.loads(line[6:])
                    if "error" in frame:
                        raise ArgumentError(f"{address}: {frame['error']['message']}")
                    yield frame
    except urllib.error.HTTPError as error:
        hint = "; give --api-key" if error.code == 401 else ""
        raise ArgumentError(f"{address} answers {error.code} {error.reason}{hint}") from None
    except OSError as error:
        raise ArgumentError(f"{address} does not answer: {error}") from None


def run(options: argparse.Namespace) -> int:
    """The command; 0 when it was ended, or the server has ended."""
    console = require("rich.console", "serve").Console()
    live_of, text_of = require("rich.live", "serve").Live, require("rich.text", "serve").Text
    key = options.api_key or os.environ.get("PAGED_KV_API_KEY")
    view, count = View(), 0
    legend = "· free  ▫ kept  ■ owned  ▣ shared  ◆ pinned; a colour for each sequence. Ctrl-C ends it."
    with live_of(console=console, refresh_per_second=10, transient=False) as live:
        for frame in frames_of(options.url, key):
            view.take(frame)
            width = max(8, console.width)
            room = width * max(1, console.height - 4)
            text = text_of(view.numbers() + "\n")
            for i, (mark, colour) in enumerate(view.cells(room)):
                text.append(mark, style=colour)
                if i % width == width - 1:
                    text.append("\n")
            text.append("\n" + legend, style="dim")
            live.update(text)
            count += 1
            if options.frames is not None and count >= options.frames:
                break
    return 0
