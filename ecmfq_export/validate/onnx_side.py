"""ONNX Runtime on the reference graphs: logits, and hidden states as further outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ecmfq_export.errors import UserError
from ecmfq_export.heap import give_back
from ecmfq_export.runtime.decoder_session import DecoderSession, graph_path
from ecmfq_export.runtime.sample import ProcessedSample
from ecmfq_export.validate.torch_lockstep import batch_rows

_BATCH_TOKENS = 2048
_BATCH_PROMPTS, _CACHE_BYTES, _LOGIT_BYTES = 16, 1 << 29, 1 << 28
"""The static cache is [batch, kv_heads, max_seq, head_dim] a layer, so a batch that decodes costs memory however short its prompts are;
logits are [batch, seq, vocabulary], and the graph has them in two types at once."""


def answer_logits(session: DecoderSession, samples: Sequence[ProcessedSample], stepwise: bool = False) -> list[np.ndarray]:
    """:meth:`DecoderSession.answer_logits` in batches of bounded size, in the order of `samples`."""
    out: dict[int, np.ndarray] = {}

    def run(rows: list[int]) -> None:
        out.update(zip(rows, session.answer_logits([samples[r] for r in rows], stepwise), strict=True))

    _in_batches(session, samples, run, max(1, _CACHE_BYTES // session.cache_bytes) if stepwise or session.logits_last else _BATCH_PROMPTS)
    return [out[i] for i in range(len(samples))]


def hidden_states(session: DecoderSession, samples: Sequence[ProcessedSample]) -> list[list[np.ndarray]]:
    """Every layer's output for each sample: [sample][layer] of [S, hidden].

    Args:
        session: from :func:`open_session` with all layers tapped.
    """
    taps = tapped_names(session.num_layers)
    out: dict[int, list[np.ndarray]] = {}

    def run(rows: list[int]) -> None:
        values, lengths = session.run_prompts([samples[r] for r in rows], taps)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            out[row] = [values[name][i, :length].copy() for name in taps]  # a view would keep its whole batch

    _in_batches(session, samples, run, _BATCH_PROMPTS)
    return [out[i] for i in range(len(samples))]


def tapped_names(num_layers: int) -> list[str]:
    """Names of every layer's output in the decoder's graph."""
    return [f"hidden_{i}" for i in range(num_layers)]


def _in_batches(session: DecoderSession, samples: Sequence[ProcessedSample], run: Callable[[list[int]], None], prompts: int) -> None:
    """Call `run` with the rows of each batch: of at most `prompts` samples, and of bounded size.

    The vision graph reads all images of a group of batches before the decoder's turn comes, and is let go of: ONNX Runtime holds it in
    float32, and the two together would be the most that validation needs.
    """
    tokens = min(_BATCH_TOKENS, _LOGIT_BYTES // (4 * session.vocab_size))
    batches = [rows[start : start + prompts] for rows in batch_rows([s.length for s in samples], tokens)
               for start in range(0, len(rows), prompts)]  # fmt: skip
    order = [row for rows in batches for row in rows]
    done = read = 0
    for rows in batches:
        if read < done + len(rows):
            read = done + session.read_images([samples[r] for r in order[done:]])
            session.release_vision()
            give_back()
        run(rows)
        done += len(rows)
    session.release()  # PyTorch's turn comes
    give_back()


def open_session(onnx_dir: Path, threads: int = 0, taps: Sequence[str] = ()) -> DecoderSession:
    """A session over ONNX Runtime on the CPU that holds a few layers at a time where the decoder is large.

    Args:
        taps: names of values of the decoder's graph that are outputs too.

    Raises:
        UnsupportedError: the graph has no such value.
    """
    from ecmfq_export.engine.ort_pieces import OrtPieces

    decoder = graph_path(onnx_dir, "decoder")
    return DecoderSession(onnx_dir, lambda path: OrtPieces(path, threads=threads, extra_outputs=taps if path == decoder else ()))


def require_same_vocabulary(session: DecoderSession, vocab_size: int) -> None:
    """Raise UserError where the graphs belong to another model."""
    if session.vocab_size != vocab_size:
        raise UserError(
            f"the graphs' vocabulary has {session.vocab_size} tokens, the checkpoint's {vocab_size}",
            "give the onnx directory that was exported from this checkpoint",
        )
