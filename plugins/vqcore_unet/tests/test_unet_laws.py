"""The laws of all components of the plugin, on one to three axes, and what is special to each of its networks."""

from pathlib import Path

import pytest
import torch
import yaml
from vqcore_unet.cnn import CNNDecoder, CNNEncoder
from vqcore_unet.unet import UNet
from vqcore_unet.uvit import UViT

from vqcore.protocols import DataSpec
from vqcore.testing import checks
from vqcore.testing.basics import noise, stirred
from vqcore.testing.conformance import (
    DecoderConformance,
    DenoiserConformance,
    EncoderConformance,
    SchedulerConformance,
    build,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
MORE_SIZES = [
    ({"size": "l"}, 392.47),
    ({"size": "h"}, 770.67),
    ({"size": "b", "long_skips": True}, 144.07),
    ({"size": "l", "long_skips": True}, 433.40),
    ({"size": "b", "downsample_before_mid": False}, 126.36),
    ({"size": "l", "downsample_before_mid": False}, 391.29),
    ({"size": "b", "downsample_before_mid": False, "widths": (128, 256, 512)}, 161.57),
    ({"size": "l", "downsample_before_mid": False, "widths": (128, 256, 512)}, 426.64),
    ({"size": "b", "conditioning": "cross-attention"}, 156.50),
    ({"size": "h", "conditioning": "cross-attention"}, 941.39),
    ({"size": "b", "conditioning": "cross-attention", "long_skips": True}, 175.45),
]
IMAGE = DataSpec(channels=3, size=(16, 16))
UNET = {"patch_size": 2, "width": 8, "mult": (1, 2), "depth": 1, "attention": (2,), "norm_groups": 4}
UVIT = {
    "patch_size": 2,
    "widths": (8, 16),
    "depth": 1,
    "mid_width": 24,
    "mid_depth": 3,
    "mid_heads": 2,
    "norm_groups": 4,
}
CNN = {"width": 8, "mult": (1, 2, 2), "depth": 1, "attention": (4,), "norm_groups": 4}
OTHER = [  # channels, size, grid of the tokens
    (2, (32,), (4,)),
    (1, (16, 32), (4, 4)),
    (2, (8, 16, 8), (2, 2, 2)),
]


class TestUNet(DenoiserConformance):
    component, spec, grid = "unet/unet", IMAGE, (4, 4)
    configs = ({**UNET, "heads": 2, "resolution_cond": True},)


@pytest.mark.slow
class TestMoreUNets(TestUNet):
    configs = (UNET, {**UNET, "depth": 0, "mult": (1, 1)}, {**UNET, "mult": (1,), "attention": ()})


class TestUViT(DenoiserConformance):
    component, spec, grid = "unet/uvit", IMAGE, (4, 4)
    configs = ({**UVIT, "long_skips": True},)


@pytest.mark.slow
class TestMoreUViTs(TestUViT):
    configs = (
        {**UVIT, "resolution_cond": True, "missing_resolution": None},
        {**UVIT, "conditioning": "cross-attention", "downsample_before_mid": False},
        {**UVIT, "widths": (8,), "depth": 0},
    )


class TestCNNEncoder(EncoderConformance):
    component, spec, configs = "unet/cnn-encoder", IMAGE, (CNN,)


class TestCNNDecoder(DecoderConformance):
    component, spec, grid, configs = "unet/cnn-decoder", IMAGE, (4, 4), (CNN,)


@pytest.mark.slow
class TestMoreCNNDecoders(TestCNNDecoder):
    configs = ({**CNN, "heads": 2}, {**CNN, "mid_attention": False, "attention": ()})


class TestDDPM(SchedulerConformance):
    component, steps = "unet/ddpm", 7
    configs = ({}, {"prediction": "sample", "schedule": "linear", "variance": "fixed_large"})


class TestDDIM(SchedulerConformance):
    component, steps = "unet/ddim", 7
    configs = (
        {"spacing": "linspace", "schedule": "shifted_cosine", "shift": 2.0, "prediction": "sample"},
        {"spacing": "leading", "prediction": "epsilon", "zero_terminal_snr": False, "eta": 1.0},
    )


class TestPNDM(SchedulerConformance):
    component, steps = "unet/pndm", 7
    configs = ({}, {"runge_kutta": True, "prediction": "epsilon"})


class TestDiffusers(SchedulerConformance):
    component = "unet/diffusers"
    configs = ({"sampler": "EulerDiscreteScheduler", "schedule": "linear"},)


@pytest.mark.slow
class TestMoreOfDiffusers(TestDiffusers):
    configs = (
        {},
        {"sampler": "UniPCMultistepScheduler", "prediction": "sample"},
        {"sampler": "EulerAncestralDiscreteScheduler", "prediction": "epsilon", "zero_terminal_snr": False},
        {"sampler": "HeunDiscreteScheduler", "options": {"use_karras_sigmas": True}},
    )


class TestFlow(SchedulerConformance):
    component, steps = "unet/flow", 3
    configs = ({}, {"solver": "heun", "shift": 3.0, "power": 4.0})


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "size", "grid"), OTHER)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("unet/unet", {**UNET, "resolution_cond": True}),
        ("unet/uvit", {**UVIT, "resolution_cond": True}),
        ("unet/uvit", {**UVIT, "conditioning": "cross-attention", "long_skips": True}),
    ],
)
def test_denoisers_of_every_rank(name, settings, channels, size, grid):
    spec = DataSpec(channels=channels, size=size)
    made = build("decoder", name, settings, dim=5, spec=spec)
    checks.check_denoiser(made, noise(2, *grid, 5), (2, channels, *size))


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "size", "grid"), OTHER)
def test_convolutions_of_every_rank(channels, size, grid):
    spec = DataSpec(channels=channels, size=size)
    encoder = build("encoder", "unet/cnn-encoder", CNN, spec=spec)
    checks.check_encoder(encoder, noise(2, channels, *size))
    coarse = tuple(side // 4 for side in size)
    decoder = build("decoder", "unet/cnn-decoder", CNN, dim=5, spec=spec)
    checks.check_decoder(decoder, noise(2, *coarse, 5), (2, channels, *size))


def net(name, **more):
    settings = UNET if name == "unet/unet" else UVIT
    return stirred(build("decoder", name, {**settings, **more}, dim=5, spec=IMAGE))


@pytest.mark.parametrize(
    ("name", "more"),
    [("unet/unet", {}), ("unet/uvit", {}), ("unet/uvit", {"conditioning": "cross-attention"})],
)
@torch.no_grad()
def test_the_condition_of_a_batch_is_that_of_both_halves(name, more):
    """Guidance is one pass: the tokens twice, once all hidden."""
    made, z, x, t = net(name, **more), noise(2, 4, 4, 5), noise(2, 3, 32, 16), torch.tensor([3.0, 700.0])
    hidden = torch.tensor([False, False, True, True])[:, None, None].expand(4, 4, 4)
    both = made(
        torch.cat([x, x]), torch.cat([t, t]), made.condition(torch.cat([z, z]), size=(32, 16), mask=hidden)
    )
    seeing = made(x, t, made.condition(z, size=(32, 16)))
    blind = made(x, t, made.condition(-z, size=(32, 16), mask=torch.ones(2, 4, 4, dtype=torch.bool)))
    torch.testing.assert_close(both, torch.cat([seeing, blind]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(seeing, blind, atol=1e-3)


@pytest.mark.parametrize("name", ["unet/unet", "unet/uvit"])
@torch.no_grad()
def test_the_original_size_is_told_for_each_sample(name):
    made, z, x, t = (
        net(name, resolution_cond=True),
        noise(2, 4, 4, 5),
        noise(2, 3, 16, 16),
        torch.tensor([9.0, 9.0]),
    )

    def told(*sizes):
        extras = {"original_size": torch.tensor(sizes)} if sizes else {}
        return made(x, t, made.condition(z, size=(16, 16), extras=extras))

    one, other = told((512, 512), (512, 512)), told((512, 512), (64, 512))
    assert torch.equal(told(), one)
    torch.testing.assert_close(other[0], one[0])
    assert not torch.allclose(other[1], one[1], atol=1e-4)
    assert not torch.allclose(told((512, 512), (512, 64))[1], other[1], atol=1e-4)
    with pytest.raises(ValueError, match=r"original_size is \(samples, 2 sides\), here 2 rows, not \[1, 2\]"):
        told((512, 512))


@pytest.mark.parametrize("name", ["unet/unet", "unet/uvit"])
def test_a_fresh_denoiser_sees_neither_tokens_nor_neighbours(name):
    """Last convolutions and gates start at zero: a U-Net predicts zero, a U-ViT adds nothing but linear maps."""
    settings = UNET if name == "unet/unet" else UVIT
    made = build("decoder", name, settings, dim=5, spec=IMAGE).eval()
    zeros = [key for key, value in made.named_parameters() if "conv2.weight" in key or "gate.weight" in key]
    assert zeros and all(not made.get_parameter(key).any() for key in zeros)
    if name == "unet/unet":
        x = noise(2, 3, 16, 16)
        assert not made(x, torch.tensor([1.0, 2.0]), made.condition(noise(2, 4, 4, 5), size=(16, 16))).any()


@pytest.mark.parametrize(
    ("name", "more"),
    [
        pytest.param("unet/unet", {"dropout": 0.2}, marks=pytest.mark.slow),
        ("unet/uvit", {"dropout": 0.2, "drop_path": 0.3, "attn_dropout": 0.1, "long_skips": True}),
        pytest.param("unet/uvit", {"conditioning": "cross-attention"}, marks=pytest.mark.slow),
    ],
)
def test_checkpointing_changes_no_gradient(name, more):
    plain, saving = net(name, **more).train(), net(name, **more, checkpointing=True).train()
    z, x, t = noise(2, 4, 4, 5), noise(2, 3, 16, 16), torch.tensor([9.0, 99.0])
    found = []
    for one in (plain, saving):
        torch.manual_seed(0)
        out = one(x, t, one.condition(z, size=(16, 16)))
        out.square().sum().backward()
        found.append((out, {key: value.grad for key, value in one.named_parameters()}))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.slow
def test_a_network_in_bf16_stays_in_bf16():
    for name, more in (
        ("unet/unet", {}),
        ("unet/uvit", {"conditioning": "cross-attention", "resolution_cond": True}),
    ):
        made = net(name, **more)
        z, x, t = noise(2, 4, 4, 5), noise(2, 3, 16, 16), torch.tensor([9.0, 99.0])
        exact = made(x, t, made.condition(z, size=(16, 16)))
        made.bfloat16()
        rough = made(x, t, made.condition(z, size=(16, 16)))
        assert rough.dtype == torch.bfloat16
        assert 0 < (rough - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize(
    ("name", "settings", "millions"),
    [
        ("unet", {}, 196.35),
        ("uvit", {"size": "b"}, 127.54),
        *(pytest.param("uvit", *size, marks=pytest.mark.slow) for size in MORE_SIZES),
    ],
)
def test_networks_are_as_large_as_4ms(name, settings, millions):
    """4M counts the fixed positions, too."""
    cls = {"unet": UNet, "uvit": UViT}[name]
    with torch.device("meta"):
        made = cls(cls.Config(**settings), dim=32, spec=DataSpec(channels=3, size=(224, 224)))
    count = sum(tensor.numel() for tensor in (*made.parameters(), *made.buffers()))
    assert count / 1e6 == pytest.approx(millions, abs=0.006)


def test_vqgans_pair_is_as_large_as_the_papers():
    """f16 at 256 px: the encoder without the paper's last convolution to 256 channels, 29.3 million with it."""
    with torch.device("meta"):
        spec = DataSpec(channels=3, size=(256, 256))
        encoder = CNNEncoder(CNNEncoder.Config(), spec=spec)
        decoder = CNNDecoder(CNNDecoder.Config(), dim=256, spec=spec)
    assert encoder.dim == 512 and encoder.grid((256, 256)) == (16, 16)
    sizes = [
        sum(parameter.numel() for parameter in module.parameters()) / 1e6 for module in (encoder, decoder)
    ]
    assert sizes == pytest.approx([29.30 - (512 * 9 + 1) * 256 / 1e6, 42.45], abs=0.01)


@torch.no_grad()
def test_the_kernel_of_attention_is_a_setting(xformers):
    """With tokens hidden as well: 16 keys of the grid, some of them, or all."""
    z, x, t = noise(2, 4, 4, 5), noise(2, 3, 32, 16), torch.tensor([3.0, 700.0])
    hidden = torch.stack([noise(4, 4) > 0, torch.ones(4, 4, dtype=torch.bool)])
    found = {}
    for kernel in ("sdpa", "math", "xformers", "auto"):
        xformers.calls.clear()
        made = net("unet/uvit", conditioning="cross-attention", attention=kernel)
        found[kernel] = made(x, t, made.condition(z, size=(32, 16), mask=hidden))
        torch.testing.assert_close(found[kernel], found["sdpa"], atol=1e-5, rtol=1e-4)
        assert bool(xformers.calls) == (kernel in ("xformers", "auto"))


def excerpts():
    page = (Path(__file__).parents[3] / "docs/diffusion.md").read_text(encoding="utf-8")
    ours = page.partition("## Networks and schedulers")[2]
    return [yaml.safe_load(text.partition("```")[0]) for text in ours.split("```yaml\n")[1:]]


def test_the_pair_of_the_page_fits_together():
    (tree,) = excerpts()
    sides = tree["model"]["encoder"], tree["model"]["decoder"]
    encoder, decoder = ({name: value for name, value in side.items() if name != "name"} for side in sides)
    spec = DataSpec(channels=3, size=(16, 16))
    with torch.no_grad():
        z = build("encoder", "unet/cnn-encoder", encoder, spec=spec)(noise(2, 3, 16, 16))
        x_hat = build("decoder", "unet/cnn-decoder", decoder, dim=256, spec=spec)(z)
    assert z.shape == (2, 4, 4, 256) and x_hat.shape == (2, 3, 16, 16)
