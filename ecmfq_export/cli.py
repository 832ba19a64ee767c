"""The command ``ecmfq-export``: arguments in, one call, output and exit code out. No logic of its own.

Exit codes: 0 success; 2 an error that the message tells how to fix (or a failed validation); 1 a bug of ours; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecmfq_export import __version__
from ecmfq_export.errors import UserError

if TYPE_CHECKING:
    from ecmfq_export.config import ExportConfig, QuantConfig
    from ecmfq_export.stages.resources import Resources

_DESCRIPTION = """\
Take a Mixture-of-Experts vision-language model from a Hugging Face checkpoint to a W4A8 TensorRT engine.

  checkpoint -> calibrate -> smooth -> quantize -> ONNX -> engine -> validate -> run
"""

_EXPORT_EXAMPLES = """\
examples:
  ecmfq-export export ./Qwen3-VL-30B-A3B --data ./calib_data --target rtx -o ./bundle
  ecmfq-export export ./model --data captions.json --target jetson-orin -o ./bundle --no-build
  ecmfq-export export ./model --data ./calib_data --target l4 -o ./bundle --set attention=w4a8 --set num_samples=512

A run that was stopped continues where it was: finished stages, and finished decoder layers of 'rotate' and 'quantize', are kept.
"""


_EVALUATE_EXAMPLES = """\
examples:
  ecmfq-export evaluate ./model --data ./heldout --json fp.json                       # floating point, once
  ecmfq-export evaluate ./work/quantized --data ./heldout --reference fp.json         # what quantization cost
  ecmfq-export evaluate ./work/quantized --data ./heldout --reference ./model         # with KL over the whole vocabulary
  ecmfq-export evaluate ./bundle --data captions_val2017.json --tasks retrieval --captions 1000 --candidates 100

data: a directory with questions.jsonl ({"image", "question", "answer", "type"} a line) and captions.jsonl ({"image", "text",
"distractors"} a line), one such file, or a COCO captions JSON, of which all captions of an image count as true. Image paths are
relative to the file. A bundle is evaluated in ONNX Runtime, a checkpoint in PyTorch, one decoder layer in memory at a time.

tasks:
  vqa         exact match of greedy answers, by type, with Wilson's 95% intervals
  perplexity  of answers and captions, by token
  embedding   retrieval (a): nearness of the states after 'Summarize ... in one word.', R@1, R@5, R@10 both ways
  p_yes       retrieval (b): log P(yes) - log P(no) to 'Does this image show {text}?' over --candidates images and texts
  retrieval   both

A reference must have been measured on the same data. Intervals of differences and of what is kept are paired bootstraps over
questions or images. docs/evaluation.md explains every figure.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the process's exit code."""
    args = _parser().parse_args(argv)
    if not hasattr(args, "run"):
        _parser().print_help()
        return 2
    # Nothing here may reach for the network: checkpoints are local directories.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return args.run(args)
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


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    # No default here: one would overwrite a -v that was given before the command.
    common.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS,
                        help="show tracebacks and the builders' own messages")
    parser = argparse.ArgumentParser("ecmfq-export", description=_DESCRIPTION, parents=[common],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"ecmfq-export {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, function: Any, text: str, epilog: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, epilog=epilog, parents=[common],
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.set_defaults(run=function)
        return sub

    sub = command("export", _export, "all stages: checkpoint to validated bundle with engines", _EXPORT_EXAMPLES)
    sub.add_argument("model", type=Path, help="checkpoint directory (config.json and .safetensors), floating point or quantized")
    sub.add_argument("-o", "--output", type=Path, required=True, help="the bundle's directory")
    sub.add_argument("--target", required=True, help="a name from 'ecmfq-export targets', or a TOML file")
    sub.add_argument("--evaluate", type=Path, metavar="JSONL", help="held-out questions {image, question, answer} for the report")
    sub.add_argument("--limit", type=int, default=0, help="at most so many evaluation items (0: all)")
    sub.add_argument("--no-build", action="store_true", help="stop at ONNX; build engines elsewhere with 'build'")
    sub.add_argument("--dry-run", action="store_true",
                     help="check everything that can be checked, print stages, bytes, memory, disk and time, and write nothing")
    _quant_arguments(sub)
    sub.add_argument("--max-seq-len", type=int, help="length of the static KV cache (default: the target's limit)")
    sub.add_argument("--max-batch", type=int, help="largest batch (default: the target's limit)")

    sub = command("quantize", _quantize, "calibrate, smooth and quantize into a compressed-tensors checkpoint",
                  "example:\n  ecmfq-export quantize ./model --data ./calib_data -o ./work/quantized\n")
    sub.add_argument("model", type=Path, help="floating-point checkpoint directory")
    sub.add_argument("-o", "--output", type=Path, required=True,
                     help="directory of the quantized checkpoint; 'calibration', 'smoothing' and 'rotated' are written beside it")
    _quant_arguments(sub)

    sub = command("build", _build, "build engines of a bundle for one more target, or on the device",
                  "example:\n  ecmfq-export build ./bundle --target l4\n")
    sub.add_argument("bundle", type=Path)
    sub.add_argument("--target", required=True)

    sub = command("validate", _validate, "compare PyTorch, quantized PyTorch and ONNX Runtime; write JSON and HTML",
                  "example:\n  ecmfq-export validate ./bundle --model ./model --evaluate heldout.jsonl\n")
    sub.add_argument("bundle", type=Path)
    sub.add_argument("--model", type=Path, required=True, help="the floating-point checkpoint")
    sub.add_argument("--evaluate", type=Path, metavar="JSONL")
    sub.add_argument("--limit", type=int, default=0)

    sub = command("evaluate", _evaluate, "accuracy, perplexity and retrieval of a model on your data, against a reference",
                  _EVALUATE_EXAMPLES)
    sub.add_argument("model", type=Path, help="checkpoint (floating point or quantized), bundle, or a bundle's onnx directory")
    sub.add_argument("--data", type=Path, required=True, help="your questions and captions")
    sub.add_argument("--reference", type=Path, metavar="MODEL", help="what to compare with: a model, or a file that --json wrote")
    sub.add_argument("--tasks", help="comma-separated: vqa, perplexity, embedding, p_yes, retrieval (default: all that the data allow)")
    sub.add_argument("--limit", type=int, default=0, metavar="N", help="at most so many questions, evenly spread (0: all)")
    sub.add_argument("--captions", type=int, default=0, metavar="N", help="at most so many images with captions (0: all)")
    sub.add_argument("--candidates", type=int, default=48, metavar="N",
                     help="images and texts of retrieval (b); N x N prompts (default 48; 0: all)")
    sub.add_argument("--distractors", action="store_true", help="near-duplicate texts join the texts of retrieval (a)")
    sub.add_argument("--yes-no", default="yes,no", metavar="YES,NO", help="the two answers of retrieval (b), a token each")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write every item's scores; such files can be references")
    sub.add_argument("--resamples", type=int, default=10_000, metavar="N", help="bootstrap draws (0: no intervals of means)")
    sub.add_argument("--memory", type=float, default=1.0, metavar="GB", help="for hidden states; beyond it layers are read again")
    sub.add_argument("--threads", type=int, default=0, help="CPU threads (0: all cores)")

    sub = command("run", _run, "image and prompt in, text out (ONNX Runtime on the CPU)",
                  'example:\n  ecmfq-export run ./bundle --image photo.png --prompt "What is on the table?"\n')
    sub.add_argument("bundle", type=Path)
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--image", type=Path, action="append", default=[], help="may be given several times")
    sub.add_argument("--max-new-tokens", type=int, default=64)
    sub.add_argument("--temperature", type=float, default=0.0, help="0 (default) always takes the likeliest token")
    sub.add_argument("--top-p", type=float, default=1.0, help="sample from the fewest tokens whose probabilities reach this sum")
    sub.add_argument("--seed", type=int, default=0, help="of the sampling")
    sub.add_argument("--threads", type=int, default=0, help="of ONNX Runtime (0: all cores)")

    sub = command("inspect", _inspect, "describe a bundle, stage, checkpoint, ONNX graph or engine file",
                  "examples:\n  ecmfq-export inspect ./bundle --verify\n  ecmfq-export inspect ./bundle --html bundle.html\n")
    sub.add_argument("path", type=Path)
    sub.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page with figures of every layer")
    sub.add_argument("--json", action="store_true", help="machine-readable")
    sub.add_argument("--verify", action="store_true", help="check every hash of a bundle")

    sub = command("compare", _compare, "two bundles side by side: settings, bytes, precision and errors by layer, figures, engines",
                  "example:\n  ecmfq-export compare ./bundle-w8a8 ./bundle-w4a8 --html compare.html\n")
    sub.add_argument("first", type=Path, metavar="A")
    sub.add_argument("second", type=Path, metavar="B")
    sub.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page")
    sub.add_argument("--json", action="store_true", help="machine-readable")

    sub = command("targets", _targets, "list the devices that can be exported for")
    sub.add_argument("--json", action="store_true")
    sub.add_argument("--markdown", action="store_true", help="every field of every target: what docs/targets.md holds")

    sub = command("doctor", _doctor, "what this machine can build and run, and how to install what is missing")
    sub.add_argument("--json", action="store_true")
    return parser


def _quant_arguments(sub: argparse.ArgumentParser) -> None:
    import typing

    from ecmfq_export.config import Method

    sub.add_argument("--data", type=Path, help="calibration samples: a directory with samples.jsonl, a JSONL file of "
                     '{"image", "text", "answer"} lines, or a COCO captions JSON')
    sub.add_argument("--config", type=Path, metavar="TOML", help="settings ([quant] and [export] tables)")
    sub.add_argument("--method", choices=typing.get_args(Method), metavar="NAME",
                     help=f"one of {', '.join(typing.get_args(Method))} (default ecmfq; rtn needs no data; docs/method.md tells what "
                     "each does, and --set puts another part in the place of the method's)")
    sub.add_argument("--attention", choices=("fp16", "w8a8", "w4a8"), help="recipe of the attention projections (default w8a8)")
    sub.add_argument("--memory", type=float, default=1.0, metavar="GB",
                     help="for activations between layers; what is more lies on disk beside the output (default 1; docs/sizes.md)")
    sub.add_argument("--device", default="cpu", help="what computes: cpu (default), cuda or cuda:N")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
                     help="any field of QuantConfig or ExportConfig (docs/method.md lists them)")


def _configs(args: argparse.Namespace) -> tuple[QuantConfig, ExportConfig]:
    from ecmfq_export.config import ExportConfig, QuantConfig, build_config, load_toml, split_settings

    quant, export = load_toml(args.config) if args.config else ({}, {})
    flag_quant, flag_export = split_settings(args.settings)
    quant |= flag_quant | {key: value for key in ("method", "attention") if (value := getattr(args, key)) is not None}
    export |= flag_export
    export |= {key: value for key in ("max_seq_len", "max_batch") if (value := getattr(args, key, None)) is not None}
    source = str(args.config or "settings")
    return build_config(QuantConfig, quant, source), build_config(ExportConfig, export, source)


def _resources(args: argparse.Namespace) -> Resources:
    from ecmfq_export.stages.resources import Resources, check_device

    if not args.memory >= 0:
        raise UserError(f"--memory {args.memory}", "give gigabytes, 0 or more")
    return Resources(int(args.memory * 1e9), check_device(args.device))


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
    resources = _resources(args)
    target = load_target(args.target)
    out, err = _consoles()
    if args.dry_run:
        return _dry_run(args, target, quant, export_config, resources, out)
    with RichProgress(err).running() as progress:
        report = export(args.model, args.data, args.output, target, quant, export_config, progress,
                        evaluation=args.evaluate, limit=args.limit, build=not args.no_build, resources=resources)
    print_report(report, out)
    out.print(f"bundle: {args.output}", soft_wrap=True)
    require_passed(report)
    return 0


def _dry_run(args: argparse.Namespace, target: Any, quant: Any, export_config: Any, resources: Any, out: Any) -> int:
    from ecmfq_export.plan import plan_export, print_plan

    plan = plan_export(args.model, args.data, args.output, target, quant, export_config, evaluation=args.evaluate, limit=args.limit,
                       build=not args.no_build, resources=resources)
    print_plan(plan, out)
    for check in plan.failed:
        print(f"ecmfq-export: error: {UserError(check.detail, check.fix)}", file=sys.stderr)
    return 2 if plan.failed else 0


def _quantize(args: argparse.Namespace) -> int:
    from ecmfq_export.console import RichProgress
    from ecmfq_export.workflow import quantize_model

    quant, _ = _configs(args)
    resources = _resources(args)
    out, err = _consoles()
    with RichProgress(err).running() as progress:
        path = quantize_model(args.model, args.data, args.output, quant, progress, resources)
    out.print(f"quantized checkpoint: {path}", soft_wrap=True)
    return 0


def _build(args: argparse.Namespace) -> int:
    from ecmfq_export.console import RichProgress
    from ecmfq_export.target import load_target
    from ecmfq_export.workflow import Paths, build_engines, seal

    target = load_target(args.target)
    out, err = _consoles()
    with RichProgress(err).running() as progress:
        path = build_engines(args.bundle, target, progress, verbose=getattr(args, "verbose", False))
    seal(Paths(args.bundle), {"target": target.name}, {"engines_built": True})
    out.print(f"engines: {path}", soft_wrap=True)
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
    from ecmfq_export.runtime.generate import Sampling
    from ecmfq_export.workflow import open_generator

    sampling = Sampling(args.temperature, args.top_p, args.seed)
    generator = open_generator(args.bundle, args.threads)
    generator.generate(args.prompt, args.image, max_new_tokens=args.max_new_tokens, sampling=sampling,
                       on_token=lambda text: print(text, end="", flush=True))
    print()
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


if __name__ == "__main__":
    sys.exit(main())
