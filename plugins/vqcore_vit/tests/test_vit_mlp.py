"""MLP encoder and decoder: laws, and results against NumPy (test_vit_parity compares with 4M)."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from vqcore_vit.mlp import MLPDecoder, MLPEncoder

from vqcore.protocols import DataSpec
from vqcore.testing.conformance import DecoderConformance, EncoderConformance

SPECS = [
    DataSpec(channels=7, size=(1,), range=None),
    DataSpec(channels=7, size=(3, 5), range=None),
    DataSpec(channels=7, size=(2, 3, 4), range=None),
]
SMALL = {"depth": 2, "width": 16}
CONFIGS = (
    SMALL,
    {**SMALL, "expansion": 1},
    {**SMALL, "kind": "plain"},
    {"depth": 1, "width": 8, "kind": "plain"},
)


class TestMLPEncoder(EncoderConformance):
    component = "vit/mlp-encoder"
    spec = SPECS[1]
    configs: ClassVar = CONFIGS


class TestMLPDecoder(DecoderConformance):
    component = "vit/mlp-decoder"
    spec = SPECS[1]
    grid = (3, 5)
    configs: ClassVar = CONFIGS


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("settings", CONFIGS)
def test_positions_are_treated_alone_and_alike(spec, settings):
    encoder = MLPEncoder(MLPEncoder.Config(**settings), spec=spec)
    decoder = MLPDecoder(MLPDecoder.Config(**settings), dim=4, spec=spec)
    x, z_q = noise(2, 7, *spec.size), noise(2, *spec.size, 4)
    with torch.no_grad():
        z = encoder(x)
        assert encoder.grid(spec.size) == spec.size and z.shape == (2, *spec.size, encoder.dim)
        assert torch.allclose(encoder(x.flip(-1)), z.flip(-2), atol=1e-6)
        x_hat = decoder(z_q)
        assert x_hat.shape == (2, 7, *spec.size)
        assert torch.allclose(decoder(z_q.flip(-2)), x_hat.flip(-1), atol=1e-6)


def affine(x, layer):
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def normalised(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def gelu(x):
    from math import erf

    return x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2


@pytest.mark.parametrize("kind", ["bottleneck", "plain"])
@pytest.mark.parametrize("activation", ["gelu", "none"])
def test_layers_follow_their_formula(kind, activation):
    torch.manual_seed(0)
    spec = DataSpec(channels=5, size=(1,), range=None)
    encoder = MLPEncoder(MLPEncoder.Config(depth=3, width=6, kind=kind, activation=activation), spec=spec)
    act = gelu if activation == "gelu" else lambda x: x
    x = noise(4, 5, 1).numpy()
    y = affine(x[..., 0], encoder.linear_in)
    if kind == "bottleneck":
        for block in encoder.blocks:
            y = y + affine(act(affine(normalised(y), block.block[0])), block.block[2])
    else:
        assert len(encoder.layers) == 2  # the third layer is linear_out
        for layer in encoder.layers:
            y = act(affine(normalised(y), layer))
    expected = affine(y, encoder.linear_out)
    assert np.allclose(encoder(torch.from_numpy(x)).detach().numpy()[:, 0], expected, atol=1e-5)


def test_names_and_sizes_are_4ms():
    """`BottleneckMLP/B_6-Wi_1024` on 768 channels has 52.21 million parameters."""
    spec = DataSpec(channels=768, size=(14, 14), range=None)
    with torch.device("meta"):
        bottleneck = MLPEncoder(MLPEncoder.Config(depth=6, width=1024), spec=spec)
        plain = MLPEncoder(MLPEncoder.Config(depth=6, width=1024, kind="plain"), spec=spec)
    assert sum(p.numel() for p in bottleneck.parameters()) / 1e6 == pytest.approx(52.21, abs=0.006)
    assert {
        "blocks.5.block.2.weight",
        "layernorms.5.bias",
        "linear_in.weight",
    } <= bottleneck.state_dict().keys()
    assert {"layers.4.weight", "layernorms.4.bias", "linear_out.weight"} <= plain.state_dict().keys()
    assert not any(name.startswith("blocks") for name in plain.state_dict())


def test_plain_without_activation_is_affine_between_its_norms():
    spec = DataSpec(channels=5, size=(1,), range=None)
    settings = {"depth": 1, "width": 6, "kind": "plain", "activation": "none"}
    encoder = MLPEncoder(MLPEncoder.Config(**settings), spec=spec)
    x, y = noise(1, 5, 1), noise(2, 5, 1)[1:]
    with torch.no_grad():
        middle = encoder((x + y) / 2)
        assert torch.allclose(middle, (encoder(x) + encoder(y)) / 2, atol=1e-6)


@pytest.mark.parametrize("settings", CONFIGS)
def test_bf16_and_gradients(settings):
    spec = SPECS[1]
    encoder = MLPEncoder(MLPEncoder.Config(**settings), spec=spec)
    decoder = MLPDecoder(MLPDecoder.Config(**settings), dim=encoder.dim, spec=spec)
    x = noise(2, 7, 3, 5)
    exact = decoder(encoder(x))
    exact.square().sum().backward()
    for module in (encoder, decoder):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = decoder(encoder(x))
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()
    encoder.bfloat16(), decoder.bfloat16()
    rougher = decoder(encoder(x))
    assert rougher.dtype == torch.bfloat16
    assert (rougher - exact).abs().max() < 0.1 * exact.abs().max()
