"""The page about a store of codes: a map or a curve for each codebook, nothing from outside, all texts escaped."""

import numpy as np
import pytest
from test_track_report import Page
from vqcore_track import page, tokens

from vqcore.artefacts.stored import store_named
from vqcore.cli import main
from vqcore.protocols import Coded
from vqcore.tokens.shards import Shards
from vqcore.tokens.stats import stats


def stored(folder, codes, size, **more):
    """A store with these codes `(n, *grid, q)`."""
    manifest = {
        "format": 1, "fingerprint": "abc", "grid": list(codes.shape[1:-1]), "size": [8] * (codes.ndim - 2),
        "num_codebooks": codes.shape[-1], "codebook_size": size, "dtype": "uint8", "store": "arrow", **more,
    }  # fmt: skip
    shards = Shards(folder, store_named("arrow", ""), manifest, 1)
    shards.write(
        "shard-00000", [Coded(str(n), row) for n, row in enumerate(codes)], {"of": 9, "failed": [["a", "b"]]}
    )
    shards.finish()
    return folder


def test_a_grid_of_two_axes_has_maps(tmp_path):
    codes = np.random.default_rng(0).integers(16, size=(50, 4, 6, 2), dtype=np.uint8)
    codes[:, 0, 0] = 7
    folder = stored(tmp_path / "tok", codes, 16, tokenizer="<b>mine</b>")
    assert main(["tokens", "stats", str(folder), "--html", str(tmp_path / "up/page.html")]) == 0
    text = (tmp_path / "up/page.html").read_text()
    found = Page(text)
    assert found.headings[:1] == ["tok"] and "<b>mine" not in text and "<b>mine</b>" in found.said
    assert all(link.startswith("data:") for link in found.links)
    maps = [each["alt"] for each in found.pictures if each["alt"]]
    assert len(maps) == 2 and maps[0].startswith("Perplexity by position, codebook 1, from 1 to ")
    assert "50 rows have 2,400 codes" in " ".join(found.said.split())
    for label in ("codebook 1", "codebook 2"):
        assert label in found.headings
    assert "1 files could not be read" in found.said


@pytest.mark.parametrize("shape", [(20, 5, 1), (20, 2, 2, 3, 1)])
def test_other_grids_have_curves(tmp_path, shape):
    codes = np.random.default_rng(0).integers(4, size=shape, dtype=np.uint8)
    use = stats(stored(tmp_path / "tok", codes, 4))
    (chart,) = tokens._places(use, use.manifest["grid"])["charts"]
    assert chart.across == "position" and len(chart.curves[0].places) == int(np.prod(shape[1:]))
    assert f"codes, position 2: {use.places[0, 2]:.5g}" in Page(tokens.render(use, "x")).said


def test_a_store_that_is_too_large_for_positions(tmp_path, monkeypatch):
    monkeypatch.setattr("vqcore.tokens.stats.MOST_CODES", 5)
    use = stats(stored(tmp_path / "tok", np.zeros((3, 2, 1), np.uint8), 4))
    assert "too large to count its codes at every position" in Page(tokens.render(use, "x")).said


def test_frequent_codes_have_wider_bars():
    counts = [0, 1, *range(10_000, 20_000, 1000)]
    assert page._octaves(counts) == [
        ("0", 1), ("1-3", 1), ("4-15", 0), ("16-63", 0), ("64-255", 0), ("256+", 0), ("1024+", 0), ("4096+", 7),
        ("16k+", 3),
    ]  # fmt: skip
    assert page._octaves([3 * 10**6] * 4)[-1] == ("1M+", 4)
