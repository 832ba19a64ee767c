"""Who may import whom: the layering, read from the imports themselves.

ruff bans what nobody but one package may import; the rows that differ by package are held here. A new row or a new entry is a
decision about the architecture: make it there first.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "ecmfq_export"

# What each part of the package may import from the package (itself apart): a name, or a dotted name for one module of a part.
OWN: dict[str, set[str]] = {
    "errors": set(),
    "json_file": set(),  # JSON that may be hostile: one reader of it
    "console": {"errors"},
    "progress": {"errors"},
    "config": {"errors"},
    "target": {"errors"},
    "compiled_library": {"errors"},
    "quant": {"errors", "compiled_library"},
    "file_hashes": set(),
    "heap": set(),
    "bundle": {"errors", "config", "file_hashes", "quant.qtensor"},
    # A quantized checkpoint gives QTensors and transforms before projections; a sample is what a forward pass takes.
    "models": {"errors", "config", "quant.activation", "quant.hadamard", "quant.int4_words", "quant.pack", "quant.qtensor",
               "quant.weight_only", "runtime.host_inputs", "runtime.sample"},
    # The processor makes calibration samples from images and text.
    "stages": {"errors", "config", "models", "quant", "bundle", "progress", "runtime.data_files", "runtime.host_inputs", "runtime.images",
               "runtime.processor", "runtime.sample"},
    "graph": {"errors", "config", "models", "bundle", "target", "progress", "quant.block_layout", "quant.kernel_layout", "quant.pack",
              "quant.qtensor"},
    "engine": {"errors", "compiled_library", "target", "bundle", "progress", "heap"},
    # The report compares PyTorch's layers with the graph's, over the same prompts that `run` takes.
    "validate": {"errors", "bundle", "progress", "heap", "graph.ops", "engine.runner", "engine.ort_pieces", "engine.ort_runner", "models",
                 "quant.qtensor", "runtime"},
    "runtime": {"errors", "bundle", "engine.runner"},
    "server": {"errors", "runtime"},
    # A model inside another project's program: opened, asked, scored.
    "integrations": {"errors", "models", "runtime", "engine.ort_runner"},
}
EVERYWHERE = {"json_file"}  # files that may be hostile are read in one way
COMMAND_LINE = {"cli", "cli_parser", "workflow", "describe", "disk_need", "plan", "plan_estimate", "layer_facts", "bundle_facts",
                "bundle_compare", "describe_tables", "target_reference"}  # may import everything

THIRD_PARTY: dict[str, set[str]] = {
    "errors": set(),
    "json_file": set(),
    "config": set(),
    "target": set(),
    "file_hashes": set(),
    "heap": set(),
    "compiled_library": set(),
    "bundle": {"safetensors", "numpy"},
    "console": {"rich"},
    "progress": {"rich"},
    "quant": {"torch", "numpy"},
    "models": {"torch", "numpy", "safetensors", "transformers"},
    "stages": {"torch", "numpy", "safetensors", "compressed_tensors"},
    "graph": {"torch", "numpy", "ml_dtypes", "safetensors", "onnx", "onnx_ir", "onnxscript"},
    "engine": {"numpy", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx"},
    "validate": {"torch", "numpy", "safetensors", "onnx", "onnx_ir", "onnxruntime", "rich", "matplotlib", "PIL"},
    "runtime": {"numpy", "PIL", "transformers", "tokenizers"},
    "server": {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "PIL"},
    "integrations": {"torch", "numpy", "PIL", "lmms_eval"},
    "cli": {"rich"},
    "workflow": set(),
    "disk_need": set(),
    "plan": {"rich"},
    "target_reference": set(),
    "layer_facts": {"onnx"},
    "bundle_facts": set(),
    "bundle_compare": set(),
    "describe_tables": {"rich"},
    "plan_estimate": {"torch"},
    "describe": {"rich"},
}


def _modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def _part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Dotted names of everything imported, at whatever depth; `from package import module` counts as the module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            folder = ROOT.parent / Path(*(node.module or "").split("."))
            for alias in node.names:
                is_module = (folder / f"{alias.name}.py").is_file() or (folder / alias.name).is_dir()
                names.add(f"{node.module}.{alias.name}" if is_module else str(node.module))
    return names


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path: Path) -> None:
    part = _part(path)
    assert part in OWN or part in COMMAND_LINE, f"'{part}' has no row in this test's tables"
    for name in sorted(_imports(path)):
        first, *rest = name.split(".")
        if first == "ecmfq_export":
            if not rest or part in COMMAND_LINE or rest[0] == part:
                continue
            assert rest[0] in OWN[part] | EVERYWHERE or ".".join(rest[:2]) in OWN[part], f"{part} may not import {name}"
        elif first not in sys.stdlib_module_names:
            assert first in THIRD_PARTY[part], f"{part} may not import {first}"


def test_torch_in_graph() -> None:
    """The vision tower is traced with torch; elsewhere in graph/ it is only the type that weights are read as."""
    with_torch = {path.name for path in (ROOT / "graph").rglob("*.py") if any(n.split(".")[0] == "torch" for n in _imports(path))}
    assert with_torch <= {"vision.py", "builder.py", "decoder.py"}, with_torch


def test_engines_are_imported_when_used() -> None:
    """Importing the builder must not import TensorRT: `--help` and a machine without it work."""
    for path in (ROOT / "engine").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
                assert not any(name.split(".")[0] in ("tensorrt", "tensorrt_rtx") for name in names), path


def test_files_fit_in_the_head() -> None:
    """About 400 lines at most."""
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in _modules()}
    assert {name: size for name, size in sizes.items() if size > 420} == {}
