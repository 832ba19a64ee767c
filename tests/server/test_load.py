"""Many clients at once, some of them broken: every answer is the one that the model gives alone, and nothing is left over."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import pytest

from benchmarks.serve.traffic import Traffic, make_asks, send_at_once
from tests.server.conftest import running


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_many_at_once(generator, count):
    asks = make_asks(generator, 12, max_tokens=6)
    with running(generator, queue=8, keys=("k",)) as server:

        async def attack() -> Traffic:
            traffic = Traffic(server.url, "tiny", asks, key="k", wait=0.3)
            try:
                await send_at_once(traffic, count, seconds=400)
            finally:
                await traffic.close()
            return traffic

        files, threads = _open_files(), threading.active_count()
        tally = asyncio.run(attack()).tally
        end = time.monotonic() + 30
        while (server.chat.worker.occupied or server.server.server_state.connections) and time.monotonic() < end:
            time.sleep(0.01)
        assert server.chat.worker.occupied == 0 and server.chat.worker.state == "ok"
        assert _open_files() <= files and threading.active_count() <= threads + 1  # the thread that prepares requests starts late
    assert tally.wrong == [] and tally.reconnected <= 4
    assert tally.outcomes["good"] == count - count // 20 and sum(tally.outcomes.values()) == count
    assert tally.refused > 0, "the queue was never full: the test shows nothing"
