"""The command ``ecmfq-export``: arguments in, one call, output and exit code out. No logic of its own.

Exit codes: 0 success; 2 an error that the message tells how to fix (or a failed validation); 1 a bug of ours; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecmfq_export.cli_parser import build_parser
from ecmfq_export.errors import UserError

if TYPE_CHECKING:
    from ecmfq_export.config import ExportConfig, QuantConfig
    from ecmfq_export.stages.resources import Resources


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the process's exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    # Nothing here may reach for the network: checkpoints are local directories.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return _COMMANDS[args.command](args)
    except UserError as error:
        if getattr(args, "verbose", False):
            raise
        print(f"ecmfq-export: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ecmfq-export: interrupted; finished stages and layers are kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) went away: nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _configs(args: argparse.Namespace) -> tuple[QuantConfig, ExportConfig]:
    from ecmfq_export.config import ExportConfig, QuantConfig, build_config, load_toml, split_settings

    quant, export = load_toml(args.config) if args.config else ({}, {})
    flag_quant, flag_export = split_settings(args.settings)
    quant |= flag_quant | {key: value for key in ("method", "attention") if (value := getattr(args, key)) is not None}
    export |= flag_export
    export |= {key: value for key in ("max_seq_len", "max_batch") if (value := getattr(args, key, None)) is not None}
    source = str(args.config or "settings")
    return build_config(QuantConfig, quant, source), build_config(ExportConfig, export, source)


@contextlib.contextmanager
def _resources(args: argparse.Namespace) -> Iterator[Resources]:
    """Memory and device that were asked for, and the other processes, if torchrun started some."""
    from ecmfq_export.stages.ranks import join_ranks, leave_ranks
    from ecmfq_export.stages.resources import Resources, check_device

    if not args.memory >= 0:
        raise UserError(f"--memory {args.memory}", "give gigabytes, 0 or more")
    ranks, device = join_ranks(args.device)
    try:
        yield Resources(int(args.memory * 1e9), check_device(device), ranks)
    finally:
        leave_ranks(ranks)


def _consoles() -> tuple[Any, Any]:
    """Console of results (standard output) and of progress (standard error)."""
    from rich.console import Console

    return Console(), Console(stderr=True)


def _export(args: argparse.Namespace) -> int:
    from ecmfq_export.console import RichProgress
    from ecmfq_export.target import load_target
    from ecmfq_export.validate.report import print_report, require_passed
    from ecmfq_export.workflow import export

    quant, export_config = _configs(args)
    if (args.target is None) != (args.flavour == "ort"):
        if args.target is None:
            raise UserError("export needs --target",
                            "a name from 'ecmfq-export targets', or --flavour ort for graphs for ONNX Runtime alone")
        raise UserError(f"--target {args.target} with --flavour ort", "graphs for ONNX Runtime alone have no target: leave --target out")
    target = None if args.target is None else load_target(args.target)
    out, err = _consoles()
    if args.dry_run:
        return _dry_run(args, target, quant, export_config, out)
    with _resources(args) as resources, RichProgress(err).running() as progress:
        if not resources.ranks.first:
            return _help_first_rank(args, quant, resources)
        report = export(args.model, args.data, args.output, target, quant, export_config, progress,
                        evaluation=args.evaluate, limit=args.limit, build=not args.no_build, expert_weights=args.expert_weights,
                        resources=resources)
    print_report(report, out)
    out.print(f"bundle: {args.output}", soft_wrap=True)
    require_passed(report)
    return 0


def _dry_run(args: argparse.Namespace, target: Any, quant: QuantConfig, export_config: ExportConfig, out: Any) -> int:
    from ecmfq_export.plan import plan_export, print_plan

    with _resources(args) as resources:
        plan = plan_export(args.model, args.data, args.output, target, quant, export_config, evaluation=args.evaluate,
                           limit=args.limit, build=not args.no_build, expert_weights=args.expert_weights, resources=resources)
    print_plan(plan, out)
    for check in plan.failed:
        print(f"ecmfq-export: error: {UserError(check.detail, check.fix)}", file=sys.stderr)
    return 2 if plan.failed else 0


def _help_first_rank(args: argparse.Namespace, quant: QuantConfig, resources: Resources) -> int:
    """What every other rank does of 'quantize' and 'export': its share of the quantized checkpoint, saying nothing."""
    from ecmfq_export.models.moe_vlm import open_model
    from ecmfq_export.progress import Silent
    from ecmfq_export.workflow import Paths, quantize_model

    model = open_model(args.model)
    # Rank 0 imports another quantizer's weights alone; 'quantize' rounds them anew, which is shared out.
    if model.quantization is None and (model.weight_only is None or args.command == "quantize"):
        quantized = args.output if args.command == "quantize" else Paths(args.output).quantized
        quantize_model(args.model, args.data, quantized, quant, Silent(), resources)
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from ecmfq_export.console import RichProgress
    from ecmfq_export.workflow import quantize_model

    quant, _ = _configs(args)
    out, err = _consoles()
    with _resources(args) as resources, RichProgress(err).running() as progress:
        if not resources.ranks.first:
            return _help_first_rank(args, quant, resources)
        path = quantize_model(args.model, args.data, args.output, quant, progress, resources)
    out.print(f"quantized checkpoint: {path}", soft_wrap=True)
    return 0


def _import(args: argparse.Namespace) -> int:
    from ecmfq_export.config import QuantConfig
    from ecmfq_export.console import RichProgress
    from ecmfq_export.workflow import import_model

    config = QuantConfig() if args.attention is None else QuantConfig(attention=args.attention)
    out, err = _consoles()
    with RichProgress(err).running() as progress:
        path = import_model(args.model, args.output, config, progress)
    out.print(f"imported checkpoint: {path}", soft_wrap=True)
    return 0


def _build(args: argparse.Namespace) -> int:
    from ecmfq_export.console import RichProgress
    from ecmfq_export.target import load_target
    from ecmfq_export.workflow import Paths, build_engines, seal, trtexec_lines

    target = load_target(args.target)
    out, err = _consoles()
    if args.trtexec:
        if args.expert_weights != "engine":
            raise UserError(f"--trtexec with --expert-weights {args.expert_weights}: trtexec leaves expert weights in the engine",
                            "build with 'ecmfq-export build' instead, or leave --expert-weights out")
        for part, line in trtexec_lines(args.bundle, target).items():
            print(f"# {part}, in engines/{target.name}\n{line}")
        return 0
    with RichProgress(err).running() as progress:
        path = build_engines(args.bundle, target, progress, verbose=getattr(args, "verbose", False),
                             expert_weights=args.expert_weights)
    built = path in Paths(args.bundle).engine_folders("build")
    seal(Paths(args.bundle), {"target": target.name}, {"engines_built": built})
    out.print(f"engines: {path}" if built else f"for the device to build its engines: {path}", soft_wrap=True)
    return 0


def _validate(args: argparse.Namespace) -> int:
    from ecmfq_export.console import RichProgress
    from ecmfq_export.validate.report import print_report, require_passed
    from ecmfq_export.workflow import revalidate

    out, err = _consoles()
    with RichProgress(err).running() as progress:
        report = revalidate(args.bundle, args.model, args.evaluate, args.limit, progress)
    print_report(report, out)
    require_passed(report)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from ecmfq_export.console import RichProgress
    from ecmfq_export.validate.evaluation.table import print_result
    from ecmfq_export.workflow import evaluate_model

    out, err = _consoles()
    with RichProgress(err).running() as progress:
        result = evaluate_model(
            args.model, args.data, progress, reference=args.reference, output=args.json, threads=args.threads, resamples=args.resamples,
            memory_limit=int(args.memory * 1e9), tasks=_words(args.tasks),
            limit=args.limit, captions=args.captions, candidates=args.candidates, distractors=args.distractors,
            yes_no=_words(args.yes_no),
        )  # fmt: skip
    print_result(result, out)
    return 0


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(","))


def _run(args: argparse.Namespace) -> int:
    from ecmfq_export.runtime.figures import figures
    from ecmfq_export.runtime.generate import Sampling
    from ecmfq_export.target import load_target
    from ecmfq_export.workflow import open_generator

    sampling = Sampling(args.temperature, args.top_p, args.seed)
    generator = open_generator(args.bundle, args.threads, load_target(args.target) if args.target else None)
    sample = generator.processor.sample(args.prompt, args.image)
    (generation,) = generator.generate_batch([sample], args.max_new_tokens, lambda _, text: print(text, end="", flush=True), sampling)
    print(flush=True)
    print(figures(generation, generator.session), file=sys.stderr)
    return 0


def _serve(args: argparse.Namespace) -> int:
    import dataclasses
    import logging

    try:
        from ecmfq_export.server.serve import serve
        from ecmfq_export.server.settings import Limits, Settings, read_keys
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs the package {error.name}", "pip install 'ecmfq-export[serve]'") from None
    from ecmfq_export.target import load_target
    from ecmfq_export.workflow import Paths, open_generator

    given = {field.name: value for field in dataclasses.fields(Limits) if (value := getattr(args, field.name)) is not None}
    name = args.model_name or args.bundle.resolve().name
    settings = Settings(name, args.host, args.port, read_keys(args.api_key_file), args.no_key, args.grace, Limits(**given))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("ecmfq_export.server").setLevel(logging.DEBUG if getattr(args, "verbose", False) else logging.INFO)
    manifest = Paths(args.bundle).onnx / "manifest.json"
    created = int(manifest.stat().st_mtime) if manifest.is_file() else 0
    key = "with an API key" if settings.keys else "without an API key"
    target = load_target(args.target) if args.target else None
    serve(lambda: open_generator(args.bundle, args.threads, target), settings,
          lambda url: print(f"serving {name} at {url}/v1 {key}; Ctrl-C stops", flush=True), created)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from ecmfq_export.describe import describe, rows
    from ecmfq_export.describe_tables import print_description

    facts = describe(args.path, verify=args.verify)
    if args.html is not None:
        from ecmfq_export.validate.facts_page import description_page

        _write_page(args.html, description_page(facts, rows(facts)))
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print_description(facts, _consoles()[0])
    return 0


def _compare(args: argparse.Namespace) -> int:
    import dataclasses

    from ecmfq_export.bundle_compare import compare, difference
    from ecmfq_export.describe_tables import print_comparison

    found = compare(args.first, args.second)
    if args.html is not None:
        from ecmfq_export.validate.facts_page import comparison_page

        _write_page(args.html, comparison_page(found.first, found.second, found.settings, found.bytes, found.evaluation, difference))
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        print_comparison(found, _consoles()[0])
    return 0


def _write_page(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}", "give a file in a directory that exists") from None


def _targets(args: argparse.Namespace) -> int:
    from ecmfq_export.describe import print_targets, target_facts

    if args.json:
        print(json.dumps(target_facts(), indent=2))
    elif args.markdown:
        from ecmfq_export.target_reference import reference

        print(reference(), end="")
    else:
        print_targets(_consoles()[0])
    return 0


def _doctor(args: argparse.Namespace) -> int:
    import dataclasses

    from ecmfq_export.describe import print_checks
    from ecmfq_export.engine.doctor import collect

    checks = collect()
    if args.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        print_checks(checks, _consoles()[0])
    return 0


_COMMANDS = {
    "export": _export, "quantize": _quantize, "import": _import, "build": _build, "validate": _validate, "evaluate": _evaluate, "run": _run,
    "serve": _serve, "inspect": _inspect, "compare": _compare, "targets": _targets, "doctor": _doctor,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
