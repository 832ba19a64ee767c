"""A checkpoint in PyTorch behind the calls of runtime.decoder_session: prefill a batch of prompts, decode one token each, score answers.

The whole decoder is in memory, floating weights in float32 and quantized ones widened to it (four bytes a parameter), so that a
token costs no reading but that of its embedding; a model that does not fit is run from its exported graphs instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ecmfq_export.errors import UserError
from ecmfq_export.models.inputs import embed_tokens, prepare_inputs, rotary_tables
from ecmfq_export.models.moe_vlm import MoEVLM
from ecmfq_export.models.torch_decoder import LayerCache, load_head, load_layer
from ecmfq_export.runtime import host_inputs
from ecmfq_export.runtime.sample import ProcessedSample


@dataclass
class TorchState:
    """Where a batch stands.

    Attributes:
        cached: int64 [batch], tokens of each row's prompt.
        deltas: int64 [batch], position of the token after the prompt minus `cached`.
        padded: slots of the prompt in the caches, padding included.
        steps: tokens that were appended to every row since.
        caches: one a layer.
    """

    cached: np.ndarray
    deltas: np.ndarray
    padded: int
    steps: int
    caches: list[LayerCache]


class TorchSession:
    """A floating-point or quantized checkpoint, loaded whole.

    Attributes:
        max_seq_len: of prompt and answer together.
    """

    def __init__(self, model: MoEVLM) -> None:
        self._model = model
        self.max_seq_len = model.spec.max_position_embeddings
        self._layers = [load_layer(model, index) for index in range(model.spec.num_layers)]
        self._vision: torch.nn.Module | None = None
        self._head = load_head(model)

    def check_length(self, sample: ProcessedSample, room: int = 0) -> None:
        """Raise UserError unless `sample` and `room` more tokens fit the context."""
        if sample.length + room > self.max_seq_len:
            raise UserError(f"a prompt of {sample.length} tokens and {room} more exceed the context of {self.max_seq_len}",
                            "shorten the prompt, or scale its images down")

    def prefill(self, samples: Sequence[ProcessedSample]) -> tuple[np.ndarray, TorchState]:
        """Run whole prompts; logits [batch, vocab] float32 after each one's last token, and the state to decode from."""
        caches = [LayerCache() for _ in self._layers]
        hidden, deltas = self._run(samples, caches)
        lengths = np.array([s.length for s in samples], np.int64)
        last = hidden[torch.arange(len(samples)), torch.from_numpy(lengths - 1)]
        return self._logits(last).numpy(), TorchState(lengths, deltas, hidden.shape[1], 0, caches)

    @torch.no_grad()
    def step(self, tokens: np.ndarray, state: TorchState, active: np.ndarray | None = None) -> np.ndarray:
        """Append one token to each row and return the logits [batch, vocab] after it; `state` moves on.

        Args:
            tokens: [batch] ids.
            active: [batch] bool; what an inactive row gives means nothing, then and later.

        Raises:
            UserError: an active row's context is full.
        """
        running = state.cached if active is None else state.cached[active]
        if int(running.max()) + state.steps >= self.max_seq_len:
            raise UserError(f"the context of {self.max_seq_len} tokens is full", "ask for fewer new tokens")
        positions = host_inputs.decode_positions(state.cached + state.steps, state.deltas)
        slots = np.arange(state.padded + state.steps + 1)
        # A row sees its own prompt, not the padding after it, and everything appended since.
        seen = (slots < state.cached[:, None]) | (slots >= state.padded)
        mask = torch.from_numpy(np.where(seen, 0.0, host_inputs.MASKED).astype(np.float32))[:, None, None, :]
        cos, sin = rotary_tables(self._model.spec, positions)
        hidden = embed_tokens(self._model, torch.from_numpy(np.asarray(tokens, np.int64))[:, None]).float()
        for layer, cache in zip(self._layers, state.caches, strict=True):
            # A token that is said is text, whatever its id.
            hidden = layer.forward(hidden, cos, sin, mask, cache, torch.zeros(hidden.shape[:2], dtype=torch.int64))
        state.steps += 1
        return self._logits(hidden[:, 0]).numpy()

    def answer_logits(self, samples: Sequence[ProcessedSample]) -> list[np.ndarray]:
        """Logits [answer tokens, vocab] that predict each token of each sample's answer, with the answer as context."""
        hidden, _ = self._run(samples, None)
        rows = [hidden[i, torch.from_numpy(np.flatnonzero(s.answer_mask) - 1)] for i, s in enumerate(samples)]
        return [part.numpy() for part in self._logits(torch.cat(rows)).split([len(row) for row in rows])]

    @torch.no_grad()
    def _run(self, samples: Sequence[ProcessedSample], caches: list[LayerCache] | None) -> tuple[torch.Tensor, np.ndarray]:
        """The last layer's output [batch, S, hidden] and the deltas."""
        for sample in samples:
            self.check_length(sample)
        if self._vision is None and any(s.pixel_values is not None for s in samples):
            self._vision = self._model.vision_module()
        inputs = prepare_inputs(self._model, samples, vision=self._vision)
        hidden = inputs.inputs_embeds
        for index, layer in enumerate(self._layers):
            cache = None if caches is None else caches[index]
            hidden = layer.forward(hidden, inputs.cos, inputs.sin, inputs.mask, cache, inputs.router_types)
            if index < len(inputs.deepstack):
                hidden = hidden + inputs.deepstack[index]
        return hidden, inputs.deltas.numpy()

    @torch.no_grad()
    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden)
