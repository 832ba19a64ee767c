"""Run an ONNX graph in ONNX Runtime on the CPU: the oracle, and the way to try a bundle without a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from ecmfq_export.engine.graph_file import load_graph
from ecmfq_export.engine.runner import check_feeds
from ecmfq_export.errors import UnsupportedError, UserError

_DTYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8, "tensor(int32)": np.int32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_,
}


class OrtRunner:
    """A :class:`~ecmfq_export.engine.runner.Runner` over one ONNX file.

    Args:
        path: the graph; custom operators must have model-local functions (``model.ref.onnx``).
        threads: CPU threads inside an operator; 0: one a physical core.
        optimize: let ONNX Runtime fuse operators. Off, every operator is computed as written.
        extra_outputs: names of values inside the graph that are outputs too; the file stays as it is.
        brief: for a session of a few runs: matrices are not packed into a second copy first.

    Raises:
        UserError: no such file, a name that no value has, or ONNX Runtime refuses the graph; with its message.
    """

    def __init__(self, path: Path, *, threads: int = 0, optimize: bool = True, extra_outputs: Sequence[str] = (),
                 brief: bool = False) -> None:
        model = load_graph(Path(path))
        source: Path | bytes = Path(path)
        if extra_outputs:
            source = _with_outputs(model, Path(path), extra_outputs)
        self._session = open_model(source, Path(path), threads, optimize, brief)
        unknown = [value for value in self._session.get_inputs() if value.type not in _DTYPES]
        if unknown:
            raise UnsupportedError(f"{path}: input '{unknown[0].name}' is a {unknown[0].type}", f"supported: {', '.join(_DTYPES)}")
        self._inputs = {value.name: (np.dtype(_DTYPES[value.type]), value.shape) for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]

    @property
    def input_names(self) -> list[str]:
        return list(self._inputs)

    @property
    def output_names(self) -> list[str]:
        return self._outputs

    @property
    def device_bytes(self) -> int:
        return 0

    @property
    def inputs(self) -> dict[str, tuple[np.dtype, list[int | str | None]]]:
        """Dtype and shape of every input; a free extent is its symbol's name or None."""
        return dict(self._inputs)

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        check_feeds(feeds, self._inputs)
        wanted = self._outputs if outputs is None else list(outputs)
        return dict(zip(wanted, self._session.run(wanted, dict(feeds)), strict=True))


def open_model(model: Path | bytes, path: Path, threads: int = 0, optimize: bool = True,
               brief: bool = False) -> onnxruntime.InferenceSession:
    """A session over a graph that :func:`~ecmfq_export.engine.graph_file.load_graph` has checked.

    Args:
        model: the file, or a graph made from it as bytes.
        path: the file whose folder has the weights; named in errors.
        threads, optimize, brief: see :class:`OrtRunner`.

    Raises:
        UserError: ONNX Runtime refuses it; with its message.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong comes as an exception, with the same words
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if brief:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if isinstance(model, bytes):
        # Weights lie beside the file, where a graph that comes as bytes does not look by itself.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent.resolve()))
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # onnxruntime raises a dozen unrelated types, all of them about this file
        raise UserError(f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {error}",
                        "an operator without an implementation: load model.ref.onnx, not model.onnx") from error


def require_values(model: onnx.ModelProto, path: Path, names: Sequence[str]) -> None:
    """Raise UnsupportedError for a name that no node of the graph gives."""
    values = {name for node in model.graph.node for name in node.output}
    missing = [name for name in names if name not in values]
    if missing:
        raise UnsupportedError(f"{path} has no value {missing[0]}", "export the model again")


def _with_outputs(model: onnx.ModelProto, path: Path, names: Sequence[str]) -> bytes:
    """The graph, without its weights, with these values of the type of its first input as outputs after its own."""
    require_values(model, path, names)
    there = {value.name for value in model.graph.output}
    element = model.graph.input[0].type.tensor_type.elem_type
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, element, None) for name in names if name not in there)
    return model.SerializeToString()
