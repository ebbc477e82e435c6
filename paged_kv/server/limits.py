"""Limits before anything is allocated: the key of a request, the size of its body, and the time it takes.

    connection ── headers: 32 KiB, 30 s ── key ── body: 4 MiB, 30 s ── route

Imports errors.
"""

import asyncio
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any, TypeAlias

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError, api_error

Scope: TypeAlias = MutableMapping[str, Any]
Event: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Event]]
Send: TypeAlias = Callable[[Event], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("paged_kv.server")

MAX_BODY_BYTES, MAX_HEADER_BYTES = 4 * 2**20, 32 * 2**10
#: Seconds for the headers of a request, and for its body.
MAX_SECONDS = 30.0
#: What answers without a key.
OPEN_PATHS = frozenset({"/", "/health"})


class Limits:
    """Middleware that reads the whole body, or refuses the request.

    api_keys : one of them is needed; none: none is
    """

    def __init__(
        self,
        app: App,
        api_keys: Collection[str] = (),
        max_body_bytes: int = MAX_BODY_BYTES,
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        self._app, self._max_bytes, self._max_seconds = app, max_body_bytes, max_seconds
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        try:
            scope["paged_kv_key"] = self._key(scope["path"], headers.get(b"authorization", b""))
            body = await self._body(headers, receive)
        except ApiError as error:
            return await send_error(send, error)
        if body is None:
            return None  # the client has gone
        is_read = False

        async def replayed() -> Event:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._answered(scope, replayed, send)

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the app answer; what it raises is an answer, too, and the connection goes on."""
        has_begun = False

        async def noted(message: Event) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            log.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            if has_begun:
                raise
            await send_error(send, api_error(error), closes=False)

    def _key(self, path: str, header: bytes) -> bytes:
        """The key of a request, empty where none is needed.  Every key is compared, in constant time."""
        if not self._keys or path in OPEN_PATHS:
            return b""
        kind, _, given = header.partition(b" ")
        found = b""
        for key in self._keys:
            if hmac.compare_digest(given.strip(), key):
                found = key
        if kind.lower() != b"bearer" or not found:
            raise ApiError(401, "the API key is missing or unknown: Authorization: Bearer <key>")
        return found

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        length = headers.get(b"content-length", b"0")
        too_large = ApiError(413, f"the body has more than {self._max_bytes} bytes")
        if not length.isdigit() or len(length) > 12 or int(length) > self._max_bytes:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._max_seconds):
                while True:
                    event = await receive()
                    if event["type"] != "http.request":
                        return None
                    parts.append(event.get("body", b""))
                    size += len(parts[-1])
                    if size > self._max_bytes:
                        raise too_large
                    if not event.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self._max_seconds:g} s") from None


async def send_error(send: Send, error: ApiError, *, closes: bool = True) -> None:
    """An error as a whole answer.

    closes : the connection, of which a part may not have been read
    """
    body = json.dumps(error.body).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **({"connection": "close"} if closes else {}),
        **error.headers,
    }
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


class TimedProtocol(H11Protocol):
    """HTTP/1.1 whose headers have to come in time, also those of a later request of a connection."""

    max_seconds = MAX_SECONDS
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            if self._timer is None:
                self._start_timer()
        else:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.max_seconds, self._end)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()
