"""The recipes for tokenizers like TerraMind's: they compose, and their tokens would be those of the published ones."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import tokenizer_of
from vqcore_terramind import held, tables

from vqcore.borrowed import weights_of
from vqcore.cli import main
from vqcore.compose.build import from_tree
from vqcore.compose.layers import load
from vqcore.config import deciding, leaves, to_tree
from vqcore.errors import ConfigError
from vqcore.registry import registry
from vqcore.schema import RunConfig, TokenizerConfig

CFGS = Path(__file__).parents[3] / "cfgs/terramind"
RECIPES = {"dem": "v1-DEM", "s2l2a": "v1-S2L2A", "lulc": "v1-LULC"}


def test_these_are_all_recipes_and_they_compose():
    paths = {path.stem: path for path in CFGS.glob("*.yaml")}
    assert paths.keys() == RECIPES.keys()
    for path in paths.values():
        assert load(str(path), [], schema=RunConfig).config.model.quantizer.form == "sigmoid01"


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_a_tokenizer_like_the_published_one(name):
    path, row = CFGS / f"{name}.yaml", tables.variant_of(RECIPES[name])
    config = load(str(path), [], schema=RunConfig).config
    with torch.device("meta"):
        made = tokenizer_of(config)
    cfg = made.cfg
    tree = {
        "modality": row.modality(),
        "size": list(cfg.size),
        "model": row.model(),
        "objective": row.objective(),
    }
    published = from_tree(tree, schema=TokenizerConfig)
    for kind in ("encoder", "quantizer", "decoder"):
        here, there = (
            deciding(getattr(each.model, kind), kind, registry().identity) for each in (cfg, published)
        )
        assert here == there
    for kind in ("modality", "objective"):
        here, there = (deciding(getattr(each, kind), kind, registry().identity) for each in (cfg, published))
        assert here == there
    assert list(held.foreign_settings(cfg, made.spec)) == []
    count = sum(value.numel() for value in weights_of(made).values())
    said = re.search(r"^# (\d+) M parameters", path.read_text(), re.MULTILINE)
    assert said is not None and abs(count / 1e6 - int(said[1])) < 1
    assert config.data.batch_size * 8 * config.optim.accumulate == 2048
    assert config.optim.lr == (3.5e-5 if name == "lulc" else 1.41e-4)
    assert config.run.epochs == (100 if name == "s2l2a" else 20)
    assert (config.ema.decay, config.run.precision) == (
        (0.99, "bf16") if name == "lulc" else (0.9999, "fp16")
    )


def family(name):
    build = registry().load("format", "terramind/checkpoint")
    return build(build.Config(name="terramind/checkpoint")).like(name)


def settings(config):
    sections = (
        "data.batch",
        "data.input",
        "data.modality",
        "model",
        "objective",
        "optim",
        "ema",
        "run.e",
        "run.p",
    )
    found = {key: value for key, value in leaves(to_tree(config)) if key.startswith(sections)}
    # Positions have the nominal size by default, and mse and cross_entropy are the losses by default.
    left = ("model.encoder.input_size_enc", "model.decoder.input_size_dec", "objective.loss")
    return {key: value for key, value in found.items() if key not in left}


@pytest.mark.parametrize("name", RECIPES)
def test_a_family_is_the_recipe_without_its_data(name):
    tree = family(RECIPES[name]).tree
    data = {key: value for key, value in tree["data"].items() if key != "resolution_step"}
    tree = {**tree, "data": {"name": "folder", "path": "-", **data}, "run": {"dir": "-", **tree["run"]}}
    here = load(str(CFGS / f"{name}.yaml"), [], schema=RunConfig).config
    assert settings(from_tree(tree, schema=RunConfig)) == settings(here)


def test_families_have_short_names_and_those_of_the_weights():
    for row in tables.VARIANTS.values():
        made = family(row.name)
        assert (
            made.tree == family(row.full).tree
            and made.tree["data"]["modality"].items() >= row.modality().items()
        )
        assert any("version 0.1" in remark for remark in made.remarks) == row.name.startswith("v0.1")
    assert family("dem").tree == family("v1-DEM").tree
    s1 = family("S1GRD").tree
    assert (s1["data"]["batch_size"] * 8 * s1["optim"]["accumulate"], s1["optim"]["lr"]) == (384, 1e-4)
    with pytest.raises(ConfigError, match=r"S2 is no tokenizer of TerraMind\. Did you mean 'S2L2A'"):
        family("S2")


@pytest.mark.slow
def test_files_of_other_channels_join_a_family(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder, shape in (("bands", (5, 80, 70)), ("heights", (300, 280)), ("many", (12, 40, 40))):
        Path(folder).mkdir()
        for number in range(16):
            np.save(f"{folder}/{number}.npy", rng.normal(700, 50, shape).astype(np.float32))
    for number in range(16):
        Path("cover").mkdir(exist_ok=True)
        np.save(f"cover/{number}.npy", rng.integers(0, 6, (64, 64)).astype(np.uint8))

    def like(name, folder):
        assert main(["new", "config", "--like", f"terramind/{name}", folder]) == 0
        return load(f"{folder}.yaml", [], schema=RunConfig).config, Path(f"{folder}.yaml").read_text()

    made, text = like("S2L2A", "bands")
    assert (made.data.modality.channels, made.data.input_size, made.model.quantizer.form) == (
        5,
        64,
        "sigmoid01",
    )
    assert made.objective.scheduler.clip is None and "Not clipped" in text
    made, _ = like("DEM", "heights")
    assert (made.data.modality.channels, made.data.input_size) == (1, 256)
    assert abs(made.data.modality.scale.mean[0] - 700) < 5 and made.optim.accumulate == 4
    made, text = like("S2L2A", "many")
    assert "Those of the family have names: [B01, B02" in text and made.data.input_size == 32
    made, _ = like("LULC", "cover")
    assert (made.data.modality.labels, made.objective.loss, made.model.embed_dim) == (
        6,
        "cross_entropy",
        None,
    )
    capsys.readouterr()
    assert main(["new", "config", "--like", "terramind/LULC", "bands", "--out", "a.yaml"]) == 2
    assert "this family is for class maps, and these files hold quantities" in capsys.readouterr().err
