"""Lookup-free quantization against the full matrix of tokens x codes in NumPy and vector-quantize-pytorch."""

import math

import numpy as np
import pytest
import torch
from vqcore_quant.lfq import LFQ
from vqcore_quant.penalty import codebook_entropy, token_entropy


def build(codebook_size=16, **settings):
    return LFQ(LFQ.Config(codebook_size=codebook_size, **settings))


def corners(bits):
    return np.array([[1.0 if code >> i & 1 else -1.0 for i in range(bits)] for code in range(2**bits)])


def oracle(z, codes, temperature):
    """Mean entropy of a token, and entropy of the mean distribution, in nats; p(c | z) = softmax(-|z - c|^2 / T)."""
    odds = -np.square(z[:, None] - codes[None]).sum(-1) / temperature
    p = np.exp(odds - odds.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    mean = p.mean(0)
    return -(p * np.log(p + 1e-300)).sum(-1).mean(), -(mean * np.log(mean + 1e-300)).sum()


def latents(*shape, scale=0.4, seed=1):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [1, 2, 5, 9])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 10.0])
def test_entropies_are_those_of_the_whole_table(bits, temperature):
    z = latents(3, 40, bits)
    token, codebook = oracle(z.flatten(0, 1).double().numpy(), corners(bits), temperature)
    out = build(2**bits, entropy_temperature=temperature, entropy_weight=0.3, entropy_gamma=0.7)(z)
    assert float(out.losses["lfq/entropy"]) == pytest.approx(0.3 * (token - 0.7 * codebook), abs=1e-5)
    assert float(out.metrics["entropy/token"]) == pytest.approx(token / math.log(2), abs=1e-5)
    assert float(out.metrics["entropy/codebook"]) == pytest.approx(codebook / math.log(2), abs=1e-5)


def test_codes_values_and_commitment():
    z = latents(2, 5, 3, 4)
    out = build(commitment_weight=0.5)(z)
    signs = np.where(z.numpy() > 0, 1.0, -1.0)
    assert np.array_equal(out.codes[..., 0].numpy(), ((signs > 0) * 2 ** np.arange(4)).sum(-1))
    assert np.array_equal(out.z_q.numpy(), signs.astype(np.float32))
    assert float(out.losses["lfq/commit"]) == pytest.approx(
        0.5 * np.square(z.numpy() - signs).mean(), rel=1e-5
    )


def test_the_gradient_of_the_entropies_is_that_of_the_whole_table():
    z = latents(1, 30, 5).double().requires_grad_()
    valid = torch.ones(1, 30, dtype=torch.bool)
    logits = 4 * z
    ours = token_entropy(logits).mean() - codebook_entropy(logits, valid, group_bits=12, training=True)
    (grad,) = torch.autograd.grad(ours, z)
    codes = torch.tensor(corners(5))
    p = (-(z.flatten(0, 1).unsqueeze(1) - codes).square().sum(-1)).softmax(-1)
    mean = p.mean(0)
    theirs = -(p * p.log()).sum(-1).mean() + (mean * mean.log()).sum()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-9)
    torch.testing.assert_close(grad, torch.autograd.grad(theirs, z)[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("group_bits", [1, 3, 4, 6])
def test_groups_are_a_bound_from_above_that_is_exact_for_independent_bits(group_bits):
    z = latents(1, 400, 12, scale=1.0)
    z[..., 6:] = z[..., :6]  # the second half repeats the first half
    valid = torch.ones(1, 400, dtype=torch.bool)
    exact = codebook_entropy(z, valid, group_bits=12, training=True)
    assert codebook_entropy(z, valid, group_bits=group_bits, training=True) > exact + 0.05
    one = latents(1, 1, 12)  # the bits of one token are independent
    whole = codebook_entropy(one, valid[:, :1], group_bits=12, training=True)
    grouped = codebook_entropy(one, valid[:, :1], group_bits=group_bits, training=True)
    assert float(grouped) == pytest.approx(float(whole), rel=1e-5)
    assert float(grouped) == pytest.approx(float(token_entropy(one).squeeze()), rel=1e-5)


def test_far_latents_have_finite_losses_and_gradients():
    z = (1e4 * latents(2, 8, 18)).requires_grad_()
    out = build(2**18, entropy_temperature=0.01)(z)
    sum(out.losses.values()).backward()
    assert out.losses["lfq/entropy"].isfinite()
    assert z.grad.isfinite().all()


def test_the_largest_codebook_needs_no_table():
    quantizer = build(2**31)
    z = torch.stack([torch.ones(31), -torch.ones(31)]).unsqueeze(0)
    out = quantizer(z)
    assert out.codes.flatten().tolist() == [2**31 - 1, 0]
    assert torch.equal(quantizer.decode(out.codes), z)
    assert not quantizer.state_dict()


def test_the_entropy_loss_spreads_codes_and_makes_tokens_certain():
    torch.manual_seed(0)
    z = (0.3 + 0.1 * torch.randn(1, 256, 4)).requires_grad_()  # all latents in one corner
    quantizer = build(16, entropy_weight=1.0, commitment_weight=0.0)
    optimizer = torch.optim.Adam([z], lr=0.05)
    before = quantizer(z).metrics
    for _ in range(150):
        optimizer.zero_grad()
        quantizer(z).losses["lfq/entropy"].backward()
        optimizer.step()
    after = quantizer(z).metrics
    assert before["codes/perplexity"] < 2
    assert after["codes/perplexity"] > 12
    assert after["entropy/token"] < before["entropy/token"]


def test_against_vector_quantize_pytorch():
    library = pytest.importorskip("vector_quantize_pytorch")
    theirs = library.LFQ(codebook_size=64, dim=6, entropy_loss_weight=1.0, commitment_loss_weight=1.0).train()
    z = latents(2, 20, 6)
    value, codes, _ = theirs(z, inv_temperature=2.0)
    _, breakdown = theirs(z, inv_temperature=2.0, return_loss_breakdown=True)
    out = build(64, entropy_temperature=0.5, entropy_weight=1.0, commitment_weight=1.0)(z)
    reverse = sum(
        (codes >> i & 1) << (5 - i) for i in range(6)
    )  # the library's first channel is the highest bit
    assert torch.equal(out.codes.squeeze(-1), reverse.long())
    assert torch.equal(out.z_q, value)
    assert float(out.metrics["entropy/token"]) * math.log(2) == pytest.approx(
        float(breakdown.per_sample_entropy), abs=1e-3
    )
    assert float(out.metrics["entropy/codebook"]) * math.log(2) == pytest.approx(
        float(breakdown.batch_entropy), abs=1e-3
    )
    assert float(out.losses["lfq/commit"]) == pytest.approx(float(breakdown.commitment), rel=1e-5)
