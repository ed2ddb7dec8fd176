"""Memcodes against recorded cases of 4M and NumPy; the chunk size does not change results."""

from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from vqcore_quant import memcodes
from vqcore_quant.memcodes import Memcodes


def recorded(case):
    return load_file(Path(__file__).parent / "parity" / f"{case}.safetensors")


def build(io, **settings):
    state = {k.removeprefix("before/"): v for k, v in io.items() if k.startswith("before/")}
    heads, size, width = state["codes"].shape
    cfg = Memcodes.Config(codebook_size=size, latent_dim=heads * width, num_codebooks=heads, **settings)
    quantizer = Memcodes(cfg)
    quantizer.load_state_dict(state)
    return quantizer


def channels_last(x):
    return rearrange(x, "b d ... -> b ... d")


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("case", ["memcodes_grid", "mlp_memcodes", "quantizer_memcodes"])
def test_evaluation_is_the_recorded_one(case):
    io = recorded(case)
    quantizer = build(io).eval()
    out = quantizer(channels_last(io["h" if "h" in io else "x"]))
    assert torch.equal(out.codes, channels_last(io["tokens"]))
    assert_close(out.z_q, channels_last(io["quant"]))
    assert_close(quantizer.decode(out.codes), channels_last(io["quant"]))


@pytest.mark.parametrize("chunk_mib", [8.0, 0.001])
def test_training_with_the_recorded_noise(monkeypatch, chunk_mib):
    io = recorded("quantizer_memcodes")
    noise = iter(rearrange(io["gumbel"], "b h n k -> h (b n) k").flatten(0, 1).split(1))

    def draw(like):
        drawn = [next(noise) for _ in range(len(like))]
        return torch.cat(drawn)

    quantizer = build(io, chunk_mib=chunk_mib).train()
    z = channels_last(io["x"]).clone().requires_grad_()
    monkeypatch.setattr(memcodes, "gumbel_noise", draw)
    with torch.no_grad():
        out = quantizer(z)
    assert torch.equal(out.codes, channels_last(io["tokens_train"]))
    assert_close(out.z_q, channels_last(io["quant_train"]))
    by_rows = rearrange(io["gumbel"], "b h n k -> h (b n) k")
    queries = rearrange(quantizer.to_k(quantizer.codes) * 4**-0.5, "h k e -> h e k")
    rows = rearrange(z, "b ... (h e) -> h (b ...) e", h=4) @ queries
    which = {row[0].item(): by_rows[h, n] for h in range(4) for n, row in enumerate(rows[h])}
    monkeypatch.setattr(
        memcodes, "gumbel_noise", lambda like: torch.stack([which[r[0].item()] for r in like])
    )
    (quantizer(z).z_q * channels_last(io["w"])).sum().backward()
    assert_close(z.grad, channels_last(io["dz"]))
    assert_close(quantizer.codes.grad, io["dcodes"])


def test_names_are_those_of_foreign_checkpoints():
    state = build(recorded("quantizer_memcodes")).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes == {"codes": (4, 20, 4), "to_k.weight": (4, 4, 4), "to_v.weight": (4, 4, 4)}


def test_against_numpy():
    torch.manual_seed(0)
    quantizer = Memcodes(Memcodes.Config(codebook_size=11, latent_dim=6, num_codebooks=2)).eval()
    z = torch.randn(2, 3, 2, 2, 6)
    out = quantizer(z)
    codes, to_k, to_v = (p.detach().double().numpy() for p in quantizer.parameters())
    for head in range(2):
        query = z[..., 3 * head : 3 * head + 3].double().numpy()
        chosen = (query @ (codes[head] @ to_k[head]).T).argmax(-1)
        assert np.array_equal(out.codes[..., head].numpy(), chosen)
        value = (codes[head] @ to_v[head])[chosen]
        np.testing.assert_allclose(out.z_q[..., 3 * head : 3 * head + 3].detach().numpy(), value, atol=1e-5)


def test_training_draws_codes_in_proportion_to_the_softmax():
    torch.manual_seed(0)
    quantizer = Memcodes(Memcodes.Config(codebook_size=5, latent_dim=4)).train()
    z = torch.randn(4)
    drawn = quantizer(z.expand(1, 20_000, 4)).codes.flatten()
    odds = z @ quantizer.to_k(quantizer.codes)[0].T / 2
    share = torch.bincount(drawn, minlength=5) / len(drawn)
    torch.testing.assert_close(share, odds.softmax(-1).detach(), atol=0.015, rtol=0)


def test_chunks_change_neither_codes_nor_gradients():
    found = []
    for chunk_mib in (1e-6, 0.001, 8.0):
        torch.manual_seed(0)
        quantizer = Memcodes(Memcodes.Config(codebook_size=30, latent_dim=8, chunk_mib=chunk_mib)).eval()
        z = torch.randn(3, 7, 8)
        out = quantizer(z)
        out.z_q.square().sum().backward()
        found.append((out.codes, quantizer.codes.grad))
    for codes, grad in found[1:]:
        assert torch.equal(codes, found[0][0])
        torch.testing.assert_close(grad, found[0][1])
