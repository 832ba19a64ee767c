"""A CPU in the place of CUDA, and an engine of a few lines of NumPy in TensorRT's: strict where the real ones would be silently wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ecmfq_export.engine.ort_runner import OrtRunner
from ecmfq_export.engine.profiles import Range, decode_ranges, profile_shapes

CACHE = 12
KINDS = ("key", "value")


class FakeCuda:
    """Device memory is a byte array at each address; captured work is a list of functions."""

    stream = 77

    def __init__(self) -> None:
        self.memory_at: dict[int, np.ndarray] = {}
        self.allocations = 0
        self.graphs: dict[int, list] = {}
        self.dropped = 0
        self.uploaded_bytes = 0
        self.capturing: list | None = None
        self._next = 4096

    def allocate(self, size: int) -> int:
        self._next += 65536
        self.memory_at[self._next] = np.full(size, 0xAB, np.uint8)
        self.allocations += 1
        return self._next

    def free(self, address: int) -> None:
        del self.memory_at[address]

    def clear(self, address: int, size: int) -> None:
        self.memory_at[address][:size] = 0

    def upload(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous and self.capturing is None
        self.memory_at[address][: array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        self.uploaded_bytes += array.nbytes

    def download(self, array: np.ndarray, address: int) -> None:
        assert self.capturing is None
        array.reshape(-1).view(np.uint8)[:] = self.memory_at[address][: array.nbytes]

    def synchronize(self) -> None:
        assert self.capturing is None, "synchronizing ends a capture with an error"

    def begin_capture(self) -> None:
        self.capturing = []

    def end_capture(self) -> int:
        self.graphs[len(self.graphs) + 1] = self.capturing
        self.capturing = None
        return len(self.graphs)

    def launch(self, graph: int) -> None:
        for work in self.graphs[graph]:
            work()

    def drop_graph(self, graph: int) -> None:
        self.graphs[graph] = [lambda: (_ for _ in ()).throw(AssertionError("a dropped graph was launched"))]
        self.dropped += 1

    def memory(self) -> tuple[int, int]:
        return 1 << 30, 1 << 30

    def view(self, address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return self.memory_at[address][: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def step(tokens: np.ndarray, starts: np.ndarray, caches: list[np.ndarray]) -> np.ndarray:
    """The model: tokens go into the caches, and a row's answer weighs everything up to its last token; [batch, 1] float32."""
    for row, start in enumerate(starts):
        for factor, cache in enumerate(caches, 1):
            cache[row, start : start + tokens.shape[1]] = factor * tokens[row]
    weights = np.arange(1, CACHE + 1, dtype=np.float32)
    seen = np.arange(CACHE)[None] < (starts + tokens.shape[1])[:, None]
    return sum((np.where(seen, cache, 0) * weights).sum(1, keepdims=True) for cache in caches).astype(np.float32)


@dataclass
class FakeContext:
    engine: Any
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    prepared: bool = False
    enqueued: int = 0

    def set_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        self.prepared = False
        return True

    def set_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def output_shape(self, name: str) -> tuple[int, ...]:
        return self.engine.output_shape(name, self.shapes)

    def enqueue(self, stream: int) -> bool:
        assert stream == FakeCuda.stream
        self.enqueued += 1
        if self.engine.fails:
            return False
        shapes, addresses, cuda = dict(self.shapes), dict(self.addresses), self.engine.cuda
        if cuda.capturing is None:
            self.prepared = True
            self.engine.compute(shapes, addresses)
            return True
        assert self.prepared, "captured before it ran with these shapes"

        def replay() -> None:
            assert shapes == self.shapes, "a graph of other shapes than the context has now"
            self.engine.compute(shapes, addresses)

        cuda.capturing.append(replay)
        return True


class FakeEngine:
    """Two caches, a prefill and a decode profile; ``in_place`` demands one address for past and present, as TensorRT does."""

    device_bytes = 1000

    def __init__(self, cuda: FakeCuda, *, in_place: bool, two_profiles: bool = True) -> None:
        self.cuda, self.in_place, self.fails = cuda, in_place, False
        f32, i64 = np.dtype(np.float32), np.dtype(np.int64)
        past = {f"past_{kind}_0": (f32, (-1, CACHE)) for kind in KINDS}
        self.inputs: Mapping = {"tokens": (f32, (-1, -1)), "write_indices": (i64, (-1,)), **past}
        self.outputs: Mapping = {"answer": (f32, (-1, 1)), **{f"present_{kind}_0": (f32, (-1, CACHE)) for kind in KINDS}}
        rest = {"write_indices": ((1,), (3,)), **{name: ((1, CACHE), (3, CACHE)) for name in past}}
        self.profiles = [{"tokens": ((1, 1), (3, CACHE)), **rest}]
        if two_profiles:
            self.profiles.append({"tokens": ((1, 1), (3, 1)), **rest})
        self.contexts = [FakeContext(self) for _ in self.profiles]

    def error(self) -> str:
        return "the fake failed" if self.fails else ""

    def output_shape(self, name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        batch = shapes["tokens"][0]
        return (batch, 1) if name == "answer" else (batch, CACHE)

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        def at(name: str, shape: tuple[int, ...]) -> np.ndarray:
            return self.cuda.view(addresses[name], shape, {**self.inputs, **self.outputs}[name][0])

        caches = []
        for kind in KINDS:
            past, present = f"past_{kind}_0", f"present_{kind}_0"
            assert (addresses[past] == addresses[present]) == self.in_place, (past, addresses)
            cache = at(present, shapes[past])
            if not self.in_place:
                cache[:] = at(past, shapes[past])
            caches.append(cache)
        answer = step(at("tokens", shapes["tokens"]), at("write_indices", shapes["write_indices"]), caches)
        at("answer", answer.shape)[:] = answer


class NumpyRunner:
    """The same model behind the same interface, with nothing kept anywhere."""

    input_names = ["tokens", "write_indices", "past_key_0", "past_value_0"]
    output_names = ["answer", "present_key_0", "present_value_0"]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        caches = [np.array(feeds[f"past_{kind}_0"]) for kind in KINDS]
        answer = step(feeds["tokens"], feeds["write_indices"], caches)
        return {"answer": answer, "present_key_0": caches[0], "present_value_0": caches[1]}


class GraphEngine:
    """An exported decoder as an engine: device memory and bindings are the fake's, and ONNX Runtime computes.

    Args:
        path: ``model.ref.onnx``.
        ranges: of the graph's symbols; a second profile takes one token a sequence.
        in_place: whether past and present must have one address.
    """

    device_bytes = 0

    def __init__(self, path: Path, cuda: FakeCuda, ranges: Mapping[str, Range], *, in_place: bool) -> None:
        self.cuda, self.in_place, self.fails = cuda, in_place, False
        self._runner = OrtRunner(path, threads=1)
        graph = onnx.load(path, load_external_data=False).graph
        self._symbols = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*graph.input, *graph.output]}
        f32 = np.dtype(np.float32)
        past = next(dtype for name, (dtype, _) in self._runner.inputs.items() if name.startswith("past_"))
        self.inputs: Mapping = {name: (dtype, self._shape(name)) for name, (dtype, _) in self._runner.inputs.items()}
        self.outputs: Mapping = {name: (past if name.startswith("present_") else f32, self._shape(name))
                                 for name in self._runner.output_names}
        shapes = [profile_shapes(path, ranges), profile_shapes(path, decode_ranges(ranges))]
        self.profiles = [{name: (kinds[0], kinds[2]) for name, kinds in profile.items()} for profile in shapes]
        self.contexts = [FakeContext(self) for _ in self.profiles]

    def error(self) -> str:
        return ""

    def output_shape(self, name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        sizes = {symbol: size for given, shape in shapes.items() for symbol, size in zip(self._symbols[given], shape, strict=True)}
        return tuple(sizes.get(symbol, symbol) for symbol in self._symbols[name])

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        feeds = {name: self.cuda.view(addresses[name], shapes[name], dtype).copy() for name, (dtype, _) in self.inputs.items()}
        for name, array in self._runner.run(feeds).items():
            if name.startswith("present_"):
                assert (addresses[name] == addresses[name.replace("present_", "past_")]) == self.in_place, name
            assert array.dtype == self.outputs[name][0]
            self.cuda.view(addresses[name], array.shape, array.dtype)[:] = array

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(symbol, str) else symbol for symbol in self._symbols[name])
