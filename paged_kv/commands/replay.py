"""`paged-kv replay FILE`: the page of the pool, of a file that `cache.record` wrote.

    --out FILE.html: one page that needs no server; else a server on 127.0.0.1, until Ctrl-C

Imports server.pool.
"""

import argparse
import http.server
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from .._binding import integer
from ..extras import require
from ..files import replace_files


def run(options: argparse.Namespace) -> int:
    """The command; 0 when it went well."""
    require("fastapi", "serve")
    from ..server.pool import page, read_recording

    integer("--port", options.port, 0, 65535)
    html = page(read_recording(Path(options.file))).encode()
    if options.out is not None:
        replace_files({Path(options.out): lambda file: file.write(html)})
        return 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", options.port), partial(_Page, html)) as server:
        print(f"{options.file} at http://127.0.0.1:{server.server_address[1]}/. Ctrl-C ends it.", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


class _Page(http.server.BaseHTTPRequestHandler):
    """Answers / with the page."""

    def __init__(self, html: bytes, *given: Any) -> None:
        self._html = html
        super().__init__(*given)

    def do_GET(self) -> None:
        if self.path != "/":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(self._html)))
        self.end_headers()
        self.wfile.write(self._html)

    def log_message(self, format: str, *values: Any) -> None:
        """Say nothing."""
