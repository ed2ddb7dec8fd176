"""Mistakes of users, and the error message of one line for each mistake."""

import pytest
import torch
from vqcore_vit.mlp import MLPDecoder, MLPEncoder
from vqcore_vit.query import QueryDecoder, QueryEncoder
from vqcore_vit.vit import ViTDecoder, ViTEncoder

from vqcore.errors import ConfigError
from vqcore.protocols import DataSpec
from vqcore.registry import registry
from vqcore.testing.conformance import build

TINY = {"width": 16, "depth": 1, "num_heads": 2, "patch_size": 8}
IMAGE = DataSpec(channels=3, size=(16, 24))


def refused(error, build):
    with pytest.raises(error) as caught:
        build()
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("cls", "settings"), [(ViTEncoder, TINY), (QueryEncoder, TINY), (MLPEncoder, {"depth": 1, "width": 4})]
)
def test_channels(cls, settings):
    encoder = cls(cls.Config(**settings), spec=IMAGE)
    text = refused(ValueError, lambda: encoder(torch.zeros(1, 4, 16, 24)))
    assert text == "the input has 4 channels, but this encoder was built for 3"


@pytest.mark.parametrize(
    ("cls", "size", "text"),
    [
        (ViTEncoder, (16, 20), "size [16, 20] is no multiple of patch_size [8, 8]"),
        (ViTEncoder, (0, 16), "size [0, 16] is no multiple of patch_size [8, 8]"),
        (ViTEncoder, (16,), "size [16] has 1 axes, patch_size [8, 8] has 2"),
        (QueryEncoder, (16, 20), "size [16, 20] is no multiple of patch_size [8, 8]"),
        (MLPEncoder, (16,), "size [16] has 1 axes, the data has 2"),
    ],
)
def test_sizes(cls, size, text):
    settings = {"depth": 1, "width": 4} if cls is MLPEncoder else TINY
    encoder = cls(cls.Config(**settings), spec=IMAGE)
    assert refused(ValueError, lambda: encoder.grid(size)) == text


@pytest.mark.parametrize(
    ("cls", "settings", "text"),
    [
        (ViTEncoder, {"width": 30, "num_heads": 4}, "width=30 is not divisible by num_heads=4"),
        (ViTDecoder, {"width": 30, "num_heads": 4}, "width=30 is not divisible by num_heads=4"),
        (QueryEncoder, {"num_tokens": 0}, "num_tokens=0 is below 1"),
        (QueryDecoder, {"num_tokens": -3}, "num_tokens=-3 is below 1"),
        (
            ViTEncoder,
            {"attn_dropout": 1.0},
            "dropout=0.0, attn_dropout=1.0, drop_path=0.0: each probability must be in [0, 1)",
        ),
        (ViTEncoder, {"grid_convs": -1}, "grid_convs=-1 must be at least 0"),
        (
            QueryDecoder,
            {"out_conv_depth": -1},
            "out_conv_depth=-1 does nothing with out_conv=none; leave it out",
        ),
    ],
)
def test_transformers(cls, settings, text):
    assert refused(ValueError, lambda: cls.Config(**{**TINY, **settings})) == text


@pytest.mark.parametrize("cls", [MLPEncoder, MLPDecoder])
@pytest.mark.parametrize("name", ["depth", "width", "expansion"])
def test_mlps(cls, name):
    assert refused(ValueError, lambda: cls.Config(**{name: 0})) == f"{name}=0 must be at least 1"


@pytest.mark.parametrize(
    ("kind", "name", "settings", "texts"),
    [
        ("encoder", "vit/encoder", {**TINY, "patch_sise": 8}, ("patch_sise", "Did you mean 'patch_size'")),
        ("encoder", "vit/encoder", {**TINY, "attention": "flash"}, ("attention", "flash", "sdpa")),
        ("encoder", "vit/mlp-encoder", {"grid_convs": 2}, ("grid_convs", "not a setting of vit/mlp-encoder")),
        ("decoder", "vit/mlp-decoder", {"kind": "BottleneckMLP"}, ("kind", "bottleneck")),
        ("encoder", "vit/timm-encoder", {}, ("model",)),
        ("encoder", "vit/qeury-encoder", TINY, ("Did you mean 'vit/query-encoder'",)),
    ],
)
def test_names_and_types(kind, name, settings, texts):
    spec = {"dim": 4, "spec": IMAGE} if kind == "decoder" else {"spec": IMAGE}
    with pytest.raises(Exception) as caught:
        build(kind, name, settings, **spec)
    text = str(caught.value)
    assert "\n" not in text and all(part in text for part in texts), text


def test_a_constructors_refusal_names_the_key():
    cfg = ViTEncoder.Config(name="vit/encoder", **{**TINY, "patch_size": (8, 8, 8)})
    text = refused(ConfigError, lambda: registry().build("encoder", cfg, "model.encoder", spec=IMAGE))
    assert text == "model.encoder (vit/encoder): patch_size=[8, 8, 8] has 3 axes, the data has 2."
