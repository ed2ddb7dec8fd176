"""Query tokens: the same number of latents for every size, and decoding to any size."""

from typing import ClassVar

import pytest
import torch
from vqcore_vit.query import QueryDecoder, QueryEncoder

from vqcore.protocols import DataSpec
from vqcore.testing.conformance import DecoderConformance, EncoderConformance

TINY = {"width": 24, "depth": 2, "num_heads": 2, "num_tokens": 6}
IMAGE = DataSpec(channels=3, size=(16, 24))
SHAPES = [((24,), 4), ((16, 16), 8), ((8, 24), (4, 3)), ((4, 6, 10), (2, 3, 5))]
EVERYTHING = {"post_mlp": True, "grid_convs": 1, "learnable_positions": True}


class TestQueryEncoder(EncoderConformance):
    component = "vit/query-encoder"
    spec = IMAGE
    configs: ClassVar = ({**TINY, "patch_size": 8}, {**TINY, "patch_size": [4, 8], **EVERYTHING})


class TestQueryDecoder(DecoderConformance):
    component = "vit/query-decoder"
    spec = IMAGE
    grid = (6,)
    configs: ClassVar = (
        {**TINY, "patch_size": 8},
        {**TINY, "patch_size": 8, "out_conv": "conv", "input_size_dec": 32, **EVERYTHING},
    )


def pair(size, patch, **settings):
    torch.manual_seed(0)
    spec = DataSpec(channels=2, size=size)
    shared = {**TINY, "patch_size": patch, **settings}
    encoder = QueryEncoder(QueryEncoder.Config(**shared), spec=spec)
    return encoder, QueryDecoder(QueryDecoder.Config(**shared), dim=24, spec=spec)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize(("size", "patch"), SHAPES)
def test_tokens_are_as_many_whatever_the_size(size, patch, factor):
    encoder, decoder = pair(size, patch)
    size = (size[0] * factor, *size[1:])
    with torch.no_grad():
        z = encoder(noise(2, 2, *size))
        assert encoder.grid(size) == (6,) and z.shape == (2, 6, 24)
        assert decoder.needs_size and decoder(z, size=size).shape == (2, 2, *size)


def test_the_nominal_size_is_the_default():
    _, decoder = pair((16, 24), 8)
    with torch.no_grad():
        assert torch.equal(decoder(noise(1, 6, 24)), decoder(noise(1, 6, 24), size=(16, 24)))


@pytest.mark.parametrize(("size", "patch"), SHAPES)
def test_gradients_reach_every_parameter(size, patch):
    encoder, decoder = pair(size, patch, **EVERYTHING)
    x_hat = decoder(encoder(noise(2, 2, *size)), size=size)
    (x_hat * noise(*x_hat.shape)).sum().backward()
    for module in (encoder, decoder):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_every_token_looks_at_the_whole_and_every_patch_at_all_tokens():
    encoder, decoder = pair((16, 24), 8)
    x = noise(1, 2, 16, 24).requires_grad_()
    encoder(x)[0, 3, 0].backward()
    seen = x.grad[0].unflatten(1, (2, 8)).unflatten(3, (3, 8)).abs().amax((0, 2, 4))
    assert seen.shape == (2, 3) and seen.min() > 0
    z_q = noise(1, 6, 24).requires_grad_()
    decoder(z_q)[0, 0, 0, 0].backward()
    assert z_q.grad.abs().amax((0, 2)).min() > 0


def test_tokens_are_told_apart_and_so_are_patches():
    encoder, decoder = pair((16, 24), 8)
    with torch.no_grad():
        z = encoder(noise(1, 2, 16, 24))[0]
        assert (z[0] - z[1]).abs().max() > 0.1
        z_q = noise(1, 6, 24)
        assert not torch.allclose(decoder(z_q), decoder(z_q.flip(1)), atol=1e-3)
        patches = decoder(z_q)[0].unflatten(1, (2, 8)).unflatten(3, (3, 8))
        assert (patches[:, 0, :, 0] - patches[:, 1, :, 2]).abs().max() > 1e-2


def test_bf16_and_checkpointing():
    encoder, decoder = pair((16, 24), 8, **EVERYTHING)
    saving, _ = pair((16, 24), 8, checkpointing=True, **EVERYTHING)
    x = noise(2, 2, 16, 24)
    for module in (encoder, saving):
        module(x).square().sum().backward()
    for (name, one), other in zip(encoder.named_parameters(), saving.parameters()):
        assert torch.allclose(one.grad, other.grad, atol=1e-5), name
    exact = decoder(encoder(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = decoder(encoder(x))
    assert 0 < (rough - exact).abs().max() < 0.1 * exact.abs().max()
    encoder.bfloat16(), decoder.bfloat16()
    rougher = decoder(encoder(x))
    assert rougher.dtype == torch.bfloat16 and (rougher - exact).abs().max() < 0.1 * exact.abs().max()


def test_another_number_of_tokens_is_refused():
    encoder, decoder = pair((16, 24), 8)
    with pytest.raises(ValueError, match="5 latent tokens, but this decoder has num_tokens=6"):
        decoder(noise(1, 5, 24))
    with pytest.raises(ValueError, match=r"size \[16, 20\] is no multiple of patch_size \[8, 8\]"):
        encoder.grid((16, 20))
    with pytest.raises(ValueError, match=r"size \[16, 20\] is no multiple of patch_size \[8, 8\]"):
        decoder(noise(1, 6, 24), size=(16, 20))
