"""docs/from-terramind.md: the suite makes its files and runs its commands, on small networks in published files."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from test_contracts_page import FENCE, NAME, Section, follow
from vqcore_fourm.names import to_theirs
from vqcore_terramind import held, tables

from vqcore.borrowed import weights_of
from vqcore.compose.build import from_tree
from vqcore.registry import registry
from vqcore.schema import TokenizerConfig
from vqcore.tokenizer import Tokenizer
from vqcore.tokens import TokenDataset

tifffile = pytest.importorskip("tifffile")
PAGE = Path(__file__).parents[3] / "docs/from-terramind.md"
MICRO = {"width": 32, "mult": [1, 2], "depth": 0, "attention": [2]}


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder with a published file of small networks, scenes in GeoTIFFs, and arrays of two channels."""
    monkeypatch.chdir(tmp_path)
    row = tables.VARIANTS["v1-DEM"]
    row = dataclasses.replace(
        row, transformer={"width": 32, "depth": 1, "num_heads": 2}, denoiser={**tables.DENOISER, **MICRO}
    )
    monkeypatch.setitem(tables.VARIANTS, row.name, row)
    monkeypatch.setattr(held, "SHAPES", {*held.SHAPES, (32, 1, 2)})
    monkeypatch.setattr(held, "DENOISERS", [*held.DENOISERS, MICRO])
    tree = {
        "modality": row.modality(),
        "size": [256, 256],
        "model": row.model(),
        "objective": row.objective(),
    }
    made = Tokenizer(from_tree(tree, schema=TokenizerConfig))
    torch.save(to_theirs(weights_of(made), made.cfg), row.file)
    rng = np.random.default_rng(0)
    Path("scenes").mkdir()
    for number in range(2):
        rough = rng.integers(0, 3000, (7, 7)).astype(np.int16)
        tifffile.imwrite(f"scenes/{number}.tif", np.kron(rough, np.ones((32, 32), np.int16)))
    Path("soil").mkdir()
    for number in range(16):
        np.save(f"soil/{number:02}.npy", rng.normal(size=(2, 64, 64)).astype(np.float32))
    registry.cache_clear()
    yield
    registry.cache_clear()


@pytest.mark.slow
def test_the_page_does_what_it_says(published, capfd):
    blocks = [
        (language, text)
        for language, text in FENCE.findall(PAGE.read_text())
        if language == "console" or NAME.match(text)
    ]
    assert [language for language, _ in blocks].count("console") == 7
    follow(Section("from-terramind", blocks), capfd)
    assert np.load("rebuilt/0.npy").shape == (224, 224)
    assert sorted(path.name for path in Path("for-terratorch").iterdir()) == [
        "TerraMind_Tokenizer_DEM.pt",
        "vqcore.json",
    ]
    assert TokenDataset("tokens")[0].shape == (14, 14, 1)


def test_the_page_names_every_tokenizer():
    text = PAGE.read_text()
    for row in tables.VARIANTS.values():
        assert row.name.partition("-")[2] in text
    assert "AION" in text and "docs/from-terramind.md" in tables.AION
