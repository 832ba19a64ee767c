"""The calls into TensorRT: their names in NVIDIA's own modules, and the runner over a module of ours that answers them without a GPU."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from ecmfq_export.engine import trt_plan, trt_runner
from ecmfq_export.engine.device import Device
from ecmfq_export.engine.trt_runner import TrtRunner
from ecmfq_export.errors import BuildError
from ecmfq_export.target import Target, load_target
from tests.engine.fake_engine import CACHE, KINDS, FakeCuda, FakeEngine, NumpyRunner

# What the expressions in the sources are, as NVIDIA's Python bindings call it.
CLASSES = {"self._engine": "ICudaEngine", "self._context": "IExecutionContext", "self._runtime": "Runtime", "context": "IExecutionContext",
           "engine": "ICudaEngine", "runtime": "Runtime", "module": "", "config": "IRuntimeConfig"}
RTX_ALONE = {"create_runtime_config", "CudaGraphStrategy", "cuda_graph_strategy"}


def _used(path: Path) -> set[tuple[str, str]]:
    """(class, attribute) of everything that a source asks of TensorRT."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in CLASSES:
            found.add((CLASSES[ast.unparse(node.value)], node.attr))
    return found


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt_lean"])
def test_names_exist_in_tensorrt(name: str) -> None:
    """TensorRT-RTX 1.7 and TensorRT 11 (its lean runtime): a name that one of them lacks would fail on the device only."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    used = _used(Path(trt_runner.__file__)) | _used(Path(trt_plan.__file__))
    wanted = {"get_tensor_profile_shape", "set_optimization_profile_async", "execute_async_v3", "create_engine_inspector"}
    assert wanted <= {attribute for _, attribute in used}
    asked = sorted(".".join(filter(None, pair)) for pair in used if name == "tensorrt_rtx" or pair[1] not in RTX_ALONE)
    # A process of its own: two TensorRTs in one have the same symbols.
    script = (f"import json, operator, {name} as module\n"
              "def there(path):\n    try: operator.attrgetter(path)(module)\n    except AttributeError: return False\n    return True\n"
              f"print(json.dumps([path for path in {asked!r} if not there(path)]))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


class _Engine:
    """FakeEngine behind the names of ICudaEngine."""

    def __init__(self, inner: FakeEngine, log: list[object]) -> None:
        self._inner, self._log = inner, log
        self._names = [*inner.outputs, *inner.inputs]  # TensorRT promises no order
        self.num_io_tensors, self.num_optimization_profiles = len(self._names), len(inner.profiles)
        self._made = 0

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_dtype(self, name: str) -> np.dtype:
        return {**self._inner.inputs, **self._inner.outputs}[name][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return {**self._inner.inputs, **self._inner.outputs}[name][1]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self._inner.inputs else "out"

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        low, high = self._inner.profiles[index][name]
        return [low, low, high]

    def create_runtime_config(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(cuda_graph_strategy="disabled")

    def create_execution_context(self, config: types.SimpleNamespace | None = None) -> types.SimpleNamespace:
        self._log.append(("context", getattr(config, "cuda_graph_strategy", None)))
        inner = self._inner.contexts[self._made]
        self._made += 1
        return types.SimpleNamespace(
            set_optimization_profile_async=lambda index, stream: self._log.append(("profile", index)) or stream == FakeCuda.stream,
            set_input_shape=inner.set_shape, set_tensor_address=inner.set_address, get_tensor_shape=inner.output_shape,
            execute_async_v3=inner.enqueue)


def _module(cuda: FakeCuda, log: list[object], **options: bool) -> types.SimpleNamespace:
    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger: object) -> None:
            pass

        def get_plugin_registry(self) -> types.SimpleNamespace:
            return types.SimpleNamespace(load_library=lambda path: log.append(("library", Path(path).name)))

        def deserialize_cuda_engine(self, data: bytes) -> _Engine | None:
            log.append(("host code", self.engine_host_code_allowed))
            return _Engine(FakeEngine(cuda, **options), log) if data == b"engine" else None

    return types.SimpleNamespace(Runtime=Runtime, TensorIOMode=types.SimpleNamespace(INPUT="in"), nptype=lambda dtype: dtype,
                                 CudaGraphStrategy=types.SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Opens TrtRunner on a GPU that is not there; gives the runner and what was asked of TensorRT."""

    def opening(target: Target, data: bytes = b"engine", files: tuple[str, ...] = (), **arguments: bool) -> tuple[TrtRunner, list[object]]:
        cuda, log = FakeCuda(), []
        module = _module(cuda, log, in_place=target.kv_cache == "in_place", two_profiles=target.engine.decode_profile)
        monkeypatch.setattr(trt_runner, "current_device", lambda: Device("GPU", target.compute_capabilities[0], 1, 1 << 34, "13.0"))
        monkeypatch.setattr(trt_runner, "CudaRuntime", lambda: cuda)
        monkeypatch.setattr(trt_runner, "load_module", lambda engine: module)
        monkeypatch.setattr(trt_runner, "make_logger", lambda module, log: None)
        (tmp_path / "decoder.engine").write_bytes(data)
        for file in files:
            (tmp_path / file).write_bytes(b"library")
        return TrtRunner(tmp_path / "decoder.engine", target, **arguments), log

    return opening


def _converse(runner: TrtRunner | NumpyRunner) -> list[np.ndarray]:
    cache = {f"past_{kind}_0": np.zeros((2, CACHE), np.float32) for kind in KINDS}
    answers, tokens, starts = [], np.array([[1, 2], [3, 4]], np.float32), np.zeros(2, np.int64)
    for step in range(5):
        outputs = runner.run({"tokens": tokens, "write_indices": starts, **cache})
        answers.append(outputs["answer"])
        cache = {f"past_{kind}_0": outputs[f"present_{kind}_0"] for kind in KINDS}
        tokens, starts = np.array([[step], [step + 7]], np.float32), starts + (2 if step == 0 else 1)
    return answers


@pytest.mark.parametrize("name", ["jetson-orin", "jetson-orin-trt11", "h100", "l4"])
def test_every_kind_of_target(opened, name: str) -> None:
    target = load_target(name)
    runner, log = opened(target, files=("libecmfq_plugin.so",))
    np.testing.assert_array_equal(_converse(runner), _converse(NumpyRunner()))
    assert set(runner.input_names) == set(NumpyRunner.input_names) and set(runner.output_names) == set(NumpyRunner.output_names)
    if target.engine.runtime == "tensorrt_rtx":
        assert log == [("host code", True), ("context", "whole"), ("profile", 0)], "it embeds the library and captures by itself"
        assert runner.calls == {"direct": 5, "captured": 0, "replayed": 0}
    else:
        assert log == [("library", "libecmfq_plugin.so"), ("host code", False), ("context", None), ("profile", 0), ("context", None),
                       ("profile", 1)]
        assert runner.calls["replayed"] == (3 if target.kv_cache == "in_place" else 2)


def test_library_that_was_compiled_on_the_device_comes_first(opened) -> None:
    _, log = opened(load_target("jetson-orin"), files=("libecmfq_plugin.so", "libecmfq_plugin.local.so"))
    assert log[0] == ("library", "libecmfq_plugin.local.so")


def test_without_graphs(opened) -> None:
    runner, _ = opened(load_target("h100"), graphs=False)
    _converse(runner)
    assert runner.calls == {"direct": 5, "captured": 0, "replayed": 0}
    _, log = opened(load_target("l4"), graphs=False)
    assert ("context", None) in log


def test_refused_engine(opened) -> None:
    with pytest.raises(BuildError, match="TensorRT refuses the engine"):
        opened(load_target("h100"), data=b"damaged")


def test_gpu_of_another_kind(opened, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = load_target("h100")
    monkeypatch.setattr(trt_runner, "current_device", lambda: Device("A100", 80, 108, 1 << 36, "13.0"))
    with pytest.raises(BuildError, match=r"needs a GPU of compute capability \[90\]; found: A100 with 80"):
        TrtRunner(tmp_path / "x.engine", target)
