"""The recipes load and have the published settings; their tokenizers work on real files."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import tokenizer_of

from vqcore.compose.layers import load
from vqcore.errors import ConfigError
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer

pytest.importorskip("vqcore_vit")
pytest.importorskip("vqcore_quant")
ROOT = Path(__file__).resolve().parent.parent
EARTH = ROOT / "data" / "earth" / "heldout"
TILE = "asia/himalaya_n39_e070"
BASE = ("rgb/base", "depth/base", "normal/base", "semseg/base", "edge/canny_base", "edge/sam_base")
SMOKE = ("rgb", "depth", "normal", "semseg", "edge", "array", "fashion")
SIZED = {"rgb", "depth", "normal", "semseg", "edge", "features", "vector"}
PUBLISHED = {
    "rgb/base": (1024, "mse", 50, 64),
    "depth/base": (8192, "smooth_l1", 20, 64),
    "normal/base": (8192, "mse", 20, 64),
    "semseg/base": (4096, "cross_entropy", 20, 80),
    "edge/canny_base": (8192, "smooth_l1", 50, 64),
    "edge/sam_base": (8192, "smooth_l1", 50, 64),
}
"""Codebook size, loss, epochs and batch size per process of 4M's published tokenizers."""


def recipe(name: str, *overrides: str) -> RunConfig:
    return load(str(ROOT / "cfgs" / f"{name}.yaml"), overrides, schema=RunConfig).config


def tokenizer(name: str, *overrides: str) -> Tokenizer:
    return tokenizer_of(recipe(name, *overrides))


@pytest.mark.parametrize("name", BASE)
def test_base_recipes_have_the_published_settings(name):
    config = recipe(f"vqvae/{name}")
    quantizer, optim = config.model.quantizer, config.optim
    loss = config.objective.loss or "mse"
    assert (quantizer.codebook_size, loss, config.run.epochs, config.data.batch_size) == PUBLISHED[name]
    assert (quantizer.latent_dim, quantizer.normalize, quantizer.decay) == (32, True, 0.99)
    assert (quantizer.commitment_weight, quantizer.coef_ema_dead_code) == (1.0, 32)
    assert (config.model.encoder.size, config.model.encoder.patch_size, config.model.encoder.post_mlp) == (
        "b",
        16,
        True,
    )
    assert (optim.base_lr, optim.betas, optim.weight_decay, optim.clip) == (
        5e-5 if name.startswith("edge") else 1e-4,
        (0.9, 0.99),
        0.05,
        1.0,
    )
    assert (config.run.precision, config.ema.decay, config.data.modality.min_crop_scale) == (
        "bf16",
        0.99,
        0.8,
    )
    assert (config.data.input_size, config.data.input_size_max) == (224, None)


@pytest.mark.parametrize("name", BASE)
def test_multi_resolution_recipes_continue_their_base(name):
    base, config = recipe(f"vqvae/{name}"), recipe(f"vqvae/{name.replace('base', 'multires')}")
    edges = name.startswith("edge")
    sizes = (config.data.input_size, config.data.input_size_min, config.data.input_size_max)
    assert sizes == (None, 224, 512 if edges else 448) and config.data.resolution_step == 16
    assert config.data.batch_size == (64 if edges else 10 if "semseg" in name else 16)
    assert (config.run.epochs, config.optim.base_lr, config.optim.warmup) == (
        1,
        1e-4 if "depth" in name else 5e-5,
        5000,
    )
    assert config.optim.warmup_epochs is None
    assert config.model.full_ckpt == base.run.dir != config.run.dir
    assert config.data.modality == base.data.modality and config.objective == base.objective
    assert config.model.quantizer == base.model.quantizer
    assert (config.model.encoder.input_size_enc, config.model.decoder.input_size_dec) == (224, 224)


@pytest.mark.parametrize("path", sorted((ROOT / "cfgs" / "vqvae").glob("*/*base.yaml")), ids=lambda p: p.stem)
def test_the_heads_of_recipes_count_their_parameters(path):
    said = re.search(r"^# (\d+) M parameters", path.read_text(), re.MULTILINE)
    assert said is not None
    with torch.device("meta"):
        state = tokenizer(str(path.relative_to(ROOT / "cfgs").with_suffix(""))).state_dict()
    assert abs(sum(value.numel() for value in state.values()) / 1e6 - int(said[1])) < 1


@pytest.mark.parametrize("name", ["dinov2-b14", "imagebind-h14"])
def test_vectors_of_pictures_of_several_sizes_continue_their_base(name):
    base, config = recipe(f"vqvae/vector/{name}_base"), recipe(f"vqvae/vector/{name}_multires")
    assert (config.run.epochs, config.data.batch_size, config.optim.base_lr) == (1, 16, 1e-4)
    assert (config.optim.warmup, config.optim.warmup_epochs) == (0, None)
    assert config.model.full_ckpt == base.run.dir != config.run.dir
    assert config.model.bare == base.model.bare and config.objective == base.objective
    assert (config.data.modality, config.data.input_size) == (base.data.modality, None)


def test_every_modality_has_a_base_recipe_and_where_something_has_a_size_one_for_several():
    folders = sorted(path for path in (ROOT / "cfgs" / "vqvae").iterdir() if path.is_dir())
    fixed = {"pose", "instance", "audio"}  # one size only, or no published recipe
    assert {path.name for path in folders} == SIZED | fixed
    for folder in folders:
        bases = {path.stem.removesuffix("base") for path in folder.glob("*base.yaml")}
        several = {path.stem.removesuffix("multires") for path in folder.glob("*multires.yaml")}
        assert bases and several == (bases if folder.name in SIZED else set()), folder


@pytest.mark.parametrize("name", SMOKE)
def test_smoke_recipes_take_twenty_steps_on_bundled_data(name):
    config = recipe(f"smoke/{name}")
    assert (
        config.run.steps == 20
        and (ROOT / config.data.path).exists()
        and (ROOT / config.data.eval_path).exists()
    )
    assert config.data.path != config.data.eval_path


def shown(tokenizer: Tokenizer, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The result of `read` and `show` for a file, and the file itself."""
    path = EARTH / name / f"{TILE}.png"
    return np.asarray(tokenizer.show(tokenizer.read(path, (192, 192)))), np.asarray(Image.open(path))


def test_show_undoes_read_in_the_units_of_the_files():
    found, file = shown(tokenizer("smoke/depth"), "depth")
    assert np.allclose(found, 10.0 * file, atol=0.01)
    found, file = shown(tokenizer("smoke/normal"), "normal")
    assert np.abs(found.astype(int) - file).max() <= 1
    found, file = shown(tokenizer("smoke/semseg"), "semseg")
    assert np.array_equal(found, file)
    found, file = shown(tokenizer("smoke/edge"), "edge")
    assert np.array_equal(found, file)


@pytest.mark.parametrize("name, side", [("semseg", 8), ("depth", 4)])
def test_a_tokenizer_makes_pictures_of_the_size_of_its_codes(name, side):
    made = tokenizer(f"smoke/{name}")
    x = made.read(EARTH / name / f"{TILE}.png")
    codes = made.encode(x)
    assert codes.shape == (1, 64 // side, 64 // side, 1)
    rebuilt = made.show(made.decode(codes))
    assert np.asarray(rebuilt).shape == (64, 64)
    assert math.isfinite(float(np.asarray(rebuilt).sum()))


@pytest.mark.parametrize("name, side", [("depth", 4), ("semseg", 8), ("edge", 4), ("rgb", 8)])
def test_a_size_that_is_no_multiple_of_the_patch_is_named(name, side):
    with pytest.raises((ConfigError, ValueError), match=rf"66.*{side}"):
        tokenizer(f"smoke/{name}", "data.input_size=66").grid()
    made = tokenizer(f"smoke/{name}")
    with pytest.raises(ValueError, match=rf"66.*{side}"):
        made.encode(made.read(next((EARTH / name).rglob("*.*g")), (66, 64)))
