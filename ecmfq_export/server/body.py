"""A request's body, bounded in bytes and time while it arrives, whatever its headers say."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from ecmfq_export.server.api_error import ApiError

__all__ = ["ClientDisconnect", "read_body", "until_gone"]


async def read_body(request: Request, max_bytes: int, seconds: float) -> bytes:
    """The whole body of a JSON request.

    Raises:
        ApiError: 415 for another type of content, 413 for more than `max_bytes`, 408 for slower than `seconds`.
        ClientDisconnect: the client went away.
    """
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the request's Content-Type must be application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "the request's body must not be compressed")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                if len(body) + len(chunk) > max_bytes:
                    raise _too_large(max_bytes)
                body += chunk
    except TimeoutError:
        raise ApiError(408, f"the request's body took longer than {seconds:g} s") from None
    return bytes(body)


async def until_gone(request: Request) -> None:
    """Return when the client goes away; after the whole body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the request is larger than this server's limit of {max_bytes} bytes", code="request_too_large")
