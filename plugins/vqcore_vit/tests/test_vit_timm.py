"""timm's models as encoders: the features equal timm's, frozen or not, and the source of the weights."""

import json
import sys
from typing import ClassVar

import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file

from vqcore.errors import CheckpointError
from vqcore.protocols import DataSpec
from vqcore.testing.conformance import EncoderConformance

timm = pytest.importorskip("timm")

from vqcore_vit.timm_encoder import TimmEncoder  # noqa: E402
from vqcore_vit.vit import ViTEncoder  # noqa: E402

IMAGE = DataSpec(channels=3, size=(64, 96))
RANDOM = {"pretrained": False}


class TestTimmEncoder(EncoderConformance):
    component = "vit/timm-encoder"
    spec = IMAGE
    configs: ClassVar = (
        {"model": "test_vit", **RANDOM},
        {"model": "test_vit", **RANDOM, "frozen": True, "layer": 2, "checkpointing": True},
        {"model": "test_convnext", **RANDOM, "drop_path": 0.1},
        {"model": "test_resnet", **RANDOM, "normalize": False},
    )


def build(model, spec=IMAGE, **settings):
    torch.manual_seed(0)
    return TimmEncoder(TimmEncoder.Config(model=model, **{**RANDOM, **settings}), spec=spec)


def noise(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("size", [(64, 96), (128, 32)])
def test_features_are_timms_without_prefix_tokens(size):
    """The features equal timm's `forward_features` on images that the test normalizes."""
    encoder = build("test_vit2").eval()  # has class and register tokens
    x, prefix = noise(2, 3, *size), encoder.model.num_prefix_tokens
    assert prefix > 0
    mean, std = (torch.tensor(encoder.model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        tokens = encoder.model.forward_features(((x + 1) / 2 - mean) / std)[:, prefix:]
        expected = rearrange(tokens, "b (h w) d -> b h w d", h=size[0] // 16)
        assert torch.allclose(encoder(x), expected, atol=1e-5)


def test_our_transformer_is_timms():
    """The same weights in `vit/encoder`, with the common names: positions, attention, MLPs, activation."""
    torch.manual_seed(0)
    theirs = timm.create_model("test_vit", class_token=False, global_pool="avg", fc_norm=False, num_classes=0)
    assert theirs.patch_embed.img_size == (160, 160)
    shape = {"width": 64, "depth": 6, "num_heads": 2, "mlp_ratio": 3.0, "patch_size": 16}
    ours = ViTEncoder(ViTEncoder.Config(**shape), spec=DataSpec(channels=3, size=(160, 160)))
    state = {name.replace("patch_embed.", ""): value for name, value in theirs.state_dict().items()}
    state["pos_emb"] = rearrange(state.pop("pos_embed"), "1 (h w) d -> 1 d h w", h=10)
    ours.load_state_dict({name: value for name, value in state.items() if not name.startswith("norm.")})
    x = noise(2, 3, 160, 160)
    with torch.no_grad():
        expected = theirs.forward_features(x)
        assert torch.allclose(theirs.norm(ours(x).flatten(1, 2)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "stride", "dim"), [("test_vit", 16, 64), ("test_convnext", 32, 64), ("test_resnet", 32, 96)]
)
def test_grid_and_width(model, stride, dim):
    encoder = build(model).eval()
    for size in ((64, 96), (32, 128)):
        grid = (size[0] // stride, size[1] // stride)
        assert encoder.grid(size) == grid
        with torch.no_grad():
            assert encoder(noise(1, 3, *size)).shape == (1, *grid, dim == encoder.dim and dim)


@pytest.mark.parametrize(
    ("range_", "settings"), [((0.0, 255.0), {}), (None, {}), ((-1.0, 1.0), {"normalize": False})]
)
def test_what_the_model_sees(range_, settings):
    encoder = build("test_convnext", DataSpec(channels=3, size=(64, 64), range=range_), **settings)
    seen = []
    encoder.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    encoder.model.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    unit = (noise(1, 3, 64, 64) + 1) / 2
    x = unit if range_ is None else range_[0] + (range_[1] - range_[0]) * unit
    with torch.no_grad():
        encoder(x)
    expected = x
    if range_ and not settings:
        mean, std = (
            torch.tensor(encoder.model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std")
        )
        expected = (unit - mean) / std
    assert torch.allclose(seen[-1], expected, atol=1e-5)


def test_other_channels_than_three():
    encoder = build("test_vit", DataSpec(channels=1, size=(32, 32)))
    assert encoder.mean.numel() == 1
    assert encoder(noise(2, 1, 32, 32)).shape == (2, 2, 2, 64)


def test_earlier_layers_leave_the_later_ones_out():
    first, last = build("test_vit", layer=0), build("test_vit")
    assert len(first.model.blocks) == 1 < len(last.model.blocks)
    stages = build("test_resnet", layer=1)
    assert stages.stride == 4 and stages.grid((64, 96)) == (16, 24)


@pytest.mark.parametrize("model", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet"])
def test_every_parameter_is_trained(model):
    encoder = build(model)
    z = encoder(noise(2, 3, 64, 96))
    (z * noise(*z.shape)).sum().backward()
    without = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    assert not without


def test_frozen_stays_in_evaluation_mode_without_gradient():
    encoder = build(
        "test_resnet", frozen=True, drop_path=0.5
    )  # batch norm and stochastic depth would change the features
    state = {key: value.clone() for key, value in encoder.state_dict().items()}
    whole = torch.nn.ModuleList([encoder]).train()
    x = noise(4, 3, 64, 96).requires_grad_()
    z = encoder(x)
    assert torch.equal(z, encoder(x)) and not z.requires_grad
    assert whole.training and not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())
    loose = build("test_resnet").train()
    assert loose(x).requires_grad and loose.model.training


def test_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        encoder = build("test_vit", checkpointing=checkpointing)
        z = encoder(noise(2, 3, 64, 96))
        (z * noise(*z.shape)).sum().backward()
        grads.append([parameter.grad for parameter in encoder.parameters()])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*grads))


def test_bf16():
    encoder = build("test_vit").eval()
    x = noise(2, 3, 64, 96)
    with torch.no_grad():
        exact = encoder(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (encoder(x) - exact).abs().max() < 0.1 * exact.abs().max()
        rough = encoder.bfloat16()(x)
    assert rough.dtype == torch.bfloat16 and (rough - exact).abs().max() < 0.1 * exact.abs().max()


def test_weights_of_a_folder(tmp_path):
    """The source of `pretrained`: a folder in timm's own format, here with one small model."""
    theirs = timm.create_model("test_vit", num_classes=0)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    published = {
        "mean": [0.1, 0.2, 0.3],
        "std": [1, 1, 1],
        "input_size": [3, 160, 160],
        "fixed_input_size": True,
    }
    published |= {"first_conv": "patch_embed.proj", "classifier": "head"}
    config = {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": published}
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = build(f"local-dir:{tmp_path}", pretrained=True, layer=2, frozen=True)
    assert not torch.equal(encoder.model.cls_token, theirs.cls_token)
    state, training = torch.random.get_rng_state(), encoder.model.training
    encoder.fetch()
    assert torch.equal(torch.random.get_rng_state(), state) and encoder.model.training is training
    for name, value in encoder.model.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    assert encoder.mean.flatten().tolist() == pytest.approx([-0.8, -0.6, -0.4])
    with pytest.raises(ValueError, match="timm's local-dir:/nowhere cannot be read"):
        build("local-dir:/nowhere", pretrained=True)


@pytest.fixture
def asked(monkeypatch):
    """timm without a connection and with an empty cache; records the requests to timm."""
    create, names = timm.create_model, []

    def without_weights(name, pretrained=False, **settings):
        if pretrained:
            names.append(name)
            raise FileNotFoundError("cannot find the requested files in the local cache.\nMore.")
        return create(name, pretrained=False, **settings)

    monkeypatch.setattr(timm, "create_model", without_weights)
    return names


def test_weights_are_asked_for_by_fetch_alone(asked):
    encoder = build("test_vit", pretrained=True)
    x = noise(1, 3, 64, 96)
    encoder.load_state_dict(build("test_vit").state_dict())
    assert torch.equal(encoder.eval()(x), build("test_vit").eval()(x)) and not asked
    build("test_vit").fetch()
    assert not asked
    with pytest.raises(
        CheckpointError,
        match=r"test_vit cannot be loaded \(cannot find .* cache\). Add --download to fetch",
    ):
        encoder.fetch()
    assert asked == ["test_vit"]


def test_normalisation_is_no_weight():
    assert not {"mean", "std"} & set(build("test_vit").state_dict())


def test_weights_decide_tokens_not_where_they_came_from():
    settings = set(TimmEncoder.Config.training_only)
    assert {"pretrained", "frozen"} <= settings and not {"model", "layer", "normalize"} & settings


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"model": "vit_bsae_patch16_224"},
            "timm has no model 'vit_bsae_patch16_224'; the nearest name is 'vit_base",
        ),
        ({"model": "convnext_atto.opnai"}, "timm's convnext_atto has no weights 'opnai'; available: d2_in1k"),
        (
            {"model": "vit_base_patch16_18x2_224", "pretrained": True},
            "no weights for vit_base_patch16_18x2_224",
        ),
        ({"model": "test_vit", "layer": 12}, "layer=12: test_vit has 6 layers, 0 to 5"),
        ({"model": "test_vit", "drop_path": 1.5}, "drop_path=1.5"),
        (
            {"model": "dla46_c", "checkpointing": True},
            "checkpointing=true: timm's dla46_c does not support it",
        ),
    ],
)
def test_bad_settings_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        build(**settings)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match=r"size \[60, 96\] is no multiple of 16, the stride of test_vit"):
        build("test_vit", DataSpec(channels=3, size=(60, 96)))
    with pytest.raises(ValueError, match="timm's models take data with 2 axes, the data has 1"):
        build("test_vit", DataSpec(channels=3, size=(64,)))
    encoder = build("mixer_s32_224", DataSpec(channels=3, size=(64, 64)))  # accepts only the nominal size
    assert encoder(noise(1, 3, 64, 64)).shape == (1, 2, 2, 512)
    with pytest.raises(
        ValueError, match=r"mixer_s32_224 does not accept an input of size \[96, 64\]: Input height"
    ):
        encoder(noise(1, 3, 96, 64))
    with pytest.raises(ValueError, match="the input has 4 channels, but this encoder was built for 3"):
        encoder(noise(1, 4, 64, 64))


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="'timm' is not installed; run: pip install timm"):
        build("test_vit")
