"""The same layer by llm-compressor's or GPTQModel's GPTQ. Called by run.py with the Python of an environment that has it.

Both get each expert's tokens, scaled by the square root of their weight: their Hessians are then the same weighted ones.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import Meter
from problem import Layer, make_layer


def llmcompressor(inputs: list[torch.Tensor], weight: torch.Tensor, batch: int, meter: Meter) -> torch.Tensor:
    """`batch` experts at a time; its default order of columns."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian

    settings = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="channel", actorder="static")
    found = []
    for start in range(0, len(weight), batch):
        some = weight[start : start + batch]
        with meter.phase("hessians"):
            hessians = []
            for expert, x in enumerate(inputs[start : start + batch]):
                module = torch.nn.Linear(1, 1, bias=False)
                module.weight = torch.nn.Parameter(some[expert], requires_grad=False)
                total, count = accumulate_hessian(x, module, make_empty_hessian(module), torch.zeros(()))
                hessians.append(total / count)
            hessian = torch.stack(hessians)
            del hessians
        with meter.phase("rounding"):
            scale, zero = calculate_qparams(some.amin(-1, keepdim=True), some.amax(-1, keepdim=True), settings)
            values, _, failed = quantize_weight(some.clone(), hessian, scale, zero, None, settings)
            assert not bool(failed.any()), "fell back to rounding to nearest"
            found.append(values)
    return torch.cat(found)


def gptqmodel(inputs: list[torch.Tensor], weight: torch.Tensor, batch: int, meter: Meter) -> torch.Tensor:
    """One expert at a time, which is all it does."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    settings = QuantizeConfig(bits=4, group_size=-1, sym=True, desc_act=True, act_group_aware=False)
    found = []
    for expert, x in enumerate(inputs):
        module = torch.nn.Linear(1, 1, bias=False)
        module.weight = torch.nn.Parameter(weight[expert], requires_grad=False)
        module.in_features, module.out_features = weight.shape[2], weight.shape[1]
        task = GPTQ(module, settings)
        task.quantizer.configure(perchannel=True)
        with meter.phase("hessians"):
            task.add_batch(x.unsqueeze(0), None)
            task.finalize_hessian()
        with meter.phase("rounding"):
            found.append(task.quantize()[0].float().view(weight.shape[1:]))
        task.free()
    return torch.stack(found)


def inputs_of(layer: Layer, name: str) -> list[torch.Tensor]:
    """Each expert's rows, [tokens, K]."""
    x = layer.x[layer.token] if name == "gate_up" else layer.inner
    return list((x * layer.weight.sqrt().unsqueeze(-1)).split(torch.bincount(layer.expert, minlength=len(layer.gate_up)).tolist()))


@torch.no_grad()
def main() -> None:
    """Print the figures as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=("llmcompressor", "gptqmodel"))
    parser.add_argument("--experts", type=int, required=True)
    parser.add_argument("--first", type=int, help="run only so many of them")
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    run = {"llmcompressor": llmcompressor, "gptqmodel": gptqmodel}[args.peer]
    layer = make_layer(args.experts)
    warm = make_layer(8, seed=1)
    run(inputs_of(warm, "down")[:2], warm.down[:2], args.batch, Meter())
    del warm
    first = args.first or args.experts
    inputs = {name: inputs_of(layer, name)[:first] for name in ("gate_up", "down")}
    meter = Meter()
    values = {name: run(inputs[name], getattr(layer, name)[:first], args.batch, meter) for name in inputs}
    errors = []
    for name, found in values.items():
        weight = getattr(layer, name)
        one = [(x @ (q - w).T).square().sum() / (x @ w.T).square().sum()
               for x, q, w in zip(inputs[name][:4], found[:4], weight[: min(4, first)], strict=True)]
        errors.append(float(sum(one) / len(one)))
    print(json.dumps({
        "seconds": meter.seconds, "core_seconds": meter.core_seconds, "peak_bytes": meter.peak_bytes, "others": meter.others,
        "experts": first, "batch": args.batch,
        "result_bytes": sum(4 * found.numel() for found in values.values()), "threads": torch.get_num_threads(), "error": errors,
        "version": importlib.metadata.version(args.peer), "torch": torch.__version__,
    }))


if __name__ == "__main__":
    main()
