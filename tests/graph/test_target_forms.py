"""Every bundled target's graphs, exported from one tiny model and run in ONNX Runtime against PyTorch; equal forms are exported once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from ecmfq_export.config import ExportConfig
from ecmfq_export.engine.bound_engine import BoundEngine
from ecmfq_export.engine.expert_weights import mapped_weights, weights_as_inputs
from ecmfq_export.engine.memory import memory_needs
from ecmfq_export.engine.ort_runner import OrtRunner
from ecmfq_export.engine.profiles import profile_shapes
from ecmfq_export.graph import pipeline, vision
from ecmfq_export.models.inputs import DecoderInputs
from ecmfq_export.models.moe_vlm import MoEVLM
from ecmfq_export.models.torch_decoder import run_decoder
from ecmfq_export.progress import Silent
from ecmfq_export.runtime import host_inputs as host
from ecmfq_export.target import Target, list_targets, load_target
from tests.engine.conversation import STEPS, conversation
from tests.engine.fake_engine import FakeCuda, GraphEngine
from tests.graph.checkpoints import decoder_inputs, quantized_checkpoint
from tests.graph.helpers import Decoder, session

CONFIG = ExportConfig(max_seq_len=32, max_image_patches=64)
NEWER = {"Attention", "TensorScatter", "RotaryEmbedding", "RMSNormalization"}

Form = tuple[str, str, str, str]


def form_of(target: Target) -> Form:
    """Everything of a target that changes a graph."""
    return target.attention, target.kv_cache, target.dtype, target.kernel.weight_layout


FORMS: dict[Form, list[str]] = {}
for _name in list_targets():
    FORMS.setdefault(form_of(load_target(_name)), []).append(_name)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[MoEVLM, MoEVLM]:
    return quantized_checkpoint(tmp_path_factory.mktemp("models"), num_hidden_layers=3, mlp_only_layers=[1])


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory) -> dict[Form, Path]:
    root, traced = tmp_path_factory.mktemp("out"), []
    trace = vision.trace_vision

    def once(*arguments):
        # Tracing takes seconds and knows nothing of targets: the second form starts from a copy of the first trace.
        if not traced:
            traced.append(trace(*arguments))
        return traced[0].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "trace_vision", once)
        return {form: pipeline.export_onnx(models[1].path, root / str(i), load_target(names[0]), CONFIG, Silent())
                for i, (form, names) in enumerate(FORMS.items())}


def test_both_forms_are_there() -> None:
    assert sorted(name for names in FORMS.values() for name in names) == list_targets()
    assert {form[:2] for form in FORMS} == {("onnx24", "in_place"), ("decomposed", "copy")}


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_operators_are_those_of_the_form(exported, form: Form) -> None:
    for part in ("decoder", "vision"):
        model = ir.load(exported[form] / part / "model.onnx")
        newer = {node.op_type for node in model.graph} & NEWER
        assert newer == (set() if form[0] == "decomposed" else NEWER if part == "decoder" else {"Attention"} & newer)
        if form[0] == "decomposed":
            assert model.opset_imports[""] <= 21
        if part == "decoder":
            update = "TensorScatter" if form[1] == "in_place" else "ScatterElements"
            written = {node.outputs[0].name for node in model.graph if node.op_type == update}
            assert {value.name for value in model.graph.outputs if value.name.startswith("present_")} <= written


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_decoder_answers_as_pytorch(exported, models, form: Form) -> None:
    """A prefill and four steps of two rows of different lengths, in the target's own type, against one float32 pass of PyTorch."""
    model, lengths, new = models[1], [7, 10], 4
    total = max(lengths) + new
    runner = session(exported[form] / "decoder" / "model.ref.onnx")
    inputs, positions = decoder_inputs(model, 5, 2, total)
    expected = run_decoder(model, inputs).numpy()
    decoder = Decoder(runner, model.spec, CONFIG.max_seq_len, 2, np.float16)
    embeds, deepstack = inputs.inputs_embeds.numpy(), [d.numpy() for d in inputs.deepstack]
    first = max(lengths)
    got = decoder.step(embeds[:, :first], positions[:, :, :first], [0, 0], [d[:, :first] for d in deepstack])["logits"]
    seen = [(got[row, lengths[row] - 1], expected[row, lengths[row] - 1]) for row in range(2)]
    for step in range(new):
        at = np.array(lengths) + step
        rows = np.arange(2)
        features = [d[rows, at][:, None] for d in deepstack]
        got = decoder.step(embeds[rows, at][:, None], positions[:, rows, at][:, :, None], at, features)["logits"][:, -1]
        seen += [(got[row], expected[row, at[row]]) for row in range(2)]
    got, wanted = (np.stack(side) for side in zip(*seen, strict=True))
    assert np.sqrt(np.mean((got - wanted) ** 2)) < 0.03 * np.sqrt(np.mean(wanted**2))
    # A step that read the wrong slots would not be near any other step's logits either.
    assert np.sqrt(np.mean((got[2:4] - wanted[4:6]) ** 2)) > 0.3 * np.sqrt(np.mean(wanted**2))


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_vision_answers_as_the_tower(exported, models, form: Form) -> None:
    grid = np.array([[1, 4, 6], [1, 2, 4]])
    spec = host.HostSpec.from_runtime_json(json.loads((exported[form] / "runtime.json").read_text()))
    patches = torch.randn(32, spec.vision.patch_features, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = models[0].vision_module()(patches, torch.from_numpy(grid))
    feeds = {"patches": patches.numpy().astype(np.float16), **host.vision_inputs(grid, spec.vision, np.float16)}
    out = session(exported[form] / "vision" / "model.onnx").run(None, feeds)
    for got, want in zip(out, [expected.pooler_output, *expected.deepstack_features], strict=True):
        np.testing.assert_allclose(got, want.numpy(), atol=0.02 * float(want.abs().max()))


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_session_over_an_engine_s_buffers(exported, form: Form) -> None:
    """Two conversations through the runner of engines, with the cache update of the form and decode steps replayed as graphs, give the
    bits of a plain runner; device memory is a CPU's, and ONNX Runtime computes in the engine's place."""
    reference = exported[form] / "decoder" / "model.ref.onnx"
    cuda = FakeCuda()
    engine = GraphEngine(reference, cuda, {"batch": (1, 1, 2), "seq": (1, 8, CONFIG.max_seq_len)}, in_place=form[1] == "in_place")
    bound = BoundEngine(engine, cuda, kv_cache=form[1])
    allocated = cuda.allocations
    got = conversation(exported[form], lambda path: bound)
    np.testing.assert_array_equal(got, conversation(exported[form], lambda path: OrtRunner(path, threads=1)))
    assert cuda.allocations == allocated and bound.calls["replayed"] == 2 * (STEPS - (1 if form[1] == "in_place" else 2))


def test_session_over_an_engine_that_takes_expert_weights(exported) -> None:
    """The same two conversations where the graph has the experts' weights as inputs, filled once from the bundle's file."""
    form = next(form for form in FORMS if form[1] == "in_place")
    reference = exported[form] / "decoder" / "model.ref.onnx"
    model, names = weights_as_inputs(reference)
    outside = reference.with_name("inputs.onnx")
    outside.write_bytes(model.SerializeToString())
    try:
        cuda = FakeCuda()
        engine = GraphEngine(outside, cuda, {"batch": (1, 1, 2), "seq": (1, 8, CONFIG.max_seq_len)}, in_place=True)
    finally:
        outside.unlink()
    assert len(names) == 4 and set(names) <= set(engine.inputs)
    weights = mapped_weights(reference, names)
    bound = BoundEngine(engine, cuda, kv_cache=form[1], weights=weights)
    assert cuda.uploaded_bytes == sum(array.nbytes for array in weights.values()) > 0
    got = conversation(exported[form], lambda path: bound)
    np.testing.assert_array_equal(got, conversation(exported[form], lambda path: OrtRunner(path, threads=1)))


def test_forms_agree_with_each_other(exported, models) -> None:
    """Closer to each other than to PyTorch: both are float16, and int8 rounding sees nearly the same numbers."""
    inputs, positions = decoder_inputs(models[1], 8, 1, 9)
    logits = [_prefill(exported[form], models[1], inputs, positions) for form in FORMS]
    for other in logits[1:]:
        assert np.sqrt(np.mean((other - logits[0]) ** 2)) < 0.03 * np.sqrt(np.mean(logits[0] ** 2))


def _prefill(directory: Path, model: MoEVLM, inputs: DecoderInputs, positions: np.ndarray) -> np.ndarray:
    decoder = Decoder(session(directory / "decoder" / "model.ref.onnx"), model.spec, CONFIG.max_seq_len, 1, np.float16)
    return decoder.step(inputs.inputs_embeds.numpy(), positions, [0], [d.numpy() for d in inputs.deepstack])["logits"]


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_cache_is_counted_once_or_twice(exported, models, form: Form) -> None:
    path = exported[form] / "decoder" / "model.onnx"
    needs = memory_needs(path, profile_shapes(path, {"batch": (1, 1, 2), "seq": (1, 8, 32)}))
    graph = onnx.load(path, load_external_data=False).graph
    one = sum(2 * np.prod([d.dim_value or 2 for d in v.type.tensor_type.shape.dim]) for v in graph.input if v.name.startswith("past_"))
    assert needs.kv_cache == one * (1 if form[1] == "in_place" else 2)
