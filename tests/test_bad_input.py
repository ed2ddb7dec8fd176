"""All kinds of bad input in one table: the error message is one line with the place and both numbers."""

from pathlib import Path

import numpy as np
import pytest
from toys import tokenizer_of

from vqcore.compose.layers import load
from vqcore.errors import VqcoreError
from vqcore.schema import RunConfig

pytest.importorskip("vqcore_vit")
pytest.importorskip("vqcore_quant")
SMOKE = Path(__file__).resolve().parent.parent / "cfgs" / "smoke"
BAD = {
    "too many channels of an array": ("volume", (), np.zeros((2, 16, 16, 16), np.uint8), r"2 channels .*1"),
    "too few channels of features": (
        "features",
        (),
        np.zeros((11, 8, 8), np.float32),
        r"has 11 channels .*data\.modality\.channels is 12",
    ),
    "two channels of depth": (
        "depth",
        (),
        np.ones((2, 64, 64), np.float32),
        r"shape \(2, 64, 64\).*one channel",
    ),
    "three channels of classes": ("semseg", (), np.zeros((64, 64, 3), np.uint8), r"shape \(64, 64, 3\)"),
    "a class id at num_labels": (
        "semseg",
        (),
        np.full((64, 64), 8, np.uint8),
        r"id 8 at \[0, 0\].*num_labels=8",
    ),
    "a class id above num_labels": ("semseg", (), np.full((64, 64), 200, np.uint8), r"id 200 at \[0, 0\]"),
    "a size that patches do not fill": (
        "semseg",
        ("data.input_size=66",),
        np.zeros((66, 66), np.uint8),
        r"66, 66\] is no multiple of patch_size \[8, 8\]",
    ),
    "NaN in an array": (
        "array",
        (),
        np.where(np.eye(28), np.nan, 0).astype(np.float32),
        r"nan at \[0, 0\] \(channel first\) is not finite",
    ),
    "NaN in features": ("features", (), np.full((12, 8, 8), np.nan, np.float32), r"\[0, 0, 0\] is nan"),
    "NaN in a vector": ("vector", (), np.full(3, np.nan, np.float32), r"nan"),
    "unit vectors that are not": (
        "normal",
        (),
        np.full((3, 64, 64), 0.5, np.float32),
        r"length 0\.866, not 1",
    ),
    "nothing but holes in depth": (
        "depth",
        (),
        np.zeros((64, 64), np.uint16),
        r"has no valid value; 0, NaN",
    ),
    "nothing but holes in normals": (
        "normal",
        (),
        np.zeros((3, 64, 64), np.float32),
        r"has no valid value",
    ),
    "nothing but the ignored label": (
        "semseg",
        ("data.modality.ignore_label=255",),
        np.full((64, 64), 255, np.uint8),
        r"has no valid value; every id is data\.modality\.ignore_label=255",
    ),
    "no instance": ("instance", (), np.zeros((64, 64), np.uint8), r"has no instance"),
}


@pytest.mark.parametrize(("recipe", "overrides", "array", "says"), BAD.values(), ids=list(BAD))
def test_bad_input_is_named(recipe, overrides, array, says):
    config = load(str(SMOKE / f"{recipe}.yaml"), list(overrides), schema=RunConfig).config
    with pytest.raises((VqcoreError, ValueError), match=says) as caught:
        tokenizer = tokenizer_of(config)
        tokenizer.encode(tokenizer.read(array))
    assert "\n" not in str(caught.value)
