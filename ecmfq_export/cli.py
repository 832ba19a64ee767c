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
  ecmfq-export export ./model --data captions.json --target jetson-orin -o ./bundle
  ecmfq-export export ./model --data ./calib_data --target l4 -o ./bundle --set attention=w4a8 --set num_samples=512
  ecmfq-export export ./Qwen3-VL-30B-A3B-GPTQ-Int4 --target l4 -o ./bundle        # imports its int4 weights
  ecmfq-export export ./Qwen3-VL-30B-A3B-GPTQ-Int4 --flavour ort -o ./bundle      # for ONNX Runtime alone

A run that was stopped continues where it was: finished stages, and finished decoder layers of 'rotate' and 'quantize', are kept.
"""


_RUN_EXAMPLES = """\
examples:
  ecmfq-export run ./bundle --image photo.png --prompt "What is on the table?"
  ecmfq-export run ./bundle --image photo.png --prompt "What is on the table?" --target l4

The text goes to standard output; time to the first token, tokens a second and memory go to standard error.
"""


_BUILD_EXAMPLES = """\
examples:
  ecmfq-export build ./bundle --target l4
  ecmfq-export build ./bundle --target jetson-orin --trtexec

A target whose engines are built on the device gets, on any other machine, what the device needs: engines/TARGET/build.sh, README.txt
and the plugin library for its platform.
"""


_IMPORT_NOTES = """\
example:
  ecmfq-export import ./Qwen3-VL-30B-A3B-GPTQ-Int4 -o ./work/imported
  ecmfq-export export ./Qwen3-VL-30B-A3B-GPTQ-Int4 --target l4 -o ./bundle     # imports, then goes on

Experts keep their integers; activations become int8 (the checkpoint is W4A16, what runs is W4A8). Zero points, gate and up
projections in activation order, and groups that are no multiple of 128 are refused for experts. docs/interop.md tells more.
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

_SERVE_EXAMPLES = """\
examples:
  ecmfq-export serve ./bundle                                          # http://127.0.0.1:8000/v1, for this machine only
  ecmfq-export serve ./bundle --host 0.0.0.0 --api-key-file keys.txt   # for others: one key a line
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "bundle", "messages": [{"role": "user", "content": "Hello"}]}'

POST /v1/chat/completions (streamed or not), GET /v1/models, /health and /metrics. Images come in requests, as data: URIs; nothing
is fetched. Without a temperature answers are greedy, as those of 'run'. Ctrl-C or SIGTERM ends the server once the answer that is
being given is complete. A key may also be in the environment variable ECMFQ_API_KEY. docs/serve.md has the rest.
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
    sub.add_argument("model", type=Path, help="checkpoint directory (config.json and .safetensors): floating point, quantized by "
                     "ecmfq-export, or int4 of GPTQ, AWQ or compressed-tensors")
    sub.add_argument("-o", "--output", type=Path, required=True, help="the bundle's directory")
    sub.add_argument("--target", help="a name from 'ecmfq-export targets', or a TOML file")
    sub.add_argument("--flavour", choices=("tensorrt", "ort"), default="tensorrt",
                     help="tensorrt (default): W4A8 graphs with plugin nodes, and engines for --target; ort: graphs for ONNX Runtime "
                     "alone, weights int4, activations floating point (W4A16), no target and no engines (docs/interop.md)")
    sub.add_argument("--evaluate", type=Path, metavar="JSONL", help="held-out questions {image, question, answer} for the report")
    sub.add_argument("--limit", type=int, default=0, help="at most so many evaluation items (0: all)")
    sub.add_argument("--no-build", action="store_true", help="stop at ONNX: no engines, no plugin library; make them later with 'build'")
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

    sub = command("import", _import, "carry a GPTQ, AWQ or compressed-tensors int4 checkpoint over, instead of quantizing", _IMPORT_NOTES)
    sub.add_argument("model", type=Path, help="checkpoint directory with weight-only int4 weights of a supported model")
    sub.add_argument("-o", "--output", type=Path, required=True, help="directory of the W4A8 checkpoint")
    _attention_argument(sub)

    sub = command("build", _build, "build engines of a bundle for one more target, or on the device", _BUILD_EXAMPLES)
    sub.add_argument("bundle", type=Path)
    sub.add_argument("--target", required=True)
    sub.add_argument("--trtexec", action="store_true", help="build nothing: print the exact lines for TensorRT's own trtexec")

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

    sub = command("run", _run, "image and prompt in, text out; in ONNX Runtime on the CPU, or with engines on this machine's GPU",
                  _RUN_EXAMPLES)
    sub.add_argument("bundle", type=Path)
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--image", type=Path, action="append", default=[], help="may be given several times")
    sub.add_argument("--max-new-tokens", type=int, default=64)
    sub.add_argument("--temperature", type=float, default=0.0, help="0 (default) always takes the likeliest token")
    sub.add_argument("--top-p", type=float, default=1.0, help="sample from the fewest tokens whose probabilities reach this sum")
    sub.add_argument("--seed", type=int, default=0, help="of the sampling")
    sub.add_argument("--threads", type=int, default=0, help="of ONNX Runtime (0: all cores)")
    sub.add_argument("--target", help="run this target's engines of the bundle (default: ONNX Runtime)")

    sub = command("serve", _serve, "an OpenAI-compatible chat endpoint with images, over HTTP", _SERVE_EXAMPLES)
    sub.add_argument("bundle", type=Path)
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    sub.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    sub.add_argument("--model-name", metavar="NAME", help="what requests call the model (default: the bundle's folder name)")
    sub.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys that open the API, one a line")
    sub.add_argument("--no-key", action="store_true", help="let everyone who reaches a non-local --host in")
    sub.add_argument("--target", metavar="NAME", help="run this target's engines on the GPU, not ONNX Runtime on the CPU")
    sub.add_argument("--threads", type=int, default=0, help="of ONNX Runtime (0: all cores)")
    sub.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help="to finish an answer in when told to stop (default 30)")
    _limit_arguments(sub)

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


def _limit_arguments(sub: argparse.ArgumentParser) -> None:
    """A flag for each field of server.settings.Limits; what is not given keeps the default there."""
    limits = sub.add_argument_group("limits")
    for name, kind, text in (
        ("queue", int, "requests that wait while one is answered; one more gets 429 (default 16)"),
        ("max-request-bytes", int, "of one request, its images as base64 included (default 20000000)"),
        ("max-images", int, "of one request (default 8)"),
        ("max-image-pixels", int, "of one image (default 16000000)"),
        ("max-prompt-tokens", int, "image tokens included (default: the model's context)"),
        ("max-new-tokens", int, "that a request may ask for (default: the model's context)"),
        ("max-connections", int, "open at once; one more gets 503 (default 512)"),
        ("body-seconds", float, "for a request's body to arrive in (default 60)"),
    ):
        limits.add_argument(f"--{name}", type=kind, metavar="N", help=text)


def _quant_arguments(sub: argparse.ArgumentParser) -> None:
    import typing

    from ecmfq_export.config import Method

    sub.add_argument("--data", type=Path, help="calibration samples: a directory with samples.jsonl, a JSONL file of "
                     '{"image", "text", "answer"} lines, or a COCO captions JSON')
    sub.add_argument("--config", type=Path, metavar="TOML", help="settings ([quant] and [export] tables)")
    sub.add_argument("--method", choices=typing.get_args(Method), metavar="NAME",
                     help=f"one of {', '.join(typing.get_args(Method))} (default ecmfq; rtn needs no data; docs/method.md tells what "
                     "each does, and --set puts another part in the place of the method's)")
    _attention_argument(sub)
    sub.add_argument("--memory", type=float, default=1.0, metavar="GB",
                     help="for activations between layers; what is more lies on disk beside the output (default 1; docs/sizes.md)")
    sub.add_argument("--device", default="cpu", help="what computes: cpu (default), cuda or cuda:N")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
                     help="any field of QuantConfig or ExportConfig (docs/method.md lists them), e.g. expert_memory_gb=1.5: memory for "
                     "rounding a layer's experts, beside its weights (default 3)")


def _attention_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--attention", choices=("fp16", "w8a8", "w4a8"), help="recipe of the attention projections (default w8a8)")


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
                        evaluation=args.evaluate, limit=args.limit, build=not args.no_build, resources=resources)
    print_report(report, out)
    out.print(f"bundle: {args.output}", soft_wrap=True)
    require_passed(report)
    return 0


def _dry_run(args: argparse.Namespace, target: Any, quant: QuantConfig, export_config: ExportConfig, out: Any) -> int:
    from ecmfq_export.plan import plan_export, print_plan

    with _resources(args) as resources:
        plan = plan_export(args.model, args.data, args.output, target, quant, export_config, evaluation=args.evaluate,
                           limit=args.limit, build=not args.no_build, resources=resources)
    print_plan(plan, out)
    for check in plan.failed:
        print(f"ecmfq-export: error: {UserError(check.detail, check.fix)}", file=sys.stderr)
    return 2 if plan.failed else 0


def _help_first_rank(args: argparse.Namespace, quant: QuantConfig, resources: Resources) -> int:
    """What every other rank does of 'quantize' and 'export': its share of the quantized checkpoint, saying nothing."""
    from ecmfq_export.models.moe_vlm import open_model
    from ecmfq_export.progress import Silent
    from ecmfq_export.workflow import Paths, quantize_model

    if open_model(args.model).quantization is None:
        quantized = args.output if args.run is _quantize else Paths(args.output).quantized
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
        for part, line in trtexec_lines(args.bundle, target).items():
            print(f"# {part}, in engines/{target.name}\n{line}")
        return 0
    with RichProgress(err).running() as progress:
        path = build_engines(args.bundle, target, progress, verbose=getattr(args, "verbose", False))
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


if __name__ == "__main__":
    sys.exit(main())
