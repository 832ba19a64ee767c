"""An engine with its buffers: allocated once, bound by name, the KV cache kept on the device, decode steps replayed as CUDA graphs.

Pure bookkeeping over two interfaces: :class:`Engine` (TensorRT's engine and its execution contexts, one a profile, all over the same
weights) and :class:`~ecmfq_export.engine.cuda_runtime.CudaApi`. What is decided here:

- buffers: one for each tensor, of its largest size in any profile. A cache's ``past_X`` and ``present_X`` are one buffer where the
  target updates in place, else two that change places with every call.
- the cache's outputs come back as :class:`DeviceTensor` and go into the next call without leaving the device.
- a repeated call of the decode profile is captured as a CUDA graph and then replayed. A graph holds the shapes and addresses of its
  capture, so it serves only calls with the same addresses, and all of a profile's graphs are dropped when its shapes change; the first
  call with new shapes always runs directly, since TensorRT prepares itself in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ecmfq_export.engine.cuda_runtime import CudaApi
from ecmfq_export.engine.runner import check_feeds
from ecmfq_export.errors import BuildError, UserError

PAST, PRESENT = "past_", "present_"

Shape = tuple[int, ...]


class Context(Protocol):
    """One execution context, of one profile."""

    def set_shape(self, name: str, shape: Shape) -> bool: ...

    def set_address(self, name: str, address: int) -> bool: ...

    def output_shape(self, name: str) -> Shape: ...

    def enqueue(self, stream: int) -> bool: ...


class Engine(Protocol):
    """A deserialized engine.

    Attributes:
        inputs, outputs: name to dtype and shape, -1 where an extent is free.
        profiles: for each profile, input to its smallest and largest shape.
        contexts: one for each profile.
        device_bytes: what the engine and its contexts hold on the device, buffers not included.
    """

    inputs: Mapping[str, tuple[np.dtype, Shape]]
    outputs: Mapping[str, tuple[np.dtype, Shape]]
    profiles: list[Mapping[str, tuple[Shape, Shape]]]
    contexts: list[Context]
    device_bytes: int

    def error(self) -> str:
        """What TensorRT said last; empty where it said nothing."""
        ...


@dataclass
class DeviceTensor:
    """A cache output: on the device, valid until the next call that takes it.

    Indexing and ``np.asarray`` copy it to the host.
    """

    owner: BoundEngine
    pair: str
    shape: Shape
    dtype: np.dtype
    version: int

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        array = self.owner.fetch(self)
        return array if dtype is None else array.astype(dtype)

    def __getitem__(self, index: object) -> np.ndarray:
        return np.asarray(self)[index]


class BoundEngine:
    """A :class:`~ecmfq_export.engine.runner.Runner` over an engine.

    Args:
        kv_cache: ``in_place`` or ``copy``, as the target says.
        weights: arrays of the inputs that stay the same: copied to the device once, and no inputs of :meth:`run`.
        graphs: whether repeated calls of the last profile are replayed as CUDA graphs; needs two profiles (the last one decodes).

    Raises:
        BuildError: a cache output without its input, a weight that the engine does not take, or memory that the device does not have.
    """

    def __init__(self, engine: Engine, cuda: CudaApi, *, kv_cache: str, graphs: bool = True,
                 weights: Mapping[str, np.ndarray] | None = None) -> None:
        self._engine, self._cuda, self._in_place = engine, cuda, kv_cache == "in_place"
        weights = weights or {}
        for name, array in weights.items():
            dtype, shape = engine.inputs.get(name, (None, ()))
            if dtype != array.dtype or tuple(shape) != array.shape:
                raise BuildError(f"the engine takes '{name}' as {dtype}{list(shape)}, the bundle has {array.dtype}{list(array.shape)}",
                                 "build the engine again from this bundle's graphs")
        self._inputs = {name: kind for name, kind in engine.inputs.items() if name not in weights}
        self._graphs_wanted = graphs and len(engine.profiles) > 1
        self.pairs = {name: PAST + name.removeprefix(PRESENT) for name in engine.outputs if name.startswith(PRESENT)}
        lost = [name for name, past in self.pairs.items() if past not in engine.inputs]
        if lost:
            raise BuildError(f"the engine has an output {lost[0]} and no input {self.pairs[lost[0]]}", "build it from an exported graph")
        self._addresses: dict[str, int] = {}
        self._versions: dict[str, int] = dict.fromkeys(self.pairs, 0)
        self._bound: list[dict[str, tuple[Shape, int]]] = [{} for _ in engine.contexts]
        self._output_shapes: list[dict[str, Shape]] = [{} for _ in engine.contexts]
        self._graphs: dict[tuple[int, ...], int | None] = {}  # addresses to a captured call of the last profile; None: ran once
        self.calls = {"direct": 0, "captured": 0, "replayed": 0}
        self.buffer_bytes = 0
        self._allocate()
        for name, array in weights.items():
            self._cuda.upload(self._addresses[name], np.ascontiguousarray(array))

    @property
    def input_names(self) -> list[str]:
        return list(self._inputs)

    @property
    def output_names(self) -> list[str]:
        return list(self._engine.outputs)

    @property
    def device_bytes(self) -> int:
        """Weights, contexts and buffers on the device."""
        return self._engine.device_bytes + self.buffer_bytes

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        check_feeds(feeds, self._inputs)
        profile = self._profile(feeds)
        blank: set[int] = set()
        for name in self._inputs:
            self._put(name, feeds[name], blank)
        shapes = {name: tuple(feeds[name].shape) for name in self._inputs}
        self._bind(profile, shapes)
        self._execute(profile)
        return self._results(profile, list(self._engine.outputs) if outputs is None else outputs)

    def fetch(self, tensor: DeviceTensor) -> np.ndarray:
        """A cache tensor on the host.

        Raises:
            UserError: a later call has written over it.
        """
        self._check_version(tensor)
        array = np.empty(tensor.shape, tensor.dtype)
        self._cuda.download(array, self._addresses[self.pairs[tensor.pair]])
        return array

    def close(self) -> None:
        """Give the buffers and graphs back; the engine is the caller's."""
        self._drop_graphs()
        for address in set(self._addresses.values()):
            self._cuda.free(address)
        self._addresses.clear()

    def _allocate(self) -> None:
        sizes = self._largest_bytes()
        for name, size in sizes.items():
            if name in self.pairs and self._in_place:
                continue
            self._addresses[name] = self._cuda.allocate(size)
            self.buffer_bytes += size
        if self._in_place:
            self._addresses.update({present: self._addresses[past] for present, past in self.pairs.items()})

    def _largest_bytes(self) -> dict[str, int]:
        """Of every tensor over all profiles; TensorRT itself says the outputs' shapes at the inputs' largest ones."""
        sizes: dict[str, int] = {}
        for profile, context in zip(self._engine.profiles, self._engine.contexts, strict=True):
            for name, (dtype, shape) in self._engine.inputs.items():
                largest = profile[name][1] if name in profile else shape
                if not context.set_shape(name, largest):
                    raise BuildError(f"the engine refuses its own largest shape {list(largest)} of '{name}': {self._engine.error()}")
                sizes[name] = max(sizes.get(name, 0), math.prod(largest) * dtype.itemsize)
            for name, (dtype, _) in self._engine.outputs.items():
                sizes[name] = max(sizes.get(name, 0), math.prod(context.output_shape(name)) * dtype.itemsize)
        return sizes

    def _profile(self, feeds: Mapping[str, np.ndarray]) -> int:
        """The last profile that admits these shapes: later ones are narrower.

        Raises:
            UserError: none does; with the first shape that is out of range.
        """
        wrong = ""
        for index in reversed(range(len(self._engine.profiles))):
            for name, (low, high) in self._engine.profiles[index].items():
                if name not in self._inputs:
                    continue
                shape = feeds[name].shape
                if any(not a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
                    wrong = f"'{name}' is {list(shape)}, allowed {list(low)} to {list(high)}"
                    break
            else:
                return index
        raise UserError(f"no profile of the engine takes these inputs: {wrong}", "export with a larger --max-seq-len or --max-batch")

    def _put(self, name: str, value: np.ndarray | DeviceTensor, blank: set[int]) -> None:
        """Bring an input to its buffer, unless it is there already."""
        if isinstance(value, DeviceTensor):
            self._check_version(value)
            if self.pairs.get(value.pair) != name:
                raise UserError(f"input '{name}' was given {value.pair}", f"it takes {PRESENT}{name.removeprefix(PAST)} of the last call")
            return
        if name in self.pairs.values():
            self._versions[PRESENT + name.removeprefix(PAST)] += 1  # an older state is gone
            # A fresh cache is one array of zeros, given for every layer: looked at once, and not sent.
            if id(value) in blank or not value.any():
                blank.add(id(value))
                self._cuda.clear(self._addresses[name], value.nbytes)
                return
        self._cuda.upload(self._addresses[name], np.ascontiguousarray(value))

    def _check_version(self, tensor: DeviceTensor) -> None:
        if tensor.owner is not self or tensor.version != self._versions[tensor.pair]:
            raise UserError(f"{tensor.pair} of an earlier call was written over", "an engine holds the cache of one generation at a time: "
                            "copy a state with take() before going on from it twice")

    def _bind(self, profile: int, shapes: Mapping[str, Shape]) -> None:
        """Tell the context what changed since its last call."""
        context, bound = self._engine.contexts[profile], self._bound[profile]
        changed = False
        for name, shape in shapes.items():
            if name not in bound or bound[name][0] != shape:
                changed = True
                if not context.set_shape(name, shape):
                    raise BuildError(f"the engine refuses shape {list(shape)} of '{name}': {self._engine.error()}")
        if changed and profile == len(self._engine.profiles) - 1:
            self._drop_graphs()
        if changed or not self._output_shapes[profile]:
            self._output_shapes[profile] = {name: context.output_shape(name) for name in self._engine.outputs}
        for name, address in self._addresses.items():
            shape = shapes.get(name) or self._output_shapes[profile].get(name, ())
            if bound.get(name, ((), 0))[1] != address and not context.set_address(name, address):
                raise BuildError(f"the engine refuses the buffer of '{name}': {self._engine.error()}")
            bound[name] = (shape, address)

    def _execute(self, profile: int) -> None:
        context, decodes = self._engine.contexts[profile], self._graphs_wanted and profile == len(self._engine.profiles) - 1
        key = tuple(self._addresses.values())
        graph = self._graphs.get(key) if decodes else None
        if graph is None and decodes and key in self._graphs:
            graph = self._graphs[key] = self._capture(context)
            self.calls["captured"] += 1
        if graph is not None:
            self._cuda.launch(graph)
            self.calls["replayed"] += 1
        else:
            if not context.enqueue(self._cuda.stream):
                raise BuildError(f"the engine failed: {self._engine.error()}", "the plugin's or TensorRT's own message is above")
            if decodes:
                self._graphs[key] = None
            self.calls["direct"] += 1
        self._cuda.synchronize()

    def _capture(self, context: Context) -> int:
        self._cuda.begin_capture()
        taken = context.enqueue(self._cuda.stream)
        graph = self._cuda.end_capture()
        if not taken:
            self._cuda.drop_graph(graph)
            raise BuildError(f"the engine failed while its calls were captured: {self._engine.error()}", "run without CUDA graphs")
        return graph

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            if graph is not None:
                self._cuda.drop_graph(graph)
        self._graphs.clear()

    def _results(self, profile: int, wanted: Sequence[str]) -> dict[str, np.ndarray]:
        outputs: dict[str, np.ndarray] = {}
        for name, (dtype, _) in self._engine.outputs.items():
            shape = self._output_shapes[profile][name]
            if name in self.pairs:
                self._versions[name] += 1
                outputs[name] = DeviceTensor(self, name, shape, dtype, self._versions[name])  # type: ignore[assignment]
                if not self._in_place:  # what was written is the next call's past
                    past = self.pairs[name]
                    self._addresses[past], self._addresses[name] = self._addresses[name], self._addresses[past]
            elif name in wanted:
                outputs[name] = np.empty(shape, dtype)
                self._cuda.download(outputs[name], self._addresses[name])
        return {name: outputs[name] for name in wanted}
