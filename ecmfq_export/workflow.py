"""The whole way from a checkpoint to a bundle, as a list of stages.

Each stage reads finished directories and writes one of its own (see :mod:`ecmfq_export.bundle`); a stage whose inputs and
settings have not changed is skipped, an interrupted one continues where it can.

The bundle::

    OUT/onnx/              decoder/model.onnx, vision/model.onnx, weights, tokenizer, runtime.json
    OUT/engines/<target>/  decoder.engine, vision.engine, the plugin library, build logs
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
from ecmfq_export.errors import BuildError, UserError
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

    def finished_engines(self) -> list[Path]:
        """Engine directories that a build has completed, in the order of their names."""
        return sorted(path.parent for path in (self.root / "engines").glob(f"*/{bundle.MANIFEST}"))


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
    parts = resolve(config)
    prompts = disk_need.probe_pool(model_dir, data) if parts.needs_data and data is not None else None
    disk_need.check_space(disk_need.quantize_needs(model, config, prompts, out_dir, resources.activation_bytes), out_dir)
    with remembered(out_dir.with_name(HASHES)):
        if parts.rotate != "none":
            from ecmfq_export.stages.rotate import rotate

            model_dir = rotate(model_dir, out_dir.with_name("rotated"), config, progress)
        calibration = smoothing = None
        if parts.needs_data and data is not None:
            from ecmfq_export.stages.calibrate import calibrate

            calibration = calibrate(model_dir, data, out_dir.with_name("calibration"), config, progress, resources)
            if parts.smoothing != "none":
                from ecmfq_export.stages.smooth import smooth

                smoothing = smooth(model_dir, calibration, out_dir.with_name("smoothing"), config, progress, resources)
        return quantize(model_dir, calibration, smoothing, out_dir, config, progress, resources)


def export(
    model_dir: Path,
    data: Path | None,
    output: Path,
    target: Target,
    quant: QuantConfig,
    export_config: ExportConfig,
    progress: Progress,
    *,
    evaluation: Path | None = None,
    limit: int = 0,
    build: bool = True,
    resources: Resources | None = None,
) -> dict[str, Any]:
    """Every stage from a floating-point or quantized checkpoint to a validated bundle.

    Args:
        evaluation: held-out questions (JSONL) for the report; None compares logits only.
        limit: at most so many evaluation items; 0 takes all.
        build: whether to build engines (where the target builds them on this machine).
        resources: memory and device of the stages up to the quantized checkpoint.

    Returns:
        The validation report.

    Raises:
        UserError: any input, machine or validation problem, before a later stage is started; too little disk, before the first one.
    """
    from ecmfq_export import disk_need
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
    if model.quantization is None:
        require_quantizable(model, quant, data, exported=True)
    if evaluation is not None and not evaluation.exists():
        raise UserError(f"no evaluation file at {evaluation}")
    if build and target.engine.build == "on-device" and not is_this_device(target):
        progress.note(f"engines for {target.name} are built on the device: copy the bundle there and run "
                      f"'ecmfq-export build BUNDLE --target {target.name}'")
        build = False
    needs = disk_need.export_needs(model, quant, target, output, build)
    if model.quantization is None:
        parts, activation_bytes = resolve(quant), (resources or DEFAULT).activation_bytes
        prompts = disk_need.probe_pool(model_dir, data) if parts.needs_data and data is not None else None
        needs = disk_need.quantize_needs(model, quant, prompts, paths.quantized, activation_bytes) + needs
    disk_need.check_space(needs, output)
    with remembered(paths.root / "stages" / HASHES):
        if model.quantization is None:
            quantized = quantize_model(model_dir, data, paths.quantized, quant, progress, resources)
        else:
            progress.note("the checkpoint is quantized already: calibrate, smooth and quantize are not run")
        export_onnx(quantized, paths.onnx, target, export_config, progress)
        drop_stale_engines(paths, progress)
        engines = build_engines(output, target, progress) if build else None
        report = validate(model_dir, quantized, paths.onnx, paths.report, data=evaluation, limit=limit, progress=progress,
                          engines_dir=engines)
    seal(paths, {"target": target.name}, {"engines_built": engines is not None})
    return report


def seal(paths: Paths, config: dict[str, Any], info: dict[str, Any]) -> None:
    """Write the bundle's own manifest over its finished parts."""
    parts = ["onnx", "report", *(f"engines/{path.name}" for path in paths.finished_engines())]
    bundle.write_bundle_manifest(paths.root, parts, config, info)


def drop_stale_engines(paths: Paths, progress: Progress) -> None:
    """Delete engines that were built from other graphs than the bundle holds now: they would answer for another model."""
    graphs = bundle.fingerprint(paths.onnx)
    for directory in paths.finished_engines():
        if bundle.read_manifest(directory, "build").inputs.get("onnx") != graphs:
            progress.note(f"{directory} was built from other graphs and is deleted")
            shutil.rmtree(directory)


def is_this_device(target: Target) -> bool:
    """Whether this machine's GPU is the target's."""
    from ecmfq_export.engine.device import current_device

    device = current_device()
    return device is not None and device.compute_capability in target.compute_capabilities


def build_engines(bundle_root: Path, target: Target, progress: Progress, *, verbose: bool = False) -> Path:
    """Build the decoder's and the vision tower's engine of a bundle, and put the plugin library beside them.

    Raises:
        BuildError: this machine cannot build for the target, a build failed, or the engine that came out does not hold one
            plugin node for each routed MoE layer.
    """
    from ecmfq_export.engine.build import build_engine
    from ecmfq_export.engine.engine_file import expect_plugin_nodes
    from ecmfq_export.engine.plugin_library import ABI_VERSION, find_plugin_library, read_plugin_library
    from ecmfq_export.engine.profiles import profile_shapes

    onnx_dir = Paths(bundle_root).onnx
    manifest = bundle.open_stage(onnx_dir, "onnx")
    ranges, num_plugin_nodes = onnx_facts(manifest, onnx_dir)
    for key, wanted in (("attention", target.attention), ("weight_layout", target.kernel.weight_layout), ("dtype", target.dtype)):
        if manifest.config.get(key) != wanted:
            raise BuildError(f"{onnx_dir} was exported with {key} = {manifest.config.get(key)}, target {target.name} needs {wanted}",
                             f"export again with --target {target.name} (into another bundle to keep both)")
    out_dir = Paths(bundle_root).engines(target)
    library = find_plugin_library()
    config = {"target": dataclasses.asdict(target), "ranges": manifest.info["dim_ranges"]}
    inputs = {"onnx": bundle.fingerprint(onnx_dir), "plugin_library": bundle.sha256_file(library)}
    if bundle.is_current(out_dir, "build", config, inputs):
        progress.note(f"{out_dir}: up to date")
        return out_dir
    with bundle.write_stage(out_dir, "build", config, inputs) as (work, info):
        info["plugin_abi"] = ABI_VERSION
        if read_plugin_library(library).platform == target.platform:
            shutil.copyfile(library, work / library.name)
        else:
            progress.note(f"{target.name} is a {target.platform} device: install ecmfq_export there for its plugin library")
        for part in progress.track(("decoder", "vision"), f"build engines for {target.name}"):
            graph = onnx_dir / part / "model.onnx"
            engine = build_engine(graph, target, work / f"{part}.engine", profiles=profile_shapes(graph, ranges),
                                  plugin_library=library, log_path=work / f"{part}.build.log", verbose=verbose)
            expect_plugin_nodes(engine, num_plugin_nodes if part == "decoder" else 0)
            info[part] = dataclasses.asdict(engine)
    return out_dir


def onnx_facts(manifest: bundle.Manifest, onnx_dir: Path) -> tuple[dict[str, tuple[int, int, int]], int]:
    """What building engines takes from the manifest of the graphs: ranges of the symbolic dimensions, and how many plugin nodes.

    Raises:
        BundleError: a fact that is missing or of another form.
    """
    ranges, nodes = manifest.info.get("dim_ranges"), manifest.info.get("num_plugin_nodes")
    if not isinstance(ranges, dict) or not ranges or type(nodes) is not int or not 0 <= nodes < 2**20 or any(
        not isinstance(values, list) or len(values) != 3 or any(type(value) is not int or not 1 <= value < 2**31 for value in values)
        for values in ranges.values()
    ):
        raise bundle.BundleError(f"{onnx_dir / bundle.MANIFEST}: dim_ranges or num_plugin_nodes is missing or wrong", "export again")
    return {name: (values[0], values[1], values[2]) for name, values in ranges.items()}, nodes


def open_generator(bundle_root: Path, threads: int = 0) -> Generator:
    """The bundle's model in ONNX Runtime, ready to answer; every file's hash is checked first.

    Raises:
        BundleError: no bundle, or a file that is missing or changed.
    """
    from ecmfq_export.engine.ort_runner import OrtRunner
    from ecmfq_export.runtime.generate import Generator
    from ecmfq_export.runtime.runtime_file import verify_export

    onnx_dir = Paths(bundle_root).onnx
    verify_export(onnx_dir)
    return Generator(onnx_dir, lambda path: OrtRunner(path, threads=threads))


def revalidate(bundle_root: Path, model_dir: Path, evaluation: Path | None, limit: int, progress: Progress) -> dict[str, Any]:
    """Write a bundle's report again, against the floating-point checkpoint `model_dir`.

    Raises:
        UserError: a file of the bundle was changed, or its quantized checkpoint is not there.
    """
    from ecmfq_export.validate.pipeline import validate

    paths = Paths(bundle_root)
    manifest = bundle.read_manifest(bundle_root, "bundle")
    bundle.verify(bundle_root, manifest, [name for name in manifest.files if not name.startswith("report/")])
    engines = paths.finished_engines()
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
