"""Residual quantization against its definition and vector-quantize-pytorch; the effects of dropout and sharing."""

import copy

import numpy as np
import pytest
import torch
from vqcore_quant.residual import Residual

from vqcore.config import Config
from vqcore.testing.conformance import build as build_by_name

VQ = {"name": "quant/vq", "codebook_size": 16, "latent_dim": 4, "normalize": False}
STILL = VQ | {"dead_code": None}


def build(quantizer=VQ, depth=3, seed=0, **settings):
    torch.manual_seed(seed)
    return build_by_name("quantizer", "quant/residual", {"quantizer": quantizer, "depth": depth, **settings})


def latents(*shape, seed=1):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_against_numpy():
    quantizer = build().eval()
    z = latents(2, 3, 5, 4)
    out = quantizer(z)
    left = z.double().numpy()
    for i, level in enumerate(quantizer.levels):
        codebook = level.embed.double().numpy()
        codes = np.square(left[..., None, :] - codebook).sum(-1).argmin(-1)
        assert np.array_equal(out.codes[..., i].numpy(), codes)
        left = left - codebook[codes]
        distance = float(out.metrics[f"level{i}/codes/distance"])
        assert distance == pytest.approx(np.square(left).mean(), rel=1e-4)
    np.testing.assert_allclose(out.z_q.numpy(), z.numpy() - left, atol=1e-5)
    assert float(out.metrics["codes/distance"]) == pytest.approx(np.square(left).mean(), rel=1e-4)


def test_against_vector_quantize_pytorch():
    library = pytest.importorskip("vector_quantize_pytorch")
    theirs = library.ResidualVQ(dim=4, num_quantizers=3, codebook_size=16).eval()
    ours = build().eval()
    for level, layer in zip(ours.levels, theirs.layers, strict=True):
        level.embed.copy_(layer._codebook.embed[0])
    z = latents(2, 30, 4)
    value, codes, _ = theirs(z)
    out = ours(z)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(out.z_q, value)


@pytest.mark.parametrize("shared", [False, True])
def test_the_first_codes_alone_decode_to_a_coarser_value(shared):
    quantizer = build(shared=shared)
    for seed in range(20):
        quantizer(latents(4, 40, 4, seed=seed))
    quantizer.eval()
    z = latents(2, 40, 4)
    out = quantizer(z)
    errors = [float((quantizer.decode(out.codes[..., :n]) - z).square().mean()) for n in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(float(out.metrics["codes/distance"]), rel=1e-4)
    assert torch.equal(quantizer.decode(out.codes), out.z_q)


@pytest.mark.parametrize("wrong", [0, 4])
def test_too_many_or_no_levels_are_refused(wrong):
    with pytest.raises(
        ValueError, match=f"{wrong} codes per position; a level has 1, and there are 3 levels"
    ):
        build().decode(torch.zeros(1, 2, wrong, dtype=torch.int64))


def test_the_gradient_does_not_grow_with_the_depth():
    z, weight = latents(2, 5, 4).requires_grad_(), latents(2, 5, 4, seed=3)
    (build(depth=4)(z).z_q * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)


def test_losses_are_added_up_and_pull_the_latents_at_every_level():
    quantizer = build(STILL)
    z = latents(1, 6, 4).requires_grad_()
    left = [z.detach()]
    for level in quantizer.levels:
        codes = torch.cdist(left[-1], level.embed).argmin(-1)
        left.append(left[-1] - level.embed[codes])
    loss = quantizer(z).losses["vq/commit"]
    loss.backward()
    assert float(loss.detach()) == pytest.approx(sum(float(x.square().mean()) for x in left[1:]), rel=1e-4)
    torch.testing.assert_close(z.grad, sum(2 * x / x.numel() for x in left[1:]), rtol=1e-4, atol=1e-6)


def test_a_shared_codebook_learns_once_from_all_levels():
    quantizer = build(STILL, depth=2, shared=True)
    alone = copy.deepcopy(quantizer.levels[0])
    z = latents(3, 20, 4)
    with torch.no_grad():
        first = copy.deepcopy(alone).eval()(z).z_q
    alone.train()(torch.cat([z, z - first]))
    out = quantizer(z)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(quantizer.levels[0].state_dict()[name], value)
    assert list(quantizer.state_dict()) == [f"levels.0.{name}" for name in alone.state_dict()]
    assert out.codes.shape == (3, 20, 2)


def test_dropout_leaves_the_last_levels_out_for_some_samples():
    quantizer = build(STILL | {"freeze": True}, depth=4, dropout=0.5)
    torch.manual_seed(0)
    z = latents(2000, 1, 4)
    out = quantizer(z)
    sums = torch.stack([quantizer.decode(out.codes[..., :n]) for n in (1, 2, 3, 4)])
    kept = (sums == out.z_q).all(-1).squeeze(-1).float().argmax(0) + 1
    share = torch.bincount(kept, minlength=5)[1:] / 2000
    torch.testing.assert_close(share, torch.tensor([0.125, 0.125, 0.125, 0.625]), atol=0.03, rtol=0)
    whole = quantizer.eval()(z)
    assert torch.equal(whole.z_q, quantizer.decode(whole.codes))


def test_levels_without_a_sample_do_not_learn():
    quantizer = build(STILL, dropout=1.0)
    torch.manual_seed(1)
    count = [float(level.cluster_size.sum()) for level in quantizer.levels]
    quantizer(latents(1, 10, 4))
    learned = [
        float(level.cluster_size.sum()) != was for level, was in zip(quantizer.levels, count, strict=True)
    ]
    assert learned == sorted(learned, reverse=True)
    assert not all(learned)


@pytest.mark.parametrize("shared", [False, True])
def test_a_sample_that_is_not_finite_stops_levels_that_it_does_without_too(shared):
    for seed in range(8):
        quantizer = build(dropout=1.0, shared=shared)
        before = copy.deepcopy(quantizer.state_dict())
        z = latents(8, 10, 4)
        z[3, 2, 1] = torch.nan
        torch.manual_seed(seed)
        assert quantizer(z).metrics["codes/nonfinite"] >= 1
        assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def test_token_state_leaves_statistics_out():
    assert set(build().token_state()) == {f"levels.{i}.embed" for i in range(3)}


def test_levels_of_several_codes():
    product = {"name": "quant/product", "groups": 2, "quantizer": VQ}
    quantizer = build(product, depth=2).eval()
    out = quantizer(latents(2, 3, 8))
    assert quantizer.num_codebooks == 4
    torch.testing.assert_close(quantizer.decode(out.codes), out.z_q)
    assert quantizer.decode(out.codes[..., :2]).shape == (2, 3, 8)


@pytest.mark.parametrize(("wrong", "message"), [({"depth": 0}, "depth=0"), ({"dropout": 1.5}, "dropout=1.5")])
def test_bad_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Residual.Config(**({"quantizer": Config(name="quant/fsq"), "depth": 2} | wrong))
