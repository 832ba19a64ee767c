"""A graph in pieces gives the bits of the whole graph, and holds no session between calls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from ecmfq_export.config import ExportConfig
from ecmfq_export.engine import ort_pieces
from ecmfq_export.engine.graph_file import load_graph
from ecmfq_export.engine.ort_pieces import OrtPieces, cut
from ecmfq_export.engine.ort_runner import OrtRunner
from ecmfq_export.engine.runner import Runner
from ecmfq_export.errors import UnsupportedError, UserError
from ecmfq_export.graph import pipeline
from ecmfq_export.progress import Silent
from ecmfq_export.target import load_target
from tests.engine.conversation import conversation
from tests.graph.checkpoints import quantized_checkpoint

TARGETS = ("rtx", "jetson-orin")  # Attention of ONNX, and decomposed


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    model = quantized_checkpoint(tmp_path_factory.mktemp("models"))[1].path
    out = tmp_path_factory.mktemp("out")
    config = ExportConfig(max_seq_len=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline._Export, "vision", lambda self: None)  # its tracing takes seconds, and no prompt here has an image
        return {f"{name} {dtype}": pipeline.export_onnx(model, out / f"{name} {dtype}", load_target(name), config, Silent(), dtype=dtype)
                for name, dtype in ((TARGETS[0], "float32"), (TARGETS[1], "float32"), (TARGETS[0], "float16"))}


def _reference(directory: Path) -> Path:
    return directory / "decoder" / "model.ref.onnx"


@pytest.mark.parametrize("target", TARGETS)
def test_bits_of_the_whole_graph(exported, target: str) -> None:
    """Prefill and steps of two conversations, a session for every layer, and for the output matrix."""
    opened: list[OrtPieces] = []

    def pieces(path: Path) -> OrtPieces:
        opened.append(OrtPieces(path, threads=1, piece_bytes=1))
        return opened[-1]

    got = conversation(exported[f"{target} float32"], pieces)
    np.testing.assert_array_equal(got, conversation(exported[f"{target} float32"], lambda path: OrtRunner(path, threads=1, brief=True)))
    layers = sum(name.startswith("present_key_") for name in opened[0].output_names)
    assert len(opened[0].pieces) == layers + 1 and isinstance(opened[0], Runner)


def test_float16_differs_by_the_rounding_between_layers(exported) -> None:
    """A whole session keeps the residual stream in float32 where it has no float16 kernels; the graph says float16, and so do pieces."""
    got, whole = (conversation(exported["rtx float16"], lambda path, c=c, o=o: c(path, threads=1, **o))
                  for c, o in ((OrtPieces, {"piece_bytes": 1}), (OrtRunner, {"brief": True})))
    assert 0 < np.sqrt(np.mean((got - whole) ** 2)) < 0.02 * np.sqrt(np.mean(whole**2))


@pytest.mark.parametrize("target", TARGETS)
def test_every_node_and_weight_is_in_one_piece(exported, target: str) -> None:
    directory = exported[f"{target} float32"] / "decoder"
    model = load_graph(directory / "model.ref.onnx")
    outputs = [value.name for value in model.graph.output]
    parts = [piece.model.graph for piece in cut(model, outputs, 1)]
    assert [n.SerializeToString() for part in parts for n in part.node] == [n.SerializeToString() for n in model.graph.node]
    large = [t.name for t in model.graph.initializer if onnx.numpy_helper.to_array(t, str(directory)).nbytes > 1024]
    assert sorted(large) == sorted(t.name for part in parts for t in part.initializer if t.name in large)
    whole = list(cut(model, outputs, 1 << 40))
    assert len(whole) == 1 and list(whole[0].outputs) == outputs


def test_inner_values_and_some_outputs(exported) -> None:
    path = _reference(exported["rtx float32"])
    whole = OrtRunner(path, threads=1, extra_outputs=["hidden_0"], brief=True)
    random = np.random.default_rng(0)
    sizes = {"batch": 1, "seq": 3}
    feeds = {name: np.zeros([sizes.get(n, n) for n in shape], dtype) if dtype == np.int64 else
             random.normal(size=[sizes.get(n, n) for n in shape]).astype(dtype) for name, (dtype, shape) in whole.inputs.items()}
    expected = whole.run(feeds)
    for size in (1, 1 << 40):
        pieces = OrtPieces(path, threads=1, extra_outputs=["hidden_0"], piece_bytes=size)
        assert pieces.inputs == whole.inputs and pieces.output_names == whole.output_names
        found = pieces.run(feeds, ["hidden_0", "logits"])
        assert list(found) == ["hidden_0", "logits"]
        if size == 1:
            for name, array in found.items():
                np.testing.assert_array_equal(array, expected[name])
        # Pieces that give nothing of what is wanted are not run.
        first = pieces.run(feeds, ["hidden_0"])
        assert list(first) == ["hidden_0"]
        np.testing.assert_array_equal(first["hidden_0"], found["hidden_0"])
        with pytest.raises(UserError, match="inputs missing: inputs_embeds"):
            pieces.run({name: array for name, array in feeds.items() if name != "inputs_embeds"})
    with pytest.raises(UnsupportedError, match="no value hidden_99"):
        OrtPieces(path, extra_outputs=["hidden_99"])


def test_no_session_outlives_its_turn(exported, monkeypatch) -> None:
    """Sessions of pieces are gone when the next one is opened, but for one of the last piece."""
    import weakref

    alive: list[weakref.ref] = []

    def counted(*arguments: object, **options: object) -> object:
        assert sum(ref() is not None for ref in alive) <= 1, "the session before is still there"
        session = opened(*arguments, **options)
        alive.append(weakref.ref(session))
        return session

    opened = ort_pieces.open_model
    monkeypatch.setattr(ort_pieces, "open_model", counted)
    made: list[OrtPieces] = []
    conversation(exported["rtx float32"], lambda path: made.append(OrtPieces(path, threads=1, piece_bytes=1)) or made[-1])
    assert len(alive) > 10 and sum(ref() is not None for ref in alive) == 1
    made[0].release()
    assert not any(ref() is not None for ref in alive)
