"""TensorRT Edge-LLM's exporter on Qwen3-MoE text models of the same shapes: time and peak memory, beside run.py's.

    python3 -m venv edge && edge/bin/pip install "tensorrt-edgellm[export]"
    python benchmarks/sizes/edge_llm.py --python edge/bin/python --layers 4 8 16 --small --work /tmp/sizes --out RESULTS.json

It has no Qwen3-VL-MoE, so it is given the same decoder as a text model, and exports it in 16 bits: no calibration, no quantization, no
engine (its builder is compiled by the user) and no validation are in its figures. It holds about twice the checkpoint: where the machine
has less, the kernel or Python ends it, and the row says so (``ended``). Rows are added to the file under ``edge_llm``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # run as a file, not as a module

from checkpoint import EXAMPLE, config_of, random_tensor  # noqa: E402
from limits import limited, parse_size  # noqa: E402
from measure import run_measured  # noqa: E402
from run import machine  # noqa: E402

from ecmfq_export.models.safetensors_writer import TensorToWrite, write_safetensors  # noqa: E402


def text_config(layers: int, small: bool) -> dict[str, Any]:
    """config.json of Qwen3-MoE with the decoder's sizes."""
    text = config_of(layers, small)["text_config"]
    kept = ("attention_bias", "attention_dropout", "decoder_sparse_step", "head_dim", "hidden_act", "hidden_size", "initializer_range",
            "intermediate_size", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob", "num_attention_heads", "num_experts",
            "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "use_cache", "vocab_size")
    return {name: text[name] for name in kept} | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16", "rope_theta": text["rope_theta"],
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "bos_token_id": 498, "eos_token_id": 500, "rope_scaling": None}


def write_text_checkpoint(directory: Path, layers: int, small: bool) -> Path:
    """The checkpoint in Qwen3-MoE's own form, an expert's three matrices apart, a shard a layer."""
    directory.mkdir(parents=True)
    config = text_config(layers, small)
    hidden, inner, head = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    query, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    groups: list[dict[str, tuple[int, ...]]] = []
    for index in range(layers):
        p = f"model.layers.{index}."
        group = {f"{p}input_layernorm.weight": (hidden,), f"{p}post_attention_layernorm.weight": (hidden,),
                 f"{p}self_attn.q_norm.weight": (head,), f"{p}self_attn.k_norm.weight": (head,),
                 f"{p}self_attn.q_proj.weight": (query, hidden), f"{p}self_attn.k_proj.weight": (keys, hidden),
                 f"{p}self_attn.v_proj.weight": (keys, hidden), f"{p}self_attn.o_proj.weight": (hidden, query),
                 f"{p}mlp.gate.weight": (config["num_experts"], hidden)}
        for expert in range(config["num_experts"]):
            e = f"{p}mlp.experts.{expert}."
            group |= {f"{e}gate_proj.weight": (inner, hidden), f"{e}up_proj.weight": (inner, hidden),
                      f"{e}down_proj.weight": (hidden, inner)}
        groups.append(group)
    vocabulary = (config["vocab_size"], hidden)
    groups.append({"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary, "model.norm.weight": (hidden,)})
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups):
        shard = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for place, (name, shape) in enumerate(group.items()):

            def make(name: str = name, shape: tuple[int, ...] = shape, seed: int = 10_000 * number + place) -> Any:
                return random_tensor(name, shape, seed)

            tensors[name] = TensorToWrite(make(shape=(1,)).dtype, shape, make)
            weight_map[name] = shard
        write_safetensors(directory / shard, tensors)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(EXAMPLE / file, directory / file)
    return directory


def memory_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def how_it_ended(returncode: int, log: str) -> str:
    """``finished``, ``out of memory`` (killed by the kernel, or an allocation that failed), or ``error``."""
    if returncode == 0:
        return "finished"
    signs = ("MemoryError", "Cannot allocate memory", "not enough memory", "std::bad_alloc", "DefaultCPUAllocator")
    return "out of memory" if returncode == -9 or any(sign in log for sign in signs) else "error"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of an environment with tensorrt-edgellm[export]")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--small", action="store_true", help="layers of a thirtieth of the size, see checkpoint.py")
    parser.add_argument("--memory-max", type=parse_size, metavar="SIZE",
                        help="run the export in a control group of so much memory, page cache included")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    version = subprocess.run([args.python, "-c", "import importlib.metadata as m; print(m.version('tensorrt-edgellm'))"],
                             capture_output=True, text=True, check=True).stdout.strip()
    for layers in args.layers:
        model, out = args.work / f"text{layers}", args.work / f"edge{layers}"
        if not (model / "config.json").is_file():
            shutil.rmtree(model, ignore_errors=True)
            write_text_checkpoint(model, layers, args.small)
        shutil.rmtree(out, ignore_errors=True)
        command = [str(args.python), "-m", "tensorrt_edgellm.scripts.export", str(model), str(out)]
        with limited(command, args.memory_max) as (held, limit):
            cost = run_measured(held, args.work / f"edge{layers}.log", None, dict(os.environ))
        log = (args.work / f"edge{layers}.log").read_text(errors="replace")
        row = {"layers": layers, "shapes": "small" if args.small else "Qwen3-VL-30B-A3B", "version": version,
               "returncode": cost.returncode, "ended": how_it_ended(cost.returncode, log), "memory_of_the_machine": memory_bytes(),
               "limit": limit or None,
               "checkpoint_bytes": sum(f.stat().st_size for f in model.iterdir()), **cost.as_dict()}
        data = json.loads(args.out.read_text()) if args.out.is_file() else {"machine": machine(), "runs": []}
        data.setdefault("edge_llm", []).append(row)
        args.out.write_text(json.dumps(data, indent=1) + "\n")
        print(json.dumps(row), flush=True)
        shutil.rmtree(model)
        shutil.rmtree(out, ignore_errors=True)
        if row["ended"] == "out of memory":
            print(f"{layers} layers did not fit; deeper ones are not tried", file=sys.stderr)
            break


if __name__ == "__main__":
    main()
