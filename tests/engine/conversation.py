"""The same two conversations with any runner, so that runners can be compared by what they answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ecmfq_export.engine.runner import Runner
from ecmfq_export.runtime.decoder_session import DecoderSession
from ecmfq_export.runtime.sample import ProcessedSample

STEPS = 8


def conversation(directory: Path, open_graph: Callable[[Path], Runner]) -> np.ndarray:
    """Logits [calls, vocab] of two conversations of different batch sizes: a prefill and eight steps each.

    Args:
        directory: an export's ``onnx``.
        open_graph: as DecoderSession takes it.
    """
    session = DecoderSession(directory, open_graph)
    random = np.random.default_rng(3)
    found: list[np.ndarray] = []
    for lengths in ((7, 4), (5,)):
        prompts = [ProcessedSample(random.integers(0, 256, n), None, None, np.zeros(n, bool)) for n in lengths]
        logits, state = session.prefill(prompts)
        found += list(logits)
        for _ in range(STEPS):
            found += list(session.step(random.integers(0, 256, len(lengths)), state))
    return np.stack(found)
