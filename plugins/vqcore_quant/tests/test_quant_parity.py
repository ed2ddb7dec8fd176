"""Comparison, step by step, with recorded results of 4M's quantizers (`parity/README.md`)."""

from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from vqcore_quant.kmeans import kmeans
from vqcore_quant.vq import VQ

STEPS = {
    "quantizer_cosine_steps": (5, {"decay": 0.9, "threshold_ema_dead_code": 0.0}),
    "quantizer_norm_latents": (
        2,
        {"decay": 0.9, "threshold_ema_dead_code": 0.0, "norm_latents": True, "commitment_weight": 0.3},
    ),
    "quantizer_euclidean_steps": (3, {"decay": 0.9, "threshold_ema_dead_code": 0.0, "normalize": False}),
}
REPLACING = {"decay": 0.8, "threshold_ema_dead_code": 1.0}


def recorded(case):
    return load_file(Path(__file__).parent / "parity" / f"{case}.safetensors")


def build(io, prefix="before", **settings):
    state = {k.removeprefix(f"{prefix}/_codebook."): v for k, v in io.items() if k.startswith(f"{prefix}/")}
    codebook_size, latent_dim = state["embed"].shape
    quantizer = VQ(VQ.Config(**({"codebook_size": codebook_size, "latent_dim": latent_dim} | settings)))
    quantizer.load_state_dict({k.removeprefix(f"{prefix}/"): v for k, v in state.items()})
    return quantizer


def heads(codes):
    return rearrange(codes, "b q h w -> b h w q")


def channels_last(x):
    return rearrange(x, "b d h w -> b h w d")


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))


def check_step(quantizer, io, k, gradient=True):
    """One training step: codes, values, loss and gradient equal the recorded ones."""
    z = channels_last(io[f"x{k}"]).clone().requires_grad_()
    out = quantizer.train()(z)
    assert torch.equal(out.codes.squeeze(-1), io[f"tokens{k}"])
    assert_close(out.z_q, channels_last(io[f"quant{k}"]))
    assert_close(out.losses["vq/commit"], io[f"loss{k}"].squeeze())
    if gradient:
        ((out.z_q * channels_last(io["w"])).sum() + out.losses["vq/commit"]).backward()
        assert_close(z.grad, channels_last(io[f"dz{k}"]))


@pytest.mark.parametrize("case", STEPS)
def test_steps_in_a_row(case):
    steps, settings = STEPS[case]
    io = recorded(case)
    quantizer = build(io, **settings)
    for k in range(steps):
        check_step(quantizer, io, k)
        state = quantizer.state_dict()
        for name in state:
            assert_close(state[name], io[f"after{k}/_codebook.{name}"])


def test_euclidean_evaluation_between_steps():
    io = recorded("quantizer_euclidean_steps")
    out = build(io, normalize=False).eval()(channels_last(io["x0"]))
    assert torch.equal(out.codes.squeeze(-1), io["tokens_eval"])
    assert torch.equal(out.z_q, channels_last(io["quant_eval"]))
    assert out.losses["vq/commit"] == pytest.approx(
        float(io["loss0"]), abs=1e-5
    )  # 4M reports 0 in evaluation


@pytest.mark.parametrize(("case", "normalize"), [("vq", True), ("vq_euclidean", False)])
def test_evaluation(case, normalize):
    io = recorded(case)
    quantizer = build(io, normalize=normalize).eval()
    out = quantizer(channels_last(io["h"]))
    assert torch.equal(out.codes.squeeze(-1), io["tokens"])
    assert torch.equal(out.z_q, channels_last(io["quant"]))
    assert torch.equal(quantizer.decode(out.codes), channels_last(io["looked_up"]))


def test_two_heads_share_a_codebook_between_projections():
    io = recorded("quantizer_heads")
    settings = {"latent_dim": 12, "num_codebooks": 2, "code_dim": 8, "decay": 0.9, "dead_code": None}
    quantizer = build(io, **settings)
    for k in range(2):
        z = channels_last(io[f"x{k}"]).clone().requires_grad_()
        out = quantizer.train()(z)
        assert torch.equal(out.codes, heads(io[f"tokens{k}"]))
        assert_close(out.z_q, channels_last(io[f"quant{k}"]))
        assert_close(out.losses["vq/commit"], io[f"loss{k}"].squeeze())
        ((out.z_q * channels_last(io["w"])).sum() + out.losses["vq/commit"]).backward()
        assert_close(z.grad, channels_last(io[f"dz{k}"]))
        for name, value in quantizer.state_dict().items():
            prefix = "" if name.startswith("project") else "_codebook."
            assert_close(value, io[f"after{k}/{prefix}{name}"])
    out = quantizer.eval()(channels_last(io["x0"]))
    assert torch.equal(out.codes, heads(io["tokens_eval"]))
    assert_close(out.z_q, channels_last(io["quant_eval"]))
    assert torch.equal(quantizer.decode(out.codes), out.z_q)  # 4M does not support this decoding


def test_orthogonal_regularisation_pushes_codes_that_follow_their_means():
    io = recorded("quantizer_orthogonal")
    quantizer = build(io, orthogonal_weight=0.7, decay=0.9, dead_code=None).train()
    out = quantizer(channels_last(io["x0"]))
    loss = out.losses["vq/commit"] + out.losses["vq/orthogonal"]
    loss.backward()
    assert torch.equal(out.codes.squeeze(-1), io["tokens0"])
    assert_close(out.z_q, channels_last(io["quant0"]))
    assert_close(loss, io["loss0"].squeeze())
    assert_close(quantizer.embed.grad, io["dcodes"])
    for name, value in quantizer.state_dict().items():
        assert_close(value, io[f"after0/_codebook.{name}"])


@pytest.mark.parametrize("k", range(4))
def test_linde_buzo_gray_splits_the_same_codes(k):
    io = recorded("quantizer_cosine_linde_buzo_gray")
    quantizer = build(io, dead_code="linde_buzo_gray", **REPLACING)
    quantizer.embed.copy_(io[f"embed{k}"])
    quantizer.cluster_size.copy_(io[f"sizes{k}"])
    check_step(quantizer, io, k)
    dead = io[f"dead{k}"]
    assert dead.any()
    assert_close(quantizer.embed, io[f"after{k}/_codebook.embed"])
    sizes = torch.where(
        dead, 2.0, io[f"after{k}/_codebook.cluster_size"]
    )  # 4M does not reset the cluster size of a dead code
    assert_close(quantizer.cluster_size, sizes)


@pytest.mark.parametrize("k", range(4))
def test_batch_random_replaces_the_same_codes(k):
    io = recorded("quantizer_cosine_batch_random")
    quantizer = build(io, prefix=f"after{k - 1}" if k else "before", **REPLACING)
    check_step(quantizer, io, k, gradient=k < 3)
    dead, theirs = io[f"dead{k}"], io[f"after{k}/_codebook.embed"]
    assert dead.any()
    assert_close(quantizer.embed[~dead], theirs[~dead])
    assert_close(quantizer.cluster_size, torch.where(dead, 2.0, io[f"after{k}/_codebook.cluster_size"]))
    if k == 3:  # there is only one latent: it replaces every dead code
        assert_close(quantizer.embed[dead], theirs[dead])
        return
    distance = (quantizer.embed[dead].unsqueeze(1) - io[f"latents{k}"]).norm(dim=-1)
    assert distance.min(1).values.max() < 1e-5
    assert len(set(distance.argmin(1).tolist())) == int(dead.sum())


@pytest.mark.parametrize(
    ("rows", "means", "sizes", "cosine"),
    [("samples", "means", "sizes", False), ("unit", "means_cosine", "sizes_cosine", True)],
)
def test_kmeans(rows, means, sizes, cosine):
    io = recorded("kmeans")
    ours, counts = kmeans(io[rows], 6, 10, cosine=cosine, means=io[rows][:6])
    assert_close(ours, io[means])
    assert torch.equal(counts.long(), io[sizes])
