"""Features that a teacher makes of pictures: laws, the teacher's own numbers, bad input."""

import copy
import pickle

import numpy as np
import pytest
import torch
from vqcore_vision.features import Features
from vqcore_vision.vector import Vector

from vqcore.errors import ConfigError, VqcoreError
from vqcore.protocols import DataSpec, View, finish, finishes
from vqcore.testing.conformance import ModalityConformance, build

pytest.importorskip("timm")
pytest.importorskip("vqcore_percept")

NET = {"name": "percept/timm", "model": "test_vit", "resize": False}
MAP = {"teacher": NET, "channels": 64, "stride": 16}
WHOLE = {"teacher": {**NET, "output": "global"}, "channels": 64, "stride": 32}

SHOWN = {"round-trip": "it reads pictures and shows features"}


def picture(height=50, width=70):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


class TestMapsOfPictures(ModalityConformance):
    component = "vision/features"
    configs = (MAP, {**MAP, "hflip": 0.5, "min_crop_scale": 0.5, "norm": 1.0, "mean": 0.1, "std": 0.5})
    size = (2, 3)
    waived = SHOWN

    def source(self):
        return picture()


class TestVectorsOfPictures(ModalityConformance):
    component = "vision/vector"
    configs = (WHOLE,)
    waived = SHOWN

    def source(self):
        return picture()


def sample(modality, size):
    raw = modality.read(picture())
    return modality.tensor(raw, modality.view(modality.extent(raw), size, None))


def test_a_map_is_what_the_teacher_makes_of_the_rgb_sample():
    scaled = build("modality", "vision/features", {**MAP, "norm": 2.0, "mean": 0.5, "std": 0.25}, size=(2, 3))
    rgb = build("modality", "rgb", {}, size=(32, 48))
    x = sample(rgb, (32, 48))
    assert torch.equal(sample(scaled, (2, 3)), x) and scaled.spec.size == (2, 3)
    with torch.no_grad():
        wanted = scaled.teacher(x[None])
    wanted = (wanted / wanted.norm(dim=1, keepdim=True) * 2 - 0.5) / 0.25
    assert torch.allclose(finish(scaled, x[None]), wanted, atol=1e-5)
    assert scaled.values(wanted)[0].norm(dim=0).flatten().tolist() == pytest.approx([2.0] * 6, rel=1e-5)


def test_a_vector_is_the_teachers_and_files_of_features_need_no_teacher():
    vector = build("modality", "vision/vector", WHOLE, size=None)
    x = sample(vector, (1,))
    assert x.shape == (3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(finish(vector, x[None])[..., 0], vector.teacher(x[None]), atol=1e-6)
    for plain in (
        Vector(Vector.Config(channels=3), size=None),
        Features(Features.Config(channels=3), size=4),
    ):
        assert not finishes(plain) and ".npy" in plain.suffixes


def test_copies_keep_their_teacher():
    modality = build("modality", "vision/features", MAP, size=(2, 2))
    x = sample(modality, (2, 2))[None]
    for other in (copy.deepcopy(modality), pickle.loads(pickle.dumps(modality))):
        assert torch.equal(finish(other, x), finish(modality, x))


def test_beside_a_picture_a_map_follows_its_crop():
    modality = build("modality", "vision/features", MAP, size=(2, 2))
    view = View(start=(0.0, 0.25), stop=(1.0, 0.75), size=(32, 48), extent=(50, 70))
    found = modality.ride(view, DataSpec(channels=3, size=(32, 48)))
    assert found.size == (2, 3) and modality.tensor(modality.read(picture()), found).shape == (3, 32, 48)


BAD = [
    ("features", {**MAP, "channels": 512}, 2, "gives 64 channels, not 512: set channels=64"),
    (
        "features",
        {**MAP, "stride": None},
        2,
        "stride=null: say how many pixels|stride: null: say how many pixels",
    ),
    ("features", {**MAP, "stride": 8}, 4, "maps of 2 x 2 of pictures of 32 x 32 pixels, but with stride=8"),
    (
        "features",
        {**MAP, "teacher": {**NET, "resize": True}},
        2,
        "maps of 10 x 10 .* set teacher.resize=false",
    ),
    ("features", {**MAP, "teacher": WHOLE["teacher"]}, 2, "one vector a picture: set teacher.output=patches"),
    ("features", {**MAP, "layout": "hwc"}, 2, "does nothing with a teacher"),
    (
        "features",
        {**MAP, "teacher": {**NET, "model": "test_vti"}},
        2,
        "no model 'test_vti'; the nearest name",
    ),
    ("vector", {**WHOLE, "teacher": NET}, None, "gives maps: set teacher.output=global"),
    ("vector", {"channels": 3, "stride": 4}, None, "does nothing with teacher=null"),
]


@pytest.mark.parametrize(("name", "settings", "size", "says"), BAD)
def test_what_does_not_fit_is_one_line(name, settings, size, says):
    with pytest.raises(VqcoreError, match=says):
        build("modality", f"vision/{name}", settings, size=size)


def test_another_size_than_the_teacher_takes_is_one_line():
    fixed = {**MAP, "teacher": {**NET, "resize": True}}
    modality = build("modality", "vision/features", fixed, size=(10, 10))
    assert finish(modality, sample(modality, (10, 10))[None]).shape == (1, 64, 10, 10)
    with pytest.raises(ConfigError, match=r"set teacher\.resize=false"):
        finish(modality, sample(modality, (2, 2))[None])
