"""Toys and the fake xFormers of the core's tests, for the networks of this plugin."""

import json
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))

from toys import toy, xformers  # noqa: F401


@pytest.fixture(scope="module")
def tower():
    """A small model of open_clip, under a name of its own."""
    library = pytest.importorskip("open_clip")
    sizes = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    words = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ViT-Tiny-Test.json").write_text(
            json.dumps({"embed_dim": 24, "vision_cfg": sizes, "text_cfg": words})
        )
        library.add_model_config(folder)
    return {"model": "ViT-Tiny-Test", "weights": "random", "blocks": ["transformer.resblocks.0"]}
