"""A tiny random model, exported once, and servers over it on loopback addresses."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ecmfq_export.engine.ort_runner import OrtRunner
from ecmfq_export.runtime.generate import Generator

CONTEXT = 384


@pytest.fixture(scope="session")
def bundle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what `run` and `serve` read of a bundle. The model writes noise and broken UTF-8, but always the same."""
    # Imported here: they bring torch, which a part of these tests can do without.
    from ecmfq_export.config import ExportConfig
    from ecmfq_export.graph.pipeline import export_onnx
    from ecmfq_export.progress import Silent
    from ecmfq_export.target import load_target
    from tests.tiny_models import make_qwen3_vl_moe

    root = tmp_path_factory.mktemp("serve") / "tiny"
    checkpoint = make_qwen3_vl_moe(tmp_path_factory.mktemp("model"), seed=3)
    export_onnx(checkpoint, root / "onnx", load_target("rtx"), ExportConfig(max_seq_len=CONTEXT), Silent(), dtype="float32")
    return root


@pytest.fixture(scope="session")
def generator(bundle_dir: Path) -> Generator:
    return Generator(bundle_dir / "onnx", lambda path: OrtRunner(path, threads=1))


@dataclass
class Running:
    """A server in a thread of this process.

    Attributes:
        url: ``http://127.0.0.1:PORT``.
        server: the uvicorn server.
        chat: the application behind it.
    """

    url: str
    server: Any
    chat: Any


@dataclass
class Held:
    """A session whose decode steps wait until they are let go.

    Attributes:
        go: steps pass while it is set.
        at_step: set once a step waits or passes.
    """

    session: Any
    go: threading.Event = field(default_factory=threading.Event)
    at_step: threading.Event = field(default_factory=threading.Event)
    steps: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def step(self, *arguments: Any) -> Any:
        self.steps += 1
        self.at_step.set()
        assert self.go.wait(60)
        return self.session.step(*arguments)


@contextlib.contextmanager
def running(generator: Generator, **values: Any) -> Iterator[Running]:
    """Serve on a free loopback port; `values` are fields of Settings or of Limits."""
    from ecmfq_export.server.app import Chat
    from ecmfq_export.server.serve import ChatServer
    from ecmfq_export.server.settings import Limits, Settings, listen

    limits = {name: values.pop(name) for name in list(values) if name in Limits.__dataclass_fields__}
    settings = Settings(**{"model_name": "tiny", "port": 0, "grace": 5.0, **values}, limits=Limits(**limits))
    ready, urls = threading.Event(), []

    def on_ready(url: str) -> None:
        urls.append(url)
        ready.set()

    chat = Chat(generator, settings)
    server = ChatServer(chat, on_ready)
    with listen(settings) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            assert ready.wait(30)
            yield Running(urls[0], server, chat)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(generator: Generator) -> Iterator[Running]:
    """A server with every default."""
    with running(generator) as server:
        yield server


@pytest.fixture
def held(generator: Generator) -> Iterator[tuple[Generator, Held]]:
    """The model with its steps held; they are let go at the end whatever happens."""
    session = Held(generator.session)
    try:
        yield Generator.over(session, generator.processor), session
    finally:
        session.go.set()


@pytest.fixture(scope="session")
def direct(generator: Generator) -> Callable[..., Any]:
    """Turns and images answered without HTTP."""

    def answer(turns: Any, images: Any = (), max_new_tokens: int = 16, **options: Any) -> Any:
        return generator.generate_batch([generator.processor.chat(turns, images)], max_new_tokens, **options)[0]

    return answer
