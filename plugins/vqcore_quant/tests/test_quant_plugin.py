"""The manifest imports nothing heavy, its names resolve, and configs load in the form that users write."""

import subprocess
import sys

import pytest
import yaml

from vqcore.compose.build import from_tree
from vqcore.compose.describe import dump, settings
from vqcore.errors import ConfigError
from vqcore.registry import registry
from vqcore.testing.checks import check_plugin

SHORT = ("vq", "fsq", "lfq", "bsq", "memcodes", "simvq", "ibq", "residual", "product", "vqp")
NAMES = [f"quant/{name}" for name in SHORT]


def test_the_manifest_names_them_all():
    assert [found.name for found in registry().components("quantizer") if found.origin.id == "quant"] == NAMES


def test_all_of_the_plugin_checks_out():
    assert check_plugin(registry(), "quant") == []


def load(**node):
    return from_tree(node, schema=registry().load("quantizer", node["name"]).Config)


def test_the_manifest_imports_neither_torch_nor_its_targets():
    heavy = "'torch', 'numpy', 'omegaconf', 'vector_quantize_pytorch', 'vqcore_quant.vq', 'vqcore_quant.fsq'"
    code = f"import sys, vqcore_quant.plugin; print([m for m in ({heavy}) if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "node",
    [
        {"name": "quant/vq", "codebook_size": 16},
        {"name": "quant/vq", "codebook_size": 16, "dead_code": None, "coef_ema_dead_code": None},
        {"name": "quant/vq", "codebook_size": 16, "normalize": False, "dead_code": "linde_buzo_gray"},
        {"name": "quant/fsq", "levels": [8, 5]},
        {"name": "quant/fsq", "levels": "8-5"},
        {"name": "quant/lfq", "codebook_size": 16},
        {"name": "quant/bsq", "codebook_size": 16, "group_bits": 4},
        {"name": "quant/memcodes", "codebook_size": 16, "num_codebooks": 8},
        {"name": "quant/simvq", "codebook_size": 16},
        {"name": "quant/ibq", "codebook_size": 16},
        {"name": "quant/residual", "depth": 2, "quantizer": {"name": "quant/lfq", "codebook_size": 16}},
        {"name": "quant/product", "groups": 2, "quantizer": {"name": "quant/lfq", "codebook_size": 16}},
    ],
)
def test_configs_load_build_and_load_again(node):
    cfg = load(**node)
    built = registry().build("quantizer", cfg)
    assert built.codebook_size == (40 if "levels" in node else 16)
    assert load(**yaml.safe_load(dump(cfg))) == cfg


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match="codebook_size is required"):
        load(name="quant/vq")
    with pytest.raises(ConfigError, match="dead_code"):
        load(name="quant/vq", codebook_size=8, dead_code="burry")
    with pytest.raises(ConfigError, match="1 is not in"):
        load(name="quant/fsq", levels=[8, 1])


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_says_what_it_does(name):
    cls = registry().load("quantizer", name)
    listed = settings(cls.Config)
    assert listed
    assert all(setting.text for setting in listed if setting.name != "name")
    fields = {setting.name for setting in listed}
    assert set(getattr(cls.Config, "training_only", ())) <= fields
