"""The manifest, valid and invalid settings, and the laws of every encoder and decoder."""

from typing import ClassVar

import pytest
import torch
import yaml
from vqcore_vit.vit import ViTDecoder, ViTEncoder

from vqcore.compose.build import from_tree
from vqcore.compose.describe import dump
from vqcore.errors import ConfigError
from vqcore.protocols import DataSpec
from vqcore.registry import registry
from vqcore.schema import TokenizerConfig
from vqcore.testing.conformance import DecoderConformance, EncoderConformance
from vqcore.tokenizer import Tokenizer

TINY = {"width": 16, "depth": 2, "num_heads": 2}
IMAGE = DataSpec(channels=3, size=(16, 24))


class TestEncoder(EncoderConformance):
    component = "vit/encoder"
    spec = IMAGE
    configs: ClassVar = (
        {**TINY, "patch_size": 8},
        {**TINY, "patch_size": [4, 8], "post_mlp": True, "grid_convs": 1, "dropout": 0.1, "drop_path": 0.1},
        {**TINY, "patch_proj": False, "input_size_enc": [4, 6]},
    )


class TestDecoder(DecoderConformance):
    component = "vit/decoder"
    spec = IMAGE
    grid = (2, 3)
    configs: ClassVar = (
        {**TINY, "patch_size": 8},
        {**TINY, "patch_size": 8, "out_conv": "convnext", "post_mlp": True, "input_size_dec": 32},
        {**TINY, "patch_size": 8, "out_conv": "conv", "grid_convs": 1, "dropout": 0.1, "drop_path": 0.1},
    )


class TestSequenceEncoder(EncoderConformance):
    component = "vit/encoder"
    spec = DataSpec(channels=2, size=(32,))
    configs: ClassVar = ({**TINY, "patch_size": 4, "grid_convs": 1}, {**TINY, "patch_size": [8]})


class TestVolumeDecoder(DecoderConformance):
    component = "vit/decoder"
    spec = DataSpec(channels=2, size=(4, 8, 8))
    grid = (2, 2, 2)
    configs: ClassVar = ({**TINY, "patch_size": [2, 4, 4], "out_conv": "conv", "grid_convs": 1},)


@pytest.mark.parametrize(
    ("kind", "node"),
    [
        ("encoder", {"size": "b", "patch_size": 16, "input_size_enc": 224}),
        ("encoder", {"size": "s", "depth": 3, "patch_size": [2, 4], "input_size_enc": [32, 64]}),
        ("encoder", {**TINY, "patch_proj": False}),
        ("decoder", {**TINY, "out_conv": "conv", "out_conv_channels": 4, "input_size_dec": None}),
    ],
)
def test_configs_load_and_load_again(kind, node):
    schema = registry().load(kind, f"vit/{kind}").Config
    cfg = from_tree({"name": f"vit/{kind}", **node}, schema=schema)
    assert from_tree(yaml.safe_load(dump(cfg)), schema=schema) == cfg


def test_one_size_of_positions_has_one_fingerprint():
    """Whether the nominal size says it, or one number, or two; positions of another grid are another tokenizer."""
    pytest.importorskip("vqcore_quant")
    found = []
    for size in (None, 16, [16, 16], 32):
        node = {"name": "vit/encoder", **TINY, "patch_size": 8, "input_size_enc": size}
        tree = {
            "modality": {"name": "rgb"},
            "size": [16, 16],
            "model": {
                "encoder": node,
                "quantizer": {"name": "quant/fsq", "levels": [4]},
                "decoder": {"name": "vit/decoder", **TINY, "patch_size": 8},
            },
            "objective": {"name": "reconstruction"},
        }
        torch.manual_seed(0)
        found.append(Tokenizer(from_tree(tree, schema=TokenizerConfig)).fingerprint)
    assert len(set(found[:3])) == 1 and found[3] != found[0]


def test_numbers_beside_a_preset_win():
    assert ViTEncoder.Config(size="b").shape == (768, 12, 12)
    assert ViTEncoder.Config(size="l", depth=3).shape == (1024, 3, 16)
    assert ViTDecoder.Config(size="s", width=96, num_heads=4).shape == (96, 8, 4)


@pytest.mark.parametrize("cls", [ViTEncoder, ViTDecoder])
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "width, depth, num_heads missing: give size"),
        ({"width": 32, "num_heads": 4}, "^depth missing"),
        ({"size": "s", "width": 0}, "width=0"),
        ({"size": "s", "depth": -1}, "depth=-1"),
        ({"size": "s", "patch_size": (4, 0)}, r"patch_size=\(4, 0\)"),
        ({"width": 30, "depth": 1, "num_heads": 4}, "width=30 .* num_heads=4"),
        ({"size": "s", "mlp_ratio": 0.0}, "mlp_ratio=0.0 .* width=512"),
        ({"size": "s", "dropout": 1.0}, "dropout=1.0"),
        ({"size": "s", "drop_path": -0.1}, "drop_path=-0.1"),
    ],
)
def test_bad_settings_are_refused(cls, settings, text):
    with pytest.raises(ValueError, match=text):
        cls.Config(**settings)


def test_out_conv_is_one_of_three_and_has_channels():
    with pytest.raises(ConfigError, match="out_conv"):
        from_tree({"name": "vit/decoder", **TINY, "out_conv": "cnov"}, schema=ViTDecoder.Config)
    with pytest.raises(ValueError, match="out_conv_channels=0"):
        ViTDecoder.Config(**TINY, out_conv="conv", out_conv_channels=0)


def test_sizes_that_patches_do_not_fill_are_refused():
    encoder = ViTEncoder(ViTEncoder.Config(**TINY, patch_size=8), spec=IMAGE)
    refused = r"size \[16, 20\] is no multiple of patch_size \[8, 8\]"
    with pytest.raises(ValueError, match=refused):
        encoder.grid((16, 20))
    with pytest.raises(ValueError, match=refused):
        encoder(torch.zeros(1, 3, 16, 20))
    with pytest.raises(ValueError, match=r"1 axes, .* has 2"):
        encoder.grid((16,))
    with pytest.raises(ValueError, match=r"\[15, 15\] is no multiple of patch_size \[8, 8\]"):
        ViTDecoder(ViTDecoder.Config(**TINY, patch_size=8, input_size_dec=15), dim=4, spec=IMAGE)


def test_patches_and_positions_have_the_rank_of_the_data():
    with pytest.raises(ValueError, match="3 axes, the data has 2"):
        ViTEncoder(ViTEncoder.Config(**TINY, patch_size=(8, 8, 8)), spec=IMAGE)
    with pytest.raises(ValueError, match="width=4 is below 6"):
        ViTEncoder(
            ViTEncoder.Config(width=4, depth=1, num_heads=1, patch_size=2),
            spec=DataSpec(channels=1, size=(4, 4, 4)),
        )
