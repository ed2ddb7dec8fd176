"""Laws of the encoder and the decoder on one, two and three axes, tested with formulas and against each other."""

import math

import numpy as np
import pytest
import torch
from vqcore_vit.blocks import DropPath
from vqcore_vit.convs import GridConv, OutputConvs
from vqcore_vit.positions import resize_positions, sincos_positions
from vqcore_vit.vit import ViTDecoder, ViTEncoder

from vqcore.protocols import DataSpec

TINY = {"width": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
SHAPES = [  # channels, size, patch, grid
    (2, (24,), 4, (6,)),
    (3, (16, 16), 8, (2, 2)),
    (3, (8, 24), (4, 3), (2, 8)),
    (2, (4, 6, 10), (2, 3, 5), (2, 2, 2)),
]
EVERYTHING = {"post_mlp": True, "grid_convs": 1, "learnable_positions": True}
OUT_CONVS = ("none", "convnext", "conv")


def pair(channels, size, patch, *, dim=5, spec=None, out_conv="none", **settings):
    torch.manual_seed(0)
    spec = spec or DataSpec(channels=channels, size=size)
    shared = {**TINY, "patch_size": patch, **settings}
    narrow = {"out_conv_channels": 4} if out_conv == "conv" else {}
    encoder = ViTEncoder(ViTEncoder.Config(**shared), spec=spec)
    decoder = ViTDecoder(ViTDecoder.Config(**shared, out_conv=out_conv, **narrow), dim=dim, spec=spec)
    return encoder, decoder


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("out_conv", OUT_CONVS)
@pytest.mark.parametrize(("channels", "size", "patch", "grid"), SHAPES)
def test_grid_agrees_with_the_output(channels, size, patch, grid, out_conv):
    encoder, decoder = pair(channels, size, patch, out_conv=out_conv, grid_convs=1)
    assert encoder.grid(size) == grid
    with torch.no_grad():
        assert encoder(noise(2, channels, *size)).shape == (2, *grid, encoder.dim)
        assert decoder(noise(2, *grid, 5)).shape == (2, channels, *size)


@pytest.mark.parametrize(("channels", "size", "patch", "grid"), SHAPES)
def test_other_sizes_than_the_nominal_one(channels, size, patch, grid):
    encoder, decoder = pair(channels, size, patch, grid_convs=1, out_conv="conv")
    larger = tuple(side * (2 + axis) for axis, side in enumerate(size))
    with torch.no_grad():
        z = encoder(noise(1, channels, *larger))
        assert z.shape[1:-1] == encoder.grid(larger) != grid
        assert decoder(noise(1, *z.shape[1:-1], 5)).shape == (1, channels, *larger)


def test_feature_maps_need_no_patches():
    encoder, decoder = pair(6, (3, 5), 16, patch_proj=False)
    assert encoder.grid((7, 2)) == (7, 2)
    with torch.no_grad():
        assert encoder(noise(1, 6, 7, 2)).shape == (1, 7, 2, 24)
        assert decoder(noise(1, 7, 2, 5)).shape == (1, 6, 7, 2)


def test_a_class_map_comes_back_as_logits():
    spec = DataSpec(channels=1, size=(8, 8), kind="categorical", labels=7, range=None)
    _, decoder = pair(1, (8, 8), 4, spec=spec)
    assert decoder(noise(2, 2, 2, 5)).shape == (2, 7, 8, 8)


@pytest.mark.parametrize(("channels", "size", "patch", "grid"), SHAPES)
def test_patches_are_laid_out_channel_first(channels, size, patch, grid):
    _, decoder = pair(channels, size, patch)
    seen = []
    decoder.out_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        x_hat = decoder(noise(1, *grid, 5))
    patch = decoder.patch
    expected = np.empty(x_hat.shape, np.float32)
    for position in np.ndindex(channels, *size):
        c, at = position[0], position[1:]
        inside = np.ravel_multi_index((c, *(a % p for a, p in zip(at, patch))), (channels, *patch))
        expected[(0, *position)] = seen[0][(0, *(a // p for a, p in zip(at, patch)), int(inside))]
    assert np.array_equal(x_hat.numpy(), expected)


def moco(grid, width):
    """The Transformer's equation of sines and cosines, axis after axis."""
    n = width // (2 * len(grid))
    found = np.zeros((width, *grid))
    for position in np.ndindex(*grid):
        for axis, index in enumerate(position):
            for k in range(n):
                angle = index / 10000 ** (k / n)
                found[(2 * n * axis + k, *position)] = math.sin(angle)
                found[(2 * n * axis + n + k, *position)] = math.cos(angle)
    return found


@pytest.mark.parametrize(
    ("grid", "width"), [((7,), 8), ((3, 5), 16), ((5, 3), 18), ((2, 3, 4), 24), ((2, 3, 4), 20)]
)
def test_positions_follow_the_formula(grid, width):
    assert np.allclose(sincos_positions(grid, width)[0].numpy(), moco(grid, width), atol=1e-6)


def test_one_half_for_the_row_and_one_for_the_column():
    pos_emb = sincos_positions((3, 5), 16)[0]
    assert torch.equal(pos_emb[:8], pos_emb[:8, :, :1].expand(8, 3, 5))
    assert torch.equal(pos_emb[8:], pos_emb[8:, :1, :].expand(8, 3, 5))
    assert len(torch.unique(pos_emb.flatten(1), dim=1).T) == 15


@pytest.mark.parametrize(("built", "grid"), [((4,), (7,)), ((4, 6), (6, 4)), ((2, 3, 4), (3, 3, 5))])
def test_positions_are_resized(built, grid):
    pos_emb = sincos_positions(built, 12)
    assert resize_positions(pos_emb, built) is pos_emb
    resized = resize_positions(pos_emb, grid)
    assert resized.shape == (1, 12, *grid)
    assert torch.allclose(resize_positions(torch.ones_like(pos_emb), grid), torch.ones(1, 12, *grid))
    assert torch.allclose(resized.flip(2), resize_positions(pos_emb.flip(2), grid), atol=1e-5)


@pytest.mark.parametrize("out_conv", OUT_CONVS)
@pytest.mark.parametrize(("channels", "size", "patch", "grid"), SHAPES)
def test_gradients_reach_every_parameter(channels, size, patch, grid, out_conv):
    encoder, decoder = pair(channels, size, patch, dim=24, out_conv=out_conv, **EVERYTHING)
    x_hat = decoder(encoder(noise(2, channels, *size)))
    (x_hat * noise(*x_hat.shape)).sum().backward()
    for module in (encoder, decoder):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("channels", "size", "patch", "grid"), SHAPES)
def test_a_sample_does_not_depend_on_its_batch(channels, size, patch, grid):
    encoder, decoder = pair(channels, size, patch, out_conv="conv", dropout=0.5, drop_path=0.5, **EVERYTHING)
    encoder.eval(), decoder.eval()
    x, z_q = noise(3, channels, *size), noise(3, *grid, 5)
    with torch.no_grad():
        assert torch.equal(encoder(x), encoder(x)) and torch.equal(decoder(z_q), decoder(z_q))
        assert torch.allclose(encoder(x)[1:2], encoder(x[1:2]), atol=1e-5)
        assert torch.allclose(decoder(z_q)[1:2], decoder(z_q[1:2]), atol=1e-5)


@pytest.mark.parametrize(("channels", "size", "patch", "grid"), SHAPES)
def test_bf16_autocast_stays_near_fp32(channels, size, patch, grid):
    encoder, decoder = pair(channels, size, patch, dim=24, out_conv="conv", **EVERYTHING)
    x = noise(2, channels, *size)
    exact = decoder(encoder(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = decoder(encoder(x))
    rough.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in encoder.parameters())
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(("channels", "size", "patch", "grid"), SHAPES)
def test_a_module_in_bf16_stays_in_bf16(channels, size, patch, grid):
    encoder, decoder = pair(channels, size, patch, dim=24, out_conv="conv", **EVERYTHING)
    x = noise(2, channels, *(2 * side for side in size))
    exact = decoder(encoder(x))
    encoder.bfloat16(), decoder.bfloat16()
    z = encoder(x)  # the input is fp32, as from a tokenizer
    rough = decoder(z.float())
    assert z.dtype == rough.dtype == torch.bfloat16
    assert 0 < (rough - exact).abs().max() < 0.1 * exact.abs().max()
    rough.float().square().sum().backward()
    for module in (encoder, decoder):
        assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in module.parameters())


def gradients(module, x, seed=2):
    module.zero_grad()
    torch.manual_seed(seed)
    out = module(x)
    (out * noise(*out.shape)).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("channels", "size", "patch", "grid"), SHAPES)
def test_checkpointing_changes_no_gradient(channels, size, patch, grid, dropout):
    random = {"dropout": dropout, "attn_dropout": dropout, "drop_path": dropout}
    plain, plain_decoder = pair(channels, size, patch, **random)
    saving, saving_decoder = pair(channels, size, patch, checkpointing=True, **random)
    calls = []
    saving.blocks[0].register_forward_pre_hook(lambda *args: calls.append(1))
    for one, other, x in (
        (plain, saving, noise(3, channels, *size)),
        (plain_decoder, saving_decoder, noise(3, *grid, 5)),
    ):
        (out, grads), (other_out, other_grads) = gradients(one, x), gradients(other, x)
        assert torch.equal(out, other_out)
        assert all(torch.allclose(grads[name], other_grads[name], atol=1e-6) for name in grads)
    assert len(calls) == 2  # forward pass, and recomputation in the backward pass
    saving.eval()(noise(1, channels, *size))
    assert len(calls) == 3


def test_the_encoders_tanh_mlp_is_exact_under_autocast_and_the_decoders_is_not():
    encoder, decoder = pair(3, (16, 16), 8, post_mlp=True)
    dtypes = {}
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        module.post_mlp.register_forward_hook(
            lambda m, args, out, name=name: dtypes.update({name: out.dtype})
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = encoder(noise(1, 3, 16, 16))
        decoder(noise(1, 2, 2, 5))
    assert z.dtype == torch.float32
    assert dtypes == {"encoder": torch.float32, "decoder": torch.bfloat16}


def test_stochastic_depth_keeps_the_mean_and_whole_samples():
    torch.manual_seed(0)
    dropped = DropPath(0.25).train()(torch.ones(4000, 2, 3, 4))
    per_sample = dropped.flatten(1)
    assert torch.equal(per_sample, per_sample[:, :1].expand_as(per_sample))
    assert sorted(set(per_sample[:, 0].tolist())) == pytest.approx([0, 4 / 3])
    assert per_sample[:, 0].mean() == pytest.approx(1, abs=0.04)
    ones = torch.ones(4, 2, 3)
    assert DropPath(0.25).eval()(ones) is ones


def test_stochastic_depth_rises_with_depth():
    encoder = ViTEncoder(
        ViTEncoder.Config(width=8, depth=4, num_heads=2, patch_size=4, drop_path=0.3),
        spec=DataSpec(channels=1, size=(8, 8)),
    )
    assert [block.drop_path.prob for block in encoder.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_see_their_neighbours_only(rank):
    torch.manual_seed(0)
    x = noise(1, *[9] * rank, 3).requires_grad_()
    GridConv(rank, 3)(x)[(0, *[4] * rank)].sum().backward()
    # Absolute values: the gradients of LayerNorm sum to 0 over the channels, up to rounding.
    seen = x.grad[0].abs().sum(-1).nonzero()
    assert seen.min() == 3 and seen.max() == 5
    y = noise(1, 3, *[9] * rank).requires_grad_()
    out = OutputConvs(rank, 3, 2, depth=1, scale=2)(y)
    assert out.shape == (1, 2, *[18] * rank)
    out[(0, slice(None), *[8] * rank)].sum().backward()
    seen = y.grad[0].abs().sum(0).nonzero()
    assert seen.min() == 2 and seen.max() == 6


def test_sub_pixels_are_those_of_torch():
    torch.manual_seed(0)
    y, convs = noise(2, 4, 3, 5), OutputConvs(2, 4, 3, depth=0, scale=2)
    torch.testing.assert_close(convs(y), torch.nn.functional.pixel_shuffle(convs.out(y), 2))


@pytest.mark.parametrize(
    ("size", "patch", "scale"), [((48,), 4, 2), ((64, 96), 8, 4), ((32, 32), 8, 8), ((16, 16, 16), 4, 2)]
)
def test_sub_pixels_start_without_a_pattern(size, patch, scale):
    """At initialisation every block of scale x scale sub-pixels is constant."""
    torch.manual_seed(0)
    convs = {"out_conv": "conv", "out_conv_channels": 4, "out_conv_scale": scale, "out_conv_depth": 1}
    cfg = ViTDecoder.Config(width=24, depth=0, num_heads=2, patch_size=patch, grid_convs=1, **convs)
    decoder = ViTDecoder(cfg, dim=5, spec=DataSpec(channels=3, size=size))
    grid, rank = tuple(side // patch for side in size), len(size)
    with torch.no_grad():
        x_hat = decoder(noise(2, *grid, 5))
    assert x_hat.std() > 1e-2
    for axis in range(2, 2 + rank):
        blocks = x_hat.unflatten(axis, (-1, scale))
        assert (blocks - blocks.select(axis + 1, 0).unsqueeze(axis + 1)).abs().max() < 1e-6


def test_sub_pixels_start_as_widely_spread_as_before():
    torch.manual_seed(0)
    weight = OutputConvs(2, 32, 3, depth=0, scale=4).out.weight.detach()
    assert float(weight.std()) == pytest.approx((32 * 9) ** -0.5 / 3**0.5, rel=0.05)
    assert len(weight.flatten(1).unique(dim=0)) == 3


def test_a_scale_that_does_not_divide_the_patch_is_named():
    with pytest.raises(ValueError, match=r"out_conv_scale=3 does not divide patch_size \[4, 4\]"):
        ViTDecoder(
            ViTDecoder.Config(width=8, depth=1, num_heads=2, patch_size=4, out_conv="conv", out_conv_scale=3),
            dim=2,
            spec=DataSpec(channels=1, size=(8, 8)),
        )


def test_convnext_blocks_add_next_to_nothing_at_first():
    _, plain = pair(3, (16, 16), 4)
    _, convnext = pair(3, (16, 16), 4, out_conv="convnext")
    convnext.load_state_dict(plain.state_dict(), strict=False)
    z_q = noise(2, 4, 4, 5)
    with torch.no_grad():
        assert 0 < (convnext(z_q) - plain(z_q)).abs().max() < 1e-4


@pytest.mark.parametrize("out_conv", OUT_CONVS)
def test_the_whole_output_passes_through_the_last_layer(out_conv):
    _, decoder = pair(3, (16, 16), 4, out_conv=out_conv)
    assert any(decoder.last_layer is parameter for parameter in decoder.parameters())
    assert not any("last_layer" in name for name in decoder.state_dict())
    decoder.last_layer.data.zero_()
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    with torch.no_grad():
        assert decoder(noise(1, 4, 4, 5)).abs().max() == 0


@pytest.mark.parametrize(
    ("size", "post_mlp", "millions"),
    [
        ("s", False, 25.71),
        ("s", True, 27.81),
        ("b", False, 85.80),
        ("b", True, 90.52),
        ("l", False, 303.30),
        ("l", True, 311.69),
    ],
)
def test_presets_are_as_large_as_published(size, post_mlp, millions):
    spec = DataSpec(channels=3, size=(224, 224))
    with torch.device("meta"):
        encoder = ViTEncoder(ViTEncoder.Config(size=size, post_mlp=post_mlp), spec=spec)
        decoder = ViTDecoder(ViTDecoder.Config(size=size, post_mlp=post_mlp), dim=32, spec=spec)
    for module in (encoder, decoder):
        count = sum(v.numel() for k, v in module.state_dict().items() if not k.startswith("in_proj"))
        assert count / 1e6 == pytest.approx(millions, abs=0.006)


def test_initial_weights():
    encoder, decoder = pair(3, (16, 16), 8, post_mlp=True)
    qkv, fc1 = encoder.blocks[0].attn.qkv.weight, decoder.post_mlp.fc1.weight
    bound = math.sqrt(6 / (24 + 24))
    assert 0.9 * bound < qkv.abs().max() <= bound
    bound = math.sqrt(6 / (24 + 48))
    assert 0.9 * bound < fc1.abs().max() <= bound
    layers = [m for m in (*encoder.modules(), *decoder.modules()) if isinstance(m, torch.nn.Linear)]
    assert all(layer.bias.abs().max() == 0 for layer in layers if layer is not decoder.in_proj)


def test_positions_may_come_from_another_size():
    """`model.full_ckpt` interpolates `pos_emb` and no other tensor."""
    for module in pair(3, (16, 16), 8):
        assert module.interpolated == ("pos_emb",) and "pos_emb" in module.state_dict()


def test_learnable_positions_change_no_names():
    fixed, _ = pair(3, (16, 16), 8)
    learnt, _ = pair(3, (16, 16), 8, learnable_positions=True)
    assert fixed.state_dict().keys() == learnt.state_dict().keys()
    assert {n for n, _ in learnt.named_parameters()} - {n for n, _ in fixed.named_parameters()} == {"pos_emb"}
