"""The whole way from a checkpoint to a bundle, as a list of stages.

Each stage reads finished directories and writes one of its own (see :mod:`ecmfq_export.bundle`); a stage whose inputs and
settings have not changed is skipped, an interrupted one continues where it can.

The bundle::

    OUT/onnx/              decoder/model.onnx, vision/model.onnx, weights, tokenizer, runtime.json
    OUT/engines/<target>/  decoder.engine, vision.engine, the plugin library, build logs; for a device that builds its own engines
                           the plugin library, build.sh and README.txt
    OUT/report/            report.json, report.html
    OUT/stages/            rotated, calibration, smoothing, quantized: what the bundle was made from; not needed on the device
    OUT/manifest.json      sha256 of every file outside stages/
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecmfq_export import bundle
from ecmfq_export.config import ExportConfig, QuantConfig
from ecmfq_export.errors import BundleError, UserError
from ecmfq_export.file_hashes import remembered
from ecmfq_export.progress import Progress
from ecmfq_export.target import Target

if TYPE_CHECKING:
    from ecmfq_export.models.moe_vlm import MoEVLM
    from ecmfq_export.runtime.generate import Generator
    from ecmfq_export.stages.resources import Resources
    from ecmfq_export.validate.evaluation.result import EvalResult


HASHES = ".file_hashes.json"
"""Beside the stages: hashes of large files as they were when they were read."""


@dataclass(frozen=True)
class Paths:
    """Where each stage's directory lies in a bundle."""

    root: Path

    @property
    def rotated(self) -> Path:
        return self.root / "stages" / "rotated"

    @property
    def calibration(self) -> Path:
        return self.root / "stages" / "calibration"

    @property
    def smoothing(self) -> Path:
        return self.root / "stages" / "smoothing"

    @property
    def quantized(self) -> Path:
        return self.root / "stages" / "quantized"

    @property
    def onnx(self) -> Path:
        return self.root / "onnx"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def engines(self, target: Target) -> Path:
        return self.root / "engines" / target.name

    def engine_folders(self, *stages: str) -> list[Path]:
        """Finished directories under ``engines`` in the order of their names: of stage ``build`` (engines) or ``device`` (what a
        device needs to build its own); of both where none is named."""
        found = sorted(path.parent for path in (self.root / "engines").glob(f"*/{bundle.MANIFEST}"))
        return [path for path in found if bundle.read_manifest(path).stage in (stages or ("build", "device"))]


def require_quantizable(model: MoEVLM, config: QuantConfig, data: Path | None, exported: bool = False) -> None:
    """Refuse what a stage would refuse later, before any work.

    Args:
        exported: whether graphs are written afterwards.

    Raises:
        UserError: a quantized model, settings that it does not allow, or no calibration data where the method needs them.
    """
    from ecmfq_export.stages.methods import resolve
    from ecmfq_export.stages.recipes import check_supported

    if model.quantization is not None:
        raise UserError(f"{model.path} is quantized already", "pass the floating-point checkpoint, or go on with 'export'")
    parts = resolve(config)
    # Rotating unties the output matrix from the embeddings.
    tied = model.spec.tie_word_embeddings and parts.rotate == "none"
    check_supported(dataclasses.replace(model.spec, tie_word_embeddings=tied), config)
    if parts.needs_data and data is None:
        raise UserError(f"method '{config.method}' needs calibration samples", "pass --data DIR, or --method rtn, which needs none")
    if exported and parts.rotate == "residual_online":
        raise UserError("rotate = 'residual_online' needs a transform while the model runs, and the plugin has no such step",
                        "export with rotate = 'residual' or 'none'; 'ecmfq-export quantize' takes it, for PyTorch")


def quantize_model(
    model_dir: Path, data: Path | None, out_dir: Path, config: QuantConfig, progress: Progress, resources: Resources | None = None
) -> Path:
    """Rotate, calibrate, smooth and quantize into `out_dir`; the stages before lie beside it.

    What is rotated is quantized in its own basis: every later stage reads the rotated checkpoint, whose function is the original's.
    Where several processes take part (``resources.ranks``), calibrate and quantize are shared out and rank 0 does the rest.

    Raises:
        UserError: the model is unsupported or damaged, calibration data are needed and missing, or too little disk is free.
    """
    from ecmfq_export import disk_need
    from ecmfq_export.models.moe_vlm import open_model
    from ecmfq_export.stages.methods import resolve
    from ecmfq_export.stages.quantize import quantize
    from ecmfq_export.stages.resources import DEFAULT

    resources = resources or DEFAULT
    model = open_model(model_dir)
    require_quantizable(model, config, data)
    if model.weight_only is not None:
        progress.note(f"{model_dir} holds {model.weight_only.method} int4 weights: their dequantized values are rounded anew "
                      "('import' and 'export' keep the integers)")
    parts, ranks = resolve(config), resources.ranks

    def check_disk() -> None:
        prompts = disk_need.probe_pool(model_dir, data) if parts.needs_data and data is not None else None
        disk_need.check_space(disk_need.quantize_needs(model, config, prompts, out_dir, resources.activation_bytes), out_dir)

    ranks.from_first(check_disk)
    with remembered(out_dir.with_name(HASHES)):
        if parts.rotate != "none":
            from ecmfq_export.stages.rotate import rotate

            ranks.from_first(lambda: str(rotate(model_dir, out_dir.with_name("rotated"), config, progress)))
            model_dir = out_dir.with_name("rotated")
        calibration = smoothing = None
        if parts.needs_data and data is not None:
            from ecmfq_export.stages.calibrate import calibrate

            calibration = calibrate(model_dir, data, out_dir.with_name("calibration"), config, progress, resources)
            if parts.smoothing != "none":
                from ecmfq_export.stages.smooth import smooth

                smoothing = out_dir.with_name("smoothing")
                ranks.from_first(lambda: str(smooth(model_dir, calibration, smoothing, config, progress, resources)))
        return quantize(model_dir, calibration, smoothing, out_dir, config, progress, resources)


def import_model(model_dir: Path, out_dir: Path, config: QuantConfig, progress: Progress) -> Path:
    """Carry another quantizer's int4 checkpoint (GPTQ, AWQ, compressed-tensors) over into `out_dir`, in the place of quantizing.

    Raises:
        UserError: it is none, holds what the integer kernels cannot, by name, or too little disk is free.
    """
    from ecmfq_export import disk_need
    from ecmfq_export.models.moe_vlm import open_model
    from ecmfq_export.stages.import_quantized import import_quantized

    disk_need.check_space(disk_need.import_needs(open_model(model_dir), config, out_dir), out_dir)
    return import_quantized(model_dir, out_dir, config, progress)


def export(
    model_dir: Path,
    data: Path | None,
    output: Path,
    target: Target | None,
    quant: QuantConfig,
    export_config: ExportConfig,
    progress: Progress,
    *,
    evaluation: Path | None = None,
    limit: int = 0,
    build: bool = True,
    expert_weights: str = "engine",
    resources: Resources | None = None,
) -> dict[str, Any]:
    """Every stage from a floating-point or quantized checkpoint to a validated bundle.

    Another quantizer's int4 checkpoint is imported where a floating-point one is quantized.

    Args:
        target: what engines are built for; None for ONNX Runtime alone, with weights alone quantized (W4A16). Another quantizer's
            checkpoint is then taken as it is.
        evaluation: held-out questions (JSONL) for the report; None compares logits only.
        limit: at most so many evaluation items; 0 takes all.
        build: whether to build engines (where the target builds them on this machine).
        expert_weights: in the decoder's ``engine``, or ``inputs`` of it (:mod:`ecmfq_export.engine.expert_weights`).
        resources: memory and device of the stages up to the quantized checkpoint.

    Returns:
        The validation report.

    Raises:
        UserError: any input, machine or validation problem, before a later stage is started; too little disk, before the first one.
    """
    from ecmfq_export import disk_need
    from ecmfq_export.engine.bundle_engines import builds_here, require_weights
    from ecmfq_export.engine.cross_compile import library_for
    from ecmfq_export.graph.pipeline import export_onnx, require_plain_inputs, resolve_sizes
    from ecmfq_export.models.moe_vlm import open_model
    from ecmfq_export.stages.methods import resolve
    from ecmfq_export.stages.resources import DEFAULT
    from ecmfq_export.validate.pipeline import validate

    paths = Paths(output)
    quantized = model_dir
    model = open_model(model_dir)
    # What a later stage would refuse is refused now, not after hours of quantization.
    resolve_sizes(model, target, export_config)
    require_plain_inputs(model)
    if model.weight_only is not None:
        from ecmfq_export.stages.import_quantized import require_experts, require_importable

        (require_experts if target is None else require_importable)(model)
    elif model.quantization is None:
        require_quantizable(model, quant, data, exported=True)
    if evaluation is not None and not evaluation.exists():
        raise UserError(f"no evaluation file at {evaluation}")
    build = build and target is not None
    if build and target is not None:
        require_weights(target, expert_weights)
        library_for(target, progress.note)
    needs = disk_need.export_needs(model, quant, target, output, build and target is not None and builds_here(target), expert_weights)
    if model.weight_only is not None and target is not None:
        needs = disk_need.import_needs(model, quant, paths.quantized) + needs
    if model.quantization is None and model.weight_only is None:
        parts, activation_bytes = resolve(quant), (resources or DEFAULT).activation_bytes
        prompts = disk_need.probe_pool(model_dir, data) if parts.needs_data and data is not None else None
        needs = disk_need.quantize_needs(model, quant, prompts, paths.quantized, activation_bytes) + needs
    disk_need.check_space(needs, output)
    with remembered(paths.root / "stages" / HASHES):
        if model.weight_only is not None and target is None:
            progress.note(f"the {model.weight_only.method} weights are taken as they are: activations stay in floating point (W4A16)")
        elif model.weight_only is not None:
            quantized = import_model(model_dir, paths.quantized, quant, progress)
        elif model.quantization is None:
            quantized = quantize_model(model_dir, data, paths.quantized, quant, progress, resources)
        else:
            progress.note("the checkpoint is quantized already: calibrate, smooth and quantize are not run")
        export_onnx(quantized, paths.onnx, target, export_config, progress)
        drop_stale_engines(paths, progress)
        folder = build_engines(output, target, progress, expert_weights=expert_weights) if build and target is not None else None
        engines = folder if folder is not None and folder in paths.engine_folders("build") else None
        report = validate(model_dir, quantized, paths.onnx, paths.report, data=evaluation, limit=limit, progress=progress,
                          engines_dir=engines)
    seal(paths, {"target": target.name} if target is not None else {"flavour": "ort"}, {"engines_built": engines is not None})
    return report


def seal(paths: Paths, config: dict[str, Any], info: dict[str, Any]) -> None:
    """Write the bundle's own manifest over its finished parts."""
    parts = ["onnx", "report", *(f"engines/{path.name}" for path in paths.engine_folders())]
    bundle.write_bundle_manifest(paths.root, parts, config, info)


def drop_stale_engines(paths: Paths, progress: Progress) -> None:
    """Delete engines that were built from other graphs than the bundle holds now: they would answer for another model."""
    graphs = bundle.fingerprint(paths.onnx)
    for directory in paths.engine_folders():
        if bundle.read_manifest(directory).inputs.get("onnx") != graphs:
            progress.note(f"{directory} was built from other graphs and is deleted")
            shutil.rmtree(directory)


def build_engines(bundle_root: Path, target: Target, progress: Progress, *, verbose: bool = False,
                  expert_weights: str = "engine") -> Path:
    """Engines of a bundle, or what a device needs to build them: :func:`ecmfq_export.engine.bundle_engines.build_engines`."""
    from ecmfq_export.engine.bundle_engines import build_engines as build

    paths = Paths(bundle_root)
    return build(paths.onnx, paths.engines(target), target, progress, verbose=verbose, expert_weights=expert_weights)


def trtexec_lines(bundle_root: Path, target: Target) -> dict[str, str]:
    """Part to the exact trtexec line that builds its engine, to be run in the bundle's ``engines/<target>``."""
    from ecmfq_export.engine.bundle_engines import engine_parts
    from ecmfq_export.engine.device_kit import arguments_of
    from ecmfq_export.engine.trtexec import trtexec_line

    parts, _ = engine_parts(Paths(bundle_root).onnx, target)
    return {name: trtexec_line(arguments) for name, arguments in arguments_of(parts, target).items()}


def open_generator(bundle_root: Path, threads: int = 0, target: Target | None = None) -> Generator:
    """The bundle's model, ready to answer; every file's hash is checked first.

    Args:
        threads: of ONNX Runtime (0: all cores).
        target: run its engines on this machine's GPU; None: the graphs in ONNX Runtime on the CPU.

    Raises:
        BundleError: no bundle, a file that is missing or changed, or no engines for the target.
        BuildError: this machine's GPU is not the target's.
    """
    from ecmfq_export.engine.ort_runner import OrtRunner
    from ecmfq_export.runtime.generate import Generator
    from ecmfq_export.runtime.runtime_file import verify_export

    paths = Paths(bundle_root)
    verify_export(paths.onnx)
    if target is None:
        return Generator(paths.onnx, lambda path: OrtRunner(path, threads=threads))
    from ecmfq_export.engine.device import current_device
    from ecmfq_export.engine.engine_directory import check_runs_here, open_engines
    from ecmfq_export.engine.expert_weights import mapped_weights
    from ecmfq_export.engine.trt_module import load_module
    from ecmfq_export.engine.trt_runner import TrtRunner

    folder = paths.engines(target)
    for engine in (folder / "decoder.engine", folder / "vision.engine"):
        if not engine.is_file():
            raise BundleError(f"no engine at {engine}", f"build it: ecmfq-export build {bundle_root} --target {target.name}")
    records = open_engines(folder)
    manifest = bundle.read_manifest(folder)
    if manifest.inputs.get("onnx") != bundle.fingerprint(paths.onnx):
        raise BundleError(f"{folder} was built from other graphs than the bundle holds",
                          f"build it again: ecmfq-export build {bundle_root} --target {target.name}")
    version, device = load_module(target.engine).__version__, current_device()
    for record in records.values():
        check_runs_here(record, version, device)

    def opened(path: Path) -> TrtRunner:
        part = path.parent.name
        weights = mapped_weights(path.with_name("model.onnx"), list(records[part].weight_inputs)) if part in records else None
        return TrtRunner(folder / f"{part}.engine", target, weights=weights)

    return Generator(paths.onnx, opened)


def revalidate(bundle_root: Path, model_dir: Path, evaluation: Path | None, limit: int, progress: Progress) -> dict[str, Any]:
    """Write a bundle's report again, against the floating-point checkpoint `model_dir`.

    Raises:
        UserError: a file of the bundle was changed, or its quantized checkpoint is not there.
    """
    from ecmfq_export.validate.pipeline import validate

    paths = Paths(bundle_root)
    manifest = bundle.read_manifest(bundle_root, "bundle")
    bundle.verify(bundle_root, manifest, [name for name in manifest.files if not name.startswith("report/")])
    engines = paths.engine_folders("build")
    quantized = paths.quantized if paths.quantized.is_dir() else model_dir
    if bundle.fingerprint(quantized) != bundle.read_manifest(paths.onnx, "onnx").inputs.get("model"):
        raise UserError(f"{bundle_root} was not exported from {quantized}",
                        "keep the bundle's stages/quantized, or pass with --model the quantized checkpoint it was exported from")
    report = validate(model_dir, quantized, paths.onnx, paths.report, data=evaluation, limit=limit, progress=progress,
                      engines_dir=engines[0] if engines else None)
    seal(paths, manifest.config, manifest.info)
    return report


def evaluate_model(
    model: Path, data: Path, progress: Progress, *, reference: Path | None = None, output: Path | None = None, threads: int = 0,
    resamples: int = 10_000, memory_limit: int | None = None, **options: Any,
) -> EvalResult:  # fmt: skip
    """Measure a checkpoint or a bundle on a user's data, and compare it with a reference.

    Args:
        reference: a model (evaluated first), or the file of an earlier result.
        output: where the result's JSON goes; checked before any work.
        memory_limit: bytes of hidden states held at once.
        options: of ``validate.evaluation.evalset.prepare``.

    Raises:
        UserError: models, data or options that cannot be used, each named.
    """
    from ecmfq_export.validate.evaluation.evalset import prepare
    from ecmfq_export.validate.evaluation.result import EvalResult
    from ecmfq_export.validate.evaluation.run import evaluate
    from ecmfq_export.validate.evaluation.sources import open_source, require_same_processor
    from ecmfq_export.validate.evaluation.torch_model import MEMORY_LIMIT

    limit = MEMORY_LIMIT if memory_limit is None else memory_limit
    source = open_source(model, threads)
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise UserError(f"{output} cannot be written", "give the path of a file in a directory that exists")
    known = EvalResult.read(reference) if reference is not None and reference.is_file() else None
    other = open_source(reference, threads) if reference is not None and known is None else None
    if other is not None:
        require_same_processor(other.processor_dir, source.processor_dir)
    evalset = prepare(source.processor_dir, data, progress=progress, **options)
    if other is not None:
        progress.note(f"the reference: {reference}")
        known = evaluate(other.model, evalset, progress=progress, resamples=resamples, memory_limit=limit)
        progress.note(f"the model: {model}")
    result = evaluate(source.model, evalset, known, progress=progress, resamples=resamples, memory_limit=limit)
    if output is not None:
        result.write(output)
    return result
