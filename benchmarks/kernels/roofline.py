"""Floors of the routed MoE layer: the bytes and the integer operations that no implementation can avoid.

    python benchmarks/kernels/roofline.py        # the floors of docs/kernels.md, from data-sheet figures

A floor is a time that cannot be beaten, not a prediction: bytes / bandwidth and operations / peak, the larger of the two.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A MoE layer's sizes; shared experts are counted as extra experts that every token uses."""

    name: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    shared: int = 0
    """How many of num_experts and of top_k are always on."""

    def expert_bytes(self, group_size: int = -1) -> int:
        """Weights and scales of one expert: int4, fp32 scales, int8 multipliers."""
        columns = 3 * self.hidden_size * self.intermediate_size
        multipliers = columns // group_size if group_size > 0 else 0
        return columns // 2 + 4 * (2 * self.intermediate_size + self.hidden_size) + multipliers

    def expected_experts(self, num_tokens: int) -> float:
        """Experts touched by `num_tokens` tokens under uniform routing without repeats within a token."""
        routed, slots = self.num_experts - self.shared, self.top_k - self.shared
        return self.shared + routed * (1.0 - (1.0 - slots / routed) ** num_tokens)

    def operations(self, num_tokens: int) -> int:
        """Integer multiplications and additions."""
        return 2 * 3 * self.hidden_size * self.intermediate_size * self.top_k * num_tokens

    def activation_bytes(self, num_tokens: int) -> int:
        """16-bit hidden states in and out, ids and weights."""
        return num_tokens * (4 * self.hidden_size + 8 * self.top_k)


QWEN3_VL_30B_A3B = Layer("Qwen3-VL-30B-A3B", 128, 8, 2048, 768)
KIMI_VL_A3B = Layer("Kimi-VL-A3B", 66, 8, 2048, 1408, shared=2)
LAYERS = (QWEN3_VL_30B_A3B, KIMI_VL_A3B)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Device:
    """Data-sheet figures: memory bandwidth in GB/s, dense int8 in TOPS (None where NVIDIA gives none that we know of)."""

    name: str
    sm: int
    bandwidth: float
    int8: float | None


DEVICES = (
    Device("Jetson AGX Orin 64 GB", 87, 204.8, 85.0),
    Device("Jetson Thor T5000", 110, 273.0, None),
    Device("DGX Spark", 121, 273.0, None),
    Device("L4", 89, 300.0, 242.0),
    Device("A10", 86, 600.0, 250.0),
    Device("RTX 4090", 89, 1008.0, 661.0),
    Device("RTX 5090", 120, 1792.0, 838.0),
    Device("A100 80 GB SXM", 80, 2039.0, 624.0),
    Device("H100 SXM", 90, 3350.0, 1979.0),
    Device("H200", 90, 4800.0, 1979.0),
    Device("B200", 100, 8000.0, 4500.0),
)


def floor_microseconds(layer: Layer, num_tokens: int, bandwidth: float, int8: float | None, experts: float | None = None,
                       group_size: int = -1) -> tuple[float, float | None]:
    """(memory floor, arithmetic floor) of one layer in microseconds; `experts`: how many are touched, by default the expectation."""
    touched = layer.expected_experts(num_tokens) if experts is None else experts
    moved = touched * layer.expert_bytes(group_size) + layer.activation_bytes(num_tokens)
    return moved / (bandwidth * 1e3), None if int8 is None else layer.operations(num_tokens) / (int8 * 1e6)


def main() -> None:
    for layer in LAYERS:
        print(f"\n{layer.name}: {layer.num_experts} experts of {layer.expert_bytes()} bytes, top {layer.top_k}, "
              f"{layer.hidden_size} x {layer.intermediate_size}\n")
        print("| tokens | experts touched | weight MB | int8 Gop | " + " | ".join(d.name for d in DEVICES) + " |")
        print("|---" * (4 + len(DEVICES)) + "|")
        for tokens in TOKENS:
            experts = layer.expected_experts(tokens)
            cells = []
            for device in DEVICES:
                memory, arithmetic = floor_microseconds(layer, tokens, device.bandwidth, device.int8)
                bound = memory if arithmetic is None or memory >= arithmetic else arithmetic
                cells.append(f"{bound:.1f} {'m' if bound == memory else 'a'}" if bound < 100 else
                             f"{bound:.0f} {'m' if bound == memory else 'a'}")
            print(f"| {tokens} | {experts:.1f} | {experts * layer.expert_bytes() / 1e6:.1f} | {layer.operations(tokens) / 1e9:.2f} | "
                  + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
