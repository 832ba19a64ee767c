"""ONNX Runtime on the reference graphs: logits, and hidden states through a copy of the graph that shows them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ecmfq_export.engine.runner import Runner
from ecmfq_export.errors import UnsupportedError, UserError
from ecmfq_export.runtime.decoder_session import DecoderSession, graph_path
from ecmfq_export.runtime.sample import ProcessedSample
from ecmfq_export.validate.torch_lockstep import batch_rows

_BATCH_TOKENS = 2048
_BATCH_PROMPTS = 16
"""The static cache is [batch, kv_heads, max_seq, head_dim] a layer, so a batch costs memory however short its prompts are."""


def answer_logits(session: DecoderSession, samples: Sequence[ProcessedSample], stepwise: bool = False) -> list[np.ndarray]:
    """:meth:`DecoderSession.answer_logits` in batches of bounded size, in the order of `samples`."""
    out: dict[int, np.ndarray] = {}
    for rows in batch_rows([s.length for s in samples], _BATCH_TOKENS):
        for start in range(0, len(rows), _BATCH_PROMPTS):
            part = rows[start : start + _BATCH_PROMPTS]
            out.update(zip(part, session.answer_logits([samples[r] for r in part], stepwise), strict=True))
    return [out[i] for i in range(len(samples))]


def hidden_states(
    onnx_dir: Path, work: Path, open_runner: Callable[[Path], Runner], samples: Sequence[ProcessedSample], num_layers: int
) -> list[list[np.ndarray]]:
    """Every layer's output for each sample: [sample][layer] of [S, hidden].

    Args:
        work: a directory on the same file system; a copy of the decoder that outputs ``hidden_{l}`` is made in it, with hard
            links to the weights, and removed again.

    Raises:
        UnsupportedError: the graph has no values of these names.
    """
    import onnx

    source = graph_path(onnx_dir, "decoder")
    copy = work / "taps"
    try:
        (copy / "decoder").mkdir(parents=True)
        for file in source.parent.iterdir():
            if file.suffix != ".onnx":
                _link(file, copy / "decoder" / file.name)
        model = onnx.load(source, load_external_data=False)
        values = {name for node in model.graph.node for name in node.output}
        missing = [i for i in range(num_layers) if f"hidden_{i}" not in values]
        if missing:
            raise UnsupportedError(f"{source} has no value hidden_{missing[0]}", "export the model again")
        element = model.graph.input[0].type.tensor_type.elem_type
        for i in range(num_layers):
            info = onnx.helper.make_tensor_value_info(f"hidden_{i}", element, ["batch", "seq", None])
            model.graph.output.append(info)
        tapped = copy / "decoder" / source.name
        tapped.write_bytes(model.SerializeToString())
        session = DecoderSession(onnx_dir, lambda path: open_runner(tapped if path == source else path))
        out = []
        for sample in samples:
            outputs = session.run_prompt(sample)
            out.append([outputs[f"hidden_{i}"][0] for i in range(num_layers)])
        return out
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    # ONNX Runtime refuses external data behind symbolic links; a hard link is a file like any other.
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def open_session(onnx_dir: Path, threads: int = 0) -> tuple[DecoderSession, Callable[[Path], Runner]]:
    """A session over ONNX Runtime on the CPU, and what opens its graphs."""
    from ecmfq_export.engine.ort_runner import OrtRunner

    def open_runner(path: Path) -> Runner:
        return OrtRunner(path, threads=threads)

    return DecoderSession(onnx_dir, open_runner), open_runner


def require_same_vocabulary(session: DecoderSession, vocab_size: int) -> None:
    """Raise UserError where the graphs belong to another model."""
    if session.vocab_size != vocab_size:
        raise UserError(
            f"the graphs' vocabulary has {session.vocab_size} tokens, the checkpoint's {vocab_size}",
            "give the onnx directory that was exported from this checkpoint",
        )
