"""What a server can be told: address, limits, keys; checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ecmfq_export.errors import UserError
from ecmfq_export.runtime.images import MAX_PIXELS

KEY_VARIABLE = "ECMFQ_API_KEY"


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take.

    Attributes:
        queue: requests that wait while one is answered; one more is answered 429.
        max_request_bytes: of one request's body; images are in it, as base64.
        max_images: of one request.
        max_image_pixels: of one image, from its header.
        max_prompt_tokens: image tokens included; 0: the model's context.
        max_new_tokens: that a request may ask for; 0: the model's context.
        max_connections: open at once; one more is answered 503.
        body_seconds: that a request's body may take to arrive.
    """

    queue: int = 16
    max_request_bytes: int = 20_000_000
    max_images: int = 8
    max_image_pixels: int = 16_000_000
    max_prompt_tokens: int = 0
    max_new_tokens: int = 0
    max_connections: int = 512
    body_seconds: float = 60.0

    def __post_init__(self) -> None:
        least = {"queue": 0, "max_images": 0, "max_prompt_tokens": 0, "max_new_tokens": 0, "body_seconds": 0.1}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value >= least.get(field.name, 1):
                raise UserError(f"--{field.name.replace('_', '-')} {value} is out of range", f"at least {least.get(field.name, 1)}")
        if self.max_image_pixels > MAX_PIXELS:
            raise UserError(f"--max-image-pixels {self.max_image_pixels} is out of range", f"at most {MAX_PIXELS}")


@dataclass(frozen=True)
class Settings:
    """One server.

    Attributes:
        model_name: what requests call the model.
        host, port: where to listen; port 0 takes a free one.
        keys: any of them opens the API; empty: no key is asked for.
        allow_no_key: serve other machines without a key.
        grace: seconds that answers under way have to finish in when the server is told to stop.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    allow_no_key: bool = False
    grace: float = 30.0
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if not self.model_name or any(c.isspace() or not c.isprintable() for c in self.model_name):
            raise UserError(f"model name {self.model_name!r} is empty or holds spaces", "give another --model-name")
        if not 0 <= self.port <= 65535 or self.grace < 0:
            raise UserError(f"--port {self.port} or --grace {self.grace} is out of range", "ports go to 65535; seconds are not negative")


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """API keys from a file, one a line, or from the environment variable ECMFQ_API_KEY; none where neither is given.

    Raises:
        UserError: both are given, the file cannot be read, or a key is empty or not made of printable ASCII.
    """
    value = environment.get(KEY_VARIABLE)
    if file is not None and value is not None:
        raise UserError(f"both --api-key-file and {KEY_VARIABLE} are given", f"unset {KEY_VARIABLE} or leave out the file")
    if file is None and value is None:
        return ()
    source = KEY_VARIABLE if file is None else str(file)
    try:
        text = value if file is None else file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"no API key can be read from {source}: {error}", "one key a line") from None
    keys = tuple(line.strip() for line in (text or "").splitlines() if line.strip())
    if not keys:
        raise UserError(f"{source} holds no API key", "one key a line; leave it out altogether to serve without a key")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise UserError(f"an API key in {source} holds spaces or other than ASCII characters", "use letters and digits")
    return keys


def listen(settings: Settings) -> socket.socket:
    """A listening socket at the settings' address; connections wait in it until the server runs.

    Raises:
        UserError: the address cannot be had, or other machines could reach it without a key.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM,
                                                      flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise UserError(f"host {settings.host!r} is no address of this machine: {error}", "127.0.0.1 serves this machine only") from None
    if not settings.keys and not settings.allow_no_key and not ipaddress.ip_address(address[0].split("%")[0]).is_loopback:
        raise UserError(
            f"{settings.host} can be reached from other machines, and there is no API key",
            f"give --api-key-file or {KEY_VARIABLE}, or --no-key to serve everyone who reaches it",
        )
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UserError(f"cannot listen on {settings.host}:{settings.port}: {error}", "give another --port; 0 takes a free one") from None
