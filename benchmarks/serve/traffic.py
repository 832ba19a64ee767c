"""Traffic for a server on this machine: good chat requests, and 5% that are broken in one of six ways.

Every good request's answer is known before, so each one that comes back is compared with it. Nothing here talks to any address but
a loopback one, and every loop is bounded in count and time.
"""

from __future__ import annotations

import asyncio
import base64
import io
import ipaddress
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np
from openai import APIConnectionError, APIStatusError, AsyncOpenAI
from PIL import Image

from ecmfq_export.runtime.chat import Turn
from ecmfq_export.runtime.generate import Generator, Sampling

_STOPPED = 10.0
"""Seconds between two looks at a clock, a second apart, that only a process which did not run can miss."""


@dataclass(frozen=True)
class Ask:
    """A request, and the text that the model answers when it is asked alone.

    Attributes:
        body: fields of the request, ``model`` and ``stream`` left out.
    """

    body: dict[str, object]
    expected: str


def picture(seed: int, width: int = 48, height: int = 32) -> Image.Image:
    """Blocks of random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 3, 3), np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)


def data_uri(image: Image.Image, kind: str = "PNG") -> str:
    """A ``data:`` URI of the image as a file."""
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def make_asks(generator: Generator, count: int, max_tokens: int = 12) -> list[Ask]:
    """Requests of every kind that is served, with the answers of `generator` called directly, one after the other."""
    asks = []
    for i in range(count):
        text = f"What is in picture {i}?"
        turns, images, content = [Turn("user", (text,))], [], text
        body: dict[str, object] = {"max_tokens": max_tokens}
        if i % 2:
            images = [picture(i)]
            turns = [Turn("user", (None, text))]
            content = [{"type": "image_url", "image_url": {"url": data_uri(images[0])}}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        if i % 3 == 0:
            turns = [Turn("system", ("Be brief.",)), *turns]
            messages = [{"role": "system", "content": "Be brief."}, *messages]
        sampling = Sampling(0.8, 0.9, seed=i) if i % 4 == 0 else Sampling()
        if i % 4 == 0:
            body |= {"temperature": 0.8, "top_p": 0.9, "seed": i}
        sample = generator.processor.chat(turns, images)
        (answer,) = generator.generate_batch([sample], max_tokens, sampling=sampling)
        asks.append(Ask({**body, "messages": messages}, answer.text))
    return asks


@dataclass
class Tally:
    """What became of the requests.

    Attributes:
        outcomes: requests by what they were and how they ended, e.g. ``good``, ``bad json 400``.
        refused: answers 429; the requests behind them were sent again.
        reconnected: requests that were sent again, once, because their connection broke: what OpenAI's client does by default. It
            happens to a process that was stopped for longer than idle connections live.
        wrong: what must not happen, in words.
        seconds: of each good request, from its first try to its answer.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    reconnected: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Traffic:
    """Sends requests to one server.

    Args:
        url: ``http://127.0.0.1:PORT``; anything but a loopback address is refused.
        wait: seconds before a request that was answered 429 is sent again; None: as its Retry-After says.
    """

    def __init__(self, url: str, model: str, asks: Sequence[Ask], key: str | None = None, wait: float | None = None) -> None:
        parts = urlsplit(url)
        if not ipaddress.ip_address(parts.hostname or "").is_loopback or parts.port is None:
            raise ValueError(f"{url} is not on this machine")
        self._host, self._port, self._model, self._asks, self._key, self._wait = parts.hostname, parts.port, model, asks, key, wait
        self._client = AsyncOpenAI(base_url=f"{url}/v1", api_key=key or "none", max_retries=0, timeout=120)
        self.tally = Tally()
        self._broken = {
            "bad json": (lambda: b'{"model": "m", "messages": [', {400}),
            "huge image": (lambda: self._with_image(data_uri(Image.new("1", (6000, 6000)))), {400}),
            "wrong type": (lambda: self._json({"messages": [{"role": "user", "content": 7}]}), {400}),
            "truncated base64": (lambda: self._with_image(data_uri(picture(1))[:-3]), {400}),
            "disconnect before the body": (None, set()),
            "disconnect while answered": (None, set()),
        }  # fmt: skip

    async def close(self) -> None:
        await self._client.close()

    async def send(self, number: int, until: float) -> None:
        """Request `number`, again after each 429; every twentieth is broken.

        Args:
            until: on the monotonic clock; a request that is still refused then counts as given up.
        """
        if number % 20 == 19:
            kinds = list(self._broken)
            await self._send_broken(kinds[number // 20 % len(kinds)], number, until)
            return
        ask, start, broken = self._asks[number % len(self._asks)], time.monotonic(), False
        while True:
            try:
                text = await self._ask(ask, stream=number % 2 == 0)
            except APIStatusError as error:
                if error.status_code == 429 and time.monotonic() < until:
                    await self._pause(float(error.response.headers["retry-after"]))
                    continue
                self.tally.outcomes[f"good {error.status_code}"] += 1
                if error.status_code != 429:
                    self.tally.wrong.append(f"request {number}: {error}")
                return
            except APIConnectionError as error:
                if not broken:
                    self.tally.reconnected += 1
                    broken = True
                    continue
                self.tally.wrong.append(f"request {number}: {error!r} from {error.__cause__!r}")
                return
            self.tally.seconds.append(time.monotonic() - start)
            self.tally.outcomes["good"] += 1
            if text != ask.expected:
                self.tally.wrong.append(f"request {number}: {text!r}, alone {ask.expected!r}")
            return

    async def _pause(self, retry_after: float) -> None:
        self.tally.refused += 1
        await asyncio.sleep(retry_after if self._wait is None else self._wait * random.uniform(0.5, 1.5))

    async def _ask(self, ask: Ask, stream: bool) -> str:
        if not stream:
            answer = await self._client.chat.completions.create(model=self._model, **ask.body)  # type: ignore[call-overload]
            return answer.choices[0].message.content
        chunks = await self._client.chat.completions.create(model=self._model, stream=True, **ask.body)  # type: ignore[call-overload]
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def _send_broken(self, kind: str, number: int, until: float) -> None:
        make, statuses = self._broken[kind]
        if make is None:
            await self._disconnect(while_answered="answered" in kind)
            self.tally.outcomes[kind] += 1
            return
        while True:
            status, retry_after = await self._post(make())
            if status == 429 and time.monotonic() < until:
                await self._pause(retry_after)
                continue
            self.tally.outcomes[f"{kind} {status}"] += 1
            if status not in statuses and status != 429:
                self.tally.wrong.append(f"request {number}, {kind}: status {status}")
            return

    def _json(self, fields: dict[str, object]) -> bytes:
        return json.dumps({"model": self._model, **fields}).encode()

    def _with_image(self, url: str) -> bytes:
        return self._json({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]})

    def _head(self, length: int) -> bytes:
        key = f"Authorization: Bearer {self._key}\r\n" if self._key else ""
        return (f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{key}Content-Type: application/json\r\n"
                f"Content-Length: {length}\r\nConnection: close\r\n\r\n").encode()

    async def _post(self, body: bytes) -> tuple[int, float]:
        """Status, and Retry-After where there is one."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(self._head(len(body)) + body)
            await writer.drain()
            answer = await asyncio.wait_for(reader.read(), 120)
        finally:
            writer.close()
        head = answer.split(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        waits = [line.split(":")[1] for line in head if line.lower().startswith("retry-after:")]
        return int(head[0].split()[1]), float(waits[0]) if waits else 1.0

    async def _disconnect(self, while_answered: bool) -> None:
        body = self._json({**self._asks[0].body, "max_tokens": 100, "stream": True})
        _, writer = await asyncio.open_connection(self._host, self._port)
        writer.write(self._head(len(body)) + (body if while_answered else body[:20]))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()


async def send_at_once(traffic: Traffic, count: int, seconds: float) -> None:
    """`count` requests, all at the same time."""
    until = time.monotonic() + seconds
    await asyncio.gather(*(traffic.send(number, until) for number in range(count)))


async def keep_sending(
    traffic: Traffic, clients: int, seconds: float, most: int, each_second: Callable[[], None]
) -> tuple[int, float]:
    """`clients` at a time, one request after the other, for so many seconds and at most so many requests.

    A time in which this process was stopped (a machine that sleeps, a job that is paused) does not count, up to twice `seconds`.

    Returns:
        requests sent, and seconds that did not count.
    """
    start, stopped = time.monotonic(), 0.0
    numbers: Iterator[int] = itertools.islice(itertools.count(), most)
    sent = 0

    def until() -> float:
        return start + seconds + min(stopped, 2 * seconds)

    async def client() -> None:
        nonlocal sent
        for number in numbers:
            if time.monotonic() >= until():
                return
            await traffic.send(number, until())
            sent += 1

    async def watch() -> None:
        nonlocal stopped
        last = time.monotonic()
        while True:
            each_second()
            await asyncio.sleep(1)
            now = time.monotonic()
            if now - last > _STOPPED:
                stopped += now - last - 1
            last = now

    watcher = asyncio.create_task(watch())
    try:
        await asyncio.gather(*(client() for _ in range(clients)))
    finally:
        watcher.cancel()
    return sent, stopped
