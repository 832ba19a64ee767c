"""The figures of a run: what they are made of, and how they read."""

from __future__ import annotations

from ecmfq_export.runtime.figures import figures
from ecmfq_export.runtime.generate import Generation


class _Session:
    def __init__(self, device_bytes: int) -> None:
        self.device_bytes = device_bytes


def test_on_the_cpu() -> None:
    found = figures(Generation("a b", (4, 5, 2), "eos", 17, 0.5, 8.0), _Session(0))
    assert (found.prompt_tokens, found.new_tokens, found.first_token_seconds, found.tokens_per_second) == (17, 3, 0.5, 8.0)
    assert 10 * 2**20 < found.peak_bytes < 2**40, "a Python process with NumPy takes more than 10 MiB"
    assert str(found).startswith("prompt 17 tokens, first token after 0.500 s; 3 tokens, then 8.0 tokens/s; memory: ")
    assert str(found).endswith(" MiB peak")


def test_on_a_gpu_and_one_token() -> None:
    text = str(figures(Generation("", (2,), "eos", 5, 0.25, 0.0), _Session(3 * 2**30)))
    assert "1 tokens, no further token" in text and text.endswith("MiB peak, 3072 MiB on the GPU")
