"""Server-sent events, and waiting for what a client may leave before it comes.

Imports serving.handle.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any

from starlette.responses import Response

from ..serving.handle import Handle
from .errors import api_error
from .limits import Receive, Scope, Send

HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
#: How a stream of OpenAI's API ends.
DONE = b"data: [DONE]\n\n"


def event(data: object, name: str | None = None) -> bytes:
    """One event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (
        (f"event: {name}\n" if name else "").encode() + b"data: " + text.encode("utf-8", "replace") + b"\n\n"
    )


async def _left(receive: Receive) -> None:
    """Wait until the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(receive: Receive, handles: list[Handle], work: Coroutine[Any, Any, None]) -> bool:
    """Do work for a client.  False when the client has gone meanwhile: then the work was cancelled.

    handles : of its requests, which end with the work
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
        return working.done()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
        for handle in handles:
            if not handle.is_done:
                handle.cancel()


class EventStream(Response):
    """A response: events as they come, until they end or the client goes away.

    events : each is sent as it is; what it raises becomes an event, and the last one
    """

    def __init__(self, events: AsyncIterator[bytes], handles: list[Handle], headers: dict[str, str]) -> None:
        super().__init__(headers=HEADERS | headers)
        del self.headers["content-length"]
        self._events, self._handles = events, handles

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent() -> None:
            # What fails before anything has come is an answer of its own, with a status.
            chunk = await anext(self._events)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            try:
                async for chunk in self._events:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except OSError:
                return  # the client has gone
            except Exception as error:
                chunk = event(api_error(error).body) + DONE
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        with suppress(OSError):
            await unless_left(receive, self._handles, sent())
