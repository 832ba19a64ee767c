"""Running the server: open the address, load and warm up the model, serve until told to stop."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable

import uvicorn
from PIL import Image

from ecmfq_export.errors import UserError
from ecmfq_export.runtime.generate import Generator
from ecmfq_export.server.app import Chat, create_app
from ecmfq_export.server.settings import Settings, listen

log = logging.getLogger(__name__)

_KEEP_ALIVE = 30
"""Seconds that an idle connection stays open. Clients drop theirs after 5 (httpx, which OpenAI's client uses); a server that drops it
at the same moment breaks the request that is just being sent."""


class ChatServer(uvicorn.Server):
    """uvicorn, told what to do when it is ready and when it stops.

    Args:
        on_ready: called with the base URL once requests are answered.
    """

    def __init__(self, chat: Chat, on_ready: Callable[[str], None]) -> None:
        limits = chat.settings.limits
        super().__init__(uvicorn.Config(
            create_app(chat), http="h11", ws="none", loop="asyncio", lifespan="on", log_config=None, access_log=False,
            proxy_headers=False, server_header=False, limit_concurrency=limits.max_connections + 1,
            timeout_keep_alive=_KEEP_ALIVE, timeout_graceful_shutdown=max(1, round(chat.settings.grace)),
        ))  # fmt: skip
        self._chat, self._on_ready = chat, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            self._on_ready(_base_url(sockets[0]))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # First of all: those who wait learn at once that they wait in vain.
        worker = self._chat.worker
        log.info("stopping: %d waiting requests are refused, the running one has %g s", worker.waiting, self._chat.settings.grace)
        worker.close()
        await super().shutdown(sockets)


def serve(load: Callable[[], Generator], settings: Settings, on_ready: Callable[[str], None], created: int = 0) -> None:
    """Serve until SIGINT or SIGTERM; answers under way may finish in the settings' grace.

    Args:
        load: opens the model; called once the address is known to be free.
        created: Unix time that the model's entry shows.

    Raises:
        UserError: the address cannot be had, or the model cannot be loaded or does not answer.
    """
    sock = listen(settings)
    with sock:
        generator = load()
        warm_up(generator)
        server = ChatServer(Chat(generator, settings, created), on_ready)
        # uvicorn raises the signal again after its shutdown; that it came is no failure.
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.run(sockets=[sock])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def warm_up(generator: Generator) -> None:
    """One token for an image and a text: both graphs are loaded, and a bundle that cannot answer is known now.

    Raises:
        UserError: the model does not answer.
    """
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    sample = generator.processor.sample("Hello", [grey])
    try:
        generator.session.check_length(sample, room=1)
    except UserError as error:
        log.warning("images do not fit this model's context: %s", error.what)
        sample = generator.processor.sample("Hello")
    generator.generate_batch([sample], 1)


def _base_url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
