"""SimVQ against NumPy and vector-quantize-pytorch; every code moves at a training step."""

import numpy as np
import pytest
import torch
from vqcore_quant.simvq import SimVQ


def build(**settings):
    torch.manual_seed(0)
    return SimVQ(SimVQ.Config(**({"codebook_size": 20, "latent_dim": 4} | settings)))


def latents(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_against_numpy():
    quantizer = build(commitment_weight=0.5, codebook_weight=2.0)
    z = latents(2, 3, 5, 4)
    out = quantizer.eval()(z)
    codebook = quantizer.codes.double().numpy() @ quantizer.map.weight.detach().double().numpy().T
    codes = np.square(z.double().numpy()[..., None, :] - codebook).sum(-1).argmin(-1)
    assert np.array_equal(out.codes[..., 0].numpy(), codes)
    np.testing.assert_allclose(out.z_q.detach().numpy(), codebook[codes], atol=1e-5)
    distance = np.square(z.double().numpy() - codebook[codes]).mean()
    assert float(out.losses["simvq/commit"]) == pytest.approx(0.5 * distance, rel=1e-5)
    assert float(out.losses["simvq/codebook"].detach()) == pytest.approx(2 * distance, rel=1e-5)


def test_against_vector_quantize_pytorch():
    library = pytest.importorskip("vector_quantize_pytorch")
    theirs = library.SimVQ(dim=4, codebook_size=20, rotation_trick=False).train()
    ours = build()
    ours.codes.copy_(theirs.frozen_codebook)
    ours.map.weight.data.copy_(theirs.code_transform.weight)
    z = latents(2, 30, 4)
    value, codes, loss = theirs(z)
    out = ours(z)
    assert torch.equal(out.codes.squeeze(-1), codes)
    torch.testing.assert_close(out.z_q, value)
    assert float(sum(out.losses.values()).detach()) == pytest.approx(float(loss.detach()), rel=1e-5)


def test_every_code_moves_though_one_is_used():
    quantizer = build()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.5)
    before = quantizer.map(quantizer.codes).detach()
    out = quantizer(latents(1, 1, 4))
    sum(out.losses.values()).backward()
    optimizer.step()
    moved = (quantizer.map(quantizer.codes).detach() - before).norm(dim=-1)
    assert (moved > 0).all()
    assert [name for name, p in quantizer.named_parameters()] == ["map.weight"]


def test_losses_pull_the_two_sides_apart_from_each_other():
    quantizer, z = build(), latents(1, 8, 4).requires_grad_()
    losses = quantizer(z).losses
    (on_z,) = torch.autograd.grad(losses["simvq/commit"], z, retain_graph=True)
    assert on_z.abs().max() > 0
    assert torch.autograd.grad(losses["simvq/commit"], z, retain_graph=True)[0] is not None
    (on_map, on_latents) = torch.autograd.grad(
        losses["simvq/codebook"], [quantizer.map.weight, z], allow_unused=True
    )
    assert on_map.abs().max() > 0
    assert on_latents is None
