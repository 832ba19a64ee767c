"""HTTP by hand, for requests that no client library would send."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any
from urllib.parse import urlsplit

PATH = "/v1/chat/completions"


def body(**fields: Any) -> bytes:
    """A good request with some fields replaced."""
    return json.dumps({"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}], **fields}).encode()


def post(
    url: str, data: bytes | Any, headers: dict[str, str] | None = None, path: str = PATH, method: str = "POST"
) -> tuple[int, dict[str, str], Any]:
    """Status, headers in lower case, and the JSON answer (or its text). An iterable as data is sent in chunks."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    try:
        connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        raw = answer.read()
    finally:
        connection.close()
    found = {name.lower(): value for name, value in answer.getheaders()}
    return answer.status, found, json.loads(raw) if found.get("content-type") == "application/json" else raw.decode()


def begin(url: str, data: bytes, length: int | None = None, path: str = PATH) -> socket.socket:
    """Send a request's head and `data`, and return the open connection.

    Args:
        length: that the head promises; default: that of `data`.
    """
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length or len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def status_of(connection: socket.socket) -> int:
    """Read the answer's first line."""
    with connection.makefile("rb") as stream:
        return int(stream.readline().split()[1])
