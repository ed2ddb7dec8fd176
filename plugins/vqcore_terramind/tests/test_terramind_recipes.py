"""The recipes for tokenizers like TerraMind's: they compose, and their tokens would be those of the published ones."""

import re
from pathlib import Path

import pytest
import torch
from toys import tokenizer_of
from vqcore_terramind import held, tables

from vqcore.borrowed import weights_of
from vqcore.compose.build import from_tree
from vqcore.compose.layers import load
from vqcore.config import deciding
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
