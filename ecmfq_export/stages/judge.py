"""Final-logit KL on held-out samples: what a choice inside one layer does to what the model says."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import torch

from ecmfq_export.errors import UserError
from ecmfq_export.models.moe_vlm import MoEVLM
from ecmfq_export.models.torch_decoder import decoder_logits, load_layer
from ecmfq_export.runtime.sample import ProcessedSample
from ecmfq_export.stages.streams import ActivationStore, Batch, advance

MAX_POSITIONS = 512

Choice = TypeVar("Choice", bound=Hashable)


class Judge:
    """Compares hidden states at some layer's output by what the floating-point rest of the model makes of them.

    Judged positions are those that predict answer tokens, of samples without an answer those that predict text tokens; at
    most 512 of them, spread evenly.

    Args:
        model: the floating-point model.
        samples: the held-out samples that `batches` were prepared from.
        batches, store: their batches; the store holds their embeddings under ``fp``.
        ahead: whether the floating-point model is run through all of its layers at once, to judge behind any of them. Without it only
            what comes out of the last layer can be judged, after :meth:`refer_to`.

    Raises:
        UserError: held-out samples without a token to predict.
    """

    def __init__(
        self, model: MoEVLM, samples: Sequence[ProcessedSample], batches: list[Batch], store: ActivationStore, ahead: bool = True
    ) -> None:
        self._model, self._batches, self._store = model, batches, store
        self._positions = _judged_positions(samples, batches)
        if not any(bool(mask.any()) for mask in self._positions.values()):
            raise UserError("the held-out samples have no token to predict", "give more samples, with answers where you can")
        self._reference = torch.empty(0)
        if ahead:
            self._refer_to("fp", 0)

    def refer_to(self, stream: str) -> None:
        """Compare with `stream` from now on: the floating-point hidden states that leave the last layer."""
        self._refer_to(stream, self._model.spec.num_layers)

    def _refer_to(self, stream: str, next_layer: int) -> None:
        for batch in self._batches:
            self._store.put(f"judge/{batch.index}", self._store.get(f"{stream}/{batch.index}"))
        self._reference = self._log_probs(["judge"], next_layer)["judge"]

    @torch.no_grad()
    def kl(self, streams: Sequence[str], next_layer: int) -> dict[str, torch.Tensor]:
        """KL(floating point || stream), in nats, at every judged position, float64 [P], of each stream of hidden states that enters
        `next_layer`; consumes them."""
        found = self._log_probs(streams, next_layer)
        reference = self._reference
        return {name: (reference.exp() * (reference - other)).sum(-1).clamp_min(0.0) for name, other in found.items()}

    @torch.no_grad()
    def _log_probs(self, streams: Sequence[str], next_layer: int) -> dict[str, torch.Tensor]:
        for index in range(next_layer, self._model.spec.num_layers):
            layer = load_layer(self._model, index).to(self._store.device)
            for stream in streams:
                advance(layer, index, self._batches, self._store, stream)
            del layer  # before the next one is read
        rows = {}
        for stream in streams:
            rows[stream] = torch.cat([self._store.get(f"{stream}/{b.index}").cpu()[self._positions[b.index]] for b in self._batches])
            for batch in self._batches:
                self._store.drop(f"{stream}/{batch.index}")
        # One call for all, because it reads the output matrix from disk.
        logits = decoder_logits(self._model, torch.cat(list(rows.values())).unsqueeze(0))[0]
        parts = logits.double().log_softmax(-1).split([len(part) for part in rows.values()])
        return dict(zip(rows, parts, strict=True))


def judged_layers(num_layers: int, most: int) -> list[int]:
    """Layers whose choice is judged, ascending: all of them, or the first ones of `most` runs of nearly equal length.

    A judgement reads every layer behind it again. Made in all L layers that is L (L - 1) / 2 layers, in M of them about M L / 2: linear
    in L. A layer that is not judged takes the choice of the last judged one before it. Layers beside each other have like activations
    and like errors to undo, so that is the best guess there is; the next judged one, which may be nearer, is not known yet, since
    layers are quantized in their order, each on the activations that the ones before it leave, and a choice for the whole model would
    need all judgements before the first layer.
    """
    count = min(num_layers, most)
    return [run * num_layers // count for run in range(count)]


def clearly_best(kl: dict[Choice, torch.Tensor], standard_errors: float = 2.0) -> Choice:
    """The choice of least mean KL among those whose gain over the first one is more than `standard_errors` of that paired gain; the
    first one where there is none.

    The least of several means that differ by their noise is no better than any other, so a choice has to be clear.

    Args:
        kl: by choice, the default first: float [P] at the same positions.
    """
    default = next(iter(kl))
    clear = [default]
    for choice, values in kl.items():
        gain = kl[default] - values
        if len(gain) > 1 and float(gain.mean()) > standard_errors * float(gain.std()) / len(gain) ** 0.5:
            clear.append(choice)
    return min(clear, key=lambda choice: float(kl[choice].mean()))


def _judged_positions(samples: Sequence[ProcessedSample], batches: list[Batch]) -> dict[int, torch.Tensor]:
    """bool [B, S] by batch."""
    found: dict[int, torch.Tensor] = {}
    for batch in batches:
        mask = torch.zeros(batch.types.shape, dtype=torch.bool, device="cpu")
        for row, number in enumerate(batch.samples):
            sample = samples[number]
            predicted = torch.from_numpy(sample.answer_mask.copy())
            if not bool(predicted.any()):
                predicted = batch.types[row, : sample.length].cpu() == 0
            mask[row, : sample.length - 1] = predicted[1:]
        found[batch.index] = mask
    total = sum(int(mask.sum()) for mask in found.values())
    step = -(-total // MAX_POSITIONS)
    seen = 0
    for mask in found.values():
        where = mask.nonzero()
        dropped = where[(torch.arange(len(where)) + seen) % step != 0] if step > 1 else where[:0]
        mask[dropped[:, 0], dropped[:, 1]] = False
        seen += len(where)
    return found
