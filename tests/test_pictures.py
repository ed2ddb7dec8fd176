"""Pictures for people: error maps, token maps, and colours that mean the same in an original and a reconstruction."""

import numpy as np
import pytest
import torch
from PIL import Image
from vqcore_vision.depth import Depth

from vqcore import pictures
from vqcore.protocols import Batch


def test_errors_are_absolute_differences():
    x, x_hat = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    x_hat[0, 1, 2], x_hat[1, 1, 2] = 1.0, -0.5
    each = pictures.errors(x_hat, x)
    assert each.shape == (1, 3, 4) and float(each[0, 1, 2]) == 0.75 and float(each.sum()) == 0.75
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2] = False
    assert float(pictures.errors(x_hat, x, mask).sum()) == 0
    classes = torch.tensor([[0, 1], [1, 2]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1], [0, 2]]), 3).permute(2, 0, 1).float()
    assert pictures.errors(logits, classes).tolist() == [[[0.0, 0.0], [1.0, 0.0]]]


def test_error_pictures_run_from_dark_to_light():
    image = (
        np.asarray(pictures.error_picture(torch.linspace(0, 2, 9).reshape(1, 1, 9), 1.0)).astype(int).sum(-1)
    )
    assert image.shape == (1, 9) and (np.diff(image[0, :5]) > 0).all() and (image[0, 5:] == image[0, 4]).all()


def test_original_and_rebuilt_have_one_scale():
    x = torch.linspace(0, 10, 16).reshape(1, 4, 4)
    half = pictures.array_picture(np.empty(0), x / 2, x)
    assert (
        np.asarray(half).max() == 128 and np.asarray(pictures.array_picture(np.empty(0), x, x)).max() == 255
    )
    assert isinstance(half, Image.Image) and half.mode == "RGB"


@pytest.mark.parametrize(
    "grid, size", [((16,), (16, 4)), ((3,), (3, 1)), ((4, 6), (6, 4)), ((2, 4, 6), (24, 2))]
)
def test_a_token_map_is_large_enough_to_see(grid, size):
    latents = torch.randn(2, *grid, 5)
    maps = pictures.token_maps(latents)
    assert [each.size for each in maps] == [size, size]
    if len(grid) == 1:
        rows = np.asarray(maps[0])
        assert (rows == rows[:1]).all() and len(np.unique(rows[0], axis=0)) == len(rows[0])


def test_positions_that_do_not_count_are_grey():
    modality = Depth(Depth.Config(scaling="linear", range=(0.0, 10.0)), size=4)
    raw = modality.read(np.array([[0.0, 5.0], [10.0, 5.0]], np.float32))
    view = modality.view((2, 2), (2, 2), None)
    batch = Batch(modality.tensor(raw, view)[None], ("a",), mask=modality.mask(raw, view)[None])
    (shown,) = pictures.originals(modality, batch)
    (bare,) = pictures.originals(modality, Batch(batch.x, ("a",)))
    shown, bare = np.asarray(shown), np.asarray(bare)
    assert shown[0, 0].tolist() == [128, 128, 128] and (bare[0, 0] == bare[0, 1]).all()
    assert np.array_equal(shown[1], bare[1]) and np.array_equal(shown[0, 1], bare[0, 1])
    vector = pictures.picture(modality, batch.x[0], mask=torch.zeros(7, dtype=torch.bool))
    assert np.array_equal(np.asarray(vector), bare)
