"""What the command ``ecmfq-export`` understands: its commands, flags and help texts."""

from __future__ import annotations

import argparse
from pathlib import Path

from ecmfq_export import __version__

_DESCRIPTION = """\
Take a Mixture-of-Experts vision-language model from a Hugging Face checkpoint to a W4A8 TensorRT engine.

  checkpoint -> calibrate -> smooth -> quantize -> ONNX -> engine -> validate -> run
"""

_EXPORT_EXAMPLES = """\
examples:
  ecmfq-export export ./Qwen3-VL-30B-A3B --data ./calib_data --target rtx -o ./bundle
  ecmfq-export export ./model --data captions.json --target jetson-orin -o ./bundle --dry-run      # only look
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


def build_parser() -> argparse.ArgumentParser:
    """The parser; ``args.command`` is the command's name, None where none is given."""
    common = argparse.ArgumentParser(add_help=False)
    # No default here: one would overwrite a -v that was given before the command.
    common.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS,
                        help="show tracebacks and the builders' own messages")
    parser = argparse.ArgumentParser("ecmfq-export", description=_DESCRIPTION, parents=[common],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"ecmfq-export {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")

    def command(name: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, epilog=epilog, parents=[common],
                                   formatter_class=argparse.RawDescriptionHelpFormatter)

    sub = command("export", "all stages: checkpoint to validated bundle with engines", _EXPORT_EXAMPLES)
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
    _expert_weights_argument(sub)
    sub.add_argument("--dry-run", action="store_true",
                     help="check everything that can be checked, print stages, bytes, memory, disk and time, and write nothing")
    _quant_arguments(sub)
    sub.add_argument("--max-seq-len", type=int, help="length of the static KV cache (default: the target's limit)")
    sub.add_argument("--max-batch", type=int, help="largest batch (default: the target's limit)")

    sub = command("quantize", "calibrate, smooth and quantize into a compressed-tensors checkpoint",
                  "example:\n  ecmfq-export quantize ./model --data ./calib_data -o ./work/quantized\n")
    sub.add_argument("model", type=Path, help="floating-point checkpoint directory")
    sub.add_argument("-o", "--output", type=Path, required=True,
                     help="directory of the quantized checkpoint; 'calibration', 'smoothing' and 'rotated' are written beside it")
    _quant_arguments(sub)

    sub = command("import", "carry a GPTQ, AWQ or compressed-tensors int4 checkpoint over, instead of quantizing", _IMPORT_NOTES)
    sub.add_argument("model", type=Path, help="checkpoint directory with weight-only int4 weights of a supported model")
    sub.add_argument("-o", "--output", type=Path, required=True, help="directory of the W4A8 checkpoint")
    _attention_argument(sub)

    sub = command("build", "build engines of a bundle for one more target, or on the device", _BUILD_EXAMPLES)
    sub.add_argument("bundle", type=Path)
    sub.add_argument("--target", required=True)
    _expert_weights_argument(sub)
    sub.add_argument("--trtexec", action="store_true", help="build nothing: print the exact lines for TensorRT's own trtexec")

    sub = command("validate", "compare PyTorch, quantized PyTorch and ONNX Runtime; write JSON and HTML",
                  "example:\n  ecmfq-export validate ./bundle --model ./model --evaluate heldout.jsonl\n")
    sub.add_argument("bundle", type=Path)
    sub.add_argument("--model", type=Path, required=True, help="the floating-point checkpoint")
    sub.add_argument("--evaluate", type=Path, metavar="JSONL")
    sub.add_argument("--limit", type=int, default=0)

    sub = command("evaluate", "accuracy, perplexity and retrieval of a model on your data, against a reference",
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

    sub = command("run", "image and prompt in, text out; in ONNX Runtime on the CPU, or with engines on this machine's GPU",
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

    sub = command("serve", "an OpenAI-compatible chat endpoint with images, over HTTP", _SERVE_EXAMPLES)
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

    sub = command("inspect", "describe a bundle, stage, checkpoint, ONNX graph or engine file",
                  "examples:\n  ecmfq-export inspect ./bundle --verify\n  ecmfq-export inspect ./bundle --html bundle.html\n")
    sub.add_argument("path", type=Path)
    sub.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page with figures of every layer")
    sub.add_argument("--json", action="store_true", help="machine-readable")
    sub.add_argument("--verify", action="store_true", help="check every hash of a bundle")

    sub = command("compare", "two bundles side by side: settings, bytes, precision and errors by layer, figures, engines",
                  "example:\n  ecmfq-export compare ./bundle-w8a8 ./bundle-w4a8 --html compare.html\n")
    sub.add_argument("first", type=Path, metavar="A")
    sub.add_argument("second", type=Path, metavar="B")
    sub.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page")
    sub.add_argument("--json", action="store_true", help="machine-readable")

    sub = command("targets", "list the devices that can be exported for")
    sub.add_argument("--json", action="store_true")
    sub.add_argument("--markdown", action="store_true", help="every field of every target: what docs/targets.md holds")

    sub = command("doctor", "what this machine can build and run, and how to install what is missing")
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


def _expert_weights_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--expert-weights", choices=("engine", "inputs"), default="engine",
                     help="where the decoder engine has the experts' weights: inside (default), or as inputs that stay in the bundle's "
                     "onnx directory; the builder then needs no memory for them (docs/sizes.md)")


def _attention_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--attention", choices=("fp16", "w8a8", "w4a8"), help="recipe of the attention projections (default w8a8)")
