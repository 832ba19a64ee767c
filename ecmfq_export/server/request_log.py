"""Around every request: a line in the log, a count, an id; and what a refused client still sends is read before it is answered."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ecmfq_export.server.metrics import Metrics

log = logging.getLogger(__name__)

CLIENT_GONE = 499
"""Status in the log and the counts for a client that did not wait; nobody receives it."""
_DISCARD_SECONDS = 2.0


class RequestLog:
    """ASGI middleware; the application may set ``scope["state"]["note"]``, which ends the line.

    Args:
        discard_bytes: how much of a refused request is read and thrown away. A client that is still sending when the connection is
            closed may never see the answer.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, discard_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._metrics, self._discard_bytes, self._clock = app, metrics, discard_bytes, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, complete = self._clock(), CLIENT_GONE, not _has_body(scope)
        scope.setdefault("state", {})["id"] = request_id = f"chatcmpl-{secrets.token_hex(12)}"

        async def watched_receive() -> Message:
            nonlocal complete
            message = await receive()
            complete = complete or message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status >= 400 and not complete:
                    await self._discard(watched_receive, lambda: complete)
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            await self._app(scope, watched_receive, watched_send)
        finally:
            self._metrics.request(status)
            # The path as it was sent, percent-encoded: it cannot break the line.
            path = scope.get("raw_path", b"").decode("ascii", "replace")[:80]
            level = logging.DEBUG if path in ("/health", "/metrics") and status < 400 else logging.INFO
            note = scope["state"].get("note", "")
            log.log(level, "%s %s %d %.2f s%s", scope["method"], path, status, self._clock() - start, f" {note}" if note else "")

    async def _discard(self, receive: Receive, complete: Callable[[], bool]) -> None:
        left = self._discard_bytes
        try:
            async with asyncio.timeout(_DISCARD_SECONDS):
                while left > 0 and not complete():
                    left -= len((await receive()).get("body", b""))
        except TimeoutError:
            pass  # it is answered all the same; the connection is closed after it


def _has_body(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    if headers.get(b"expect", b"").lower() == b"100-continue":
        return False  # it waits to be told, and is told the answer instead
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") not in (b"", b"0")
