"""What `export --dry-run` shows: every stage with its bytes, memory, disk and time, after everything that can be checked was checked.

Nothing is written and no weight is read; the checkpoint's headers, the data file and a few samples of it are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ecmfq_export import bundle, disk_need
from ecmfq_export.config import ExportConfig, QuantConfig
from ecmfq_export.describe import size_text
from ecmfq_export.engine.doctor import Check
from ecmfq_export.errors import UserError
from ecmfq_export.plan_estimate import Load, Rates, largest_layer, measure_rates, quantize_loads
from ecmfq_export.stages.resources import DEFAULT, Resources
from ecmfq_export.target import Target

T = TypeVar("T")

UNCHECKED = ("values of weights (NaN, infinity: found when a tensor is read), images of samples beyond the few that were opened, "
             "what TensorRT's builder says to the graph")  # fmt: skip


@dataclass(frozen=True)
class StagePlan:
    """One row of the plan.

    Attributes:
        name: of the stage; state: ``to do``, ``there`` (looked at by its manifest alone: hashes are compared when it runs) or
            ``interrupted``.
        layers: that it goes through; 0 where it goes through none.
        bytes_in, bytes_out: read and left behind.
        memory: bytes at the peak, the process's own included; None: not known before.
        scratch: disk bytes that are gone when it ends.
        seconds: the least that the counted work takes at the measured rates; None: nothing was counted.
        basis: what was counted.
    """

    name: str
    state: str
    layers: int
    bytes_in: int
    bytes_out: int
    memory: int | None
    scratch: int
    seconds: float | None
    basis: str


@dataclass
class Plan:
    """Checks and stages; ``rates`` is None where the model could not be opened."""

    checks: list[Check] = field(default_factory=list)
    stages: list[StagePlan] = field(default_factory=list)
    rates: Rates | None = None

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.ok]

    def look(self, name: str, function: Callable[[], tuple[T, str]]) -> T | None:
        """Run one check; what it finds goes into the list, and so does the error that it ends with."""
        try:
            result, detail = function()
        except UserError as error:
            self.checks.append(Check(name, False, error.what, error.fix))
            return None
        self.checks.append(Check(name, True, detail))
        return result


def plan_export(
    model_dir: Path, data: Path | None, output: Path, target: Target | None, quant: QuantConfig, export_config: ExportConfig, *,
    evaluation: Path | None = None, limit: int = 0, build: bool = True, expert_weights: str = "engine", resources: Resources = DEFAULT,
) -> Plan:  # fmt: skip
    """The plan of ``workflow.export`` with the same arguments. Problems are in ``Plan.failed``, all of them at once."""
    from ecmfq_export.engine.bundle_engines import builds_here, require_weights
    from ecmfq_export.models.moe_vlm import open_model
    from ecmfq_export.workflow import Paths

    plan, paths = Plan(), Paths(output)
    said = "ONNX Runtime alone, without engines" if target is None else f"{target.name}: {target.description}"
    plan.checks.append(Check("target", True, said))

    def opened() -> tuple[Any, str]:
        model = open_model(model_dir)
        spec = model.spec
        size = sum(model.checkpoint.entry(name).num_bytes for name in model.checkpoint.names())
        return model, (f"{spec.family}, {spec.num_layers} layers, {len(model.checkpoint.names())} tensors of the shapes that config.json "
                       f"implies, {size_text(size)}")

    model = plan.look("config and tensors", opened)
    plan.look("tokenizer and images", lambda: _processor(model_dir))
    if evaluation is not None:
        plan.look("evaluation", lambda: _evaluation(evaluation, limit))
    plan.look("output", lambda: _writable(output))
    here = build and target is not None and builds_here(target)
    if build and target is not None:
        if expert_weights != "engine":
            plan.look("expert weights", lambda: (require_weights(target, expert_weights), "inputs of the decoder's engine"))
        plan.look("plugin library", lambda: _library(target))
        if here:
            plan.look("engine builder", lambda: _builder(target))
        else:
            plan.checks.append(Check("engine builder", True, f"the bundle carries what {target.name} needs to build its engines itself"))
    if model is None:
        return plan
    sizes = plan.look("settings", lambda: _settings(model, quant, export_config, target, data))
    prompts = None
    floating = model.quantization is None and model.weight_only is None
    if floating and data is not None and _needs_data(quant):
        prompts = plan.look("data", lambda: _pool(model_dir, data))
        if prompts is None:
            return plan
    needs = disk_need.export_needs(model, quant, target, output, here, expert_weights)
    if model.weight_only is not None and target is not None:
        needs = [*disk_need.import_needs(model, quant, paths.quantized), *needs]
    if floating:
        needs = [*disk_need.quantize_needs(model, quant, prompts, paths.quantized, resources.activation_bytes), *needs]
    plan.look("disk", lambda: _disk(needs, output))
    if sizes is not None and target is not None:
        plan.look("device memory", lambda: _device_memory(model, quant, sizes, target, output))
    plan.rates = measure_rates(model)
    loads = quantize_loads(model, quant, prompts, resources.activation_bytes) if floating else {}
    plan.stages = _stages(model, needs, loads, plan.rates)
    return plan


def _stages(model: Any, needs: list[disk_need.StageNeed], loads: dict[str, Load], rates: Rates) -> list[StagePlan]:
    source = sum(model.checkpoint.entry(name).num_bytes for name in model.checkpoint.names())
    layers, layer = model.spec.num_layers, largest_layer(model)
    results = {need.name: need.result for need in needs}
    rows = []
    for need in needs:
        load = loads.get(need.name)
        memory, basis = (None, "") if load is None else (rates.process + load.memory, load.basis)
        read, count = source, layers
        if need.name in ("smooth", "quantize") and "rotate" in results:
            read = results["rotate"]
        elif need.name == "import":
            memory, basis = rates.process + layer, "every weight read, and its integers written in another form"
        elif need.name == "export graphs":
            read = results.get("quantize", results.get("import", source))
            memory, basis = rates.process + layer, "every weight read, and written as graphs need it"
        elif need.name == "build engines":
            read, count, basis = results["export graphs"], 0, "by TensorRT, which keeps a copy of the weights; time not known before"
            memory = rates.process + need.result
        elif need.name == "validate":
            read = source + results.get("quantize", results.get("import", 0)) + results["export graphs"]
            memory, basis = rates.process + 2 * layer + results["export graphs"], "three models over the evaluation's prompts; not counted"
        read += load.read_again if load is not None else 0
        moved = (read + need.result) / rates.read
        seconds = moved + load.flops / rates.flops if load is not None else moved if need.name in ("export graphs", "import") else None
        rows.append(StagePlan(need.name, _state(need.directory), count, read, need.result, memory, need.scratch, seconds, basis))
    return rows


def _state(directory: Path) -> str:
    if (directory / bundle.MANIFEST).is_file():
        return "there"
    return "interrupted" if bundle.partial_dir(directory).is_dir() else "to do"


def _needs_data(quant: QuantConfig) -> bool:
    from ecmfq_export.stages.methods import resolve

    return resolve(quant).needs_data


def _processor(model_dir: Path) -> tuple[Any, str]:
    from ecmfq_export.runtime.processor import Processor

    processor = Processor(model_dir)
    processor.prompt_ids("Describe the image.", 1)
    return processor, f"chat template renders; {len(processor.tokenizer.get_vocab()):,} tokens"


def _evaluation(path: Path, limit: int) -> tuple[Any, str]:
    from ecmfq_export.validate.evaluate import load_questions

    questions = load_questions(path / "questions.jsonl" if path.is_dir() else path, limit)
    return questions, f"{path}: {len(questions)} questions, every image is there"


def _pool(model_dir: Path, data: Path) -> tuple[disk_need.Prompts, str]:
    prompts = disk_need.probe_pool(model_dir, data)
    return prompts, f"{data}: {prompts.count} samples, about {prompts.tokens:.0f} tokens each (a few of them were processed)"


def _writable(output: Path) -> tuple[Path, str]:
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file", "give a directory as --output")
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing} cannot be written", "choose another --output")
    return existing, f"{output} can be written; {size_text(shutil.disk_usage(existing).free)} are free"


def _library(target: Target) -> tuple[Any, str]:
    from ecmfq_export.engine.cross_compile import cross_tools, library_for
    from ecmfq_export.engine.plugin_library import host_platform

    if target.platform != host_platform():
        # Compiling it is work; what it takes is looked for.
        missing = [tool for tool in cross_tools(target.platform) if not tool.path]
        if missing:
            raise UserError(f"the plugin library for {target.platform} cannot be compiled here: {missing[0].name} is missing, which "
                            f"{missing[0].purpose}", f"{missing[0].install}, or pass --no-build")
        return None, f"is compiled for {target.platform} on this machine when the run starts"
    library = library_for(target)
    return library, f"{library.path}, kernels for SM {', '.join(map(str, library.compute_capabilities))}"


def _builder(target: Target) -> tuple[Any, str]:
    from ecmfq_export.engine.trt_module import load_module

    module = load_module(target.engine)
    return module, f"{target.engine.runtime} {module.__version__}"


def _settings(model: Any, quant: QuantConfig, config: ExportConfig, target: Target | None, data: Path | None) -> tuple[Any, str]:
    from ecmfq_export.graph.pipeline import require_plain_inputs, resolve_sizes
    from ecmfq_export.stages.import_quantized import require_experts, require_importable
    from ecmfq_export.workflow import require_quantizable

    sizes = resolve_sizes(model, target, config)
    require_plain_inputs(model)
    graphs = f"graphs for {sizes.max_seq_len} tokens, batch {sizes.max_batch}, {sizes.max_image_patches} image patches"
    if model.quantization is not None:
        return sizes, f"{graphs}; the checkpoint is quantized already"
    if model.weight_only is not None:
        (require_experts if target is None else require_importable)(model)
        return sizes, f"{graphs}; {model.weight_only.method} weights keep their integers"
    require_quantizable(model, quant, data, exported=True)
    return sizes, f"method {quant.method}, experts w4a8, attention {quant.attention}; {graphs}"


def _disk(needs: list[disk_need.StageNeed], output: Path) -> tuple[None, str]:
    disk_need.check_space(needs, output)
    fullest = max(sum(n.result for n in needs[: i + 1]) + needs[i].scratch for i in range(len(needs)))
    return None, f"{size_text(fullest)} at the fullest, from an empty directory"


def _device_memory(model: Any, quant: QuantConfig, sizes: Any, target: Target, output: Path) -> tuple[None, str]:
    """Engines and KV cache against the target's memory; activations are known after the build alone."""
    from ecmfq_export.graph.attention import cache_head_dim

    engines = next(n for n in disk_need.export_needs(model, quant, target, output, True) if n.name == "build engines").result
    cache = sum(2 * 2 * sizes.max_batch * layer.attention.num_kv_heads * sizes.max_seq_len * cache_head_dim(layer.attention)
                for layer in model.spec.layers)
    said = (f"engines {size_text(engines)}, KV cache {size_text(cache)}, of {size_text(target.limits.memory_bytes)} on {target.name}; "
            "activations on top")
    if engines + cache > target.limits.memory_bytes:
        raise UserError(said, "use a smaller --max-seq-len or --max-batch, or a target with more memory")
    return None, said


def print_plan(plan: Plan, console: Console) -> None:
    """The checks, the stages, the sum, and what the estimate rests on."""
    checks = Table("", "checked", "found", title="checks", title_justify="left")
    for check in plan.checks:
        checks.add_row("[green]yes[/]" if check.ok else "[red]no[/]", check.name, escape(check.detail))
    console.print(checks)
    if not plan.stages:
        return
    # Narrow enough for 80 columns: what is cut off says nothing.
    table = Table(title="plan", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for header in ("stage", "state", "layers", "in", "out", "scratch", "memory", "time"):
        table.add_column(header, justify="left" if header in ("stage", "state") else "right", no_wrap=True)
    for row in plan.stages:
        table.add_row(row.name, row.state, str(row.layers or ""), size_text(row.bytes_in), size_text(row.bytes_out),
                      size_text(row.scratch) if row.scratch else "", "" if row.memory is None else size_text(row.memory),
                      "" if row.seconds is None else f">= {_time(row.seconds)}")
    left = [row for row in plan.stages if row.state != "there"]
    known = [row.seconds for row in left if row.seconds is not None]
    table.add_section()
    table.add_row("all that is to do", "", "", "", size_text(sum(row.bytes_out for row in left)), "",
                  size_text(max((row.memory or 0 for row in left), default=0)), f">= {_time(sum(known))}")
    console.print(table)
    for row in plan.stages:
        if row.basis:
            console.print(f"{row.name}: {row.basis}", highlight=False, markup=False, soft_wrap=True)
    if plan.rates is not None:
        rates = plan.rates
        console.print(f"Times are the counted work at {rates.flops / 1e9:.0f} GFLOP/s (float32 matrix products, {rates.threads} threads) "
                      f"and {size_text(int(rates.read))}/s read, both measured just now: the least that it takes. Searches, rounding and "
                      "stages without a time come on top.", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Not checked: {UNCHECKED}.", highlight=False, markup=False, soft_wrap=True)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 0.1):.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
