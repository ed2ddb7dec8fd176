"""Binary spherical quantization against the paper's formulas in NumPy, and against vector-quantize-pytorch."""

import math

import numpy as np
import pytest
import torch
from vqcore_quant.bsq import BSQ


def build(codebook_size=64, **settings):
    return BSQ(BSQ.Config(codebook_size=codebook_size, **settings))


def latents(*shape, seed=1):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def binary_entropy(p):
    return -(p * np.log(p) + (1 - p) * np.log(1 - p))


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_against_the_paper(temperature):
    z = latents(2, 30, 6)
    out = build(
        entropy_temperature=temperature,
        entropy_weight=0.3,
        entropy_gamma=0.8,
        commitment_weight=0.5,
        group_bits=1,
    )(z)
    u = z.double().numpy()
    u = u / np.linalg.norm(u, axis=-1, keepdims=True)
    corner = np.where(u > 0, 1, -1) / math.sqrt(6)
    assert np.array_equal(out.codes[..., 0].numpy(), ((u > 0) * 2 ** np.arange(6)).sum(-1))
    np.testing.assert_allclose(out.z_q.numpy(), corner, atol=1e-6)
    tau = 2 / temperature  # the paper's exp(tau c.u): each bit is the logistic function of 2 tau u / sqrt(L)
    p = 1 / (1 + np.exp(-2 * tau * u / math.sqrt(6)))
    token = binary_entropy(p).sum(-1).mean()
    codebook = binary_entropy(p.reshape(-1, 6).mean(0)).sum()
    assert float(out.losses["bsq/entropy"]) == pytest.approx(0.3 * (token - 0.8 * codebook), abs=1e-5)
    commit = np.square(u - corner).sum(-1).mean()
    assert float(out.losses["bsq/commit"]) == pytest.approx(0.5 * commit, rel=1e-5)


@pytest.mark.parametrize("group_bits", [2, 3, 6])
def test_groups_of_bits_are_those_of_the_table_of_a_group(group_bits):
    z = latents(1, 50, 6)
    out = build(group_bits=group_bits, entropy_temperature=1.0)(z)
    u = torch.nn.functional.normalize(z, dim=-1).squeeze(0)
    entropy = 0.0
    for part in u.split(group_bits, dim=-1):
        bits = part.shape[-1]
        table = torch.tensor([[1.0 if c >> i & 1 else -1.0 for i in range(bits)] for c in range(2**bits)])
        p = (-(part.unsqueeze(1) - table / math.sqrt(6)).square().sum(-1)).softmax(-1).mean(0)
        entropy -= float((p * p.log2()).sum())
    assert float(out.metrics["entropy/codebook"]) == pytest.approx(entropy, abs=1e-5)


def test_two_opposite_corners_look_like_even_use_bit_by_bit_only():
    z = torch.ones(1, 40, 6)
    z[:, ::2] = -1
    bit_by_bit = build(group_bits=1, entropy_temperature=0.01)(z).metrics["entropy/codebook"]
    together = build(entropy_temperature=0.01)(z).metrics["entropy/codebook"]
    assert float(bit_by_bit) == pytest.approx(6, abs=1e-4)
    assert float(together) == pytest.approx(1, abs=1e-4)


def test_values_lie_on_the_sphere_and_length_does_not_matter():
    quantizer = build(2**18)
    z = latents(2, 4, 4, 18)
    out = quantizer(z)
    torch.testing.assert_close(out.z_q.norm(dim=-1), torch.ones(2, 4, 4))
    assert torch.equal(quantizer(7 * z).codes, out.codes)
    assert out.losses["bsq/commit"] <= 0.25 * 2


def test_the_largest_codebook_costs_as_much_as_its_bits():
    quantizer = build(2**31)
    z = latents(2, 5, 31)
    out = quantizer(z)
    assert torch.equal(quantizer.decode(out.codes), out.z_q)
    assert out.codes.max() > 2**24  # fp32 cannot represent all integers above this number


def test_against_vector_quantize_pytorch():
    library = pytest.importorskip("vector_quantize_pytorch")
    theirs = library.LFQ(codebook_size=64, dim=6, spherical=True, codebook_scale=1.0).train()
    z = latents(2, 20, 6)
    value, codes, _ = theirs(z)
    _, breakdown = theirs(z, inv_temperature=3.0, return_loss_breakdown=True)
    out = build(entropy_temperature=1 / 3, group_bits=6)(z)
    assert torch.equal(out.codes.squeeze(-1), sum((codes >> i & 1) << (5 - i) for i in range(6)).long())
    torch.testing.assert_close(out.z_q, value)
    assert float(out.metrics["entropy/token"]) * math.log(2) == pytest.approx(
        float(breakdown.per_sample_entropy), abs=1e-3
    )
    assert float(out.metrics["entropy/codebook"]) * math.log(2) == pytest.approx(
        float(breakdown.batch_entropy), abs=1e-3
    )
