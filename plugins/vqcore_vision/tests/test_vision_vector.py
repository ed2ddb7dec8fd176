"""Feature vectors: arrays of any shape with the right number of values, scaling, and losses of directions."""

import numpy as np
import pytest
import torch
from vqcore_vision.vector import Vector, barcode

from vqcore.errors import DataError
from vqcore.protocols import View
from vqcore.testing.conformance import ModalityConformance


def vector(size=None, **settings):
    return Vector(Vector.Config(**{"channels": 8, **settings}), size=size)


def numbers(seed=0):
    return np.random.default_rng(seed).normal(1.0, 2.0, 8).astype(np.float32)


def tensor(modality, source):
    return modality.tensor(modality.read(source), modality.view((1,), (1,), None))


class TestVector(ModalityConformance):
    component = "vision/vector"
    configs = ({"channels": 8}, {"channels": 8, "mean": 1.0, "std": [1, 2, 3, 4, 5, 6, 7, 8], "norm": 3.0})

    def source(self):
        return numbers()


@pytest.mark.parametrize("shape", [(8,), (1, 8), (8, 1), (8, 1, 1), (1, 8, 1, 1)])
def test_any_shape_of_as_many_numbers(tmp_path, shape):
    np.save(tmp_path / "v.npy", numbers().reshape(shape))
    found = tensor(vector(), tmp_path / "v.npy")
    assert found.shape == (8, 1) and np.array_equal(found[:, 0], numbers())
    assert np.array_equal(vector().show(found), numbers()) and np.array_equal(
        vector().show(found[None]), numbers()
    )


def test_mean_and_deviation_come_back():
    modality = vector(mean=tuple(float(v) for v in numbers(1)), std=2.0)
    found = tensor(modality, numbers())
    assert np.allclose(found[:, 0], (numbers() - numbers(1)) / 2, atol=1e-6)
    assert np.allclose(modality.show(found), numbers(), atol=1e-5)
    assert np.allclose(modality.values(found[None])[0, :, 0], numbers(), atol=1e-5)


def test_norm():
    found = tensor(vector(norm=1.0), numbers())
    assert np.allclose(found[:, 0], numbers() / np.linalg.norm(numbers()), atol=1e-6)


def test_the_loss_compares_directions():
    assert vector().spec.loss == "cosine" and vector().metrics[0] == "cosine" and vector().spec.size == (1,)


def test_as_an_extra_modality_it_stays_whole():
    view = View(start=(0.1, 0.2), stop=(0.6, 0.7), size=(64, 64), flip=True)
    modality = vector(size=(64, 64))
    assert np.array_equal(modality.tensor(modality.read(numbers()), view)[:, 0], numbers())


@pytest.mark.parametrize(
    "array, says",
    [
        (np.zeros(7), r"has 7 values .*data.modality.channels is 8"),
        (np.zeros((2, 8)), "has 16 values"),
        (np.full(8, np.nan), r"value at \[0\] is nan"),
        (np.array(["a"] * 8), "type <U1"),
    ],
)
def test_what_is_wrong_is_said(array, says):
    with pytest.raises(DataError, match=says):
        vector().read(array)


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="size 1, not 14"):
        vector(size=14)


def test_the_picture_tells_signs_apart():
    found = np.asarray(barcode(torch.tensor([3.0, -3.0, 0.0, 1.0, -1.0])))
    assert found.shape == (3, 3, 3)
    red, blue, white, pale, _ = found.reshape(9, 3)[:5].astype(int)
    assert red[0] == 255 and red[1] == red[2] < 150
    assert blue[2] == 255 and blue[0] == blue[1] < 150
    assert (white == 255).all() and red[1] < pale[1] < 255 and (found.reshape(9, 3)[5:] == 128).all()
