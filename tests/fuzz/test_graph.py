"""Damaged ONNX files: external data entries, tensors, nodes, bytes. What our own checks let through goes to ONNX Runtime."""

from __future__ import annotations

import random
from collections.abc import Callable

import onnx
import pytest

from ecmfq_export.describe import describe
from ecmfq_export.engine.graph_file import load_graph
from ecmfq_export.engine.ort_runner import OrtRunner
from tests.fuzz.mutations import LONG, mutate_bytes
from tests.fuzz.sandbox import outcome
from tests.fuzz.subject import CASES, SECRET, SEEDS, Subject, run_cases

GRAPHS = ("onnx/decoder/model.onnx", "onnx/decoder/model.ref.onnx", "onnx/vision/model.onnx")
NUMBERS = (0, -1, 1, 2, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))


def _model(subject: Subject, draw: random.Random) -> tuple[str, onnx.ModelProto]:
    name = draw.choice(GRAPHS)
    return name, onnx.load_model_from_string(subject.bytes_of(name))


def _external(draw: random.Random, model: onnx.ModelProto) -> onnx.TensorProto:
    return draw.choice([tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL])


def _set(tensor: onnx.TensorProto, key: str, value: str) -> None:
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value
            return
    tensor.external_data.add(key=key, value=value)


@pytest.mark.parametrize("seed", SEEDS["places of weights"])
def test_places_of_weights(seed: int, subject: Subject) -> None:
    """Entries that lead elsewhere, overlap the end, or are no numbers; none may be taken."""
    secret = str(subject.root.parent / SECRET)
    locations = (f"../../../{SECRET}", f"../../{SECRET}", secret, "/etc/hostname", "", ".", "..", "../decoder", "weights.data/",
                 "a/../../x", "weights.data\0", "no-such-file", LONG, "file://" + secret, "..\\..\\" + SECRET, "~/x", "*", "weights.data ")
    texts = ("-1", "abc", "0x10", "1e3", " 5", "+5", "5.0", "\u0665", "9" * 30, str(2**63), str(2**64), str(10**14), "")

    def mutate(draw: random.Random) -> tuple[str, bytes, str]:
        name, model = _model(subject, draw)
        tensor = _external(draw, model)
        size = (subject.root / name).parent.joinpath(dict((e.key, e.value) for e in tensor.external_data)["location"]).stat().st_size
        key = draw.choice(["location"] * 3 + ["offset", "offset", "length", "length", "double", "unknown", "end", "raw", "dims", "type"])
        if key == "location":
            done = draw.choice(locations)
            _set(tensor, key, done)
        elif key in ("offset", "length"):
            done = draw.choice(texts[:-1] if key == "length" else texts)
            _set(tensor, key, done)
        elif key == "double":
            done = draw.choice(["location", "offset", "length"])
            tensor.external_data.add(key=done, value="weights.data")
        elif key == "unknown":
            done = "basepath"
            tensor.external_data.add(key=done, value="/")
        elif key == "end":
            done = str(size - 1)
            _set(tensor, "offset", done)
            tensor.dims[:] = [2, *tensor.dims]
        elif key == "raw":
            done = ""
            tensor.raw_data = b"xx"
        elif key == "dims":
            tensor.dims[0] = draw.choice([-1, 2**40, 2**62, 2**63 - 1, tensor.dims[0] + 1, tensor.dims[0] - 1 or 7])
            done = str(tensor.dims[0])
        else:
            tensor.data_type = draw.choice([0, 99, 8, 14, 11 if tensor.data_type != 11 else 7])
            done = str(tensor.data_type)
        return name, model.SerializeToString(), f"{tensor.name} {key} {done[:60]!r}"

    refused = run_cases(subject, seed, mutate, lambda: [load_graph(subject.root / name) for name in GRAPHS], rehash=True,
                        may_pass=False)
    assert len(refused) == CASES


def _node_faults(draw: random.Random, model: onnx.ModelProto) -> str:
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    node = draw.choice(nodes)
    other = draw.choice(nodes)
    names = [value for one in nodes for value in (*one.input, *one.output) if value]

    def attribute(change: Callable[[onnx.AttributeProto], None]) -> None:
        candidates = [one for one in nodes if one.attribute]
        if candidates:
            change(draw.choice(draw.choice(candidates).attribute))

    def number(one: onnx.AttributeProto) -> None:
        if one.type == onnx.AttributeProto.INT:
            one.i = draw.choice(NUMBERS)
        elif one.type == onnx.AttributeProto.INTS and one.ints:
            one.ints[draw.randrange(len(one.ints))] = draw.choice(NUMBERS)
        elif one.type == onnx.AttributeProto.FLOAT:
            one.f = draw.choice([0.0, -1.0, float("inf"), float("nan"), 1e38])
        elif one.type == onnx.AttributeProto.STRING:
            one.s = draw.choice([b"", b"\xff\xfe", b"x" * 5000, b"Relu"])

    actions: dict[str, Callable[[], object]] = {
        "attribute": lambda: attribute(number),
        "attribute's type": lambda: attribute(lambda one: setattr(one, "type", draw.choice([0, 1, 2, 3, 4, 5, 6, 7, 8]))),
        "attribute twice": lambda: node.attribute and node.attribute.append(node.attribute[0]),
        "attribute's name": lambda: attribute(lambda one: setattr(one, "name", draw.choice(["", "x", LONG]))),
        "operator": lambda: setattr(node, "op_type", draw.choice(["Relu", "NoSuchOp", "", "Loop", "If", "ConstantOfShape", other.op_type])),
        "domain": lambda: setattr(node, "domain", draw.choice(["", "x", "com.microsoft", "ai.onnx.ml", "ecmfq"])),
        "input": lambda: node.input and node.input.__setitem__(draw.randrange(len(node.input)), draw.choice([*names, "", "nowhere"])),
        "output": lambda: node.output and node.output.__setitem__(0, draw.choice(names)),
        "cycle": lambda: node.input and node.output and node.input.__setitem__(0, node.output[0]),
        "no inputs": lambda: node.ClearField("input"),
        "many inputs": lambda: node.input.extend(names[:500]),
        "no node": lambda: model.graph.ClearField("node"),
        "copied node": lambda: model.graph.node.append(node),
        "opset": lambda: setattr(model.opset_import[0], "version", draw.choice([*NUMBERS, 13])),
        "ir": lambda: setattr(model, "ir_version", draw.choice([*NUMBERS, 3])),
        "recursion": lambda: model.functions and model.functions[0].node.add(
            op_type=model.functions[0].name, domain=model.functions[0].domain, input=["x"], output=["y"]),
        "function twice": lambda: model.functions and model.functions.append(model.functions[0]),
        "input's extent": lambda: setattr(draw.choice([d for v in model.graph.input for d in v.type.tensor_type.shape.dim]), "dim_value",
                                          draw.choice(NUMBERS)),
        "input's type": lambda: setattr(draw.choice(model.graph.input).type.tensor_type, "elem_type", draw.choice([0, 8, 16, 99, 14])),
        "input's name": lambda: setattr(draw.choice(model.graph.input), "name", draw.choice(["", "x", LONG, names[0]])),
        "no output": lambda: model.graph.ClearField("output"),
        "weight gone": lambda: model.graph.initializer.pop(),
        "weight twice": lambda: model.graph.initializer.append(model.graph.initializer[0]),
        "constant": lambda: model.graph.initializer.add(name=draw.choice(names), data_type=7, dims=[draw.choice([0, 2, 2**40])],
                                                        raw_data=b"\0" * 16),
        "shape bomb": lambda: _bomb(model, draw),
    }  # fmt: skip
    action = draw.choice(list(actions))
    actions[action]()
    return f"{action} at {node.op_type} {node.name}"


def _bomb(model: onnx.ModelProto, draw: random.Random) -> None:
    """A few bytes of graph that stand for terabytes."""
    size = onnx.helper.make_tensor("bomb_size", onnx.TensorProto.INT64, [1], [2**41])
    node = onnx.helper.make_node(draw.choice(["ConstantOfShape", "Expand", "Tile"]), ["bomb_size"], ["bomb"], "bomb")
    if node.op_type != "ConstantOfShape":
        node.input.insert(0, "bomb_size")
    model.graph.initializer.append(size)
    model.graph.node.insert(0, node)
    model.graph.output.append(onnx.helper.make_tensor_value_info("bomb", onnx.TensorProto.INT64, ["n"]))


@pytest.mark.parametrize("seed", SEEDS["nodes"])
def test_nodes(seed: int, subject: Subject) -> None:
    """What passes our checks is opened by ONNX Runtime, which must refuse it in words or take it."""

    def mutate(draw: random.Random) -> tuple[str, bytes, str]:
        name, model = _model(subject, draw)
        done = _node_faults(draw, model)
        mutate.name = name  # type: ignore[attr-defined]
        return name, model.SerializeToString(), done

    def read() -> None:
        OrtRunner(subject.root / mutate.name, threads=1, optimize=False)  # type: ignore[attr-defined]

    refused = run_cases(subject, seed, mutate, read, rehash=False)
    by_runtime = sum("ONNX Runtime" in str(error) for error in refused)
    assert len(refused) > by_runtime > 20, "both our checks and ONNX Runtime had something to refuse"


@pytest.mark.parametrize("seed", SEEDS["bytes"])
def test_bytes(seed: int, subject: Subject) -> None:
    """Any byte of a graph; every tenth of those that hold goes on to ONNX Runtime."""

    def mutate(draw: random.Random) -> tuple[str, bytes, str]:
        name = draw.choice(GRAPHS)
        mutate.name, mutate.on = name, draw.random() < 0.1  # type: ignore[attr-defined]
        return name, *mutate_bytes(draw, subject.bytes_of(name))

    def read() -> None:
        describe(subject.root / mutate.name)  # type: ignore[attr-defined]
        if mutate.on:  # type: ignore[attr-defined]
            OrtRunner(subject.root / mutate.name, threads=1, optimize=False)  # type: ignore[attr-defined]

    run_cases(subject, seed, mutate, read, rehash=True)


def test_weights_behind_a_link(subject: Subject) -> None:
    weights = subject.root / "onnx/decoder/weights.data"
    with subject.changed("onnx/decoder/weights.data", b""):
        weights.unlink()
        weights.symlink_to(subject.root.parent / SECRET)
        error = outcome(subject.root, lambda: OrtRunner(subject.root / "onnx/decoder/model.ref.onnx", threads=1))
    assert error is not None and "through a link" in str(error)
