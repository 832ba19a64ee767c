"""ONNX Runtime on the reference graphs: logits, and hidden states as further outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ecmfq_export.errors import UserError
from ecmfq_export.runtime.decoder_session import DecoderSession, graph_path
from ecmfq_export.runtime.sample import ProcessedSample
from ecmfq_export.validate.torch_lockstep import batch_rows

_BATCH_TOKENS = 2048
_BATCH_PROMPTS, _CACHE_BYTES, _LOGIT_BYTES = 16, 1 << 29, 1 << 29
"""The static cache is [batch, kv_heads, max_seq, head_dim] a layer, so a batch costs memory however short its prompts are; logits are
[batch, seq, vocabulary]."""


def answer_logits(session: DecoderSession, samples: Sequence[ProcessedSample], stepwise: bool = False) -> list[np.ndarray]:
    """:meth:`DecoderSession.answer_logits` in batches of bounded size, in the order of `samples`."""
    out: dict[int, np.ndarray] = {}
    prompts = max(1, min(_BATCH_PROMPTS, _CACHE_BYTES // session.cache_bytes))
    tokens = min(_BATCH_TOKENS, _LOGIT_BYTES // (4 * session.vocab_size))
    for rows in batch_rows([s.length for s in samples], tokens):
        for start in range(0, len(rows), prompts):
            part = rows[start : start + prompts]
            out.update(zip(part, session.answer_logits([samples[r] for r in part], stepwise), strict=True))
    return [out[i] for i in range(len(samples))]


def hidden_states(onnx_dir: Path, samples: Sequence[ProcessedSample], num_layers: int) -> list[list[np.ndarray]]:
    """Every layer's output for each sample: [sample][layer] of [S, hidden].

    Raises:
        UnsupportedError: the graph has no values of the names ``hidden_{l}``.
    """
    from ecmfq_export.engine.ort_runner import OrtRunner

    taps, decoder = [f"hidden_{i}" for i in range(num_layers)], graph_path(onnx_dir, "decoder")
    session = DecoderSession(onnx_dir, lambda path: OrtRunner(path, extra_outputs=taps if path == decoder else ()))
    outputs = (session.run_prompt(sample) for sample in samples)
    return [[values[name][0] for name in taps] for values in outputs]


def open_session(onnx_dir: Path, threads: int = 0) -> DecoderSession:
    """A session over ONNX Runtime on the CPU."""
    from ecmfq_export.engine.ort_runner import OrtRunner

    return DecoderSession(onnx_dir, lambda path: OrtRunner(path, threads=threads))


def require_same_vocabulary(session: DecoderSession, vocab_size: int) -> None:
    """Raise UserError where the graphs belong to another model."""
    if session.vocab_size != vocab_size:
        raise UserError(
            f"the graphs' vocabulary has {session.vocab_size} tokens, the checkpoint's {vocab_size}",
            "give the onnx directory that was exported from this checkpoint",
        )
