"""rho, phi and their combination."""

import torch

from ecmfq_export.quant.token_weights import combine, cross_modal_scores, fusion_weight, text_weight, vision_attention_mass


def causal(scores: torch.Tensor) -> torch.Tensor:
    length = scores.shape[-1]
    mask = torch.tril(torch.ones(length, length)).bool()
    return scores.masked_fill(~mask, -1e9).softmax(-1)


def example(batch: int = 2, length: int = 12, vision: slice = slice(2, 8), seed: int = 0):
    probs = causal(torch.randn(batch, 3, length, length, generator=torch.Generator().manual_seed(seed)))
    types = torch.zeros(batch, length, dtype=torch.int64)
    types[:, vision] = 1
    return probs, types, torch.ones(batch, length, dtype=torch.bool)


def test_text_weight_is_clipped_and_keeps_the_masses_within_four_to_one():
    assert text_weight(0.2, 10, 10) == 1.0
    assert text_weight(100.0, 1, 100) == 32.0
    assert text_weight(10.0, 100, 100) == 4.0
    assert text_weight(1.0, 10, 100) == 2.5
    assert text_weight(10.0, 100, 0) == 10.0


def test_scores_equal_their_definition():
    probs, types, valid = example()
    scores = cross_modal_scores(probs, types, valid)
    mean = probs.mean(1)
    for j in range(12):
        if types[0, j]:
            rows = [i for i in range(j, 12) if not types[0, i]]
            expected = sum(mean[0, i, j] for i in rows) / len(rows)
        else:
            expected = sum(mean[0, j, i] for i in range(12) if types[0, i])
        assert torch.allclose(scores[0, j], torch.as_tensor(float(expected)), atol=1e-6)
    mass = vision_attention_mass(probs, types, valid)
    assert torch.allclose(mass[0], scores[0][types[0] == 0].mean())


def test_phi_has_mean_near_one_is_clipped_and_ignores_padding():
    probs, types, valid = example(length=40, vision=slice(3, 30))
    valid[1, 35:] = False
    phi = fusion_weight(cross_modal_scores(probs, types, valid), types, valid, 0.5)
    assert not phi[1, 35:].any()
    for modality in (0, 1):
        values = phi[0][types[0] == modality]
        assert 0.8 < float(values.mean()) <= 1.05
    assert float(phi[valid].min()) >= 0.5 + 0.5 * 0.25 - 1e-6 and float(phi.max()) <= 0.5 + 0.5 * 4
    assert torch.equal(fusion_weight(cross_modal_scores(probs, types, valid), types, valid, 0.0), valid.float())


def test_sinks_are_neutral_and_do_not_move_the_others():
    probs, types, valid = example(length=40, vision=slice(3, 30))
    scores = cross_modal_scores(probs, types, valid)
    scores[0, 10] = 1e3
    phi = fusion_weight(scores, types, valid, 0.5)
    assert phi[0, 10] == 1.0
    others = fusion_weight(scores, types, valid & (torch.arange(40) != 10), 0.5)
    keep = torch.arange(40) != 10
    assert torch.equal(phi[0][keep], others[0][keep])


def test_one_modality_is_neutral():
    probs, types, valid = example()
    for only in (torch.zeros_like(types), torch.ones_like(types)):
        phi = fusion_weight(cross_modal_scores(probs, only, valid), only, valid, 0.5)
        assert torch.equal(phi, valid.float())


def test_combine():
    rho, gate, phi = torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.25]), torch.tensor([1.5, 0.5])
    assert combine("none", rho, gate, phi).tolist() == [1, 1]
    assert combine("rho", rho, gate, phi).tolist() == [2, 1]
    assert combine("rho_g", rho, gate, phi).tolist() == [1, 0.25]
    assert combine("rho_g_phi", rho, gate, phi, power=2.0).tolist() == [0.75, 0.03125]
